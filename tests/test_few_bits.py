"""Scores of features in few bits, inner products as scores, and candidates that are scored again exactly."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_sided_reference as definition
from language_models import B, Language, texts
from numpy.typing import NDArray
from torch import Tensor

from trak_fast import HookGradientComputer, TRAKer
from trak_fast.scoring import estimator
from trak_fast.tasks import CausalLM

EPS = 2.0**-24
TERMS = 2000
K = 64


def attribute(
    folder: Path, batch: list[Tensor], targets: list[Tensor], **options: Any
) -> tuple[TRAKer, dict[str, Tensor], NDArray[np.float64]]:
    """Attributes texts to others with a small model, without a metric unless it is asked for."""
    torch.manual_seed(5)
    model = Language(tied=False)
    state = copy.deepcopy(model.state_dict())
    traker = TRAKer(model, "causal_lm", B, folder, **{"metric": None, "proj_dim": K, **options})
    traker.load_checkpoint(state, 0)
    traker.featurize(batch, num_samples=B)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", state, 0, num_targets=B)
    traker.score(targets, num_samples=B)
    return traker, state, np.array(traker.finalize_scores("test"), np.float64)


def gradients(state: dict[str, Tensor], batch: list[Tensor]) -> NDArray[np.float64]:
    """Computes whole gradients, (B, D), one after the other in float64."""
    model = Language(tied=False).double()
    model.load_state_dict(state)
    return definition.flattened(definition.gradients_alone(model, CausalLM(), batch))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("store_dtype", ["float32", "float16", "int8", "1bit"])
def test_with_an_infinite_ridge_scores_are_inner_products(tmp_path: Path, store_dtype: str, normalize: bool) -> None:
    batch, targets = texts(), texts()
    options: dict[str, Any] = {"lambda_reg": math.inf, "store_dtype": store_dtype, "normalize": normalize}
    traker, _, scores = attribute(tmp_path, batch, targets, **options)
    features = np.asarray(traker.store.train(0).features[:], np.float64)
    aims = np.asarray(traker.store.targets(0, "test").features[:], np.float64)
    weights = np.array(traker.store.train(0).weights, np.float64)
    if normalize:
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        aims /= np.linalg.norm(aims, axis=1, keepdims=True)
    expected = weights[:, None] * (features @ aims.T) / (features**2).sum(1).mean()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=K * 10 * EPS * np.abs(expected).max())
    influence = traker.self_influence()
    own = weights * (features**2).sum(1) / (features**2).sum(1).mean()
    np.testing.assert_allclose(influence, own, rtol=1e-5)
    traker.lambda_reg = 1.0  # which needs the matrix that was not formed before
    changed = np.array(traker.finalize_scores("test"))
    assert np.isfinite(changed).all()
    assert not np.allclose(changed, scores)


def test_a_ridge_after_inner_products_is_that_from_the_start(tmp_path: Path) -> None:
    batch, targets = texts(), texts()
    traker, _, _ = attribute(tmp_path / "late", batch, targets, lambda_reg=math.inf)
    traker.lambda_reg = 0.5
    late = np.array(traker.finalize_scores("test"))
    _, _, early = attribute(tmp_path / "early", batch, targets, lambda_reg=0.5)
    np.testing.assert_allclose(late, early, rtol=1e-5, atol=1e-6 * np.abs(early).max())


@pytest.mark.parametrize(("store_dtype", "bits"), [("float32", 32), ("float16", 16), ("int8", 8), ("1bit", 1)])
def test_bytes_on_disk(tmp_path: Path, store_dtype: str, bits: int) -> None:
    batch = texts()
    traker, _, _ = attribute(tmp_path, batch, batch, store_dtype=store_dtype, proj_dim=1024)
    header = 128
    size = (traker.store.checkpoint(0) / "train/features.npy").stat().st_size
    assert size == B * 1024 * bits // 8 + header


@pytest.mark.parametrize("lambda_reg", [math.inf, 1.0, "auto"])
@pytest.mark.parametrize("store_dtype", ["int8", "1bit"])
def test_scores_of_few_bits_are_those_of_float32_but_for_noise(
    tmp_path: Path, store_dtype: str, lambda_reg: float | str
) -> None:
    batch, targets = texts(), texts()
    size = 16384
    _, _, exact = attribute(tmp_path / "float32", batch, targets, proj_dim=size, lambda_reg=lambda_reg)
    options: dict[str, Any] = {"proj_dim": size, "lambda_reg": lambda_reg, "store_dtype": store_dtype}
    traker, _, found = attribute(tmp_path / "few", batch, targets, **options)
    features = traker.store.train(0).features
    norms = np.sqrt(features.squared_norms)
    aims = np.linalg.norm(np.asarray(traker.store.targets(0, "test").features[:]), axis=1)
    weights = np.array(traker.store.train(0).weights, np.float64)
    scale = (norms**2).mean()
    # the noise of a sign, (π/2 − 1)/k of the squared norms, or of rounding to 1/127 of the largest of k numbers
    noise = math.sqrt((math.pi / 2 - 1) / size) if store_dtype == "1bit" else 5 / 127 / math.sqrt(12 * size)
    bound = 6 * noise * np.outer(weights * norms, aims) / scale
    if lambda_reg == math.inf:
        assert (np.abs(found * (scale / scale) - exact * _mean_ratio(found, exact)) <= bound).all()
    else:  # the inverse of X'X, whose smallest eigenvalues are λ, multiplies it
        assert np.abs(found - exact).max() <= 0.1 * np.abs(exact).max()
    assert not np.array_equal(found, exact)


def _mean_ratio(found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """Fits the factor between scores that are divided by mean squares of their own features."""
    return float((found * exact).sum() / (exact**2).sum())


@pytest.mark.parametrize("store_dtype", ["float32", "1bit"])
def test_parts_of_tokens_are_those_of_features_that_are_not_rounded(tmp_path: Path, store_dtype: str) -> None:
    """The rotation before signs are taken does not show."""
    batch, targets = texts(), texts()
    traker, state, _ = attribute(tmp_path, batch, targets, lambda_reg=math.inf, store_dtype=store_dtype)
    traker.load_checkpoint(state, 0)
    parts = traker.token_scores("test", 1, batch, range(B)).sum(1)
    plain, _, scores = attribute(tmp_path / "plain", batch, targets, lambda_reg=math.inf)
    mean = (np.asarray(plain.store.train(0).features[:], np.float64) ** 2).sum(1).mean()
    own = (np.asarray(traker.store.train(0).features[:], np.float64) ** 2).sum(1).mean()
    np.testing.assert_allclose(parts * own, scores[:, 1] * mean, rtol=0, atol=TERMS * EPS * np.abs(scores).max() * mean)


@pytest.mark.parametrize("store_dtype", ["float32", "int8", "1bit"])
def test_reranked_inner_products_are_those_of_whole_gradients(tmp_path: Path, store_dtype: str) -> None:
    batch, targets = texts(), texts()
    traker, state, _ = attribute(tmp_path, batch, targets, lambda_reg=math.inf, store_dtype=store_dtype)
    train, aims = gradients(state, batch), gradients(state, targets)
    weights = np.array(traker.store.train(0).weights, np.float64)
    mean = (np.asarray(traker.store.train(0).features[:], np.float64) ** 2).sum(1).mean()
    inds = [3, 0, 4]
    for target in range(B):
        found = traker.rerank("test", target, [x[target : target + 1] for x in targets], [x[inds] for x in batch], inds)
        expected = weights[inds] * K * (train[inds] @ aims[target]) / mean
        sizes = weights[inds] * K * np.linalg.norm(train[inds], axis=1) * np.linalg.norm(aims[target]) / mean
        assert (np.abs(found - expected) <= TERMS * EPS * sizes).all()


@pytest.mark.parametrize("proj_dim", [4, 64])  # k ≤ n, and k > n
def test_reranked_scores_with_an_inverse_have_exact_products_in_them(tmp_path: Path, proj_dim: int) -> None:
    batch, targets = texts(), texts()
    traker, state, scores = attribute(tmp_path, batch, targets, lambda_reg=0.3, proj_dim=proj_dim)
    features = np.asarray(traker.store.train(0).features[:], np.float64)
    aims = np.asarray(traker.store.targets(0, "test").features[:], np.float64)
    weights = np.array(traker.store.train(0).weights, np.float64)
    ridge = 0.3 * traker.grad_dim
    exact = proj_dim * gradients(state, batch) @ gradients(state, targets).T
    expected = scores + weights[:, None] * (exact - features @ aims.T) / ridge
    for target in range(B):
        found = traker.rerank("test", target, [x[target : target + 1] for x in targets], batch, range(B))
        size = np.abs(exact).max() / ridge + np.abs(scores).max()
        assert np.abs(found - expected[:, target]).max() <= TERMS * EPS * size


def test_reranked_scores_of_sketches_are_those_of_whole_gradients(tmp_path: Path) -> None:
    """Those of blocks that are not projected have E‖φ‖² = ‖g‖²."""
    batch, targets = texts(), texts()
    options: dict[str, Any] = {"lambda_reg": math.inf, "sketch": "two_sided", "sketch_side": 4, "proj_dim": 0}
    traker, state, _ = attribute(tmp_path, batch, targets, **options)
    mean = (np.asarray(traker.store.train(0).features[:], np.float64) ** 2).sum(1).mean()
    weights = np.array(traker.store.train(0).weights, np.float64)
    exact = gradients(state, batch) @ gradients(state, targets)[2]
    found = traker.rerank("test", 2, [x[2:3] for x in targets], batch, range(B))
    np.testing.assert_allclose(found, weights * exact / mean, rtol=0, atol=TERMS * EPS * np.abs(exact).max() / mean)


def test_rerank_refuses_what_it_cannot_compute(tmp_path: Path) -> None:
    batch, targets = texts(), texts()
    one = [x[:1] for x in targets]
    traker, _, _ = attribute(tmp_path / "plain", batch, targets, lambda_reg=0)
    with pytest.raises(ValueError, match="lambda_reg must not be 0"):
        traker.rerank("test", 0, one, batch, range(B))
    traker.lambda_reg = math.inf
    traker.normalize = True
    with pytest.raises(ValueError, match="normalize must be False"):
        traker.rerank("test", 0, one, batch, range(B))
    traker.normalize = False
    with pytest.raises(ValueError, match="samples"):
        traker.rerank("test", 0, one, targets, range(B))
    with pytest.raises(ValueError, match="samples"):
        traker.rerank("test", 1, one, batch, range(B))
    with pytest.raises(ValueError, match="target must be one sample"):
        traker.rerank("test", 0, targets, batch, range(B))
    with pytest.raises(ValueError, match="target must be in"):
        traker.rerank("test", B, one, batch, range(B))
    fresh = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / "plain", metric=None, proj_dim=K)
    with pytest.raises(RuntimeError, match="before rerank"):
        fresh.rerank("test", 0, one, batch, range(B))
    hooks = TRAKer(
        Language(tied=False), "causal_lm", B, tmp_path / "hooks", proj_dim=K, gradient_computer=HookGradientComputer
    )
    with pytest.raises(ValueError, match="must be left out"):
        hooks.rerank("test", 0, one, batch, range(B))


def test_norms_of_signs_do_not_lengthen_the_diagonal_of_the_kernel(tmp_path: Path) -> None:
    batch = texts()
    traker, _, _ = attribute(tmp_path, batch, batch, store_dtype="1bit", lambda_reg=1.0)
    plain, _, _ = attribute(tmp_path / "plain", batch, batch, lambda_reg=1.0)
    kernel = np.load(traker.store.checkpoint(0) / "gram.npy")[0]
    features = np.asarray(plain.store.train(0).features[:], np.float64)
    np.testing.assert_allclose(np.diag(kernel), (features**2).sum(1), rtol=1e-5)


@pytest.mark.parametrize("store_dtype", ["float32", "int8"])
def test_large_systems_take_the_curvature_of_some_samples(
    tmp_path: Path, store_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, targets = texts(), texts()
    options: dict[str, Any] = {"lambda_reg": 0.3, "store_dtype": store_dtype}
    monkeypatch.setattr(estimator, "LARGEST_SYSTEM", B - 1)
    traker, _, found = attribute(tmp_path / "subset", batch, targets, **options)
    features = np.asarray(traker.store.train(0).features[:], np.float64)
    aims = np.asarray(traker.store.targets(0, "test").features[:], np.float64)
    chosen = np.linspace(0, B - 1, B - 1).astype(int)
    assert np.load(traker.store.checkpoint(0) / "gram.npy").shape == (1, B - 1, B - 1)
    curvature = B / (B - 1) * features[chosen].T @ features[chosen]
    weights = np.array(traker.store.train(0).weights, np.float64)
    inverse = np.linalg.inv(curvature + 0.3 * traker.grad_dim * np.eye(K))
    expected = weights[:, None] * (features @ inverse @ aims.T)
    tolerance = 1e-4 if store_dtype == "float32" else 0.02  # whose diagonal is that before rounding
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    traker.lambda_reg = 0
    with pytest.raises(ValueError, match="lambda_reg must be more than 0"):
        traker.finalize_scores("test")
