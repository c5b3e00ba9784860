"""Checks of integers, choices and row numbers, and the errors otherwise."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
from torch import Tensor


def integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    if type(value) is int:
        number = value
    else:
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__} ({value!r})")
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, allowed is {low} to {high}")
    return number


def indexes(name: str, values: Sequence[int] | npt.NDArray[Any] | Tensor, end: int) -> npt.NDArray[np.uint64]:
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


def choice(name: str, value: object, allowed: Mapping[str, int]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}; allowed are {', '.join(allowed)}")
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
    return allowed[value]
