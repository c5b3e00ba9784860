"""The projection matrix (definition 1) and the projection, slow and readable.

This file is the second, independent statement of what the compiled kernels compute: the tests compare the two. It
imports nothing from the package, and is written for the reader, not for speed.

`y = P g`: `g` holds one sample's D values, one for each column of P, and `y` its k projected values. Every entry
`P[i, j]` is a pure function of `(proj_type, seed, stream, i, j)`. `stream` is the public `model_id`.
"""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOW_32_BITS = np.uint64(0xFFFFFFFF)

TAGS = {"rademacher": 0, "normal": 1, "places": 2, "signs": 3}
"""Number of each kind of matrix in Philox's counter, so that no two kinds share a call; the sparse kind has two."""

COLUMNS_PER_BLOCK = {"rademacher": 512, "normal": 32}
"""Columns of one row that the four calls of Philox with the same block number serve."""


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Computes Philox4x32-10, a counter-based generator of 128 random bits a call.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.

    Args:
        counter: (..., 4) integers below 2^32.
        key: (2,) integers below 2^32.

    Returns:
        (..., 4) uint32, the four output words of each counter.
    """
    # Words are kept in 64 bits, so that a product of two words has room for its high half.
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = (int(word) for word in np.asarray(key, dtype=np.uint64))
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c1 = product1 & LOW_32_BITS
        c2 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c3 = product0 & LOW_32_BITS
        k0 = (k0 + 0x9E3779B9) % 2**32  # the golden ratio
        k1 = (k1 + 0xBB67AE85) % 2**32  # sqrt(3) - 1
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


@functools.cache
def normal_table() -> NDArray[np.float32]:
    """Makes the 65,536 values of the normal kind: equiprobable quantiles of mean 0, variance 1, rounded to bfloat16.

    Returns:
        (65536,) float32, increasing; read-only, because all calls return the same array.
    """
    quantile = NormalDist().inv_cdf
    z = np.array([quantile((u + 0.5) / 65536) for u in range(65536)])
    z = (z - z[::-1]) / 2  # exactly antisymmetric
    z /= np.sqrt(np.mean(z**2))
    # Rounded to float32 and from there to bfloat16 (8 significant bits), ties to even both times. Rounding once would
    # change one pair of entries (u = 8593, 56942); the golden values, which are the definition, were rounded twice.
    mantissa, exponent = np.frexp(z.astype(np.float32))
    table: NDArray[np.float32] = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8).astype(np.float32)
    table.setflags(write=False)
    return table


def matrix(
    proj_type: str,
    seed: int,
    stream: int,
    rows: ArrayLike,
    cols: ArrayLike,
    proj_dim: int | None = None,
    nonzeros: int = 4,
) -> NDArray[np.float32]:
    """Returns the entries `P[i, j]` for all `i` of `rows` and all `j` of `cols`.

    Args:
        proj_type: "rademacher" (entries ±1), "normal" (entries of `normal_table`) or "sjlt" (`nonzeros` entries ±1 in
            each column, the rest 0).
        seed: 0 to 2^64 - 1.
        stream: 0 to 2^32 - 1.
        rows: (r,) row numbers, 0 to 2^32 - 1, in any order.
        cols: (c,) column numbers, 0 to 2^53 - 1, in any order.
        proj_dim: The number of rows of P, on which "sjlt" depends.
        nonzeros: Entries in each column of "sjlt".

    Returns:
        (r, c) float32.
    """
    i = np.asarray(rows, dtype=np.uint64)
    j = np.asarray(cols, dtype=np.uint64)
    if proj_type == "sjlt":
        assert proj_dim is not None
        places = sparse_rows(seed, stream, j, proj_dim, nonzeros)
        signs = sparse_signs(seed, stream, j)
        sparse: NDArray[np.float32] = (signs * (i[:, None, None] == places).any(axis=1)).astype(np.float32)
        return sparse

    # One call of Philox serves one row, one block of columns and one t. Make each call once.
    t = j % np.uint64(8) // np.uint64(2)
    block = j // np.uint64(COLUMNS_PER_BLOCK[proj_type])
    calls, call_of_column = np.unique(np.stack([block, t]), axis=1, return_inverse=True)
    call_of_column = call_of_column.reshape(-1)
    block, t = calls

    counter = np.empty((i.size, t.size, 4), dtype=np.uint64)
    counter[..., 0] = block & LOW_32_BITS
    counter[..., 1] = i[:, None]
    counter[..., 2] = t | np.uint64(TAGS[proj_type] << 8) | (block >> np.uint64(32)) << np.uint64(16)
    counter[..., 3] = stream
    words = philox4x32(counter, (seed % 2**32, seed >> 32)).reshape(i.size, 4 * t.size)

    entries: NDArray[np.float32]
    if proj_type == "rademacher":
        v = j % np.uint64(512) // np.uint64(128)
        slice_of_16 = j % np.uint64(128) // np.uint64(16)
        half_of_slice = j % np.uint64(16) // np.uint64(8)
        bit = np.uint64(16) * (j % np.uint64(2)) + np.uint64(2) * slice_of_16 + half_of_slice
        word = words[:, 4 * call_of_column + v.astype(np.intp)]
        negative = (word >> bit.astype(np.uint32)) & np.uint32(1)
        entries = 1 - 2 * negative.astype(np.float32)
    else:
        v = np.uint64(2) * (j % np.uint64(32) // np.uint64(16)) + j % np.uint64(16) // np.uint64(8)
        word = words[:, 4 * call_of_column + v.astype(np.intp)]
        shift = np.uint64(16) * (j % np.uint64(2))
        u = (word >> shift.astype(np.uint32)) & np.uint32(0xFFFF)
        entries = normal_table()[u]
    return entries


def sparse_rows(seed: int, stream: int, cols: NDArray[np.uint64], proj_dim: int, nonzeros: int) -> NDArray[np.uint64]:
    """Returns the rows of the entries of the sparse kind, one in each block of K = proj_dim / nonzeros rows.

    Source: Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", JACM 2014, the block construction; here the
    K columns of a chunk meet the K rows of a block by a permutation.

    Returns:
        (nonzeros, len(cols)) uint64.
    """
    K = proj_dim // nonzeros
    chunk, x = np.divmod(cols, np.uint64(K))
    rows = np.empty((nonzeros, cols.size), dtype=np.uint64)
    for q in range(nonzeros):
        counter = np.zeros((cols.size, 4), dtype=np.uint64)
        counter[:, 0] = chunk & LOW_32_BITS
        counter[:, 1] = q
        counter[:, 2] = np.uint64(TAGS["places"] << 8) | (chunk >> np.uint64(32)) << np.uint64(16)
        counter[:, 3] = stream
        words = philox4x32(counter, (seed % 2**32, seed >> 32)).astype(np.uint64)
        rows[q] = np.uint64(q * K) + ((words[:, 0] | np.uint64(1)) * x + words[:, 1]) % np.uint64(K)
    return rows


def sparse_signs(seed: int, stream: int, cols: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns the sign of each column of the sparse kind, the same in all blocks: (len(cols),), +1 or -1."""
    n = cols // np.uint64(128)
    counter = np.zeros((cols.size, 4), dtype=np.uint64)
    counter[:, 0] = n & LOW_32_BITS
    counter[:, 2] = np.uint64(TAGS["signs"] << 8) | (n >> np.uint64(32)) << np.uint64(16)
    counter[:, 3] = stream
    words = philox4x32(counter, (seed % 2**32, seed >> 32))
    word = np.take_along_axis(words, (cols % np.uint64(128) // np.uint64(32)).astype(np.intp)[:, None], axis=1)[:, 0]
    signs: NDArray[np.int64] = 1 - 2 * ((word >> (cols % np.uint64(32)).astype(np.uint32)) & np.uint32(1)).astype(
        np.int64
    )
    return signs


def project(
    grads: NDArray[Any],
    proj_dim: int,
    proj_type: str = "rademacher",
    seed: int = 0,
    stream: int = 0,
    offset: int = 0,
    nonzeros: int = 4,
) -> NDArray[np.float64]:
    """Computes `y = P g` for each row `g` of `grads`, in double precision.

    Args:
        grads: (B, D) numbers.
        proj_dim: k, the number of rows of P.
        proj_type: As in `matrix`.
        seed: As in `matrix`.
        stream: As in `matrix`.
        offset: The column of P that the first column of `grads` meets.
        nonzeros: As in `matrix`.

    Returns:
        (B, k) float64.
    """
    batch, grad_dim = grads.shape
    result = np.zeros((batch, proj_dim))
    step = max(512, 2**24 // proj_dim)  # 128 MB of matrix at a time
    for start in range(0, grad_dim, step):
        stop = min(start + step, grad_dim)
        columns = np.arange(offset + start, offset + stop, dtype=np.uint64)
        entries = matrix(proj_type, seed, stream, np.arange(proj_dim), columns, proj_dim, nonzeros)
        result += grads[:, start:stop].astype(np.float64) @ entries.astype(np.float64).T
    return result
