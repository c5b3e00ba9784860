"""Features in few bits, against their definition in float64 and the statistics of random rotations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trak_fast.features.rotation import Rotation
from trak_fast.store.encodings import CODED, code_width, decode, encode
from trak_fast.store.rows import CodedMatrix, Rows

N, K = 7, 37


def values(seed: int = 0, scales: tuple[float, ...] = (1.0,)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, K)) * np.resize(scales, N)[:, None]


@pytest.mark.parametrize("store_dtype", CODED)
def test_a_row_s_product_with_its_encoding_is_its_squared_norm(store_dtype: str) -> None:
    rows = values()
    items, scales = encode(rows, store_dtype)
    assert items.nbytes == N * code_width(store_dtype, K) == N * (K if store_dtype == "int8" else 5)
    decoded = decode(items, scales, store_dtype, slice(None), K).astype(np.float64)
    squares = (rows**2).sum(1)
    np.testing.assert_allclose((decoded * rows).sum(1), squares, rtol=1e-6)
    np.testing.assert_allclose(scales[:, 1], squares, rtol=1e-6)


def test_signs_are_signs_and_whole_numbers_are_rounded() -> None:
    rows = values()
    items, scales = encode(rows, "1bit")
    signs = np.sign(decode(items, scales, "1bit", slice(None), K))
    np.testing.assert_array_equal(signs, np.where(rows >= 0, 1, -1))
    items, _ = encode(rows, "int8")
    np.testing.assert_array_equal(items, np.rint(rows * 127 / np.abs(rows).max(1, keepdims=True)))


@pytest.mark.parametrize("store_dtype", CODED)
def test_columns_are_decoded_by_themselves(store_dtype: str) -> None:
    items, scales = encode(values(), store_dtype)
    whole = decode(items, scales, store_dtype, slice(None), K)
    for start in (0, 1, 8, 13, K - 1):
        for stop in (start, start + 1, start + 9, K):
            part = decode(items, scales, store_dtype, slice(start, stop), K)
            np.testing.assert_array_equal(part, whole[:, start:stop])


@pytest.mark.parametrize("store_dtype", CODED)
def test_rows_of_any_scale_are_stored_and_read(store_dtype: str, tmp_path: Path) -> None:
    rows = values(scales=(1.0, 1e-60, 1e60, 0.0, 1e-30))
    shapes = {"features": (K,), "weights": ()}
    Rows.create(tmp_path / "rows", N, shapes, store_dtype)
    stored = Rows(tmp_path / "rows", N, shapes, store_dtype)
    order = np.array([4, 0, 6, 1, 3, 2, 5])
    written = stored.write(order, features=rows[order], weights=np.arange(N))
    features = stored.features
    assert isinstance(features, CodedMatrix)
    assert features.shape == (N, K)
    np.testing.assert_array_equal(features[:], stored.read("features", slice(0, N)))
    np.testing.assert_array_equal(features[order], written["features"])
    np.testing.assert_array_equal(features.T[3:20], features[:].T[3:20])
    np.testing.assert_array_equal(features[5], features[:][5])
    largest = np.abs(rows).max(1)
    with np.errstate(invalid="ignore"):
        relative = np.where(largest[:, None] > 0, rows / largest[:, None], 0)
        read = np.where(largest[:, None] > 0, features[:] / largest[:, None], 0)
    np.testing.assert_allclose((read * relative).sum(1), (relative**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(features.squared_norms, (rows**2).sum(1), rtol=1e-5)
    assert not features[3].any()
    if store_dtype == "int8":
        assert (np.abs(read - relative) <= 1 / 127).all()  # half for rounding, and the factor is not quite 1


@pytest.mark.parametrize("store_dtype", CODED)
@pytest.mark.parametrize("size", [64, 100])
def test_products_with_other_vectors_have_no_bias(store_dtype: str, size: int) -> None:
    """Also for rows of a few large numbers, whose signs alone would say next to nothing."""
    rows = np.zeros((3, size))
    rows[0, :2] = 3.0, 1.0
    rows[1, size // 2 :] = 1.0
    rows[2] = np.random.default_rng(1).standard_normal(size)
    others = np.random.default_rng(2).standard_normal((4, size))
    others[0, :2] = 2.0, 0.5
    found = []
    for seed in range(400):
        rotation = Rotation(size, seed)
        turned = rotation.apply(torch.from_numpy(rows)).numpy()
        items, scales = encode(turned, store_dtype)
        decoded = decode(items, scales, store_dtype, slice(None), size)
        found.append(decoded @ rotation.apply(torch.from_numpy(others)).numpy().T)
    expected = rows @ others.T
    error = np.std(found, axis=0) / math.sqrt(len(found))
    assert (np.abs(np.mean(found, axis=0) - expected) <= 5 * error + 1e-6).all()
    # and their noise is that of signs of random numbers: (π/2 − 1) of what projections have
    sizes = np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(others, axis=1))
    assert (np.std(found, axis=0) <= 1.5 * math.sqrt((math.pi / 2 - 1) / size) * sizes).all()
