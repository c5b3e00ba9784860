"""The projection y = P g and its adjoint P'y, where P (k × D) is made inside the multiplication and never stored.

Every tensor is allocated here, after checks.py has checked the arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..arguments import indexes, integer
from . import checks, kernels, operators
from .checks import Gradients
from .kernels import _CUDA_DIMENSIONS, _adjoint_cuda, _instruction_set, _project_cuda


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
    proj_dim = integer("proj_dim", proj_dim, 1, 2**32)
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
        kernels._C.project(projection, _instruction_set(), torch.get_num_threads())
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
    integer("proj_dim", y.shape[1], 1, 2**32)
    grad_dim = integer("grad_dim", grad_dim, 0, checks.MAX_COLUMNS)
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
        kernels._C.project_adjoint(adjoint, _instruction_set(), torch.get_num_threads())
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
    row_array = indexes("rows", rows, 2**32).astype(np.uint32)
    col_array = indexes("cols", cols, checks.MAX_COLUMNS)
    out = torch.empty(len(row_array), len(col_array), dtype=torch.float32)
    kernels._C.matrix(
        *(kind, seed, model_id, row_array.ctypes.data, len(row_array)),
        *(col_array.ctypes.data, len(col_array), out.data_ptr()),
    )
    return out


operators.define(project, project_adjoint)
