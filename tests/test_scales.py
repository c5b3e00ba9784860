"""Gradients of any scale against float64 references: right to float32's precision, or refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_fast import TRAKer
from trak_fast.projection import reference
from trak_fast.scales import beyond_float32, exponents_of, map_rows, split

N, M, D = 24, 5, 50
X = torch.from_numpy(np.random.default_rng(0).standard_normal((N + M, D - 1)))
SCALES = [(1.0, 1.0), (1e-30, 1.0), (1e-30, 1e-30), (1e30, 1e25), (1e-45, 1e-40), (1e-60, 1e-50), (1e60, 1e40)]


class Linear(nn.Linear):
    """A model in float64 whose gradient is (x, 1) times the scale of the checkpoint; f adds that of the sample."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__(D - 1, 1, dtype=torch.float64)
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def output(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    return model(x[None])[0, 0] * scale


def gradients(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([X.numpy(), np.ones((N + M, 1))], axis=1) * scales[:, None]


def both(train: float, target: float) -> NDArray[np.float64]:
    """The scale of each training sample and target."""
    return np.repeat([float(train), float(target)], [N, M])


def run(folder: Path, scales: NDArray[np.float64], checkpoints: tuple[float, ...] = (1.0,), **options: Any) -> TRAKer:
    """Featurizes and scores samples of some scales with checkpoints of some scales."""
    model = Linear()
    states = [{**model.state_dict(), "scale": torch.tensor(one, dtype=torch.float64)} for one in checkpoints]
    traker = TRAKer(model, output, N, folder, logging_level=logging.ERROR, **options)
    batch = [X, torch.from_numpy(scales)]
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        traker.featurize([x[:N] for x in batch], num_samples=N)
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("e", state, model_id, M)
        traker.score([x[N:] for x in batch], num_samples=M)
    return traker


def features(scales: NDArray[np.float64], k: int, model_id: int = 0) -> NDArray[np.float64]:
    """P g by the reference, with each row's scale taken out."""
    unit = gradients(np.ones(N + M))
    return scales[:, None] * (unit @ reference.matrix("rademacher", 0, model_id, range(k), range(D)).T.astype(float))


def expected(
    scales: NDArray[np.float64], k: int, lambda_reg: float | str, normalize: bool = False, model_id: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores and self-influence in float64, computed at the scale 1 where squares neither vanish nor overflow."""
    size, size_of_targets = (1.0, 1.0) if normalize else (scales[:N].max(), scales[N:].max())
    every = features(scales / np.repeat([size, size_of_targets], [N, M]), k, model_id)
    if normalize:
        every = features(np.ones(N + M), k, model_id)
        every /= np.linalg.norm(every, axis=1, keepdims=True)
    x, targets = every[:N], every[N:]
    values = np.linalg.eigvalsh(x @ x.T)
    if lambda_reg == "auto":
        ridge = 2 * 0.2 * np.sqrt((values**2).mean()) + values.sum() / k
    else:
        ridge = float(lambda_reg) * D / size / size
    u, s, v = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-6 * s[0]
    u, s, v = u[:, kept], s[kept], v[kept]
    return (
        u * (s / (s**2 + ridge)) @ v @ targets.T / size * size_of_targets,
        (u**2 * (s**2 / (s**2 + ridge))).sum(1),
    )


def check(scores: NDArray[Any], right: NDArray[np.float64], tolerance: float) -> None:
    """Compares relatively to the largest score of each target."""
    assert (np.abs(scores - right).max(0) <= tolerance * np.abs(right).max(0)).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize("lambda_reg", ["auto", 0, 0.1])
@pytest.mark.parametrize(("train", "target"), SCALES)
def test_scores_are_right_at_any_scale_or_refused(
    tmp_path: Path, train: float, target: float, lambda_reg: float | str, k: int, half: bool
) -> None:
    scales = both(train, target)
    traker = run(tmp_path, scales, proj_dim=k, lambda_reg=lambda_reg, use_half_precision=half)
    right, influence = expected(scales, k, lambda_reg)
    tolerance = 3e-2 if half else 1e-4  # of features 2^-12 and some 2^-24, times a condition number of some tens
    if beyond_float32(np.abs(right).max(0)).any():
        for compute in (lambda: traker.finalize_scores("e"), lambda: traker.top_scores("e", 3)):
            with pytest.raises(ValueError, match=r"largest score of a target .* \(targets \[0, 1, 2, 3, 4\]\)"):
                compute()
        assert not (tmp_path / "scores" / "e.npy").exists()
    else:
        check(traker.finalize_scores("e"), right, tolerance)
        top = traker.top_scores("e", 3)
        check(top.scores.T, np.sort(right, axis=0)[::-1][:3], tolerance)
    if beyond_float32(influence.max()):
        with pytest.raises(ValueError, match="largest self-influence must be 0 or in"):
            traker.self_influence()
    else:
        check(traker.self_influence(), influence, tolerance)


@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize("half", [False, True])
def test_ordinary_scores_are_bit_for_bit_those_of_plain_float32(tmp_path: Path, k: int, half: bool) -> None:
    """float32 features times float32 coefficients, summed over checkpoints and weighted in float32."""
    traker = run(tmp_path, both(1, 1e-3), (1.0, 30.0), proj_dim=k, use_half_precision=half)
    rho = traker._estimator.disagreement([0, 1])
    total = torch.zeros(N, M)
    for model_id in range(2):
        solver = traker._estimator.solver(model_id, 2, rho)
        features = traker.store.train(model_id).features[:]
        targets = traker.store.targets(model_id, "e").features
        assert features.dtype == targets.dtype == np.float32
        assert isinstance(targets, np.memmap)
        right = torch.from_numpy(np.array(targets, np.float64)).mT
        if k > N:
            total += solver.inverse.solve(torch.from_numpy(features.astype(np.float64)) @ right).float()
        else:
            total += torch.from_numpy(np.array(features)) @ solver.inverse.solve(right).float()
    assert traker.finalize_scores("e").tobytes() == (total * torch.tensor(0.5)).numpy().tobytes()


@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize(("train", "target"), [*SCALES, (1e-200, 1e-300)])
def test_normalized_scores_do_not_depend_on_the_scale(tmp_path: Path, train: float, target: float, k: int) -> None:
    scales = both(train, target)
    right, influence = expected(scales, k, "auto", normalize=True)
    traker = run(tmp_path, scales, proj_dim=k, normalize=True)
    check(traker.finalize_scores("e"), right, 1e-4)
    check(traker.self_influence(), influence, 1e-4)


@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize("half", [False, True])
def test_checkpoints_of_different_scale_are_averaged(tmp_path: Path, k: int, half: bool) -> None:
    checkpoints = (1e-30, 1.0, 1e20, 1e60)
    traker = run(tmp_path, both(1, 0.1), checkpoints, proj_dim=k, lambda_reg=0, use_half_precision=half)
    parts = [expected(both(one, 0.1 * one), k, 0, model_id=i) for i, one in enumerate(checkpoints)]
    scores, influence = (np.mean(part, axis=0) for part in zip(*parts, strict=True))
    check(traker.finalize_scores("e"), scores, 3e-2 if half else 1e-4)
    check(traker.self_influence(), influence, 3e-2 if half else 1e-4)


@pytest.mark.parametrize("k", [4, 40])
def test_the_disagreement_of_checkpoints_does_not_depend_on_their_scale(tmp_path: Path, k: int) -> None:
    plain = run(tmp_path / "a", both(1, 1), (1.0, 1.0), proj_dim=k).finalize_scores("e")
    scaled = run(tmp_path / "b", both(1, 1), (2.0**-150, 2.0**200), proj_dim=k)
    np.testing.assert_allclose(scaled.finalize_scores("e"), plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("small", [1e-40, 1e-90, 1e-310])
@pytest.mark.parametrize("lambda_reg", ["auto", 0])
def test_a_tiny_sample_beside_others_has_its_tiny_score(tmp_path: Path, small: float, lambda_reg: float | str) -> None:
    """Its score is right to float32 relative to the target's largest, and the others are as without it."""
    scales = both(1, 1)
    scales[3] = small
    traker = run(tmp_path, scales, proj_dim=4, lambda_reg=lambda_reg)
    right, _ = expected(scales, 4, lambda_reg)
    check(traker.finalize_scores("e"), right, 1e-4)
    stored = traker.store.train(0).features
    np.testing.assert_allclose(stored[3], features(scales, 4)[3], rtol=1e-5 if small > 1e-300 else 1e-2)
    unit = features(both(1, 1), 4)
    assert np.array_equal(np.asarray(stored[4:6], np.float32), np.asarray(stored[4:6]))  # as float32 has it
    np.testing.assert_allclose(stored[4:6], unit[4:6], rtol=1e-5, atol=1e-6)


def test_the_advice_for_scores_beyond_float32_works(tmp_path: Path) -> None:
    scales = both(1e-30, 1e30)
    traker = run(tmp_path, scales, proj_dim=4)
    with pytest.raises(ValueError, match=r"not .*e\+.* multiply these targets' model output f"):
        traker.finalize_scores("e")
    traker.start_scoring_checkpoint("e", traker.model.state_dict(), 0, M)
    traker.score([X[N:], torch.full((M,), 1e30 * 2.0**-100, dtype=torch.float64)], num_samples=M)
    check(traker.finalize_scores("e"), expected(scales, 4, "auto")[0] * 2.0**-100, 1e-4)
    traker.normalize = True
    check(traker.finalize_scores("e"), expected(scales, 4, "auto", normalize=True)[0], 1e-4)


def test_features_beyond_float64_s_squares_are_refused_by_their_samples(tmp_path: Path) -> None:
    scales = both(1, 1)
    scales[[2, 5]] = 1e75
    with pytest.raises(
        ValueError, match=r"features of samples \[2, 5\] must be at most 1.73e\+69 .* multiply the model"
    ):
        run(tmp_path / "a", scales, proj_dim=4)
    for size in (1e-75, 1e-170):
        traker = run(tmp_path / str(size), both(size, 1), proj_dim=4)
        with pytest.raises(
            ValueError, match=r"largest feature of model_id 0 must be 0 or at least 5.8e-70, not .* less"
        ):
            traker.finalize_scores("e")
    scales[5] = np.nan
    with pytest.raises(ValueError, match=r"features of samples \[5\] are not finite"):
        run(tmp_path / "b", scales, proj_dim=4)


@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize("lambda_reg", ["auto", 0, 0.1])
def test_features_that_are_all_zero_score_zero_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, k: int, lambda_reg: float | str
) -> None:
    class Task(Curved):
        def get_output(self, *args: Any) -> Tensor:
            return super().get_output(*args) * 0

    traker = TRAKer(Linear(), Task(), N, tmp_path, proj_dim=k, lambda_reg=lambda_reg, logging_level=logging.WARNING)
    traker.load_checkpoint(traker.model.state_dict(), 0)
    traker.featurize([X[:N], torch.ones(N)], num_samples=N)
    traker.finalize_features()
    caplog.clear()  # the warning about the gradients
    with caplog.at_level(logging.WARNING, "trak_fast"):
        assert (traker.self_influence() == 0).all()
    assert caplog.messages == ["all features of model_id 0 are 0, and so are its scores; see grad_wrt"]
    traker.start_scoring_checkpoint("e", traker.model.state_dict(), 0, M)
    traker.score([X[N:], torch.ones(M)], num_samples=M)
    assert (traker.finalize_scores("e") == 0).all()


class Curved:
    """A task with weights of any size, and a curvature that differs between samples."""

    name = "curved"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, x: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**weights, **buffers}, (x[None],))[0, 0] * scale

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        return torch.full((len(batch[0]),), self.weight, dtype=torch.float64)

    def get_loss_curvature(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.linspace(0.1, 1, len(weights))


@pytest.mark.parametrize("weight", [1e-36, 1e20, 1e-45, 1e40, 0.0])
def test_weights_of_any_size_are_right_or_refused(
    tmp_path: Path, weight: float, caplog: pytest.LogCaptureFixture
) -> None:
    traker = TRAKer(Linear(), Curved(weight), N, tmp_path, proj_dim=4, curvature=False, logging_level=logging.WARNING)
    traker.load_checkpoint(traker.model.state_dict(), 0)
    batch = [X[:N], torch.full((N,), 1e-10, dtype=torch.float64)]
    if weight == 1e40:
        with pytest.raises(
            ValueError, match=r"weights of samples .* at most 3.4e\+38 .* multiply the loss by a constant"
        ):
            traker.featurize(batch, num_samples=N)
        return
    traker.featurize(batch, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("e", traker.model.state_dict(), 0, M)
    traker.score([X[N:], torch.ones(M, dtype=torch.float64)], num_samples=M)
    if weight == 1e-45:
        with pytest.raises(ValueError, match="largest weight of a sample must be 0 or in"):
            traker.finalize_scores("e")
        return
    scores = traker.finalize_scores("e")
    check(scores, weight * expected(both(1e-10, 1), 4, "auto")[0], 1e-4)
    assert ("the weights of all training samples are 0" in caplog.text) == (weight == 0)


def test_exponents_are_powers_of_two() -> None:
    numbers = [1.0, 0.75, 2.0**-1074, 2.0**1000, 0, np.inf, np.nan]
    assert exponents_of(numbers).tolist() == [1, 0, -1073, 1001, 0, 0, 0]
    assert exponents_of(numbers, 0.5, 1).tolist() == [0, 0, -1073, 1001, 0, 0, 0]
    values = torch.tensor([[3.0, 2.0**-900], [2.0**-800, 0.0], [5e-324, 0.0]], dtype=torch.float64)
    for dim, table in ((1, values), (0, values.mT)):
        scaled = split(table, dim, 0.5, 4)
        assert scaled.exponents.tolist() == [0, -799, -1000]
        mantissas = scaled.mantissas if dim == 1 else scaled.mantissas.mT
        assert (np.ldexp(mantissas.numpy(), scaled.exponents[:, None]) == values.numpy()).all()
        assert mantissas[1, 0] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_any_scale_are_mapped_to_float32_s_precision(dtype: torch.dtype) -> None:
    """Only rows that need it are mapped again, and mixed dtypes share one power of two."""
    powers = [0, -149, -100, 120, 0, -500, 900] if dtype == torch.float64 else [0, -130, -100, 120, 0, 0, 0]
    scales = torch.from_numpy(np.ldexp(1.0, powers))
    scales[4] = 0
    generator = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(7, *shape, generator=generator) for name, shape in (("a", (3, 2)), ("b", ()))}
    grads = {
        name: (part.double() * scales.reshape(-1, *[1] * (part.ndim - 1))).to(dtype) for name, part in parts.items()
    }
    grads["c"] = torch.zeros(7, 0)  # a parameter without elements
    grads["d"] = grads["b"].clone().float() if dtype != torch.float64 else grads["b"].clone()
    entries = torch.randn(8, 5, generator=generator).float()
    calls = []

    def apply(rows: dict[str, Tensor]) -> Tensor:
        calls.append(len(rows["a"]))
        return torch.cat([rows[name].float().reshape(len(rows[name]), -1) for name in "abcd"], dim=1) @ entries

    result = map_rows(apply, grads)
    flat = torch.cat([grads[name].double().reshape(7, -1) for name in "abcd"], dim=1)
    right = flat @ entries.double()
    assert calls == [7, 5 if dtype == torch.float64 else 3]
    assert result.dtype == torch.float64
    assert ((result - right).norm(dim=1) <= 1e-6 * flat.norm(dim=1) * entries.norm()).all()
    assert (result[4] == 0).all()
    ordinary = {name: part[:1] for name, part in grads.items()}
    assert torch.equal(map_rows(apply, ordinary), apply(ordinary))
    assert map_rows(apply, ordinary).dtype == torch.float32
    grads["b"][1] = torch.nan
    assert not map_rows(apply, grads)[1].isfinite().any()
    assert map_rows(apply, grads)[2].isfinite().all()
