"""Loads checkpoints into a model, whole or not at all."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COMPILED = "_orig_mod."
"""The part of a name that torch.compile adds, before that of the compiled module."""


def load_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Loads a state dict; a failure leaves the weights that the model had.

    An entry that is missing is taken from another of which the model says that it is the same tensor: files of
    safetensors hold tied weights once.

    Args:
        model: The model.
        checkpoint: The state dict.

    Raises:
        TypeError: `checkpoint` is no state dict.
        ValueError: Its names or shapes are not the model's. The message has the way to those that are, if it is known.
    """
    _check_type(checkpoint)
    own = model.state_dict()
    completed = _placed_as(own, _with_tied(own, checkpoint))
    faults = _Faults.between(own, completed)
    # a model that renames old entries while it loads may take them all the same
    before = _copies(own) if faults else None
    try:
        model.load_state_dict(completed)
    except RuntimeError as error:
        if before is None:
            raise
        model.load_state_dict(before)
        raise ValueError(_refusal(own, checkpoint, faults)) from error


def _check_type(checkpoint: object) -> None:
    """Refuses what is no state dict.

    Raises:
        TypeError: It is none.
    """
    if isinstance(checkpoint, Mapping):
        return
    fix = ""
    if isinstance(checkpoint, (str, os.PathLike)):
        fix = '; torch.load(checkpoint, map_location="cpu", weights_only=True) reads a file of torch.save'
    elif isinstance(checkpoint, nn.Module):
        fix = "; checkpoint.state_dict() is one"
    raise TypeError(f"checkpoint must be a state dict, not {type(checkpoint).__name__}{fix}")


def _with_tied(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the entries that are missing, and that in the model share all their memory with one that is there."""
    missing = [name for name in own if name not in checkpoint]
    if not missing:
        return checkpoint
    present = {_memory(own[name]): name for name in own if name in checkpoint}
    partners = {name: present[place] for name in missing if (place := _memory(own[name])) in present and place}
    completed = OrderedDict(checkpoint)
    if (versions := getattr(checkpoint, "_metadata", None)) is not None:
        completed._metadata = versions  # type: ignore[attr-defined]  # the modules' versions, as torch keeps them
    completed.update((name, checkpoint[partner]) for name, partner in partners.items())
    return completed


def _placed_as(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Cuts out of whole tensors the parts that a sharded model has in this process; the others stay as they are."""
    sharded = {
        name: value
        for name, value in checkpoint.items()
        if hasattr(own.get(name), "placements") and isinstance(value, Tensor) and not hasattr(value, "placements")
        if value.shape == own[name].shape
    }
    if not sharded:
        return checkpoint
    from torch.distributed.tensor import distribute_tensor

    placed = OrderedDict(checkpoint)
    for name, value in sharded.items():
        mesh, placements = own[name].device_mesh, own[name].placements
        # every process has the whole tensor, so that none is sent
        placed[name] = distribute_tensor(value.to(own[name].device), mesh, placements, src_data_rank=None)
    return placed


def _memory(value: Any) -> tuple[object, ...] | None:
    """Returns what two tensors have in common that are the same memory; None for those that have none of their own."""
    if hasattr(value, "to_local"):
        value = value.to_local()
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
        return None
    return (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.data_ptr() else None


def _copies(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state.items()}


@dataclass(frozen=True)
class _Faults:
    """The differences of a checkpoint from a model.

    Attributes:
        size: Entries of the model.
        missing: Names that the checkpoint lacks.
        unknown: Names that the model lacks.
        shapes: Names and both shapes, as text.
    """

    size: int
    missing: list[str]
    unknown: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        """Tells if there are any."""
        return bool(self.missing or self.unknown or self.shapes)

    @classmethod
    def between(cls, own: Mapping[str, Any], given: Mapping[str, Any]) -> _Faults:
        """Compares the entries of a model with those of a checkpoint."""
        return cls(
            size=len(own),
            missing=[name for name in own if name not in given],
            unknown=[str(name) for name in given if name not in own],
            shapes=[
                f"{name} {tuple(given[name].shape)} for {tuple(value.shape)}"
                for name, value in own.items()
                if isinstance(given.get(name), Tensor) and isinstance(value, Tensor)
                if given[name].shape != value.shape
            ],
        )

    def __str__(self) -> str:
        parts = {"lack": self.missing, "have unknown": self.unknown, "have shapes that differ:": self.shapes}
        return ", ".join(f"{verb} {_some(names)}" for verb, names in parts.items() if names)


def _refusal(own: Mapping[str, Any], checkpoint: Mapping[str, Any], faults: _Faults) -> str:
    """Says what is wrong with a checkpoint, and how it can be mended."""
    wrapped = {
        f"checkpoint[{key!r}]": value
        for key, value in checkpoint.items()
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())
    }
    for place, entries in wrapped.items():
        if set(entries) == set(own):
            return f"checkpoint must be a state dict, not a dict that has one in it; load {place}"
    for place, entries in {"checkpoint": checkpoint, **wrapped}.items():
        given = [str(name) for name in entries]
        if renaming := _renaming(set(own), given):
            return (
                f"checkpoint must have the model's names, such as {next(iter(own))!r}, not {given[0]!r}; "
                f"load {{{renaming}: v for k, v in {place}.items()}}"
            )
    return (
        f"checkpoint must have the {faults.size} parameters and buffers of the model, not {faults}; "
        "build the model as it was when the checkpoint was saved"
    )


def _renaming(own: set[str], given: list[str]) -> str | None:
    """Looks for an expression of `k` that turns given names into the model's: all of them, or all that it has.

    Wrappers change names: DistributedDataParallel puts "module." before them and Lightning "model.", torch.compile puts
    "_orig_mod." into them.
    """
    if not own or not given or own.issuperset(given) or own.issubset(given):
        return None
    candidates: dict[str, list[str]] = {}
    for prefix in ("", *_prefixes(given)):
        bare = [name.removeprefix(prefix) for name in given]
        expression = f"k.removeprefix({prefix!r})" if prefix else "k"
        candidates[expression] = bare
        candidates[f"{expression}.replace({COMPILED!r}, '')"] = [name.replace(COMPILED, "") for name in bare]
    for prefix in _prefixes(list(own)):
        candidates[f"{prefix!r} + k"] = [prefix + name for name in given]
    for expression, names in candidates.items():
        if own.issuperset(names) or own.issubset(names):
            return expression
    return None


def _prefixes(names: list[str]) -> list[str]:
    """Lists the beginnings that all names have in common and that end with a dot, the shortest first."""
    ends = [place + 1 for place, letter in enumerate(names[0]) if letter == "."]
    beginnings = [names[0][:end] for end in ends]
    return [beginning for beginning in beginnings if all(name.startswith(beginning) for name in names)]


def _some(names: Iterable[str], most: int = 5) -> str:
    """Counts names, and lists the first."""
    names = list(names)
    return f"{len(names)} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
