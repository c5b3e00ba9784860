"""traker's arrangement of what is stored, against traker's formulas in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attribution import CHECKPOINTS, M, N, build, run

D = 131


@pytest.mark.parametrize("proj_dim", [8, N, 20])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lambda_reg", [0, 0.3])
def test_arrays_are_those_of_traker(tmp_path: Path, proj_dim: int, half: bool, lambda_reg: float) -> None:
    """Features are X (X'X + λI)⁻¹ for X = features / √D; with λ = 0 and k > n, which traker cannot do, the
    pseudo-inverse."""
    traker = build(tmp_path, proj_dim=proj_dim, lambda_reg=lambda_reg, use_half_precision=half)
    run(traker)
    for model_id in range(len(CHECKPOINTS)):
        traker.saver.load_current_store(model_id, exp_name="test", exp_num_targets=M)
        assert traker.saver.current_model_id == model_id
        store = traker.saver.current_store
        train = traker.store.train(model_id)
        x = np.asarray(train.features, np.float64) / np.sqrt(D)
        np.testing.assert_allclose(store["grads"], x, rtol=1e-6)
        targets = np.asarray(traker.store.targets(model_id, "test").features, np.float64) / np.sqrt(D)
        np.testing.assert_allclose(store["test_grads"], targets, rtol=1e-6)
        np.testing.assert_array_equal(store["out_to_loss"], train.weights[:, None])
        np.testing.assert_array_equal(store["is_featurized"], np.ones((N, 1), np.int32))
        regularized = x @ np.linalg.inv(x.T @ x + (lambda_reg or 1) * np.eye(proj_dim))
        expected = regularized if lambda_reg else np.linalg.pinv(x).T
        difference = np.linalg.norm(store["features"] - expected)
        assert difference <= 1e-6 * np.linalg.cond(x) ** 2 * np.linalg.norm(expected)
        assert np.linalg.cond(x) < 200  # else the comparison would say nothing
        assert set(store) == {"grads", "out_to_loss", "is_featurized", "features", "test_grads"}


@pytest.mark.parametrize("proj_dim", [8, 20])
@pytest.mark.parametrize("options", [{"lambda_reg": 0}, {"lambda_reg": 0.3}, {"shrink_weights": False}])
def test_scores_made_by_hand_from_the_arrays_are_the_scores(
    tmp_path: Path, proj_dim: int, options: dict[str, Any]
) -> None:
    traker = build(tmp_path, proj_dim=proj_dim, **options)
    run(traker)
    for model_id in range(len(CHECKPOINTS)):
        scores = traker.finalize_scores("test", model_ids=[model_id])
        traker.saver.load_current_store(model_id)
        store = traker.saver.current_store
        targets = np.asarray(traker.store.targets(model_id, "test").features) / traker.normalize_factor
        by_hand = targets @ store["features"].T * store["out_to_loss"].T
        np.testing.assert_allclose(by_hand, scores.T, rtol=1e-3, atol=1e-4 * np.abs(scores).max())


def test_features_follow_the_settings_and_the_stored_samples(tmp_path: Path) -> None:
    traker = build(tmp_path, lambda_reg=0.3)
    run(traker)
    traker.saver.load_current_store(0)
    store = traker.saver.current_store
    before = store["features"]
    assert store["features"] is before  # kept, as programs ask for it again and again
    traker.lambda_reg = 30.0
    x = np.asarray(traker.store.train(0).features, np.float64) / np.sqrt(D)
    np.testing.assert_allclose(store["features"], x @ np.linalg.inv(x.T @ x + 30.0 * np.eye(8)), rtol=1e-3, atol=1e-7)
    again = build(tmp_path, lambda_reg=0.3)
    again.load_checkpoint(CHECKPOINTS[1], 0, _allow_featurizing_already_registered=True)
    assert "features" not in store
    assert not store["is_featurized"].any()
    with pytest.raises(KeyError, match="'features' are there after finalize_features"):
        store["features"]


def test_arrays_cannot_be_written_and_unknown_names_are_answered_with_those_that_exist(tmp_path: Path) -> None:
    traker = build(tmp_path)
    with pytest.raises(KeyError, match="no checkpoint is loaded"):
        traker.saver.current_store["grads"]
    assert traker.saver.model_ids == {}
    traker.load_checkpoint(CHECKPOINTS[0], 7)
    assert traker.saver.current_model_id == 7
    assert traker.saver.model_ids == {7: {"is_featurized": 0, "is_finalized": 0}}
    traker = build(tmp_path / "whole")
    run(traker)
    assert traker.saver.save_dir == traker.store.path
    assert traker.saver.model_ids == {i: {"is_featurized": 1, "is_finalized": 1} for i in range(len(CHECKPOINTS))}
    for array in traker.saver.current_store.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(KeyError, match=r"'other_grads' must be one of 'grads', .*'features', 'test_grads'"):
        traker.saver.current_store["other_grads"]
    with pytest.raises(ValueError, match=r"model_id must be one of \[0, 1\], .* not 5"):
        traker.saver.load_current_store(5)
    with pytest.raises(ValueError, match="'other' has no targets"):
        traker.saver.load_current_store(0, "other")
    with pytest.raises(ValueError, match="exp_num_targets must be 4 for exp_name 'test', not 5"):
        traker.saver.load_current_store(0, "test", 5)
    with pytest.raises(ValueError, match=r'mode must be "r" or "r\+", not \'w\+\''):
        traker.saver.load_current_store(0, mode="w+")
