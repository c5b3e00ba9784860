"""The manifest, which lists all that features depend on, and its differences from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .identity import Description


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Lists the entries that differ, one a line with both values; lists are compared item by item."""
    lines = []
    for name in dict.fromkeys([*given, *stored]):
        old, new = stored.get(name), given.get(name)
        if name == "task_code" and isinstance(old, dict) and isinstance(new, dict) and old != new:
            if old.get("python") == new.get("python"):  # code cannot be compared between versions of Python
                lines.append("task: the code of its functions is another")
        elif isinstance(old, list) and isinstance(new, list):
            pairs = zip_longest(old, new)
            lines += [f"{name}[{i}]: stored {a!r}, given {b!r}" for i, (a, b) in enumerate(pairs) if a != b]
        elif old != new:
            lines.append(f"{name}: stored {old!r}, given {new!r}")
    return lines


def digest(weights: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a state dict's tensors, with their names, shapes and dtypes."""
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def manifest_of(
    projector: Any,
    proj_dim: int,
    task: object,
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    train_set_size: int,
    half: bool = False,
) -> dict[str, Any]:
    """Writes down all that features depend on.

    Args:
        projector: The projector, known by its `proj_type` and `seed`, and by `definition`, the number of its matrix's
            definition; if it has no such number, by its class's name.
        proj_dim: Size of a feature, k.
        task: The task, known by its `name` if it has one, else by its class's, by its settings (`Task.get_settings`, or
            attributes without a leading underscore) and by its code.
        model: The model, known by its modules' names and classes.
        parameters: The parameters that gradients are taken with respect to, in this order.
        train_set_size: Training samples, n.
        half: If True, features are stored in float16.

    Returns:
        A JSON object.
    """
    described = Description(model)
    described.add_class("task", type(task))
    if hasattr(task, "get_settings"):
        settings = task.get_settings()
    else:
        settings = {name: value for name, value in vars(task).items() if not name.startswith("_")}
    for name, value in settings.items():
        described.add(name, value)
    proj_type = getattr(projector, "proj_type", None)
    seed = getattr(projector, "seed", None)
    return {
        "matrix_definition": getattr(projector, "definition", type(projector).__qualname__),
        "proj_type": getattr(proj_type, "value", proj_type),
        "seed": None if seed is None else int(seed),
        "proj_dim": proj_dim,
        "grad_dim": sum(parameter.numel() for parameter in parameters.values()),
        "train_set_size": train_set_size,
        "task": str(getattr(task, "name", type(task).__qualname__)),
        "task_settings": described.lines,
        "task_code": described.code,
        "dtype": "float16" if half else "float32",
        "modules": [f"{name} {type(module).__qualname__}".lstrip() for name, module in model.named_modules()],
        "parameters": [f"{name} {p.dtype} {tuple(p.shape)}" for name, p in parameters.items()],
    }
