"""Checks of the projection's arguments, which end in what the lower rooms take as it is.

Imports nothing compiled. With `memory=False`, tensors may be the stand-ins that torch.compile and autograd pass around.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from ..arguments import choice, integer, one_of

Gradients = Tensor | Mapping[str, Tensor] | Sequence[Tensor]

MAX_COLUMNS = 2**48
"""Columns that a matrix has; the largest D, and the end of every `offset`."""

MAX_ROWS = 2**32
"""Rows that a matrix has; the largest k."""

KINDS = {"rademacher": 0, "normal": 1, "sjlt": 2}
"""Kinds of matrix with the numbers that the compiled module has for them."""

SPARSE = "sjlt"
"""The sparse kind, whose matrix depends on `proj_dim` and `nonzeros` too."""

NONZEROS = (1, 2, 4, 8)
"""Entries that a column of the sparse kind may have."""

DEFAULT_NONZEROS = 4
"""Entries that a column of the sparse kind has unless a number is given."""

BLOCK_ROWS = (16, 2**20)
"""The smallest and the largest k / nonzeros of the sparse kind, a power of two."""

TERMS = {"medium": 1, "high": 2, "highest": 3}
"""Precisions with the number of bfloat16 terms that a float32 enters as."""

DEFAULT_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 2, torch.float64: 3}
"""Dtypes with the number of bfloat16 terms that their elements enter as, unless a precision is given."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Dtypes of gradients with the numbers that the compiled module has for them."""


class MatrixPart(NamedTuple):
    """Names a matrix P and the first of its columns that a call multiplies by.

    `nonzeros` is 0 for a dense kind.
    """

    kind: int
    seed: int
    model_id: int
    offset: int
    nonzeros: int


class Projection(NamedTuple):
    """Checked arguments of a projection, the tensor to add it to aside."""

    tensors: list[Tensor]
    columns: int
    proj_dim: int
    part: MatrixPart
    precision: str | None


class Adjoint(NamedTuple):
    """Checked arguments of an adjoint, the tensor to add it to aside."""

    y: Tensor
    grad_dim: int
    part: MatrixPart


def check_projection(
    tensors: list[Tensor],
    columns: int,
    proj_dim: SupportsIndex,
    proj_type: str | enum.Enum,
    seed: SupportsIndex,
    model_id: SupportsIndex,
    offset: SupportsIndex,
    precision: str | None,
    nonzeros: SupportsIndex | None,
) -> Projection:
    """Checks the arguments of a projection of tensors that `gradient_tensors` has checked, with so many columns."""
    rows = integer("proj_dim", proj_dim, 1, MAX_ROWS)
    part = matrix_part(proj_type, seed, model_id, offset, columns, rows, nonzeros)
    check_precision(precision)
    return Projection(tensors, columns, rows, part, precision)


def check_adjoint(
    y: Tensor,
    grad_dim: SupportsIndex,
    proj_type: str | enum.Enum,
    seed: SupportsIndex,
    model_id: SupportsIndex,
    offset: SupportsIndex,
    nonzeros: SupportsIndex | None,
    memory: bool = True,
) -> Adjoint:
    """Checks the arguments of an adjoint."""
    check_tensor("y", y, memory)
    if memory and y.is_neg():
        y = y.resolve_neg()
    if y.ndim != 2 or y.shape[1] < 1:
        raise ValueError(f"y must have two dimensions (B, proj_dim), proj_dim at least 1, not shape {tuple(y.shape)}")
    rows = integer("proj_dim", y.shape[1], 1, MAX_ROWS)
    columns = integer("grad_dim", grad_dim, 0, MAX_COLUMNS)
    part = matrix_part(proj_type, seed, model_id, offset, columns, rows, nonzeros)
    return Adjoint(y, columns, part)


def kind_of(proj_type: str | enum.Enum) -> int:
    """Returns the number of a kind of matrix."""
    name = proj_type.value if isinstance(proj_type, enum.Enum) else proj_type
    return KINDS[choice("proj_type", name, KINDS)]


def nonzeros_of(kind: int, proj_dim: int, nonzeros: SupportsIndex | None) -> int:
    """Checks the entries of a column of the sparse kind, and that k fits them; returns their number.

    Returns:
        `nonzeros`, or its default for None; 0 for a dense kind.

    Raises:
        ValueError: `nonzeros` is no such number or is given for a dense kind, or k does not fit it.
        TypeError: `nonzeros` is no integer.
    """
    number = DEFAULT_NONZEROS if nonzeros is None else one_of("nonzeros", nonzeros, NONZEROS)
    if kind != KINDS[SPARSE]:
        if nonzeros is not None:
            raise ValueError(f"nonzeros belongs to proj_type={SPARSE!r}: leave it out for a dense kind")
        return 0
    low, high = BLOCK_ROWS
    rows = proj_dim // number  # divmod would not be traced where k is dynamic
    if proj_dim % number or rows & (rows - 1) or not low <= rows <= high:
        below = 1 << max(rows.bit_length() - 1, 0)
        nearest = sorted({number * min(max(size, low), high) for size in (below, 2 * below)})
        others = [n for n in NONZEROS if proj_dim in [n << bits for bits in range(4, 21)]]
        raise ValueError(
            f"proj_dim must be nonzeros times a power of two in [{low}, 2**20] for proj_type={SPARSE!r}, "
            f"not {proj_dim}; near it with nonzeros={number}: {' and '.join(map(str, nearest))}"
            + (f"; nonzeros={' or '.join(map(str, others))} takes it" if others else "; the dense kinds take any")
        )
    return number


def check_precision(precision: str | None) -> None:
    """Checks a precision; None stands for the default of each dtype."""
    if precision is not None:
        choice("precision", precision, TERMS)


def terms_of(precision: str | None, tensors: Sequence[Tensor]) -> int:
    """Returns the number of bfloat16 terms that elements of these tensors enter as: the largest that one needs."""
    terms = DEFAULT_TERMS
    if precision is not None:
        terms = {**DEFAULT_TERMS, torch.float32: TERMS[precision], torch.float64: TERMS[precision]}
    return terms[tensors[0].dtype] if len(tensors) == 1 else max([terms[tensor.dtype] for tensor in tensors])


def matrix_part(
    proj_type: str | enum.Enum,
    seed: SupportsIndex,
    model_id: SupportsIndex,
    offset: SupportsIndex,
    columns: int,
    proj_dim: int,
    nonzeros: SupportsIndex | None,
) -> MatrixPart:
    """Checks what names a matrix of `proj_dim` rows, and that it has `columns` columns from `offset` on."""
    kind = kind_of(proj_type)
    part = MatrixPart(
        kind=kind,
        seed=integer("seed", seed, 0, 2**64 - 1),
        model_id=integer("model_id", model_id, 0, 2**32 - 1),
        offset=integer("offset", offset, 0, MAX_COLUMNS),
        nonzeros=nonzeros_of(kind, proj_dim, nonzeros),
    )
    if part.offset + columns > MAX_COLUMNS:
        raise ValueError(f"offset + D must be at most 2**48, not {part.offset + columns}")
    return part


def gradient_tensors(grads: Gradients, memory: bool = True) -> list[Tensor]:
    """Returns the gradients' tensors, each (B, ...), once they are checked."""
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


def count_columns(tensors: Sequence[Tensor]) -> int:
    """Returns the number of columns that tensors (B, ...) have in all when they are flattened."""
    return sum([width(tensor) for tensor in tensors])


def width(tensor: Tensor) -> int:
    """Returns the number of columns that a tensor (B, ...) has when it is flattened."""
    return tensor.shape[1] if tensor.ndim == 2 else math.prod(tensor.shape[1:])


def check_tensor(name: str, tensor: object, memory: bool = True) -> None:
    """Checks that `tensor` is one that the kernels can read, or that stands for one if not `memory`."""
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
    """Says if the memory may be read. Wrappers, fake and zero tensors have none, nor has a storage that was freed."""
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:
        return False
    end = tensor.storage_offset()
    if tensor.is_contiguous():
        end += tensor.numel()
    else:
        end += 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return pointer != 0 and tensor.untyped_storage().nbytes() >= end * tensor.element_size()


def check_projection_out(out: Tensor, projection: Projection, memory: bool = True) -> None:
    """Checks the tensor that a projection is added to."""
    shape = (projection.tensors[0].shape[0], projection.proj_dim)
    _check_out(out, shape, "(B, proj_dim)", "grads", projection.tensors, memory)


def check_adjoint_out(out: Tensor, adjoint: Adjoint, memory: bool = True) -> None:
    """Checks the tensor that an adjoint is added to."""
    _check_out(out, (adjoint.y.shape[0], adjoint.grad_dim), "(B, grad_dim)", "y", [adjoint.y], memory)


def _check_out(
    out: object, shape: tuple[int, int], size: str, name: str, tensors: Sequence[Tensor], memory: bool
) -> None:
    """Checks the tensor that a result is added to.

    Args:
        out: The tensor.
        shape: The shape that it must have.
        size: The same shape in words.
        name: The argument that `tensors` are.
        tensors: Tensors that it must be on one device with, and share no memory with.
        memory: If False, tensors may be stand-ins; the operator that is called with the real ones looks again.
    """
    check_tensor("out", out, memory)
    assert isinstance(out, Tensor)
    if out.dtype != torch.float32:
        raise TypeError(f"out must have dtype torch.float32, not {out.dtype}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {size} = {shape}, not {tuple(out.shape)}")
    if out.device != tensors[0].device:
        raise ValueError(f"out is on device {out.device}, but {name} is on {tensors[0].device}")
    if not memory:
        return
    if out.requires_grad or out.is_neg():
        raise ValueError("out requires grad or is a negated view: pass a plain tensor, e.g. out.detach()")
    if out.numel() == 0 or not out.is_contiguous():  # a contiguous one shares none
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
