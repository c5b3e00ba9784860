"""Models, adapters and ensembles from folders: every weight is the saved one, and what would be another is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import needs
from model_folders import assert_equal, drop_weight, edit, refusal, save, save_adapter, save_tokenizer
from torch import nn
from transformer_models import new_model

from trak_fast.lm.models.folders import Models, find_models

transformers = needs("transformers")
peft = needs("peft")
tokenizers = needs("tokenizers")

# peft asks transformers for it, while these tests build adapters
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("name", "task", "architecture"),
    [
        ("gpt2", "causal_lm", "GPT2LMHeadModel"),
        ("llama_tied", "causal_lm", "LlamaForCausalLM"),
        ("bert", "masked_lm", "BertForMaskedLM"),
        ("bert_classifier", "text_classification", "BertForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_weights_that_were_saved(
    name: str, task: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = save(name, tmp_path, dtype)
    models = find_models([tmp_path])
    assert (models.task, models.folders[0].architecture) == (task, architecture)
    assert (models.vocab_size, models.max_tokens) == (61, 16)
    model = models.build()
    assert type(model).__name__ == architecture
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_equal(model.state_dict(), saved.state_dict())
    assert_equal(models.state(0, model), saved.state_dict())


def test_a_classifier_of_the_llama_family_says_its_labels(tmp_path: Path) -> None:
    config = new_model("llama").config
    config.num_labels, config.id2label, config.label2id = 2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    saved = transformers.LlamaForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    models = find_models([tmp_path])
    assert models.task == "text_classification"
    assert models.label_ids == {"no": 0, "yes": 1}
    assert_equal(models.build().state_dict(), saved.state_dict())


def test_a_given_dtype_and_attention_are_those_of_the_model(tmp_path: Path) -> None:
    saved = save("llama", tmp_path)
    model: Any = find_models([tmp_path]).build(dtype="bfloat16", attention="eager")
    assert model.config._attn_implementation == "eager"
    assert_equal(model.state_dict(), saved.bfloat16().state_dict())


def test_files_of_torch_save_are_read_too(tmp_path: Path) -> None:
    saved = save("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    assert_equal(find_models([tmp_path]).build().state_dict(), saved.state_dict())


def test_an_ensemble_gives_each_state(tmp_path: Path) -> None:
    folders = [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    saved = [save("llama_tied", folder).state_dict() for folder in folders]
    models = find_models(folders)
    model = models.build()
    assert not torch.equal(saved[0]["lm_head.weight"], saved[1]["lm_head.weight"])
    for i in (1, 0):
        assert_equal(models.state(i, model), saved[i])
    assert_equal(model.state_dict(), saved[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_weights_that_were_saved_and_are_all_that_is_attributed(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = save("llama_tied", tmp_path / "base", dtype).state_dict()
    folders = [tmp_path / "a", tmp_path / "b"]
    saved = [save_adapter(tmp_path / "base", folder) for folder in folders]
    models = find_models(folders)
    assert [(f.is_adapter, f.base, f.architecture) for f in models.folders] == [
        (True, tmp_path / "base", "LlamaForCausalLM")
    ] * 2
    assert models.tokenizer_path == tmp_path / "base"
    model: Any = models.build()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name.replace(".weight", ".default.weight") for name in saved[0]}
    for i in (1, 0):
        state = models.state(i, model)
        assert state.keys() == model.state_dict().keys()
        for name, value in saved[i].items():
            assert torch.equal(state[name.replace(".weight", ".default.weight")], value)
        rest = {name: value for name, value in state.items() if name not in trained}
        assert all(value.data_ptr() == model.state_dict()[name].data_ptr() for name, value in rest.items())
        plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in rest.items()}
        assert_equal(plain, whole)
    for name, value in saved[0].items():
        assert torch.equal(model.get_parameter(name.replace(".weight", ".default.weight")), value)


def test_what_is_trained_beside_an_adapter_is_part_of_its_state(tmp_path: Path) -> None:
    """Biases of the base and a head of its own, which have other names in the model than in the file."""
    save("bert_classifier", tmp_path / "base")
    folders = [tmp_path / "a", tmp_path / "b"]
    ids = torch.tensor([[3, 4, 5]])
    logits = []
    for folder in folders:
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
        adapted = peft.get_peft_model(whole, config).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        adapted.save_pretrained(folder)
        logits.append(adapted(input_ids=ids).logits)
    models = find_models(folders)
    model: Any = models.build()
    assert torch.equal(model(input_ids=ids).logits, logits[0])
    state = models.state(1, model)
    assert torch.equal(model(input_ids=ids).logits, logits[0])
    model.load_state_dict(state)
    assert torch.equal(model(input_ids=ids).logits, logits[1])


def test_building_draws_no_random_numbers(tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a")
    before = torch.get_rng_state()
    find_models([tmp_path / "a"]).build()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_base_is_found_from_the_working_directory_or_the_adapter_or_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    edit(file, base_model_name_or_path="../base")
    assert find_models([tmp_path / "a"]).folders[0].base == tmp_path / "a" / "../base"
    edit(file, base_model_name_or_path="base")
    assert refusal(tmp_path / "a") == f"{tmp_path}/a is an adapter of base, which is no folder here; --base DIR"
    monkeypatch.chdir(tmp_path)
    assert find_models(["a"]).folders[0].base == Path("base")
    shutil.copytree("base", "other")
    assert find_models(["a"], base="other").folders[0].base == Path("other")
    edit(file, base_model_name_or_path=None)
    assert refusal("a") == "a is an adapter that names no base model; --base DIR"
    assert refusal("a", base="lost").startswith("the base model lost is no folder here, and nothing is downloaded")
    assert (
        refusal("a", base="a") == "a, the base model of a, is an adapter itself; merge it with merge_and_unload first"
    )
    assert refusal("base", base="other") == "base is no adapter and needs no base model; leave --base out"


def test_an_adapter_of_a_classifier_brings_its_head(tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    config = new_model("llama").config
    config.num_labels = 3
    whole = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(whole, settings)
    with torch.no_grad():
        adapted.base_model.model.score.modules_to_save.default.weight.normal_()
    adapted.save_pretrained(tmp_path / "a")
    models = find_models([tmp_path / "a"])
    assert models.task == "text_classification"
    model = models.build().eval()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    for built in (model, models.build()):  # what the adapter stands for is the same in each run
        assert not built.state_dict()["base_model.model.score.original_module.weight"].any()


LIMITED: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 12}),
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {"pad_token_id": 1}),
    "opt": ("OPTConfig", {"ffn_dim": 8, "word_embed_proj_dim": 8}),
}
"""Models with tables of positions."""


@pytest.mark.parametrize("name", LIMITED)
def test_the_longest_text_is_the_longest_that_runs(name: str, tmp_path: Path) -> None:
    config, settings = LIMITED[name]
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 12}
    options = settings if name == "gpt2" else sizes | settings
    options |= {"vocab_size": 13} | ({"intermediate_size": 8} if "bert" in name else {})
    kind = "AutoModelForMaskedLM" if "bert" in name else "AutoModelForCausalLM"
    getattr(transformers, kind).from_config(getattr(transformers, config)(**options)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    models = find_models([tmp_path])
    longest = models.max_tokens
    assert longest is not None
    model = models.build()
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("name", "limit", "expected"), [("gpt2", 7, 7), ("gpt2", 99, 16), ("mamba", 7, 7), ("mamba", None, None)]
)
def test_the_tokenizer_may_know_a_lower_limit(
    name: str, limit: int | None, expected: int | None, tmp_path: Path
) -> None:
    new_model(name).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, limit=limit)
    assert find_models([tmp_path]).max_tokens == expected


def test_transformers_says_nothing_and_keeps_its_settings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    saved = save("llama", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a")
    drop_weight(tmp_path / "base", "lm_head.weight")
    logs = transformers.utils.logging
    constants = needs("huggingface_hub").constants
    logs.set_verbosity_info()
    logs.enable_progress_bar()
    capfd.readouterr()
    recwarn.clear()
    try:
        before = (logging.getLogger("transformers").level, constants.HF_HUB_OFFLINE)
        refusal(tmp_path / "a", build=True)
        saved.save_pretrained(tmp_path / "base")
        capfd.readouterr()
        models: Models = find_models([tmp_path / "a"])
        model: nn.Module = models.build()
        models.state(0, model)
        models.tokenizer()
        assert capfd.readouterr() == ("", "")
        assert not recwarn.list
        assert (logging.getLogger("transformers").level, constants.HF_HUB_OFFLINE) == before
        assert logs.is_progress_bar_enabled()
        assert not needs("huggingface_hub").utils.are_progress_bars_disabled()
        logs.disable_progress_bar()
        models.tokenizer()
        assert not logs.is_progress_bar_enabled()
    finally:
        logs.set_verbosity_warning()
        logs.enable_progress_bar()
