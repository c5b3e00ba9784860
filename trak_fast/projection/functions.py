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

from ..arguments import indexes, integer
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
    nonzeros: int | None = None,
    out: Tensor | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Projects a batch of gradients: `result[b, i] = Σ_j P[i, offset + j] · grads[b, j]`, unscaled, summed in fp32.

    Every entry of P depends on `(proj_type, seed, model_id, i, j)` only (that of `"sjlt"` also on `proj_dim` and
    `nonzeros`), so results from any machine, split or batch belong together. The same call gives the same bits every
    time, with any number of threads. (Park et al. 2023, section 3, step 2, asks for a Gaussian P; ±1 keeps norms and
    angles as well.)

    Args:
        grads: Gradients (B, D), or a mapping or sequence of tensors (B, ...) that are taken in order as if flattened
            and concatenated; nothing is concatenated. float32, bfloat16, float16 or float64; any strides; on one
            device.
        proj_dim: k, at least 1.
        proj_type: `"rademacher"` (entries ±1), `"normal"` (standard normal, rounded to bfloat16) or `"sjlt"`
            (sparse: `nonzeros` entries ±1 in each column, the rest 0), or an enum member with such a value. Dense
            kinds have E‖Pg‖² = k ‖g‖², `"sjlt"` has nonzeros · ‖g‖². Inner products from `"sjlt"` are unbiased,
            with at most 1 + c (c - 1) / k times the mean squared error of dense ±1 (c: nonzeros), but large errors are
            more frequent where a few dozen coordinates carry the gradients: two coordinates meet with probability
            c²/k, and their product is then off by 1/c of itself (docs/choosing.md). Its c blocks of rows have the same
            sum, so that the rank of P is at most k - c + 1.
        seed: 0 to 2^64 - 1.
        model_id: 0 to 2^32 - 1. Each has its own independent P.
        offset: Column of P that belongs to the first column of `grads`, for gradients that come in slices: the
            slices' results add up to the whole's (up to fp32 rounding).
        precision: The form in which float32 and float64 gradients enter where the processor multiplies bfloat16 (AMX;
            elsewhere, and by `"sjlt"`, they are taken as float32): as 1 (`"medium"`), 2 (`"high"`) or 3
            (`"highest"`) bfloat16 terms. The first changes an element by at most 2^-8 of itself, the second by
            2^-17, the third not at all (float64: 2^-24, from float32); elements below 1e-33 by at most 2^-126, where
            bfloat16 products end. Default: `"high"` for float32 (some 2.5e-6 of the result, where the projection
            itself distorts by 1/√k), and `"highest"` for float64. bfloat16 and float16 are always exact. On CUDA,
            tensor cores round sums toward zero besides: a result shrinks by up to 1e-5 of itself at any precision
            (8.4e-6 measured on an H100).
        nonzeros: c, the entries in each column of `"sjlt"`: 1, 2, 4 (the default) or 8. k / c must be a power of two,
            16 to 2^20. The work is c additions for each element of the gradients, whatever k is. (The block
            construction of Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", JACM 2014, but with one sign
            for all entries of a column.)
        out: Float32 tensor (B, k) on the gradients' device that the projection is added to, in place.
        differentiable: Records the projection for autograd (P'y is its derivative, see `project_adjoint`; torch.func
            transforms are not supported). By default nothing is recorded, even if `grads` requires grad: features that
            are kept must not keep the graph behind their gradients alive.

    Returns:
        Float32 tensor (B, k) on the gradients' device: `out` if given, else a new one.

    Raises:
        ValueError: A shape or a number is out of range, tensors disagree, or `out` is given with
            `differentiable`.
        TypeError: Something has the wrong type, dtype or layout, or has no memory (meta tensors, inside vmap).
        RuntimeError: CUDA reports an error, or the device's first `"normal"` projection is inside a graph capture.
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
        nonzeros=nonzeros,
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
    nonzeros: int | None = None,
    out: Tensor | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Computes the adjoint (transpose) of `project`: `result[b, j] = Σ_i P[i, offset + j] · y[b, i]`, unscaled.

    The adjoint carries derivatives back through a projection, and 1/k times it (`"sjlt"`: 1/nonzeros times) is an
    unbiased estimate of the gradient that was projected. Products and sums are in fp32, and the same call gives the
    same bits every time.

    Args:
        y: Projected gradients (B, k), float32, bfloat16, float16 or float64 (rounded to float32), any strides.
        grad_dim: D, the number of columns of P to go back to.
        proj_type: See `project`, as for `seed` and `model_id`.
        seed: 0 to 2^64 - 1.
        model_id: 0 to 2^32 - 1.
        offset: Column of P that belongs to the result's first column.
        nonzeros: See `project`.
        out: Float32 tensor (B, D) on the device of `y` that the result is added to, in place.
        differentiable: Records the call for autograd, see `project`.

    Returns:
        Float32 tensor (B, D) on the device of `y`: `out` if given, else a new one.

    Raises:
        ValueError: A shape or a number is out of range, or `out` is given with `differentiable`.
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
        nonzeros=nonzeros,
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
    *,
    proj_dim: int | None = None,
    nonzeros: int | None = None,
) -> Tensor:
    """Computes entries of P, one by one as the definition has them.

    Args:
        proj_type: `"rademacher"`, `"normal"` or `"sjlt"`.
        seed: 0 to 2^64 - 1.
        model_id: 0 to 2^32 - 1.
        rows: Row numbers, 0 to proj_dim - 1.
        cols: Column numbers, 0 to 2^48 - 1.
        proj_dim: k, the rows of P; needed for `"sjlt"`, whose entries depend on it. Default: 2^32.
        nonzeros: See `project`.

    Returns:
        Float32 tensor (len(rows), len(cols)) on the CPU: `P[rows[r], cols[c]]`.

    Raises:
        ValueError: A number is out of range, or `proj_dim` is missing for `"sjlt"`.
        TypeError: Something is not an integer.
    """
    if proj_dim is None and checks.kind_of(proj_type) == checks.KINDS[checks.SPARSE]:
        raise ValueError(f"proj_dim must be given for proj_type={checks.SPARSE!r}, whose entries depend on it")
    size = checks.MAX_ROWS if proj_dim is None else integer("proj_dim", proj_dim, 1, checks.MAX_ROWS)
    part = checks.matrix_part(proj_type, seed, model_id, offset=0, columns=0, proj_dim=size, nonzeros=nonzeros)
    row_numbers = indexes("rows", rows, size).astype(np.uint32)
    return kernels.matrix(part, size, row_numbers, indexes("cols", cols, checks.MAX_COLUMNS))


def _refuse_recording(differentiable: bool) -> None:
    """Refuses `differentiable` beside `out`, whose own history autograd would lose."""
    if differentiable:
        raise ValueError("out cannot be combined with differentiable=True: add the result to it instead")
