"""Finds out what models are for: the task of an architecture, its class in transformers, and its longest text."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from . import loading

MAPPINGS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
"""Task -> transformers' table of the classes for it, by types of models."""

TASKS = ", ".join(MAPPINGS)

ADAPTER_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "text_classification"}
"""Tasks as peft calls them -> as they are called here."""

OTHER_ADAPTER_TASKS = ("SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks of peft that are none of these."""

ONE_LABEL = (None, "single_label_classification")
"""Kinds of problems, as transformers calls them, in which one of several labels is right."""


def fit_to_adapter(path: Path, config: Any, adapter: Mapping[str, Any]) -> None:
    """Refuses adapters of other kinds or tasks; sets the number of labels to that of a classifier's adapter."""
    kind = str(adapter.get("peft_type"))
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"):
        raise ValueError(f"{path} must be an adapter of layers, such as LORA, not {kind}, which peft does not train on")
    if kind == "XLORA" or adapter.get("megatron_config"):
        raise ValueError(f"{path} must be an adapter of its own weights, and name neither others nor code of Megatron")
    task = adapter.get("task_type")
    if task in OTHER_ADAPTER_TASKS:
        raise ValueError(f"{path} is an adapter for {task}; tasks are {TASKS}")
    if task == "SEQ_CLS":
        for name, value in loading.adapter_weights(path).items():
            ends = name.endswith(("score.weight", "classifier.weight", "classifier.out_proj.weight"))
            if ends and value.shape[0] != config.num_labels:
                config.num_labels = value.shape[0]


def _classes(task: str) -> dict[str, str]:
    """Returns transformers' classes for a task by types of models."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    return dict(getattr(tables, MAPPINGS[task]))


def task_of(path: Path, config: Any, adapter: Mapping[str, Any] | None, task: str | None) -> tuple[str, str]:
    """Finds the task of a folder, and the name of the class for it.

    Args:
        path: The folder, of an adapter the base's.
        config: Its configuration.
        adapter: The configuration of the adapter on it, if there is one.
        task: The task that is asked for, None for the adapter's or the architecture's.

    Raises:
        ValueError: The architecture is for another task than these, or not for the one that was asked for.
    """
    architecture = str((config.architectures or [f"a {config.model_type} of no named architecture"])[0])
    if config.is_encoder_decoder:
        raise ValueError(f"{path} is {architecture}, an encoder and decoder; tasks are {TASKS}")
    classes = {name: _classes(name) for name in MAPPINGS}
    own = next((name for name, table in classes.items() if architecture in table.values()), None)
    adapted = None if adapter is None else adapter.get("task_type")
    wanted = task or ADAPTER_TASKS.get(str(adapted)) or own or _task_of_base(architecture, config)
    if wanted is None:
        raise ValueError(f"{path} is {architecture}, which is for none of the tasks {TASKS}")
    name = classes[wanted].get(config.model_type)
    if name is None:
        raise ValueError(
            f"{path} is {architecture}, and transformers has no {loading.AUTO_CLASSES[wanted]} for "
            f"{config.model_type}; give another --task"
        )
    # encoders become causal language models by a setting alone; without it, each token sees itself
    sees_all = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    if wanted == "causal_lm" and config.model_type in classes["masked_lm"] and sees_all:
        raise ValueError(
            f"{path} is {architecture}, whose tokens see those after them (is_decoder is not set in config.json); "
            "--task masked_lm"
        )
    problem = getattr(config, "problem_type", None)
    if wanted == "text_classification" and (config.num_labels < 2 or problem not in ONE_LABEL):
        problem = problem or "regression"
        raise ValueError(f"{path} must choose one of several labels, not do {problem} with {config.num_labels}")
    return wanted, name


def _task_of_base(architecture: str, config: Any) -> str | None:
    """Returns the task that a model without a head may be for."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    names = tables.MODEL_MAPPING_NAMES.get(config.model_type, ())
    without_head = architecture in ([names] if isinstance(names, str) else names)
    return "causal_lm" if without_head and config.model_type in _classes("causal_lm") else None


def longest_text(config: Any, model: nn.Module) -> int | None:
    """Returns the longest text of a model, None if there is no limit.

    Models like RoBERTa count positions from behind the number of the padding, which they take from the table of
    positions; tables with rows that are added for an offset (OPT) are as long as the configuration says.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit
