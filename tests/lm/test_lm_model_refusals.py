"""Folders that are refused: what is missing, would be random, is of another model, or for another task."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import needs
from model_folders import assert_equal, drop_weight, edit, refusal, save, save_adapter, save_tokenizer
from transformer_models import new_model

from trak_fast.lm.models.folders import find_models

# peft asks transformers for it, while these tests build adapters
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_missing_library_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a")
    monkeypatch.setitem(sys.modules, name, None)
    thing = {"transformers": "a model", "peft": "an adapter"}[name]
    assert refusal(tmp_path / "a", build=True) == f"reading {thing} needs {name}: pip install {name}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16, float16 or float64, not int8"),
        (
            {"attention": "some/it"},
            "attention must be one of eager, sdpa, flash_attention_2, flash_attention_3, flex_attention, not 'some/it'",
        ),
    ],
)
def test_other_dtypes_and_attention_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        find_models([tmp_path]).build(**options)
    assert str(error.value) == message


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    drop_weight(tmp_path, "lm_head.weight")
    assert refusal(tmp_path, build=True) == (
        f"{tmp_path} lacks lm_head.weight: it would be random; save the whole model with save_pretrained, or give the "
        "--task that it was trained for"
    )


def test_a_task_whose_head_is_missing_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    assert f"{tmp_path} lacks score.weight: it would be random" in refusal(
        tmp_path, build=True, task="text_classification"
    )


def test_the_states_of_an_ensemble_are_never_random(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save("llama", tmp_path / name)
    drop_weight(tmp_path / "b", "model.layers.0.mlp.up_proj.weight")
    models = find_models([tmp_path / "a", tmp_path / "b"])
    model = models.build()
    with pytest.raises(ValueError, match=r"b lacks model\.layers\.0\.mlp\.up_proj\.weight: it would be random"):
        models.state(1, model)


def test_a_model_without_its_head_is_causal_only_if_the_head_is_tied(tmp_path: Path) -> None:
    saved = new_model("gpt2")
    saved.transformer.save_pretrained(tmp_path / "tied")
    new_model("llama").model.save_pretrained(tmp_path / "untied")
    for name in ("tied", "untied"):
        save_tokenizer(tmp_path / name)
    models = find_models([tmp_path / "tied"])
    assert models.task == "causal_lm"
    assert_equal(models.build().state_dict(), saved.state_dict())
    assert "untied lacks lm_head.weight: it would be random" in refusal(tmp_path / "untied", build=True)


def test_adapters_with_other_names_are_refused(tmp_path: Path) -> None:
    safetensors = needs("safetensors.torch")
    save("llama", tmp_path / "base")
    weights = save_adapter(tmp_path / "base", tmp_path / "a")
    models = find_models([tmp_path / "a"])
    model = models.build()
    renamed = {name.replace("model.layers", "layers"): value for name, value in weights.items()}
    file = tmp_path / "a" / "adapter_model.safetensors"
    safetensors.save_file(renamed, file)
    first = min(weights)
    assert f"{tmp_path}/a lacks {first}, " in refusal(tmp_path / "a", build=True)
    with pytest.raises(ValueError, match="and 5 more: they would be random"):
        models.state(0, model)
    safetensors.save_file(weights | {"base_model.model.other.lora_A.weight": torch.zeros(2)}, file)
    assert refusal(tmp_path / "a", build=True) == (
        f"{tmp_path}/a has base_model.model.other.lora_A.weight, which its base model has no place for; --base DIR "
        "names the one that it was trained on"
    )
    file.write_bytes(b"nothing")
    assert refusal(tmp_path / "a", build=True).startswith(f"the weights of {tmp_path}/a cannot be read: ")


def test_an_adapter_of_a_wider_model_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    save("llama", tmp_path / "wide", hidden_size=32)
    save_adapter(tmp_path / "base", tmp_path / "a")
    message = refusal(tmp_path / "a", base=tmp_path / "wide", build=True)
    assert message.startswith(f"{tmp_path}/a does not fit its base model: ")
    assert message.endswith("; --base DIR")


def test_folders_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("gpt2") == "gpt2 is no folder here, and nothing is downloaded: save it with save_pretrained first"
    save("gpt2", Path("out/checkpoint-5"))
    assert refusal("out") == "out has neither config.json nor adapter_config.json; out/checkpoint-5 has one"
    assert refusal("out/checkpoint-5", "out/../out/checkpoint-5").endswith(" is given twice")
    assert refusal("out/checkpoint-5", task="translation") == (
        "task must be one of causal_lm, masked_lm, text_classification, not 'translation'"
    )
    assert refusal() == "paths must name at least one folder, not none"
    Path("out/checkpoint-5/model.safetensors").write_bytes(b"nothing")
    assert refusal("out/checkpoint-5", build=True).startswith("out/checkpoint-5 cannot be opened by transformers: ")
    Path("out/checkpoint-5/model.safetensors").unlink()
    assert refusal("out/checkpoint-5") == (
        "out/checkpoint-5 has config.json, but no weights (model.safetensors); save it with save_pretrained"
    )
    Path("empty").mkdir()
    assert refusal("empty").endswith("adapter_config.json; save the model with save_pretrained")
    Path("empty/adapter_config.json").write_text("{}")
    assert refusal("empty") == "empty has adapter_config.json, but no weights (adapter_model.safetensors)"
    Path("empty/adapter_model.safetensors").touch()
    Path("empty/adapter_config.json").write_text("{")
    assert refusal("empty").startswith("empty/adapter_config.json is not JSON (")
    Path("empty/adapter_config.json").write_text("[]")
    assert refusal("empty") == "empty/adapter_config.json must be a JSON object, not list"


def test_architectures_for_other_tasks_are_refused(tmp_path: Path) -> None:
    tasks = "causal_lm, masked_lm, text_classification"
    new_model("t5").save_pretrained(tmp_path / "t5")
    assert refusal(tmp_path / "t5") == (
        f"{tmp_path}/t5 is T5ForConditionalGeneration, an encoder and decoder; tasks are {tasks}"
    )
    new_model("vit").save_pretrained(tmp_path / "vit")
    assert refusal(tmp_path / "vit") == (
        f"{tmp_path}/vit is ViTForImageClassification, which is for none of the tasks {tasks}"
    )
    save("llama", tmp_path / "llama")
    assert refusal(tmp_path / "llama", task="masked_lm") == (
        f"{tmp_path}/llama is LlamaForCausalLM, and transformers has no AutoModelForMaskedLM for llama; give another "
        "--task"
    )
    save("bert", tmp_path / "bert")
    assert refusal(tmp_path / "bert", task="causal_lm") == (
        f"{tmp_path}/bert is BertForMaskedLM, whose tokens see those after them (is_decoder is not set in "
        "config.json); --task masked_lm"
    )
    save("bert_classifier", tmp_path / "one", num_labels=1)
    assert refusal(tmp_path / "one") == f"{tmp_path}/one must choose one of several labels, not do regression with 1"
    edit(tmp_path / "llama" / "config.json", model_type="unheard")
    assert refusal(tmp_path / "llama").startswith(f"{tmp_path}/llama cannot be opened by transformers: ")


def test_adapters_that_are_none_of_layers_or_for_other_tasks_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", task_type="TOKEN_CLS")
    assert refusal(tmp_path / "a") == (
        f"{tmp_path}/a is an adapter for TOKEN_CLS; tasks are causal_lm, masked_lm, text_classification"
    )
    edit(tmp_path / "a" / "adapter_config.json", peft_type="PROMPT_TUNING")
    assert refusal(tmp_path / "a") == (
        f"{tmp_path}/a must be an adapter of layers, such as LORA, not PROMPT_TUNING, which peft does not train on"
    )


def test_folders_of_different_models_are_refused(tmp_path: Path) -> None:
    def pair(first: str, second: str) -> tuple[Path, Path]:
        return tmp_path / first, tmp_path / second

    save("llama", tmp_path / "a")
    save("gpt2", tmp_path / "gpt2")
    save("llama", tmp_path / "wide", intermediate_size=32)
    both = f"{tmp_path}/a and {tmp_path}/"
    assert (
        refusal(*pair("a", "gpt2"))
        == f"{both}gpt2 must have one architecture, not LlamaForCausalLM and GPT2LMHeadModel"
    )
    assert refusal(*pair("a", "wide")) == f"{both}wide must have one intermediate_size, not 24 and 32"
    save("llama", tmp_path / "half", torch.bfloat16)
    assert refusal(*pair("a", "half"), build=True) == (
        f"{both}half must have one dtype, not float32 and bfloat16; --dtype names one for all"
    )
    models = find_models(pair("a", "half"))
    assert models.state(1, models.build(dtype=torch.float32))["lm_head.weight"].dtype == torch.float32
    save_adapter(tmp_path / "a", tmp_path / "lora")
    assert refusal(*pair("a", "lora")) == (
        f"{tmp_path}/lora is an adapter and {tmp_path}/a a whole model; give folders of one kind"
    )
    assert refusal(*pair("lora", "a")) == refusal(*pair("a", "lora"))
    save_adapter(tmp_path / "a", tmp_path / "rank", rank=3)
    lora = f"{tmp_path}/lora and {tmp_path}/"
    assert refusal(*pair("lora", "rank")) == f"{lora}rank must have one r, not 2 and 3"
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    save_adapter(tmp_path / "same", tmp_path / "moved")
    assert refusal(*pair("lora", "moved")) == (
        f"{lora}moved must have one base model, not {tmp_path}/a and {tmp_path}/same; --base DIR"
    )
    assert len(find_models(pair("lora", "moved"), base=tmp_path / "a").folders) == 2


def test_the_tokenizer_is_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out/checkpoint-500", "out/checkpoint-600"):
        new_model("gpt2").save_pretrained(name)
    assert refusal("out/checkpoint-500") == "out/checkpoint-500 has no tokenizer; --tokenizer DIR"
    save_tokenizer(Path("out"))
    assert refusal("out/checkpoint-500") == "out/checkpoint-500 has no tokenizer; --tokenizer DIR (out/ has one)"
    models = find_models(["out/checkpoint-500"], tokenizer="out")
    assert models.tokenizer().convert_tokens_to_ids(["c", "b"]) == [2, 1]
    assert refusal("out/checkpoint-500", tokenizer="out/checkpoint-600").startswith(
        "out/checkpoint-600 has no tokenizer"
    )
    assert refusal("out/checkpoint-500", tokenizer="x").startswith("the tokenizer x is no folder here, and nothing is")
    save_tokenizer(Path("out/checkpoint-500"))
    save_tokenizer(Path("out/checkpoint-600"), "cba")
    both = ("out/checkpoint-500", "out/checkpoint-600")
    assert refusal(*both) == (
        "out/checkpoint-500 and out/checkpoint-600 must have one tokenizer; --tokenizer DIR names one for all"
    )
    assert len(find_models(both, tokenizer="out").folders) == 2
    Path("out/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer of out cannot be opened by transformers: .*; --tokenizer DIR"):
        models.tokenizer()
