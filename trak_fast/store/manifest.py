"""The manifest, which lists all that features depend on, and its differences from another."""

from __future__ import annotations

import hashlib
import io
import numbers
import operator
import pickle
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Returns the SHA-256 of a state dict: of its tensors with their names, shapes and dtypes, and of other entries.

    Sparse tensors with the same numbers have the same digest in one layout, however their entries were added up.

    Raises:
        ValueError: A tensor has no numbers, as on the device "meta".
        TypeError: An entry is nothing that pickle takes.
    """
    sha = hashlib.sha256()
    for name, value in weights.items():
        if value is not None:  # an extra state of a module that has none
            _update(sha, name, value)
    return sha.hexdigest()


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Returns the bytes of a dense tensor's numbers of any dtype, in the order of its indexes."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # a tensor of one number may count as contiguous whatever its stride is
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def _update(sha: hashlib._Hash, name: str, value: object) -> None:
    """Adds an entry to a digest."""
    if isinstance(value, Tensor):
        for part, tensor in _dense_parts(name, value.detach()):
            sha.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(bytes_of(tensor).data)
    elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        sha.update(f"{name} numpy {value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        sha.update(f"{name} mapping of {len(value)}".encode())
        for key, item in value.items():
            _update(sha, f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{name} sequence of {len(value)}".encode())
        for place, item in enumerate(value):
            _update(sha, f"{name}[{place}]", item)
    elif isinstance(value, (set, frozenset)):
        _update(sha, f"{name} set", sorted(map(repr, value)))
    elif isinstance(value, io.BytesIO):
        _update(sha, name, value.getvalue())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        sha.update(f"{name} {type(value).__name__} {value!r}".encode())
    else:
        try:
            content = pickle.dumps(value, protocol=4)
        except Exception as error:  # any, as an object pickles itself by code of its own
            raise TypeError(
                f"checkpoint[{name!r}] must be a tensor or something that pickle takes, not {type(value).__qualname__}"
            ) from error
        sha.update(f"{name} {type(value).__qualname__}".encode() + content)


def _dense_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Splits a tensor into dense ones that have its content, with their names.

    Raises:
        ValueError: There are none.
    """
    if tensor.is_meta:
        raise ValueError(f'checkpoint[{name!r}] must have numbers, not be on the device "meta", which has none')
    layout = f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.layout}"
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [(f"{layout} indices", tensor.indices()), ("values", tensor.values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [
            (f"{layout} rows", tensor.crow_indices()),
            ("columns", tensor.col_indices()),
            ("values", tensor.values()),
        ]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [
            (f"{layout} columns", tensor.ccol_indices()),
            ("rows", tensor.row_indices()),
            ("values", tensor.values()),
        ]
    if tensor.layout != torch.strided:
        return [(layout, tensor.to_dense())]
    if tensor.is_quantized:
        parts = [(f"{layout} {tensor.qscheme()}", tensor.int_repr())]
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return [*parts, ("scale", torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64))]
        return [
            *parts,
            (f"scales along {tensor.q_per_channel_axis()}", tensor.q_per_channel_scales()),
            ("zero points", tensor.q_per_channel_zero_points()),
        ]
    return [(name, tensor)]


def manifest_of(
    projector: Any,
    proj_dim: int,
    task: object,
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    train_set_size: int,
    store_dtype: str = "float32",
    gradients: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes down all that features depend on.

    Args:
        projector: The projector, known by its `proj_type`, `seed` and `nonzeros` (None for dense kinds), and by
            `definition`, the number of its matrix's definition; if it has no such number, by its class's name.
        proj_dim: Size of a feature, k.
        task: The task, known by its `name` if it has one, else by its class's, by its settings (`Task.get_settings`, or
            attributes without a leading underscore) and by its code.
        model: The model, known by its modules' names and classes.
        parameters: The parameters that gradients are taken with respect to, in this order.
        train_set_size: Training samples, n.
        store_dtype: The way in which training features are stored.
        gradients: Entries that describe the way to gradients.

    Returns:
        A JSON object.
    """
    described = Description(model)
    described.add_class("task", type(task))
    if hasattr(task, "get_settings"):
        settings = task.get_settings()
    else:
        settings = {name: value for name, value in getattr(task, "__dict__", {}).items() if not name.startswith("_")}
    for name, value in settings.items():
        described.add(name, value)
    return {
        "matrix_definition": _plain(getattr(projector, "definition", type(projector).__qualname__)),
        "proj_type": _plain(getattr(projector, "proj_type", None)),
        "nonzeros": _plain(getattr(projector, "nonzeros", None)),
        "seed": _plain(getattr(projector, "seed", None)),
        "proj_dim": proj_dim,
        "grad_dim": sum(parameter.numel() for parameter in parameters.values()),
        "train_set_size": train_set_size,
        "task": str(getattr(task, "name", type(task).__qualname__)),
        "task_settings": described.lines,
        "task_code": described.code,
        "dtype": store_dtype,
        **(gradients or {}),
        "modules": [f"{name} {_class_of(module).__qualname__}".lstrip() for name, module in model.named_modules()],
        "parameters": [f"{name} {p.dtype} {tuple(p.shape)}" for name, p in parameters.items()],
    }


def _class_of(module: nn.Module) -> type:
    """Returns the class that a module had before `fully_shard` gave it one of its own, if it did."""
    own = type(module)
    return own.__bases__[-1] if own.__bases__[0].__name__ == "FSDPModule" else own


def _plain(value: Any) -> Any:
    """Returns what JSON has for a value, that of a member of an enumeration included; else the name of its type."""
    value = getattr(value, "value", value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item() if isinstance(value, Tensor) else operator.index(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return type(value).__qualname__
