"""The projection y = P g, where P (k × D) is made inside the multiplication and never stored.

The only importer of the compiled module: everything is checked, and every tensor allocated, here.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"trak_fast's compiled module is missing or does not load ({error}). In a source folder, install with "
        "`pip install -e .`, or start Python elsewhere to use an installed trak_fast."
    ) from error

__all__ = ["Accumulator", "Projector", "info", "matrix", "project"]

Gradients = Tensor | Mapping[str, Tensor] | Sequence[Tensor]

ISA_VARIABLE = "TRAK_FAST_ISA"
MAX_COLUMNS = 2**48
_KINDS = {"rademacher": 0, "normal": 1}
_TERMS = {"medium": 1, "high": 2, "highest": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_CUDA_BLOCK = 1 << 23  # entries of P (floats) that the CUDA path holds at a time: 32 MiB


def project(
    grads: Gradients,
    proj_dim: int,
    *,
    proj_type: str | enum.Enum = "rademacher",
    seed: int = 0,
    model_id: int = 0,
    offset: int = 0,
    precision: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Projects a batch of gradients: ``result[b, i] = Σ_j P[i, offset + j] · grads[b, j]``, unscaled, summed in fp32.

    Every entry of P depends on ``(proj_type, seed, model_id, i, j)`` only, so results from any machine, split or batch
    belong together. The same call gives the same bits every time, with any number of threads. (Park et al. 2023,
    section 3, step 2, asks for a Gaussian P; ±1 keeps norms and angles as well.)

    Args:
        grads: Gradients (B, D), or a mapping or sequence of tensors (B, ...) that are taken in order as if flattened
            and concatenated; nothing is concatenated. float32, bfloat16, float16 or float64; any strides; on one
            device.
        proj_dim: k, at least 1.
        proj_type: ``"rademacher"`` (entries ±1) or ``"normal"`` (standard normal, rounded to bfloat16), or an enum
            member with such a value.
        seed: 0 to 2**64 - 1.
        model_id: 0 to 2**32 - 1. Each has its own independent P.
        offset: Column of P that belongs to the first column of ``grads``, for gradients that come in slices: the
            slices' results add up to the whole's (up to fp32 rounding).
        precision: How float32 and float64 gradients enter where the processor multiplies bfloat16 (AMX; elsewhere they
            are multiplied as float32): as 1 (``"medium"``), 2 (``"high"``) or 3 (``"highest"``) bfloat16 terms. The
            first changes an element by at most 2**-8 of itself, the second by 2**-17, the third not at all (float64:
            2**-24, from float32); elements below 1e-33 by at most 2**-126, where bfloat16 products end. Default:
            ``"high"`` for float32 (some 2.5e-6 of the result, where the projection itself distorts by 1/√k), and
            ``"highest"`` for float64. bfloat16 and float16 are always exact.
        out: Float32 tensor (B, k) on the gradients' device that the projection is added to, in place.

    Returns:
        Float32 tensor (B, k) on the gradients' device: ``out`` if given, else a new one.

    Raises:
        ValueError: A shape or a number is out of range, or tensors disagree.
        TypeError: Something has the wrong type, dtype or layout, or has no memory (meta tensors, inside vmap).
    """
    parts = list(_parts(grads))
    batch = parts[0][1].shape[0]
    columns = sum(_width(tensor) for _, tensor in parts)
    kind = _kind(proj_type)
    proj_dim = _integer("proj_dim", proj_dim, 1, 2**32)
    seed = _integer("seed", seed, 0, 2**64 - 1)
    model_id = _integer("model_id", model_id, 0, 2**32 - 1)
    offset = _integer("offset", offset, 0, MAX_COLUMNS)
    if offset + columns > MAX_COLUMNS:
        raise ValueError(f"offset + D is {offset + columns}, allowed is up to {MAX_COLUMNS}")
    tensors = [tensor for _, tensor in parts]
    terms = _terms(precision, tensors)
    device = tensors[0].device
    if out is None:
        out = torch.zeros(batch, proj_dim, dtype=torch.float32, device=device)
    else:
        _check_out(out, (batch, proj_dim), tensors)
    if batch == 0 or columns == 0:
        return out
    if device.type == "cuda":
        _project_cuda(tensors, kind, seed, model_id, offset, out)
        return out
    described = [_describe(tensor) for tensor in tensors if tensor.numel()]
    _C.project(
        *(kind, seed, model_id, proj_dim, batch, offset, terms, described),
        *(out.data_ptr(), out.stride(0), out.stride(1), _instruction_set(), torch.get_num_threads()),
    )
    return out


def matrix(
    proj_type: str | enum.Enum,
    seed: int,
    model_id: int,
    rows: Sequence[int] | npt.NDArray[Any] | Tensor,
    cols: Sequence[int] | npt.NDArray[Any] | Tensor,
) -> Tensor:
    """Entries of P, one by one as the definition has them.

    Args:
        proj_type: ``"rademacher"`` or ``"normal"``.
        seed: 0 to 2**64 - 1.
        model_id: 0 to 2**32 - 1.
        rows: Row numbers, 0 to 2**32 - 1.
        cols: Column numbers, 0 to 2**48 - 1.

    Returns:
        Float32 tensor (len(rows), len(cols)) on the CPU: ``P[rows[r], cols[c]]``.

    Raises:
        ValueError: A number is out of range.
        TypeError: Something is not an integer.
    """
    kind = _kind(proj_type)
    seed = _integer("seed", seed, 0, 2**64 - 1)
    model_id = _integer("model_id", model_id, 0, 2**32 - 1)
    row_array = _indexes("rows", rows, 2**32).astype(np.uint32)
    col_array = _indexes("cols", cols, MAX_COLUMNS)
    out = torch.empty(len(row_array), len(col_array), dtype=torch.float32)
    _C.matrix(
        *(kind, seed, model_id, row_array.ctypes.data, len(row_array)),
        *(col_array.ctypes.data, len(col_array), out.data_ptr()),
    )
    return out


class Projector:
    """Projects gradients of one model; can be handed to ``trak.TRAKer(projector=...)``.

    Args:
        grad_dim: D, the number of columns of every gradient.
        proj_dim: k.
        seed: See :func:`project`.
        proj_type: See :func:`project`.
        device: Where the gradients will be; None: wherever they are.
        precision: See :func:`project`.

    Raises:
        ValueError: A number is out of range.
        TypeError: Something has the wrong type.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str | enum.Enum = "rademacher",
        device: torch.device | str | None = None,
        *,
        precision: str | None = None,
    ) -> None:
        self.grad_dim = _integer("grad_dim", grad_dim, 0, MAX_COLUMNS)
        self.proj_dim = _integer("proj_dim", proj_dim, 1, 2**32)
        self.seed = _integer("seed", seed, 0, 2**64 - 1)
        _terms(precision, [])
        _kind(proj_type)
        self.proj_type = str(getattr(proj_type, "value", proj_type))
        self.device = None if device is None else torch.device(device)
        self.precision = precision
        self.definition: int = _C.DEFINITION

    def project(self, grads: Gradients, model_id: int = 0) -> Tensor:
        """Projects gradients (B, D), or a mapping or sequence of (B, ...), to a new float32 tensor (B, k).

        Raises:
            ValueError: The gradients do not have ``grad_dim`` columns; otherwise as :func:`project`.
            TypeError: As :func:`project`.
        """
        columns = self._columns(grads)
        if columns != self.grad_dim:
            raise ValueError(f"grads has {columns} columns, but grad_dim is {self.grad_dim}")
        return self._project(grads, model_id)

    def accumulator(self, batch_size: int, model_id: int = 0) -> Accumulator:
        """A sum over slices of gradients of ``batch_size`` samples, for gradients that are never whole."""
        return Accumulator(self, batch_size, model_id)

    def free_memory(self) -> None:
        """Does nothing: there is no matrix to free. Part of traker's protocol."""

    def _columns(self, grads: Gradients) -> int:
        tensors = [tensor for _, tensor in _parts(grads)]
        device = tensors[0].device
        if self.device is not None and (
            device.type != self.device.type or self.device.index not in (None, device.index)
        ):
            raise ValueError(f"grads is on device {device}, but this projector's device is {self.device}")
        return sum(_width(tensor) for tensor in tensors)

    def _project(self, grads: Gradients, model_id: int, offset: int = 0, out: Tensor | None = None) -> Tensor:
        return project(
            grads,
            self.proj_dim,
            proj_type=self.proj_type,
            seed=self.seed,
            model_id=model_id,
            offset=offset,
            precision=self.precision,
            out=out,
        )

    def __repr__(self) -> str:
        return (
            f"Projector(grad_dim={self.grad_dim}, proj_dim={self.proj_dim}, seed={self.seed}, "
            f"proj_type={self.proj_type!r}, device={self.device}, precision={self.precision!r})"
        )


class Accumulator:
    """Adds up projections of slices of a gradient. Made by :meth:`Projector.accumulator`."""

    def __init__(self, projector: Projector, batch_size: int, model_id: int) -> None:
        self._projector = projector
        self._batch_size = _integer("batch_size", batch_size, 0, 2**62)
        self._model_id = _integer("model_id", model_id, 0, 2**32 - 1)
        self._sum: Tensor | None = None

    def add(self, grads: Gradients, offset: int) -> None:
        """Adds the projection of columns ``offset`` onwards of the gradients.

        Args:
            grads: (batch_size, columns), or a mapping or sequence of (batch_size, ...).
            offset: The slice's first column within the whole gradient.

        Raises:
            ValueError: The slice does not fit into ``grad_dim`` columns or has another batch size; otherwise as
                :func:`project`.
            TypeError: As :func:`project`.
        """
        columns = self._projector._columns(grads)
        offset = _integer("offset", offset, 0, MAX_COLUMNS)
        if offset + columns > self._projector.grad_dim:
            raise ValueError(
                f"columns {offset} to {offset + columns} do not fit into grad_dim = {self._projector.grad_dim}"
            )
        _, first = next(_parts(grads))
        if len(first) != self._batch_size:
            raise ValueError(f"grads holds {len(first)} samples, but batch_size is {self._batch_size}")
        if self._sum is None:
            self._sum = self._zeros(first.device)
        self._projector._project(grads, self._model_id, offset, self._sum)

    def result(self) -> Tensor:
        """The sum so far: a new float32 tensor (batch_size, k)."""
        if self._sum is None:
            return self._zeros(self._projector.device)
        return self._sum.clone()

    def _zeros(self, device: torch.device | None) -> Tensor:
        return torch.zeros(self._batch_size, self._projector.proj_dim, dtype=torch.float32, device=device)


def info() -> dict[str, Any]:
    """What was built and what was found: versions, instruction sets (best first) and CUDA."""
    devices = _C.cuda_device_count()
    return {
        "version": _C.VERSION,
        "matrix_definition": _C.DEFINITION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_sets": _C.instruction_sets(),
        "instruction_sets_built": _C.built_instruction_sets(),
        "cuda_version": _C.cuda_version(),
        "cuda_architectures": _C.cuda_architectures().split(",") if _C.cuda_architectures() else [],
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(devices)] if torch.cuda.is_available() else [],
    }


def _integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__} ({value!r})")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, allowed is {low} to {high}")
    return number


def _indexes(name: str, values: Sequence[int] | npt.NDArray[Any] | Tensor, end: int) -> npt.NDArray[np.uint64]:
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, dtype=np.uint64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be a one-dimensional sequence of integers, not {array.dtype} of shape {array.shape}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= end:
        raise ValueError(f"{name} runs from {low} to {high}, allowed is 0 to {end - 1}")
    return np.ascontiguousarray(array, dtype=np.uint64)


def _choice(name: str, value: object, allowed: Mapping[str, int]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}; allowed are {', '.join(allowed)}")
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
    return allowed[value]


def _kind(proj_type: str | enum.Enum) -> int:
    return _choice("proj_type", proj_type.value if isinstance(proj_type, enum.Enum) else proj_type, _KINDS)


def _terms(precision: str | None, tensors: Sequence[Tensor]) -> int:
    chosen = None if precision is None else _choice("precision", precision, _TERMS)
    terms = {torch.bfloat16: 1, torch.float16: 2, torch.float32: chosen or 2, torch.float64: chosen or 3}
    return max((terms[tensor.dtype] for tensor in tensors), default=1)


def _parts(grads: Gradients) -> Iterator[tuple[str, Tensor]]:
    """The gradients' tensors, each (B, ...), checked, with names for messages."""
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
    for name, tensor in named:
        _check_tensor(name, tensor)
        first_name, first = named[0]
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}, but {first_name} has {first.shape[0]}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on device {tensor.device}, but {first_name} is on {first.device}")
        yield name, tensor.resolve_neg()


def _width(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, not {layout}")
    if tensor.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}, allowed are {allowed}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} is on device {tensor.device}, allowed are cpu and cuda")
    if tensor.numel() and not _has_memory(tensor):
        raise TypeError(
            f"{name} has no memory of its own: project outside of torch.func transforms such as vmap, and on real "
            "tensors whose storage was not freed"
        )
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension (B, ...)")


def _has_memory(tensor: Tensor) -> bool:
    """Whether the memory may be read: not that of wrappers, fake or zero tensors, or after the storage was resized."""
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:
        return False
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return pointer != 0 and tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def _check_out(out: object, shape: tuple[int, int], tensors: Sequence[Tensor]) -> None:
    _check_tensor("out", out)
    assert isinstance(out, Tensor)
    if out.dtype != torch.float32:
        raise TypeError(f"out has dtype {out.dtype}, allowed is torch.float32")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, needed is (B, proj_dim) = {shape}")
    if out.device != tensors[0].device:
        raise ValueError(f"out is on device {out.device}, but grads is on {tensors[0].device}")
    if out.requires_grad or out.is_neg():
        raise ValueError("out requires grad or is a negated view: pass a plain tensor, e.g. out.detach()")
    strides = sorted((stride, size) for stride, size in zip(out.stride(), out.shape, strict=True) if size > 1)
    reach = 1
    for stride, size in strides:
        if stride < reach:
            raise ValueError(f"out has elements that share memory (strides {out.stride()})")
        reach = stride * size
    memory = out.untyped_storage().data_ptr()
    if out.numel() and any(tensor.untyped_storage().data_ptr() == memory for tensor in tensors if tensor.numel()):
        raise ValueError("out shares its storage with grads")


def _describe(tensor: Tensor) -> tuple[int, int, int, int, list[int], list[int]]:
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
    return tensor.data_ptr(), _DTYPES[tensor.dtype], _width(tensor), tensor.stride(0), sizes, strides


def _instruction_set() -> str:
    name = os.environ.get(ISA_VARIABLE, "")
    available = _C.instruction_sets()
    if name and name not in available:
        raise ValueError(f"{ISA_VARIABLE} is {name!r}, this processor's instruction sets are {', '.join(available)}")
    return name


def _project_cuda(tensors: Sequence[Tensor], kind: int, seed: int, model_id: int, offset: int, out: Tensor) -> None:
    """Multiplies with blocks of P that a kernel writes out, one after the other."""
    device = out.device
    table = _normal_table(device).data_ptr() if kind == _KINDS["normal"] else 0
    stream = torch.cuda.current_stream(device).cuda_stream
    rows = min(out.shape[1], 4096)
    buffer = torch.empty(_CUDA_BLOCK, dtype=torch.float32, device=device)
    for tensor in tensors:
        flat = tensor.detach().flatten(1)
        for first in range(0, flat.shape[1], _CUDA_BLOCK // rows):
            columns = flat[:, first : first + _CUDA_BLOCK // rows].float()
            for row in range(0, out.shape[1], rows):
                part = out[:, row : row + rows]
                size = (part.shape[1], columns.shape[1])
                block = buffer[: size[0] * size[1]].view(size)
                _C.matrix_block_cuda(
                    *(kind, seed, model_id, row, size[0], offset + first, size[1]),
                    *(table, block.data_ptr(), device.index, stream),
                )
                part.addmm_(columns, block.T)
        offset += flat.shape[1]


@functools.lru_cache
def _normal_table(device: torch.device) -> Tensor:
    table = ctypes.string_at(_C.normal_half_table(), 2 * 32768)
    return torch.frombuffer(bytearray(table), dtype=torch.int16).to(device)
