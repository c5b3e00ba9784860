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
    stored = traker.store.train(0).features
    squares = getattr(stored, "squared_norms", (features**2).sum(1))
    if normalize:
        features /= np.sqrt(squares)[:, None]
        aims /= np.linalg.norm(aims, axis=1, keepdims=True)
    expected = weights[:, None] * (features @ aims.T) / (1 if normalize else squares.mean())
    np.testing.assert_allclose(scores, expected, rtol=0, atol=K * 10 * EPS * np.abs(expected).max())
    own = weights * squares / squares.mean() if not normalize else weights
    np.testing.assert_allclose(traker.self_influence(), own, rtol=1e-5)


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
    traker, _, _ = attribute(tmp_path, batch, batch, store_dtype=store_dtype, proj_dim=1024, lambda_reg=math.inf)
    header = 128
    size = (traker.store.checkpoint(0) / "train/features.npy").stat().st_size
    assert size == B * 1024 * bits // 8 + header


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("store_dtype", ["int8", "1bit"])
def test_scores_of_few_bits_are_those_of_float32_but_for_noise(
    tmp_path: Path, store_dtype: str, normalize: bool
) -> None:
    batch, targets = texts(), texts()
    size = 16384
    options: dict[str, Any] = {"proj_dim": size, "lambda_reg": math.inf, "normalize": normalize}
    plain, _, exact = attribute(tmp_path / "float32", batch, targets, **options)
    traker, _, found = attribute(tmp_path / "few", batch, targets, store_dtype=store_dtype, **options)
    norms = np.linalg.norm(np.asarray(plain.store.train(0).features[:], np.float64), axis=1)
    aims = np.linalg.norm(np.asarray(plain.store.targets(0, "test").features[:], np.float64), axis=1)
    sizes = np.ones((B, B)) if normalize else np.outer(norms, aims) / (norms**2).mean()
    weights = np.array(traker.store.train(0).weights, np.float64)
    # the noise of a sign, (π/2 − 1)/k of the squared norms, or of rounding to 1/127 of the largest of k numbers
    noise = math.sqrt((math.pi / 2 - 1) / size) if store_dtype == "1bit" else 5 / 127 / math.sqrt(12 * size)
    assert (np.abs(found - exact) <= 6 * noise * weights[:, None] * sizes).all()
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(traker.self_influence(), plain.self_influence(), rtol=1e-4)


@pytest.mark.parametrize("proj_dim", [4, 64])  # k ≤ n, and k > n
@pytest.mark.parametrize("lambda_reg", [0.01, "auto"])
def test_whole_numbers_of_eight_bits_are_inverted_as_float32_is(
    tmp_path: Path, proj_dim: int, lambda_reg: float | str
) -> None:
    batch, targets = texts(), texts()
    options: dict[str, Any] = {"proj_dim": proj_dim, "lambda_reg": lambda_reg}
    _, _, exact = attribute(tmp_path / "float32", batch, targets, **options)
    traker, _, found = attribute(tmp_path / "few", batch, targets, store_dtype="int8", **options)
    features = np.asarray(traker.store.train(0).features[:], np.float64)
    amplified = np.linalg.norm(features, 2) ** 2 / (traker.grad_dim * 0.01) if lambda_reg != "auto" else 10
    assert np.abs(found - exact).max() <= amplified * 2 / 127 * np.abs(exact).max()
    assert not np.array_equal(found, exact)


def test_signs_are_not_inverted(tmp_path: Path) -> None:
    batch, targets = texts(), texts()
    with pytest.raises(ValueError, match='store_dtype must be "int8", "float16" or "float32" where X\'X is inverted'):
        TRAKer(Language(), "causal_lm", B, tmp_path / "early", metric=None, proj_dim=K, store_dtype="1bit")
    traker, _, _ = attribute(tmp_path / "late", batch, targets, store_dtype="1bit", lambda_reg=math.inf)
    traker.lambda_reg = "auto"
    with pytest.raises(ValueError, match=r"lambda_reg=math\.inf inverts nothing"):
        traker.finalize_scores("test")


@pytest.mark.parametrize("store_dtype", ["float32", "1bit"])
def test_parts_of_tokens_are_those_of_features_that_are_not_rounded(tmp_path: Path, store_dtype: str) -> None:
    """The rotation before signs are taken does not show."""
    batch, targets = texts(), texts()
    traker, state, _ = attribute(tmp_path, batch, targets, lambda_reg=math.inf, store_dtype=store_dtype)
    traker.load_checkpoint(state, 0)
    parts = traker.token_scores("test", 1, batch, range(B)).sum(1)
    plain, _, scores = attribute(tmp_path / "plain", batch, targets, lambda_reg=math.inf)
    assert plain.store.train(0).features.dtype == np.float32
    np.testing.assert_allclose(parts, scores[:, 1], rtol=0, atol=TERMS * EPS * np.abs(scores).max())


@pytest.mark.parametrize("store_dtype", ["float32", "int8", "1bit"])
def test_reranked_inner_products_are_those_of_whole_gradients(tmp_path: Path, store_dtype: str) -> None:
    batch, targets = texts(), texts()
    traker, state, _ = attribute(tmp_path, batch, targets, lambda_reg=math.inf, store_dtype=store_dtype)
    train, aims = gradients(state, batch), gradients(state, targets)
    weights = np.array(traker.store.train(0).weights, np.float64)
    stored = traker.store.train(0).features
    mean = getattr(stored, "squared_norms", (np.asarray(stored[:], np.float64) ** 2).sum(1)).mean()
    inds = [3, 0, 4]
    for target in range(B):
        found = traker.rerank("test", target, [x[target : target + 1] for x in targets], [x[inds] for x in batch], inds)
        expected = weights[inds] * K * (train[inds] @ aims[target]) / mean
        sizes = weights[inds] * K * np.linalg.norm(train[inds], axis=1) * np.linalg.norm(aims[target]) / mean
        assert (np.abs(found - expected) <= TERMS * EPS * sizes).all()


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
    traker, _, _ = attribute(tmp_path / "plain", batch, targets, lambda_reg=0.5)
    with pytest.raises(ValueError, match=r"lambda_reg must be math\.inf"):
        traker.rerank("test", 0, one, batch, range(B))
    traker.lambda_reg = math.inf
    traker.normalize = True
    with pytest.raises(ValueError, match="normalize must be False"):
        traker.rerank("test", 0, one, batch, range(B))
    traker.normalize = False
    with pytest.raises(ValueError, match="samples"):
        traker.rerank("test", 0, one, targets, range(B))
    with pytest.raises(ValueError, match="target_batch must be the sample that target 1 of exp_name 'test'"):
        traker.rerank("test", 1, one, batch, range(B))
    with pytest.raises(ValueError, match="target_batch must be one sample"):
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


@pytest.mark.parametrize("store_dtype", ["float32", "int8"])
def test_large_systems_take_the_curvature_of_some_samples(
    tmp_path: Path, store_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, targets = texts(), texts()
    options: dict[str, Any] = {"lambda_reg": 0.3, "store_dtype": store_dtype}
    _, _, products = attribute(tmp_path / "products", batch, targets, **{**options, "lambda_reg": math.inf})
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
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    traker.lambda_reg = math.inf  # whose sum of squares is that of all samples
    again = np.array(traker.finalize_scores("test"))
    np.testing.assert_allclose(again, products, rtol=0, atol=1e-5 * np.abs(products).max())
    traker.lambda_reg = 0
    with pytest.raises(ValueError, match="lambda_reg must be more than 0"):
        traker.finalize_scores("test")
