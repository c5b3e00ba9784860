"""What the projection's arguments may be, the errors otherwise, and tensors as the compiled module takes them.

Imports nothing compiled. With `memory=False`, tensors may be the stand-ins that torch.compile and autograd pass around.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from ..arguments import choice, integer

Gradients = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
MAX_COLUMNS = 2**48
KINDS = {"rademacher": 0, "normal": 1}
TERMS = {"medium": 1, "high": 2, "highest": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def kind_of(proj_type: str | enum.Enum) -> int:
    return KINDS[choice("proj_type", proj_type.value if isinstance(proj_type, enum.Enum) else proj_type, KINDS)]


def terms_of(precision: str | None, tensors: Sequence[Tensor]) -> int:
    chosen = None if precision is None else TERMS[choice("precision", precision, TERMS)]
    terms = {torch.bfloat16: 1, torch.float16: 2, torch.float32: chosen or 2, torch.float64: chosen or 3}
    return max([1, *[terms[tensor.dtype] for tensor in tensors]])


def matrix_part(
    proj_type: str | enum.Enum, seed: SupportsIndex, model_id: SupportsIndex, offset: SupportsIndex, columns: int
) -> tuple[int, int, int, int]:
    """Kind, seed, model_id and offset, checked, of `columns` columns of P."""
    kind = kind_of(proj_type)
    seed = integer("seed", seed, 0, 2**64 - 1)
    model_id = integer("model_id", model_id, 0, 2**32 - 1)
    offset = integer("offset", offset, 0, MAX_COLUMNS)
    if offset + columns > MAX_COLUMNS:
        raise ValueError(f"offset + D must be at most 2**48, not {offset + columns}")
    return kind, seed, model_id, offset


def gradient_tensors(grads: Gradients, memory: bool = True) -> list[Tensor]:
    """The gradients' tensors, each (B, ...), checked."""
    if isinstance(grads, Tensor):
        if grads.ndim != 2:
            raise ValueError(f"grads must have two dimensions (B, D), not shape {tuple(grads.shape)}")
        named = [("grads", grads)]
    elif isinstance(grads, Mapping):
        named = [(f"grads[{key!r}]", tensor) for key, tensor in grads.items()]
    elif isinstance(grads, Sequence) and not isinstance(grads, (str, bytes)):
        named = [(f"grads[{i}]", tensor) for i, tensor in enumerate(grads)]
    else:
        raise TypeError(f"grads must be a tensor or a mapping or sequence of tensors, not {type(grads).__name__}")
    if not named:
        raise ValueError("grads is empty: at least one tensor is needed")
    tensors = []
    first_name, first = named[0]
    for name, tensor in named:
        check_tensor(name, tensor, memory)
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}, but {first_name} has {first.shape[0]}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on device {tensor.device}, but {first_name} is on {first.device}")
        tensors.append(tensor.resolve_neg() if memory and tensor.is_neg() else tensor)
    return tensors


def width(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def check_tensor(name: str, tensor: object, memory: bool = True) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, not {layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(map(str, DTYPES))}, not {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} must be on device cpu or cuda, not {tensor.device}")
    if memory and tensor.numel() and not has_memory(tensor):
        raise TypeError(
            f"{name} has no memory of its own: project outside of torch.func transforms such as vmap, and on real "
            "tensors whose storage was not freed"
        )
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension (B, ...)")


def has_memory(tensor: Tensor) -> bool:
    """Whether the memory may be read: not that of wrappers, fake or zero tensors, or after the storage was resized."""
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:
        return False
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return pointer != 0 and tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def check_out(
    out: object, shape: tuple[int, int], size: str, name: str, tensors: Sequence[Tensor], memory: bool
) -> None:
    """Checks what the result for the tensors `name` is added to; `size` says in words what `shape` is."""
    check_tensor("out", out, memory)
    assert isinstance(out, Tensor)
    if out.dtype != torch.float32:
        raise TypeError(f"out must have dtype torch.float32, not {out.dtype}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {size} = {shape}, not {tuple(out.shape)}")
    if out.device != tensors[0].device:
        raise ValueError(f"out is on device {out.device}, but {name} is on {tensors[0].device}")
    if not memory:
        return  # the operator that is called with the real tensors looks again
    if out.requires_grad or out.is_neg():
        raise ValueError("out requires grad or is a negated view: pass a plain tensor, e.g. out.detach()")
    strides = sorted((stride, n) for stride, n in zip(out.stride(), out.shape, strict=True) if n > 1)
    reach = 1
    for stride, n in strides:
        if stride < reach:
            raise ValueError(f"out has elements that share memory (strides {out.stride()})")
        reach = stride * n
    if out.numel():
        start = out.untyped_storage().data_ptr()
        if any(tensor.untyped_storage().data_ptr() == start for tensor in tensors if tensor.numel()):
            raise ValueError(f"out shares its storage with {name}")


def describe(tensor: Tensor) -> tuple[int, int, int, int, list[int], list[int]]:
    """A tensor as the compiled module takes it, trailing dimensions merged where memory allows."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return tensor.data_ptr(), DTYPES[tensor.dtype], width(tensor), tensor.stride(0), sizes, strides
