"""Exported vectors, whose inner products in float64 are the scores."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attribution import M, N, build, run

from trak_fast import TRAKer
from trak_fast.scoring import estimator, gram

EPS = 2.0**-24


def require_scores(traker: TRAKer, folder: Path, model_ids: list[int] | None = None) -> None:
    """Checks products of the vectors in float64 against scores.

    Both round features and solved systems to float32, and scores are float32 sums of that many products.
    """
    scores = np.asarray(traker.finalize_scores("test", model_ids), np.float64)
    train, targets = (np.asarray(x, np.float64) for x in traker.export_vectors("test", folder, model_ids))
    width = traker.proj_dim * (2 if model_ids is None else len(model_ids))
    assert (train.shape, targets.shape) == ((N, width), (M, width))
    bound = (width + 6) * EPS * np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(targets, axis=1)
    assert bound.max() < 1e-2 * np.abs(scores).max()  # else the comparison would say nothing
    assert (np.abs(train @ targets.T - scores) <= bound).all()


@pytest.mark.parametrize("proj_dim", [8, 20])
@pytest.mark.parametrize("options", [
    {}, {"curvature": False}, {"lambda_reg": 0.3}, {"lambda_reg": 0}, {"lambda_reg": math.inf}, {"normalize": True},
    {"store_dtype": "float16"}, {"store_dtype": "int8"}, {"store_dtype": "int8", "normalize": True},
    {"store_dtype": "1bit", "lambda_reg": math.inf},
])  # fmt: skip
def test_products_of_the_vectors_are_the_scores(tmp_path: Path, proj_dim: int, options: dict[str, Any]) -> None:
    traker = build(tmp_path / "store", proj_dim=proj_dim, **options)
    run(traker)
    require_scores(traker, tmp_path / "new" / "vectors")
    require_scores(traker, tmp_path / "new" / "vectors", [1])  # in place of the others


def test_vectors_are_made_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of few rows, and the curvature of some samples alone."""
    traker = build(tmp_path / "store", proj_dim=20)
    run(traker)
    train, targets = traker.export_vectors("test", tmp_path / "whole")
    monkeypatch.setattr(gram, "BLOCK_BYTES", 8 * 20 * 3)
    again = traker.export_vectors("test", tmp_path / "blocks")
    np.testing.assert_allclose(again[0], train, rtol=1e-6)
    np.testing.assert_allclose(again[1], targets, rtol=1e-5, atol=1e-6 * np.abs(targets).max())
    monkeypatch.setattr(estimator, "LARGEST_SYSTEM", 7)
    other = build(tmp_path / "other", proj_dim=20, lambda_reg=0.3)
    run(other)
    require_scores(other, tmp_path / "subset")


def test_files_are_arrays_that_numpy_reads(tmp_path: Path) -> None:
    traker = build(tmp_path / "store")
    run(traker)
    arrays = traker.export_vectors("test", tmp_path)
    for name, array in zip(("train", "targets"), arrays, strict=True):
        stored = np.load(tmp_path / f"{name}.npy")
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored, array)
        assert not array.flags.writeable
    assert sorted(path.name for path in tmp_path.glob("*") if path.is_file()) == ["targets.npy", "train.npy"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    traker = build(tmp_path / "store")
    run(traker)
    with pytest.raises(ValueError, match="other"):
        traker.export_vectors("other", tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()


def test_vectors_beyond_float32_are_refused(tmp_path: Path) -> None:
    """With a ridge of 1e42 they, and scores, are some 1e-42."""
    traker = build(tmp_path / "store")
    run(traker)
    traker.lambda_reg = 1e42
    with pytest.raises(ValueError, match=r"largest number of a vector must be 0 or in \[1.18e-38, 3.4e\+38\], not"):
        traker.export_vectors("test", tmp_path / "vectors")
    assert not list((tmp_path / "vectors").iterdir())
