"""Opens models, adapters and tokenizers with transformers and peft: silently, locally, and without random weights."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "text_classification": "AutoModelForSequenceClassification",
}
"""Task -> transformers' class that opens models for it."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of attention; transformers takes other names for repositories to download."""

ADAPTER = "default"
"""The name by which peft knows the one adapter of a model."""

PREFIX = "base_model.model."
"""The part that peft puts before the names of a base model's entries."""

FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
"""Errors by which transformers and peft say that files do not fit."""


def library(name: str, purpose: str) -> Any:
    """Imports a library that the package does without elsewhere.

    Raises:
        ValueError: It is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about each other
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ValueError(f"{purpose} needs {name}: pip install {name}") from None


@contextmanager
def quiet() -> Iterator[Any]:
    """Yields transformers, which warns of nothing, shows no bars and downloads nothing meanwhile.

    Its settings, those of huggingface_hub and of Python's warnings are then what they were.
    """
    transformers = library("transformers", "reading a model")
    logs = importlib.import_module("transformers.utils.logging")
    hub = importlib.import_module("huggingface_hub.utils")
    constants: Any = importlib.import_module("huggingface_hub.constants")
    logger = logging.getLogger("transformers")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    bars, hub_bars = logs.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        constants.HF_HUB_OFFLINE = True
        logs.disable_progress_bar()
        try:
            yield transformers
        finally:
            logger.setLevel(level)
            constants.HF_HUB_OFFLINE = offline
            if bars:
                logs.enable_progress_bar()
            if bars and not hub_bars:
                hub.disable_progress_bars()
            if hub_bars and not bars:
                hub.enable_progress_bars()


def new_on_meta(config: Any, task: str) -> nn.Module:
    """Builds the model of a configuration without memory for its weights."""
    with quiet() as transformers, torch.device("meta"):
        model: nn.Module = getattr(transformers, AUTO_CLASSES[task]).from_config(config, trust_remote_code=False)
    return model


def open_whole(
    path: Path, config: Any, task: str, dtype: str | torch.dtype, attention: str | None, provided: Iterable[str] = ()
) -> nn.Module:
    """Opens a folder of save_pretrained on the CPU, in evaluation mode.

    Args:
        path: The folder.
        config: Its configuration.
        task: A name in AUTO_CLASSES.
        dtype: The dtype of the weights; "auto": that of the folder.
        attention: A name in ATTENTION; None: the model's own.
        provided: Parameters that the folder may lack, as an adapter brings them. They are 0 then.

    Raises:
        ValueError: transformers does not open it, or some weights would be random.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    # weights that are missing are drawn before they can be refused
    with quiet() as transformers, torch.random.fork_rng(devices=[]):
        try:
            model, information = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
                path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:  # those of safetensors and pickle have no class in common
            raise ValueError(f"{path} cannot be opened by transformers: {first_line(error)}") from error
    missing = sorted(information["missing_keys"])
    provided = set(provided)
    refuse_random(path, [name for name in missing if name not in provided])
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    result: nn.Module = model.eval()
    return result


def refuse_random(path: Path, missing: list[str]) -> None:
    """Refuses a folder that lacks weights.

    Raises:
        ValueError: It does.
    """
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        verb = "it" if len(missing) == 1 else "they"
        raise ValueError(
            f"{path} lacks {', '.join(missing[:3])}{more}: {verb} would be random; save the whole model with "
            "save_pretrained, or give the --task that it was trained for"
        )


def adapter_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights of an adapter, on the CPU, by their names in the file.

    Raises:
        ValueError: The file cannot be read.
    """
    peft = library("peft", "reading an adapter")
    with quiet():
        try:
            weights: dict[str, Tensor] = peft.load_peft_weights(str(path), device="cpu")
        except Exception as error:  # safetensors and pickle have errors of their own
            raise ValueError(f"the weights of {path} cannot be read: {first_line(error)}") from error
    return weights


def put_adapter(model: nn.Module, path: Path) -> nn.Module:
    """Puts an adapter on a base model; its weights require gradients, and no others do.

    Weights in float16 and bfloat16 become float32, as peft has them in training.

    Raises:
        ValueError: peft does not open it, or a weight is not in the model, or would be random.
    """
    peft = library("peft", "reading an adapter")
    weights = adapter_weights(path)
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            adapted: nn.Module = peft.PeftModel.from_pretrained(model, str(path), is_trainable=True, torch_device="cpu")
        except FAILURES as error:
            raise ValueError(f"{path} does not fit its base model: {first_line(error)}; --base DIR") from error
    _refuse_others(path, adapted, weights)
    return adapted.eval()


def adapter_state(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Returns the state dict of an adapted model with the weights of another adapter; those of the base are not copied.

    Raises:
        ValueError: A weight is not in the model, or has another shape, or would be the present adapter's.
    """
    peft = library("peft", "reading an adapter")
    weights = adapter_weights(path)
    _refuse_others(path, model, weights)
    own = dict(model.state_dict())
    # biases of the base and embeddings may be trained with an adapter
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mine = [name for name in own if ADAPTER in name.split(".") or name in trained or name in weights]
    before = {name: own[name].clone() for name in mine}
    with quiet():
        try:
            # peft alone knows which entry of the file becomes which of the model
            peft.set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
            after = {name: own[name].clone() for name in mine}
        except FAILURES as error:
            raise ValueError(f"{path} does not fit its base model: {first_line(error)}; --base DIR") from error
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    own[name].copy_(value)
    return own | after


def _refuse_others(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuses an adapter whose file has other entries than the model's adapter."""
    peft = library("peft", "reading an adapter")
    with quiet():
        wanted = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    refuse_random(path, sorted(name for name in wanted if name not in weights))
    # embeddings that were trained are saved beside the adapter, by their names in the model
    own = model.state_dict()
    unknown = sorted(name for name in weights if name not in wanted and name not in own)
    if unknown:
        raise ValueError(
            f"{path} has {unknown[0]}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, which its base "
            "model has no place for; --base DIR names the one that it was trained on"
        )


def open_tokenizer(path: Path) -> Any:
    """Opens the tokenizer of a folder.

    Raises:
        ValueError: transformers does not open it.
    """
    with quiet() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except FAILURES as error:
            raise ValueError(
                f"the tokenizer of {path} cannot be opened by transformers: {first_line(error)}; --tokenizer DIR"
            ) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error that says something; its class if there is none."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
