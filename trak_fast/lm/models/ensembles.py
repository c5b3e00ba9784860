"""Checks that several folders are checkpoints of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = (
    "_name_or_path",
    "architectures",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "peft_version",
    "revision",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Settings whose values may differ, as do those of dropout and of how weights began: they change no gradient in
evaluation mode."""

UNORDERED = ("exclude_modules", "modules_to_save", "target_modules")
"""Settings that are sets of names, which peft writes in any order."""


def short(value: object) -> str:
    """Writes a value in a message: its beginning if it is long, and dtypes without "torch."."""
    text = str(value).removeprefix("torch.")
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_same_settings(pair: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuses settings of two folders that differ.

    Args:
        pair: Both folders, for the message.
        first: The settings of the first by name.
        other: Those of the other.

    Raises:
        ValueError: They differ; the message has the first that does.
    """
    for name in sorted({*first, *other}):
        if name in HARMLESS or "dropout" in name or "pdrop" in name or "initializer" in name:
            continue
        values = [settings.get(name) for settings in (first, other)]
        if name in UNORDERED:
            values = [sorted(value) if isinstance(value, list) else value for value in values]
        if values[0] != values[1]:
            raise ValueError(f"{pair} must have one {name}, not {short(values[0])} and {short(values[1])}")
