"""Features in fewer bits: whole numbers of eight bits, or signs, with a factor for each row.

A row φ is kept as codes c and the factor s = ‖φ‖²/c'φ. Its product with any vector then has no bias as long as φ was
rotated at random before: of s c, the part along φ is φ, and the rest is noise that knows nothing of the vector (Gao and
Long, "RaBitQ", SIGMOD 2024).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORE_DTYPES = ("float32", "float16", "int8", "1bit")
"""The ways to store a number of a training feature."""

CODED = ("int8", "1bit")
"""Those of them that take few bits."""

LARGEST_CODE = 127
"""The largest whole number of eight bits that is used; the smallest is its negative."""


def code_width(store_dtype: str, width: int) -> int:
    """Counts the stored items of a row of `width` numbers."""
    return -(-width // 8) if store_dtype == "1bit" else width


def item_type(store_dtype: str) -> type[np.generic]:
    """Returns the type of a stored item."""
    types: dict[str, type[np.generic]] = {
        "float32": np.float32,
        "float16": np.float16,
        "int8": np.int8,
        "1bit": np.uint8,
    }
    return types[store_dtype]


def encode(rows: NDArray[Any], store_dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Encodes rows.

    Args:
        rows: (B, k) float32 or float64, the largest number of each row of about 1, or 0.
        store_dtype: "int8" or "1bit".

    Returns:
        The items, (B, k) int8 or (B, ⌈k/8⌉) uint8, and for each row its factor and its squared norm, (B, 2) float32.
    """
    rows = np.asarray(rows, np.float64)
    if store_dtype == "int8":
        largest = np.abs(rows).max(axis=1, initial=0)
        items: NDArray[Any] = np.rint(rows * (LARGEST_CODE / np.where(largest == 0, 1, largest))[:, None]).astype(
            np.int8
        )
        codes = items.astype(np.float64)
    else:
        items = np.packbits(rows >= 0, axis=1)
        codes = np.where(rows >= 0, 1.0, -1.0)
    squares = (rows**2).sum(axis=1)
    products = (codes * rows).sum(axis=1)
    factors = np.divide(squares, products, out=np.zeros_like(squares), where=products > 0)
    return items, np.stack([factors, squares], axis=1).astype(np.float32)


def decode(
    items: NDArray[Any], scales: NDArray[np.float32], store_dtype: str, columns: slice, width: int
) -> NDArray[np.float32]:
    """Decodes columns [start, stop) of rows.

    Args:
        items: (B, ...) all items of the rows.
        scales: (B, 2) factor and squared norm of each row.
        store_dtype: "int8" or "1bit".
        columns: The columns.
        width: Numbers of a row, k.

    Returns:
        (B, stop − start) float32.
    """
    start, stop, _ = columns.indices(width)
    if store_dtype == "int8":
        codes = items[:, start:stop].astype(np.float32)
    else:
        first = start // 8
        bits = np.unpackbits(items[:, first : -(-stop // 8)], axis=1)[:, start - 8 * first : stop - 8 * first]
        codes = bits.astype(np.float32)
        codes *= 2
        codes -= 1
    codes *= scales[:, :1]
    return codes
