"""The projection y = P g and its adjoint P'y, where P (k × D) is made inside the multiplication and never stored.

The only importer of the compiled module: every tensor is allocated here, after checks.py has checked the arguments.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import checks, operators
from .checks import Gradients

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"trak_fast's compiled module is missing or does not load ({error}). In a source folder, install with "
        "`pip install -e .`, or start Python elsewhere to use an installed trak_fast."
    ) from error

__all__ = ["Accumulator", "Projector", "info", "matrix", "project", "project_adjoint"]

ISA_VARIABLE = "TRAK_FAST_ISA"
KERNEL_VARIABLE = "TRAK_FAST_CUDA_KERNEL"
_CUDA_DIMENSIONS = 7  # that kernels take, the batch included; tensors with more are flattened before


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
    differentiable: bool = False,
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
            ``"highest"`` for float64. bfloat16 and float16 are always exact. On CUDA, tensor cores round sums toward
            zero besides: a result shrinks by up to 1e-5 of itself at any precision (8.4e-6 measured on an H100).
        out: Float32 tensor (B, k) on the gradients' device that the projection is added to, in place.
        differentiable: Records the projection for autograd (torch 2.4 or newer; P'y is its derivative, see
            :func:`project_adjoint`; torch.func transforms are not supported). By default nothing is recorded, even if
            ``grads`` requires grad: features that are kept must not keep the graph behind their gradients alive.

    Returns:
        Float32 tensor (B, k) on the gradients' device: ``out`` if given, else a new one.

    Raises:
        ValueError: A shape or a number is out of range, tensors disagree, or ``out`` is given with
            ``differentiable``.
        TypeError: Something has the wrong type, dtype or layout, or has no memory (meta tensors, inside vmap).
        RuntimeError: CUDA reports an error, or the device's first ``"normal"`` projection is inside a graph capture.
    """
    compiling = torch.compiler.is_compiling()
    tensors = checks.gradient_tensors(grads, memory=not (compiling or differentiable))
    batch, device = tensors[0].shape[0], tensors[0].device
    columns = sum(map(checks.width, tensors))
    proj_dim = checks.integer("proj_dim", proj_dim, 1, 2**32)
    kind, seed, model_id, offset = checks.matrix_part(proj_type, seed, model_id, offset, columns)
    terms = checks.terms_of(precision, tensors)
    if out is not None:
        if differentiable:
            raise ValueError("out cannot be combined with differentiable=True: add the result to it instead")
        checks.check_out(out, (batch, proj_dim), "(B, proj_dim)", "grads", tensors, memory=not compiling)
    if compiling or differentiable:
        return operators.project(tensors, proj_dim, kind, seed, model_id, offset, precision, out, differentiable)
    add = out is not None
    if out is None:
        sets = device.type == "cuda" and batch > 0 and columns > 0  # the CPU's kernels always add
        out = (torch.empty if sets else torch.zeros)(batch, proj_dim, dtype=torch.float32, device=device)
    if batch == 0 or columns == 0:
        return out
    if device.type == "cuda":
        tensors = [tensor.flatten(1) if tensor.ndim > _CUDA_DIMENSIONS else tensor for tensor in tensors]
    projection = (
        *(kind, seed, model_id, proj_dim, batch, offset, terms),
        [checks.describe(tensor) for tensor in tensors if tensor.numel()],
        *(out.data_ptr(), out.stride(0), out.stride(1)),
    )
    if device.type == "cuda":
        _project_cuda(projection, add, kind, device)
    else:
        _C.project(projection, _instruction_set(), torch.get_num_threads())
    return out


def project_adjoint(
    y: Tensor,
    grad_dim: int,
    *,
    proj_type: str | enum.Enum = "rademacher",
    seed: int = 0,
    model_id: int = 0,
    offset: int = 0,
    out: Tensor | None = None,
    differentiable: bool = False,
) -> Tensor:
    """The adjoint (transpose) of :func:`project`: ``result[b, j] = Σ_i P[i, offset + j] · y[b, i]``, unscaled.

    It is what carries derivatives back through a projection, and 1/k times it is an unbiased estimate of the gradient
    that was projected. Products and sums are in fp32, and the same call gives the same bits every time.

    Args:
        y: Projected gradients (B, k), float32, bfloat16, float16 or float64 (rounded to float32), any strides.
        grad_dim: D, the number of columns of P to go back to.
        proj_type: See :func:`project`, as for ``seed`` and ``model_id``.
        seed: 0 to 2**64 - 1.
        model_id: 0 to 2**32 - 1.
        offset: Column of P that belongs to the result's first column.
        out: Float32 tensor (B, D) on the device of ``y`` that the result is added to, in place.
        differentiable: Records the call for autograd, see :func:`project`.

    Returns:
        Float32 tensor (B, D) on the device of ``y``: ``out`` if given, else a new one.

    Raises:
        ValueError: A shape or a number is out of range, or ``out`` is given with ``differentiable``.
        TypeError: Something has the wrong type, dtype or layout, or has no memory (meta tensors, inside vmap).
    """
    compiling = torch.compiler.is_compiling()
    memory = not (compiling or differentiable)
    checks.check_tensor("y", y, memory)
    if memory and y.is_neg():
        y = y.resolve_neg()
    if y.ndim != 2 or y.shape[1] < 1:
        raise ValueError(f"y must have two dimensions (B, proj_dim), proj_dim at least 1, not shape {tuple(y.shape)}")
    checks.integer("proj_dim", y.shape[1], 1, 2**32)
    grad_dim = checks.integer("grad_dim", grad_dim, 0, checks.MAX_COLUMNS)
    kind, seed, model_id, offset = checks.matrix_part(proj_type, seed, model_id, offset, grad_dim)
    if out is not None:
        if differentiable:
            raise ValueError("out cannot be combined with differentiable=True: add the result to it instead")
        checks.check_out(out, (y.shape[0], grad_dim), "(B, grad_dim)", "y", [y], memory=not compiling)
    if compiling or differentiable:
        return operators.project_adjoint(y, grad_dim, kind, seed, model_id, offset, out, differentiable)
    if out is None:
        out = torch.zeros(y.shape[0], grad_dim, dtype=torch.float32, device=y.device)
    if out.numel() == 0:
        return out
    adjoint = (
        *(kind, seed, model_id, grad_dim, y.shape[0], offset, checks.describe(y)),
        *(out.data_ptr(), out.stride(0), out.stride(1)),
    )
    if y.device.type == "cuda":
        _adjoint_cuda(adjoint, kind, y.device)
    else:
        _C.project_adjoint(adjoint, _instruction_set(), torch.get_num_threads())
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
    kind, seed, model_id, _ = checks.matrix_part(proj_type, seed, model_id, 0, 0)
    row_array = checks.indexes("rows", rows, 2**32).astype(np.uint32)
    col_array = checks.indexes("cols", cols, checks.MAX_COLUMNS)
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
        self.grad_dim = checks.integer("grad_dim", grad_dim, 0, checks.MAX_COLUMNS)
        self.proj_dim = checks.integer("proj_dim", proj_dim, 1, 2**32)
        self.seed = checks.integer("seed", seed, 0, 2**64 - 1)
        checks.terms_of(precision, [])
        checks.kind_of(proj_type)
        self.proj_type = str(getattr(proj_type, "value", proj_type))
        self.device = None if device is None else torch.device(device)
        on_cuda = self.device is not None and self.device.type == "cuda" and torch.cuda.is_available()
        if on_cuda and self.proj_type == "normal":
            _device_table(torch.empty(0, device=self.device).device)  # before anyone captures a graph
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

    def adjoint(self, y: Tensor, model_id: int = 0) -> Tensor:
        """P'y: takes (B, k) back to a new float32 tensor (B, grad_dim), see :func:`project_adjoint`.

        Raises:
            ValueError: ``y`` does not have ``proj_dim`` columns; otherwise as :func:`project_adjoint`.
            TypeError: As :func:`project_adjoint`.
        """
        if isinstance(y, Tensor) and y.ndim == 2 and y.shape[1] != self.proj_dim:
            raise ValueError(f"y has {y.shape[1]} columns, but proj_dim is {self.proj_dim}")
        return project_adjoint(y, self.grad_dim, proj_type=self.proj_type, seed=self.seed, model_id=model_id)

    def accumulator(self, batch_size: int, model_id: int = 0) -> Accumulator:
        """A sum over slices of gradients of ``batch_size`` samples, for gradients that are never whole."""
        return Accumulator(self, batch_size, model_id)

    def free_memory(self) -> None:
        """Does nothing: there is no matrix to free. Part of traker's protocol."""

    def _columns(self, grads: Gradients) -> int:
        tensors = checks.gradient_tensors(grads, memory=False)
        device = tensors[0].device
        if self.device is not None and (
            device.type != self.device.type or self.device.index not in (None, device.index)
        ):
            raise ValueError(f"grads is on device {device}, but this projector's device is {self.device}")
        return sum(map(checks.width, tensors))

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
        self._batch_size = checks.integer("batch_size", batch_size, 0, 2**62)
        self._model_id = checks.integer("model_id", model_id, 0, 2**32 - 1)
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
        offset = checks.integer("offset", offset, 0, checks.MAX_COLUMNS)
        if offset + columns > self._projector.grad_dim:
            raise ValueError(
                f"columns {offset} to {offset + columns} do not fit into grad_dim = {self._projector.grad_dim}"
            )
        first = checks.gradient_tensors(grads, memory=False)[0]
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
        "cuda_devices": [{"name": torch.cuda.get_device_name(i), "kernels": _C.cuda_kernels(i)} for i in range(devices)]
        if torch.cuda.is_available()
        else [],
    }


def _instruction_set() -> str:
    name = os.environ.get(ISA_VARIABLE, "")
    available = _C.instruction_sets()
    if name and name not in available:
        raise ValueError(f"{ISA_VARIABLE} is {name!r}, this processor's instruction sets are {', '.join(available)}")
    return name


def _project_cuda(projection: _C.Projection, add: bool, kind: int, device: torch.device) -> None:
    """Launches the projection on the current stream; all memory that it needs comes from torch's allocator."""
    kernel = os.environ.get(KERNEL_VARIABLE, "")
    _C.project_cuda(projection, add, _normal_table(kind, device), _Scratch(device), *_place(device), kernel)


def _adjoint_cuda(adjoint: _C.Adjoint, kind: int, device: torch.device) -> None:
    """As :func:`_project_cuda`."""
    _C.project_adjoint_cuda(adjoint, _normal_table(kind, device), _Scratch(device), *_place(device))


class _Scratch:
    """Memory for the kernels of one call, which asks for it once it knows how much; freed with this object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, size: int) -> int:
        self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory.data_ptr()


def _place(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    assert device.index is not None
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _normal_table(kind: int, device: torch.device) -> int:
    """Where the device has the table that the normal kind needs; 0 for the other."""
    return _device_table(device).data_ptr() if kind == checks.KINDS["normal"] else 0


@functools.lru_cache
def _device_table(device: torch.device) -> Tensor:
    """The normal table's upper half as bfloat16 and as float16, which both hold it exactly: (2, 32768) int16."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first projection with proj_type='normal' on {device} uploads a table, which a CUDA graph cannot "
            "capture: make a Projector with that device and proj_type, or project once, before the capture"
        )
    bits = bytearray(ctypes.string_at(_C.normal_half_table(), 2 * 32768))
    bf16 = torch.frombuffer(bits, dtype=torch.bfloat16)
    return torch.stack([bf16.view(torch.int16), bf16.to(torch.float16).view(torch.int16)]).to(device)


operators.define(project, project_adjoint)
