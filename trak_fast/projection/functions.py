"""The public functions: the projection y = P g, its adjoint P'y, and entries of P (k × D).

Each checks its arguments once, and hands them to kernels.py, or to operators.py where torch compiles or records
the call.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..arguments import indexes
from . import checks, kernels, operators
from .checks import Gradients


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
        precision: The form in which float32 and float64 gradients enter where the processor multiplies bfloat16 (AMX;
            elsewhere they are multiplied as float32): as 1 (``"medium"``), 2 (``"high"``) or 3 (``"highest"``) bfloat16
            terms. The first changes an element by at most 2**-8 of itself, the second by 2**-17, the third not at all
            (float64: 2**-24, from float32); elements below 1e-33 by at most 2**-126, where bfloat16 products end.
            Default: ``"high"`` for float32 (some 2.5e-6 of the result, where the projection itself distorts by 1/√k),
            and ``"highest"`` for float64. bfloat16 and float16 are always exact. On CUDA, tensor cores round sums
            toward zero besides: a result shrinks by up to 1e-5 of itself at any precision (8.4e-6 measured on an H100).
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
    memory = not (differentiable or torch.compiler.is_compiling())
    tensors = checks.gradient_tensors(grads, memory)
    projection = checks.check_projection(
        tensors,
        checks.count_columns(tensors),
        proj_dim,
        proj_type=proj_type,
        seed=seed,
        model_id=model_id,
        offset=offset,
        precision=precision,
    )
    if out is not None:
        _refuse_recording(differentiable)
        checks.check_projection_out(out, projection, memory)
    if not memory:
        return operators.project(projection, out, differentiable)
    return kernels.project(projection, out)


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
    """Computes the adjoint (transpose) of :func:`project`: ``result[b, j] = Σ_i P[i, offset + j] · y[b, i]``, unscaled.

    The adjoint carries derivatives back through a projection, and 1/k times it is an unbiased estimate of the gradient
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
    memory = not (differentiable or torch.compiler.is_compiling())
    adjoint = checks.check_adjoint(
        y,
        grad_dim,
        proj_type=proj_type,
        seed=seed,
        model_id=model_id,
        offset=offset,
        memory=memory,
    )
    if out is not None:
        _refuse_recording(differentiable)
        checks.check_adjoint_out(out, adjoint, memory)
    if not memory:
        return operators.project_adjoint(adjoint, out, differentiable)
    return kernels.project_adjoint(adjoint, out)


def matrix(
    proj_type: str | enum.Enum,
    seed: int,
    model_id: int,
    rows: Sequence[int] | npt.NDArray[Any] | Tensor,
    cols: Sequence[int] | npt.NDArray[Any] | Tensor,
) -> Tensor:
    """Computes entries of P, one by one as the definition has them.

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
    part = checks.matrix_part(proj_type, seed, model_id, 0, 0)
    row_numbers = indexes("rows", rows, checks.MAX_ROWS).astype(np.uint32)
    return kernels.matrix(part, row_numbers, indexes("cols", cols, checks.MAX_COLUMNS))


def _refuse_recording(differentiable: bool) -> None:
    """Refuses `differentiable` beside `out`, whose own history autograd would lose."""
    if differentiable:
        raise ValueError("out cannot be combined with differentiable=True: add the result to it instead")
