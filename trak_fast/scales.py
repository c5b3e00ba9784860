"""Exact powers of two by which rows of any scale come to where float32 computes with them, and back.

float32 holds 24 bits, but only of numbers within 2^-126 to 2^128, and its products and sums leave that range sooner.
Multiplying by a power of two changes no bits, so a row is given as float32 mantissas and one exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

LARGEST_FEATURE = 2.0**230
"""The largest feature that is taken. Gram matrices sum squares, and the ridge sums the squares of their entries: with
features up to here, float64 holds both for 2^52 features. Where the largest is at least 1/2^230, neither vanishes."""

Linear = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Scaled:
    """A matrix whose rows, or columns, have a power of two each.

    Attributes:
        mantissas: (h, w) floating.
        exponents: The matrix is `mantissas` with each row, or column, times 2 to the power of its exponent; int16.
    """

    mantissas: Tensor
    exponents: NDArray[np.int16]


def exponents_of(largest: ArrayLike, low: float = math.inf, high: float = 0) -> NDArray[np.int16]:
    """Returns e for each magnitude of [2^(e−1), 2^e); 0 for those in [low, high], for 0, and for those not finite."""
    numbers = np.asarray(largest, np.float64)
    stay = (numbers == 0) | ~np.isfinite(numbers) | ((numbers >= low) & (numbers <= high))
    return np.where(stay, 0, np.frexp(numbers)[1]).astype(np.int16)


def split(values: Tensor, dim: int, low: float = math.inf, high: float = 0) -> Scaled:
    """Takes a power of two out of each row (dim=1) or column (dim=0) whose largest magnitude is not in [low, high].

    Args:
        values: (h, w) float64.
        dim: The dimension in which the numbers with the same power of two lie.
        low: The smallest magnitude, zero aside, that stays.
        high: The largest magnitude that stays.

    Returns:
        The matrix with mantissas in [½, 1) at the largest of such rows or columns, in float64.
    """
    # further out, the factors themselves would leave float64's range
    exponents = exponents_of(values.abs().amax(dim).cpu().numpy(), low, high).clip(-1000, 1000)
    if exponents.any():
        values = values * powers(-exponents, values).unsqueeze(dim)
    return Scaled(values, exponents)


def joined(columns: Scaled) -> Tensor:
    """Returns a matrix whose columns have powers of two, in float64."""
    whole = columns.mantissas.double()
    return whole * powers(columns.exponents, whole)


def powers(exponents: NDArray[np.int16], like: Tensor) -> Tensor:
    """Returns 2 to the power of each exponent, which must be in the range of the dtype of `like`, on its device."""
    return torch.from_numpy(np.ldexp(1.0, exponents)).to(like.dtype).to(like.device)


def beyond_float32(largest: ArrayLike) -> NDArray[np.bool_]:
    """Tells which magnitudes float32 cannot hold with all its bits; it holds 0."""
    numbers = np.asarray(largest, np.float64)
    range_ = np.finfo(np.float32)
    bad: NDArray[np.bool_] = ~((numbers == 0) | ((numbers >= float(range_.tiny)) & (numbers <= float(range_.max))))
    return bad


def map_rows(apply: Callable[[Any], Tensor], rows: Linear) -> Tensor:
    """Applies a linear map that computes in float32 to rows of any scale.

    Rows whose largest result is in [2^-60, 2^100] stay as they are. In others, numbers may have overflowed or vanished
    on the way: these rows are multiplied by powers of two, mapped once more, and multiplied back.

    Args:
        apply: The map, of `rows` or some of them to (B, k).
        rows: (B, D), or (B, ...) by name.

    Returns:
        (B, k): what `apply` returns if all rows stay, else float64 on the CPU. Rows that are not finite stay so.
    """
    result = apply(rows)
    tensors = {"": rows} if isinstance(rows, Tensor) else rows
    count = len(next(iter(tensors.values())))
    if result.shape[:1] != (count,) or not result.numel() or not result.is_floating_point():
        return result  # not a map's result: the caller's to refuse
    largest = _largest(result)
    chosen = np.flatnonzero(~((largest >= 2.0**-60) & (largest <= 2.0**100)))
    if not len(chosen):
        return result
    sizes = np.max([_largest(_rows(tensor, chosen)) for tensor in tensors.values()], axis=0)
    good = np.isfinite(sizes) & (sizes > 0)
    chosen, exponents = chosen[good], exponents_of(sizes[good])
    if not len(chosen):
        return result
    scaled = {name: _divided(_rows(tensor, chosen), exponents) for name, tensor in tensors.items()}
    again = apply(scaled[""] if isinstance(rows, Tensor) else scaled).detach().cpu().double().numpy()
    wide = result.detach().cpu().double()
    with np.errstate(over="ignore"):  # beyond float64, which the caller sees
        wide[torch.from_numpy(chosen)] = torch.from_numpy(np.ldexp(again, exponents[:, None]))
    return wide


def _rows(tensor: Tensor, chosen: NDArray[np.intp]) -> Tensor:
    """Copies some rows of a tensor."""
    return tensor.detach()[torch.from_numpy(chosen).to(tensor.device)]


def _largest(rows: Tensor) -> NDArray[np.float64]:
    """Returns the largest magnitude of each row (B, ...), or NaN where one is."""
    flat = rows.detach().reshape(len(rows), -1)
    if not flat.shape[1]:
        return np.zeros(len(rows))
    # two passes, but no copy of absolute values
    return cast(NDArray[np.float64], torch.maximum(flat.amax(1), -flat.amin(1)).cpu().double().numpy())


def _divided(rows: Tensor, exponents: NDArray[np.int16]) -> Tensor:
    """Divides rows by powers of two, in place if they are float32 or float64; smaller dtypes become float32."""
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    limit = 126 if wide.dtype == torch.float32 else 1000  # within which no factor overflows; float32 needs no more
    first = -exponents // 2
    for part in (first, -exponents - first):
        wide.mul_(powers(part.clip(-limit, limit), wide).reshape(-1, *[1] * (wide.ndim - 1)))
    return wide
