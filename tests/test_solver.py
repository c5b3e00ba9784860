"""The linear algebra against NumPy's explicit inverses in float64, and the ridge against known truths."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trak_fast import solver
from trak_fast.solver import GramAccumulator, Solver, auto_ridge, curvature_weights, factorize, gram_matrix

CPU = torch.device("cpu")
M = 7


def features(n: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows with singular values from 1 down to 0.1 of the largest, so that no inverse loses more than 2 digits."""
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.standard_normal((n, k)), full_matrices=False)
    return (u * np.geomspace(30, 3, min(n, k)) @ v).astype(np.float32)


def curvatures(n: int) -> NDArray[np.float64]:
    """Weights over three orders of magnitude, some 0."""
    rng = np.random.default_rng(2)
    return np.where(rng.random(n) < 0.2, 0, 10.0 ** rng.uniform(-2, 1, n))


def solution(
    x: NDArray, targets: NDArray, ridge: float, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """(X'RX + λI)⁻¹ Φ' as it is written; with the pseudo-inverse where λ = 0."""
    r = np.ones(len(x)) if weights is None else weights
    kernel = x.T.astype(np.float64) @ (r[:, None] * x) + ridge * np.eye(x.shape[1])
    return (np.linalg.inv(kernel) if ridge else np.linalg.pinv(kernel, rcond=1e-10, hermitian=True)) @ targets.T


def assemble(solved: Solver, targets: NDArray, n: int) -> NDArray[np.float64]:
    result = np.zeros((n, len(targets)))
    for rows, columns, block in solved.scores(targets):
        result[rows, columns] += block.numpy()  # += so that a pair that came twice would show
    return result


def check(
    solved: Solver, x: NDArray, targets: NDArray, ridge: float, weights: NDArray[np.float64] | None = None
) -> None:
    solution_ = solution(x, targets, ridge, weights)
    error = np.abs(assemble(solved, targets, len(x)) - x @ solution_)
    # The last product sums k float32 terms, of which one factor was rounded: an error of at most (k + 2) ε of the
    # terms' magnitudes. All else is float64, and condition numbers of 100² leave it 12 digits.
    assert (error <= (x.shape[1] + 2) * 2.0**-23 * (np.abs(x) @ np.abs(solution_)) + 1e-11).all()
    itself = np.einsum("ik,ki->i", x, solution(x, x, ridge, weights))
    np.testing.assert_allclose(solved.self_influence(), itself, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=[64 << 20, 400], ids=["one block", "many blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "BLOCK_BYTES", request.param)


SHAPES = [(40, 9), (17, 17), (17, 23), (1, 5), (5, 1), (1, 1)]


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("ridge", [0.0, 0.5, 50.0])
def test_scores_are_those_of_the_explicit_inverse(n: int, k: int, ridge: float) -> None:
    x, targets = features(n, k), features(M, k, seed=1)
    check(Solver(x, gram_matrix(x, CPU), ridge), x, targets, ridge)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("ridge", [0.5, 50.0])
def test_weighted_scores_are_those_of_the_explicit_inverse(n: int, k: int, ridge: float) -> None:
    x, targets, weights = features(n, k), features(M, k, seed=1), curvatures(n)
    check(Solver(x, gram_matrix(x, CPU, weights), ridge, weights), x, targets, ridge, weights)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(("n", "k"), [(40, 9), (17, 23)])
@pytest.mark.parametrize("weighted", [False, True])
def test_normalized_scores_are_those_of_features_of_length_1(n: int, k: int, weighted: bool) -> None:
    x, targets = features(n, k), features(M, k, seed=1)
    # lengths whose squares overflow or vanish in float32, and a row of zeros
    scales = np.resize([1, 1e30, 1e-30], n)
    scaled = (x * scales[:, None]).astype(np.float32)
    scaled[3] = 0
    weights = curvatures(n) if weighted else None
    lengths = np.linalg.norm(scaled.astype(np.float64), axis=1, keepdims=True)
    unit = scaled / np.where(lengths > 0, lengths, 1)
    unit_targets = targets / np.linalg.norm(targets.astype(np.float64), axis=1, keepdims=True)
    gram = gram_matrix(scaled, CPU, weights, normalize=True)
    solved = Solver(scaled, gram, 0.5, weights, normalize=True)
    check(solved, unit, unit_targets, 0.5, weights)


def test_weights_without_a_ridge_are_refused_where_they_need_one() -> None:
    x, weights = features(9, 40), curvatures(9)
    with pytest.raises(ValueError, match="weights with ridge = 0 need k <= n"):
        Solver(x, gram_matrix(x, CPU, weights), 0.0, weights)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(("n", "k"), [(40, 9), (9, 40)])
def test_gram_matrix_is_exact_for_float32_features(n: int, k: int) -> None:
    # 22-bit integers times 2^20: float64 holds their products and sums exactly, float32 would round the products, and
    # float16 would overflow
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2**22), 2**22, (n, k))
    x = (integers * 2.0**20).astype(np.float32)
    squares = np.arange(n) % 4  # weights 0, 1, 4, 9, whose roots are exact
    for roots in (np.ones(n, int), squares):
        weighted = integers * roots[:, None]
        product = weighted.T @ weighted if n >= k else weighted @ weighted.T
        weights = None if roots is not squares else roots.astype(np.float64) ** 2
        assert (gram_matrix(x, CPU, weights).numpy() == product * 2.0**40).all()


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_accumulator_sums_blocks_in_any_order_and_form(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-1000, 1000, (37, 8)).astype(np.float32)  # exact, so that order does not matter
    weights = (rng.integers(0, 4, 37) ** 2).astype(np.float64) if weighted else None
    first, second = GramAccumulator(8), GramAccumulator(8)
    for sum_, rows in ((first, slice(30, 37)), (second, slice(0, 1)), (first, slice(1, 30))):
        part = torch.from_numpy(x[rows]).requires_grad_() if rows.start == 1 else x[rows]
        sum_.add(part, None if weights is None else weights[rows])
    first.add_sum(second.value())
    r = np.ones(37) if weights is None else weights
    assert (first.value().numpy() == x.T.astype(np.float64) @ (r[:, None] * x)).all()
    for bad in (np.zeros((3, 7)), np.zeros(8)):
        with pytest.raises(ValueError, match=r"features must have shape \(B, 8\)"):
            first.add(bad)
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\), not \(2,\)"):
        first.add(np.zeros((3, 8)), np.zeros(2))


@pytest.mark.parametrize(("n", "k"), [(300, 64), (100, 256)])
@pytest.mark.parametrize("mapped", [False, True])
def test_half_precision_features_do_not_change_the_ranking(n: int, k: int, mapped: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    spectrum = np.arange(1, k + 1) ** -0.7
    mixing = np.linalg.qr(rng.standard_normal((k, k)))[0] * spectrum
    x, targets = (100 * (rng.standard_normal((size, k)) @ mixing.T).astype(np.float32) for size in (n, 20))
    full = assemble(Solver(x, (gram := gram_matrix(x, CPU)), auto_ridge(gram, n, k)), targets, n)
    half = x.astype(np.float16)
    if mapped:
        np.save(tmp_path / "x.npy", half)
        half = np.load(tmp_path / "x.npy", mmap_mode="r")
    gram = gram_matrix(half, CPU)
    assert (gram.diagonal().sum() - (half.astype(np.float64) ** 2).sum()).abs() < 1e-9 * gram.trace()
    scores = assemble(Solver(half, gram, auto_ridge(gram, n, k)), targets.astype(np.float16), n)
    # Rounding changes each feature by about 2^-12 of itself. Errors of 2^-12 √2 of the scores' spread cost a rank
    # correlation of 1 − 2^-24; the inverse, with a condition number of some tens here,
    # makes them that many times larger.
    for j in range(20):
        assert spearmanr(full[:, j], scores[:, j]).statistic > 1 - 1e-4
        top = set(np.argsort(-full[:, j])[:10])
        assert len(top & set(np.argsort(-scores[:, j])[:10])) >= 9


def test_auto_ridge_is_the_rms_eigenvalue_plus_the_norm_times_n_over_k() -> None:
    for n, k in [(40, 9), (9, 40), (12, 12)]:
        x = features(n, k)
        kernel = x.astype(np.float64) @ x.T
        values = np.linalg.eigvalsh(kernel)
        expected = np.sqrt((values**2).mean()) + n / k * np.mean([np.dot(row, row) for row in x.astype(np.float64)])
        for checkpoints in (1, 5):
            ridge = auto_ridge(gram_matrix(x, CPU), n, k, checkpoints)
            assert ridge == pytest.approx(expected / checkpoints**0.5, rel=1e-6)  # the features are float32


@pytest.mark.parametrize(("noise", "share_of_best"), [(0.5, 0.97), (1.0, 0.85)])
@pytest.mark.parametrize(("n", "k"), [(300, 75), (300, 300), (300, 1200), (150, 1200)])
@pytest.mark.parametrize("checkpoints", [1, 5])
@pytest.mark.parametrize("decay", [0.6, 1.0])
def test_auto_ridge_is_near_the_best_where_the_truth_is_known(
    n: int, k: int, noise: float, share_of_best: float, checkpoints: int, decay: float
) -> None:
    """Checkpoints share some directions and have others of their own; truth is a ridge on the shared ones."""
    rng = np.random.default_rng(0)
    m, shared, own = 40, 400, 800
    common = rng.standard_normal((n + m, shared)) * np.arange(1, shared + 1) ** -decay
    common /= np.sqrt((common**2).sum(1).mean())
    # the ridge of training itself grows with n, as weight decay on a sum of losses does; the features don't know it
    kernel = common[:n] @ common[:n].T + 0.01 * n * np.eye(n)
    truth = np.linalg.solve(kernel, common[:n] @ common[n:].T)

    factors = np.geomspace(1e-2, 1e3, 31)
    path, auto = np.zeros((len(factors), n, m)), np.zeros((n, m))
    for _ in range(checkpoints):
        private = noise * rng.standard_normal((n + m, own)) / np.sqrt(own)
        entries = rng.choice([-1.0, 1.0], (shared + own, k))
        x = (np.concatenate([common, private], axis=1) @ entries).astype(np.float32)
        gram = gram_matrix(x[:n], CPU)
        auto += assemble(Solver(x[:n], gram, auto_ridge(gram, n, k, checkpoints)), x[n:], n)
        train, targets = x[:n].astype(np.float64), x[n:].astype(np.float64)
        values, vectors = np.linalg.eigh(train @ train.T)
        products = vectors.T @ (train @ targets.T)
        for total, factor in zip(path, factors, strict=True):
            total += vectors @ (products / (values + factor * values.mean())[:, None])
    *qualities, ours = (np.mean([np.corrcoef(s[:, j], truth[:, j])[0, 1] for j in range(m)]) for s in (*path, auto))
    assert ours > share_of_best * max(qualities)
    assert ours > 1.1 * qualities[0]  # the choice matters: next to no ridge is clearly worse


def test_curvature_weights_have_mean_1_and_a_floor() -> None:
    weights = curvature_weights(np.array([0.0, 0.1, 0.3]))
    np.testing.assert_allclose(weights, (np.array([0, 0.75, 2.25]) + 0.1) / 1.1)
    assert weights.mean() == pytest.approx(1)
    assert (curvature_weights(np.zeros(4, np.float32)) == 1).all()


@pytest.mark.parametrize(("n", "k"), [(30, 12), (12, 30)])
def test_dependent_rows_get_the_least_norm_solution(n: int, k: int, caplog: pytest.LogCaptureFixture) -> None:
    base = features(6, k)
    x, targets = base[np.arange(n) % 6], features(M, k, seed=1)  # rank 6: every sample is there several times
    with caplog.at_level(logging.WARNING, "trak_fast"):
        solved = Solver(x, gram_matrix(x, CPU), 0.0)
    assert "6 of 12 eigenvalues are inverted" in caplog.text
    assert solved.inverse.method == "eigh"
    check(solved, x, targets, 0.0)
    assert solved.self_influence().sum().item() == pytest.approx(6, abs=1e-9)  # a projection's trace is its rank


def test_features_that_are_all_zero_score_zero() -> None:
    x = np.zeros((4, 3), np.float32)
    gram = gram_matrix(x, CPU)
    solved = Solver(x, gram, auto_ridge(gram, 4, 3))
    assert (assemble(solved, features(M, 3), 4) == 0).all()
    assert (solved.self_influence() == 0).all()


def spectral(values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    size = len(values)
    random = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = torch.linalg.qr(random)[0]
    return (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.mT, vectors


def test_factorize_keeps_what_is_above_the_cutoff_and_drops_the_rest() -> None:
    matrix, vectors = spectral([1.0, 0.1, 1e-3, 1e-5])
    values = torch.tensor([1.0, 0.1, 1e-3, 1e-5], dtype=torch.float64)
    right = torch.eye(4, dtype=torch.float64)
    for cutoff, kept in [(1e-12, 4), (1e-4, 3), (0.5, 1)]:
        inverse = factorize(matrix, cutoff)
        expected = (vectors[:, :kept] / values[:kept]) @ vectors[:, :kept].mT
        torch.testing.assert_close(inverse.solve(right), expected, rtol=1e-9, atol=1e-9 / values[kept - 1])
        assert inverse.condition == pytest.approx(1 / values[kept - 1].item(), rel=1e-4)
        assert inverse.method == ("cholesky" if kept == 4 else "eigh")


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e8])
def test_condition_number_is_that_of_the_eigenvalues(condition: float) -> None:
    matrix, _ = spectral(np.geomspace(1, condition, 200).tolist())
    found = factorize(matrix, 0.0).condition
    assert 0.8 * condition < found < condition * (1 + 1e-6)


def test_jitter_saves_a_matrix_whose_ridge_is_lost_in_rounding(caplog: pytest.LogCaptureFixture) -> None:
    x = np.repeat(features(6, 40), 5, axis=0)  # rank 6 of 30
    gram = gram_matrix(x, CPU)
    ridge = 1e-18 * gram.trace().item()
    gram.diagonal().add_(ridge)
    gram[0, 0] -= 1e-13 * gram.trace()  # what rounding may do to a singular matrix: now it is indefinite
    assert np.linalg.eigvalsh(gram.numpy())[0] < 0
    with caplog.at_level(logging.WARNING, "trak_fast"):
        inverse = factorize(gram, 0.0, jitter=True)
    assert inverse.method == "cholesky"
    assert inverse.jitter > 0
    assert "was added to the diagonal" in caplog.text
    jittered = gram + inverse.jitter * torch.eye(30)
    # relative residual of a backward-stable solve
    right = torch.eye(30, dtype=torch.float64)
    residual = (jittered @ inverse.solve(right) - right).norm() / (jittered.norm() * inverse.solve(right).norm())
    assert residual < 30 * 2.0**-52
    assert factorize(gram, 1e-10).method == "eigh"  # without a ridge, the pseudo-inverse
