"""Small models of transformers with random weights, batches for them, and their gradients by autograd alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from libraries import needs
from torch import Tensor, nn

needs("transformers")
import transformers  # noqa: E402

WORDS = 61
LENGTHS = [7, 4, 9, 2, 6]
"""Tokens of each text."""

_LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
_BERT = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_HEADS = {"head_dim": 8}
_GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
_GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16}
_T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_VIT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
_RESNET = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic"}


@dataclass(frozen=True)
class Family:
    """One of transformers' models.

    Attributes:
        task: The name of its task.
        config: The name of its configuration's class.
        settings: Settings of the configuration.
    """

    task: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "gpt2": Family("causal_lm", "GPT2Config", _GPT2),
    "gpt_neox": Family("causal_lm", "GPTNeoXConfig", _BERT),
    "opt": Family("causal_lm", "OPTConfig", _BERT | _OPT),
    "llama": Family("causal_lm", "LlamaConfig", _LLAMA),
    "llama_tied": Family("causal_lm", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "mistral": Family("causal_lm", "MistralConfig", _LLAMA | {"sliding_window": 4}),
    "qwen3": Family("causal_lm", "Qwen3Config", _LLAMA | _HEADS | {"tie_word_embeddings": True}),
    "gemma3": Family("causal_lm", "Gemma3TextConfig", _LLAMA | _HEADS | _GEMMA),
    "olmo2": Family("causal_lm", "Olmo2Config", _LLAMA),
    "mixtral": Family("causal_lm", "MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    "qwen3_moe": Family(
        "causal_lm",
        "Qwen3MoeConfig",
        _LLAMA | _HEADS | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": Family("causal_lm", "GptOssConfig", _LLAMA | _HEADS | {"num_local_experts": 4, "sliding_window": 4}),
    "mamba": Family(
        "causal_lm", "MambaConfig", {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    ),
    "bert": Family("masked_lm", "BertConfig", _BERT),
    "modernbert": Family(
        "masked_lm",
        "ModernBertConfig",
        _BERT | {"global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "bert_classifier": Family("text_classification", "BertConfig", _BERT | {"num_labels": 3}),
    "t5": Family("seq2seq_lm", "T5Config", _T5 | {"decoder_start_token_id": 0}),
    "vit": Family("image_classification", "ViTConfig", _VIT | {"image_size": 8, "patch_size": 4, "num_labels": 3}),
    "resnet": Family("image_classification", "ResNetConfig", _RESNET | {"num_labels": 3}),
}

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "text_classification": "AutoModelForSequenceClassification",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
}


def new_model(name: str, **settings: Any) -> Any:
    """Makes a model of a family, of which no parameter or statistic has the value that it begins training with.

    Args:
        name: A name in FAMILIES.
        settings: Settings of the configuration beside those of the family.
    """
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.settings | settings)
    model = getattr(transformers, AUTO_CLASSES[family.task]).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer += 0.5 * torch.rand_like(buffer)
    return model.eval()


def loaded_model(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """Makes a model of a family, saves it, and loads it as users do."""
    new_model(name).save_pretrained(folder)
    return getattr(transformers, AUTO_CLASSES[FAMILIES[name].task]).from_pretrained(folder, dtype=dtype).eval()


def batch_of(task: str) -> list[Tensor]:
    """Makes a batch of texts of different lengths, padded on the right, or of images."""
    count = len(LENGTHS)
    labels = torch.randint(3, (count,))
    if task == "image_classification":
        return [torch.randn(count, 3, 8, 8), labels]
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, WORDS, mask.shape) * mask
    if task == "causal_lm":
        return [ids, mask]
    if task == "text_classification":
        return [ids, torch.randint(2, ids.shape) * mask, mask, labels]
    if task == "masked_lm":
        chosen = torch.rand(ids.shape) < 0.3
        chosen[:, 1] = True
        chosen &= mask.bool()
        return [torch.where(chosen, 4, ids), mask, torch.where(chosen, ids, -100)]
    outputs = torch.randint(1, WORDS, (count, 6))
    outputs[torch.arange(6) >= torch.tensor([6, 3, 1, 4, 5])[:, None]] = -100
    return [ids, mask, outputs]


def singles(task: str, batch: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields each sample of a batch as a batch of one without padding."""
    for sample in zip(*batch, strict=True):
        single = [x.unsqueeze(0) for x in sample]
        if task != "image_classification":
            length = int(single[2 if task == "text_classification" else 1].sum())
            texts = len(batch) - (task in ("text_classification", "seq2seq_lm"))
            single[:texts] = [x[:, :length] for x in single[:texts]]
        if task == "seq2seq_lm":
            single[2] = single[2][single[2] != -100].unsqueeze(0)
        yield single


def output_alone(model: nn.Module, task: str, single: Sequence[Tensor]) -> Tensor:
    """Computes f = log p/(1 − p) of one sample from the logits, with p as the tasks say; (1,) float32 or float64."""
    if task == "image_classification":
        logits, labels = model(single[0]).logits, single[1]
    elif task == "text_classification":
        logits = model(input_ids=single[0], token_type_ids=single[1], attention_mask=single[2]).logits
        labels = single[3]
    elif task == "causal_lm":
        logits, labels = model(input_ids=single[0]).logits[0, :-1], single[0][0, 1:]
    elif task == "masked_lm":
        logits, labels = model(input_ids=single[0]).logits[0], single[2][0]
    else:
        logits, labels = model(input_ids=single[0], labels=single[2]).logits[0], single[2][0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = nn.functional.cross_entropy(wide, labels)
    return -loss - torch.log(-torch.expm1(-loss))


def gradients_alone(
    model: nn.Module, task: str, batch: Sequence[Tensor], names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Differentiates each sample alone, without padding, by autograd.

    Args:
        model: The model.
        task: The name of a task.
        batch: The batch.
        names: Parameters; by default all of the model's that require gradients.

    Returns:
        (B, *shape) for each parameter, in the model's order.
    """
    parameters = dict(model.named_parameters())
    if names is None:
        names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    chosen = [parameters[name] for name in parameters if name in names]
    rows = [
        torch.autograd.grad(output_alone(model, task, single), chosen, allow_unused=True, materialize_grads=True)
        for single in singles(task, batch)
    ]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def errors_of(found: Tensor, expected: Tensor) -> Tensor:
    """Computes the norm of each row's difference relative to the row's norm, (B,)."""
    expected = expected.double()
    return (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
