"""Checks of the numbers and batches that callers give."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = Sequence[int] | NDArray[np.integer] | Tensor


def integer(name: str, value: int, low: int = 1, high: int = 2**48) -> int:
    """`value` as a Python integer.

    Raises:
        TypeError: It is no integer.
        ValueError: It is not in [low, high].
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= operator.index(value) <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], not {value}")
    return operator.index(value)


def row_numbers(
    batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None, following: int, num_rows: int
) -> tuple[NDArray[np.intp], int]:
    """The rows that a batch goes to.

    Args:
        batch: Tensors (B, ...).
        inds: (B,) the rows, or None.
        num_samples: B, or None; one of these two is given.
        following: The first row if it is `num_samples`.
        num_rows: Rows that there are.

    Returns:
        (B,) the rows, and the row that follows them if they were given by `num_samples`, else `following`.

    Raises:
        TypeError, ValueError: something does not fit.
    """
    if isinstance(batch, Tensor) or not all(isinstance(x, Tensor) and x.ndim > 0 for x in batch):
        raise TypeError(f"batch must be a sequence of tensors (B, ...), not {type(batch).__name__}")
    if (inds is None) == (num_samples is None):
        raise ValueError("give either inds or num_samples")
    if num_samples is not None:
        rows = np.arange(following, following + integer("num_samples", num_samples))
        following += len(rows)
    else:
        rows = np.asarray(inds.cpu() if isinstance(inds, Tensor) else inds).reshape(-1)
        if rows.size and not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(f"inds must be integers, not {rows.dtype}")
    if any(len(x) != len(rows) for x in batch):
        raise ValueError(
            f"batch has {[len(x) for x in batch]} samples in its tensors, "
            f"{'inds' if num_samples is None else 'num_samples'} says {len(rows)}"
        )
    if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:
        raise ValueError(f"samples {rows.min()} to {rows.max()} are not all in [0, {num_rows})")
    if len(np.unique(rows)) != len(rows):
        raise ValueError("inds has the same number twice")
    return rows.astype(np.intp), following
