"""Folders of small models, adapters and tokenizers, as transformers and peft save them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import needs
from torch import Tensor
from transformer_models import new_model

from trak_fast.lm.models.folders import find_models

transformers = needs("transformers")
peft = needs("peft")
tokenizers = needs("tokenizers")


def save_tokenizer(folder: Path, words: str = "abc", limit: int | None = None) -> None:
    """Saves a tokenizer of single letters."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    options = {} if limit is None else {"model_max_length": limit}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a", **options).save_pretrained(folder)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Saves a new model of a family with a tokenizer, and returns it."""
    model = new_model(name, **settings).to(dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_adapter(base: Path, folder: Path, rank: int = 2, **settings: Any) -> dict[str, Tensor]:
    """Saves a new adapter of a causal language model, and returns its weights."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=rank,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        **{"task_type": "CAUSAL_LM"} | settings,
    )
    model = peft.get_peft_model(whole, config)
    model.save_pretrained(folder)
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(model)
    return weights


def edit(file: Path, **settings: Any) -> None:
    """Changes entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def drop_weight(folder: Path, name: str, file: str = "model.safetensors") -> None:
    """Deletes a tensor from a file of safetensors."""
    safetensors = needs("safetensors.torch")
    weights = safetensors.load_file(folder / file)
    del weights[name]
    safetensors.save_file(weights, folder / file, metadata={"format": "pt"})


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compares state dicts bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def refusal(*paths: Path | str, build: bool = False, **options: Any) -> str:
    """Returns the message by which folders are refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011, PT012 (the tests compare the messages)
        models = find_models(paths, **options)
        if build:
            models.build()
    return str(error.value)
