"""The linear algebra against NumPy's explicit inverses in float64, and the ridge against known truths."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trak_fast.projection import project, reference
from trak_fast.scales import joined
from trak_fast.scoring import gram as gram_module
from trak_fast.scoring.gram import GramAccumulator, gram_matrix, normalized
from trak_fast.scoring.ridge import auto_ridge, curvature_weights, disagreement, shrunk_weights
from trak_fast.scoring.solver import Solver, SubsetSolver, factorize

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


def assemble(solved: Solver, x: NDArray, targets: NDArray) -> NDArray[np.float64]:
    """The scores, with the last product in float32 as it is taken from disk."""
    scaled = solved.solve(targets)
    result = scaled.mantissas
    if solved.primal:
        rows = torch.from_numpy(np.array(x, np.float64))
        result = (normalized(rows) if solved.normalize else rows).float() @ result
    return np.ldexp(result.double().numpy(), scaled.exponents)


def check(
    solved: Solver, x: NDArray, targets: NDArray, ridge: float, weights: NDArray[np.float64] | None = None
) -> None:
    solution_ = solution(x, targets, ridge, weights)
    error = np.abs(assemble(solved, x, targets) - x @ solution_)
    # The last product sums k float32 terms, of which one factor was rounded: an error of at most (k + 2) ε of the
    # terms' magnitudes. All else is float64, and condition numbers of 100² leave it 12 digits.
    assert (error <= (x.shape[1] + 2) * 2.0**-23 * (np.abs(x) @ np.abs(solution_)) + 1e-11).all()
    coefficients = solved.coefficients(targets).numpy()
    assert np.linalg.norm(coefficients - solution_) <= 1e-9 * np.linalg.norm(solution_)
    itself = np.einsum("ik,ki->i", x, solution(x, x, ridge, weights))
    np.testing.assert_allclose(solved.self_influence(slice(0, len(x))), itself, rtol=1e-10, atol=1e-12)
    part = slice(len(x) // 3, len(x) // 2)
    np.testing.assert_allclose(solved.self_influence(part), itself[part], rtol=1e-10, atol=1e-12)


@pytest.fixture(params=[64 << 20, 400], ids=["one block", "many blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "BLOCK_BYTES", request.param)


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


@pytest.mark.parametrize("nonzeros", [2, 4, 8])
def test_sparse_features_without_a_ridge_get_the_least_norm_solution(nonzeros: int) -> None:
    """The blocks of rows of a sparse matrix have the same sum, so X'X has nonzeros - 1 eigenvalues of 0."""
    g = torch.randn(300, 900, generator=torch.Generator().manual_seed(0))
    x = project(g, 128, proj_type="sjlt", nonzeros=nonzeros).numpy()
    exact = reference.project(g.numpy(), 128, "sjlt", nonzeros=nonzeros)
    assert np.linalg.matrix_rank(exact) == 128 - nonzeros + 1
    solved = Solver(x, gram_matrix(x, torch.device("cpu")), 0.0)
    assert solved.inverse.method == "eigh"
    expected = exact @ np.linalg.pinv(exact.T @ exact, rcond=1e-10, hermitian=True) @ exact[:5].T
    # The condition of X'X is that of a random matrix of 300 × 128, about ((√300 + √128) / (√300 - √128))² < 40.
    assert solved.inverse.condition < 100
    np.testing.assert_allclose(assemble(solved, x, x[:5]), expected, atol=100 * 900 * 2.0**-24)


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
    total = first.value() + second.value()
    r = np.ones(37) if weights is None else weights
    assert (total.numpy() == x.T.astype(np.float64) @ (r[:, None] * x)).all()
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
    full = assemble(Solver(x, (gram := gram_matrix(x, CPU)), auto_ridge(gram, n, k)), x, targets)
    half = x.astype(np.float16)
    if mapped:
        np.save(tmp_path / "x.npy", half)
        half = np.load(tmp_path / "x.npy", mmap_mode="r")
    gram = gram_matrix(half, CPU)
    assert (gram.diagonal().sum() - (half.astype(np.float64) ** 2).sum()).abs() < 1e-9 * gram.trace()
    scores = assemble(Solver(half, gram, auto_ridge(gram, n, k)), half, targets.astype(np.float16))
    # Rounding changes each feature by about 2^-12 of itself. Errors of 2^-12 √2 of the scores' spread cost a rank
    # correlation of 1 − 2^-24; the inverse, with a condition number of some tens here,
    # makes them that many times larger.
    for j in range(20):
        assert spearmanr(full[:, j], scores[:, j]).statistic > 1 - 1e-4
        top = set(np.argsort(-full[:, j])[:10])
        assert len(top & set(np.argsort(-scores[:, j])[:10])) >= 9


@pytest.mark.parametrize(("n", "k"), [(40, 9), (9, 40), (12, 12)])
@pytest.mark.parametrize(
    ("checkpoints", "rho", "share"),
    [(1, 0.0, 0.2), (5, 0.5, 0.5 / 5**0.5), (5, 0.2, 0.2 / 5**0.5), (4, 0.1, (0.03 + 0.01 / 4) ** 0.5), (3, 0.0, 0.2)],
)
def test_auto_ridge_is_the_level_of_noise(n: int, k: int, checkpoints: int, rho: float, share: float) -> None:
    x = features(n, k).astype(np.float64)
    values = np.linalg.eigvalsh(x @ x.T)
    expected = 2 * share * np.sqrt((values**2).mean()) + n / k * (x**2).sum(1).mean() / checkpoints**0.5
    ridge = auto_ridge(gram_matrix(features(n, k), CPU), n, k, checkpoints, rho)
    assert ridge == pytest.approx(expected, rel=1e-6)  # the features are float32


@pytest.mark.parametrize("k", [300, 3000])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.5])
def test_disagreement_is_the_share_of_the_kernel_that_checkpoints_do_not_have_in_common(k: int, noise: float) -> None:
    """Kernels with parts of their own, seen through projections of their own."""
    rng = np.random.default_rng(3)
    n, count, shared = 400, 4, 6
    common = rng.standard_normal((n, shared))
    gradients = [np.concatenate([common, noise**0.5 * rng.standard_normal((n, shared))], axis=1) for _ in range(count)]
    kernels = [g @ g.T / np.mean((g**2).sum(1)) for g in gradients]
    size = np.mean([(a**2).sum() for a in kernels])
    cross = np.mean([(a * b).sum() for i, a in enumerate(kernels) for b in kernels[:i]])
    of_projection = (n**2 + size) / k
    found = disagreement([g @ rng.choice([-1.0, 1.0], (2 * shared, k)) for g in gradients])
    # (‖a‖² ‖b‖² + ⟨a, b⟩²)/k is exact for normal entries; with signs the variance is less by 2 Σ a_i² b_i²/k, which for
    # `shared` directions of the same size is 2/shared of the first term. And each of a kernel's 2 · shared eigenvalues,
    # of which squares are summed, varies by √(2/k) of itself; this has half as much again.
    slack = 2 / shared * of_projection / size + 1.5 * 2 * (2 / (k * 2 * shared * count)) ** 0.5
    assert found**2 == pytest.approx((size - cross) / (size + of_projection), abs=slack)


def test_disagreement_looks_at_an_even_sample_and_at_directions_alone_if_normalized() -> None:
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((2500, 8)).astype(np.float32) @ rng.choice([-1, 1], (8, 500)) for _ in range(2)]
    rows = np.linspace(0, 2499, 1024).astype(int)
    assert disagreement(xs) > 0.5
    assert disagreement(xs) == pytest.approx(disagreement([x[rows] for x in xs]), rel=1e-12)
    assert disagreement(xs) != pytest.approx(disagreement([x[:1024] for x in xs]), rel=1e-6)
    scaled = [x * rng.uniform(0.1, 10, (2500, 1)) for x in xs]
    assert disagreement(scaled, normalize=True) == pytest.approx(disagreement(xs, normalize=True), rel=1e-9)
    assert disagreement(scaled) != pytest.approx(disagreement(xs), rel=1e-5)
    assert disagreement(xs[:1]) == disagreement([]) == disagreement([np.zeros((5, 3), np.float32)] * 2) == 0


def test_weights_are_shrunk_by_a_third_where_none_is_negative() -> None:
    weights = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    torch.testing.assert_close(shrunk_weights(weights), torch.tensor([0.4, 1.0, 2.2], dtype=torch.float64) / 3)
    signed = torch.tensor([-0.1, 0.3])
    assert shrunk_weights(signed) is signed


@pytest.mark.parametrize(
    ("checkpoints", "noise", "share_of_best"),
    [(1, 0.1, 0.97), (1, 0.3, 0.97), (5, 0.1, 0.97), (5, 0.5, 0.97), (5, 1.0, 0.9)],
)
@pytest.mark.parametrize(("n", "k"), [(300, 75), (300, 300), (300, 1200), (150, 1200)])
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
    xs = []
    for _ in range(checkpoints):
        private = noise * rng.standard_normal((n + m, own)) / np.sqrt(own)
        entries = rng.choice([-1.0, 1.0], (shared + own, k))
        xs.append((np.concatenate([common, private], axis=1) @ entries).astype(np.float32))
    rho = disagreement([x[:n] for x in xs])
    for x in xs:
        gram = gram_matrix(x[:n], CPU)
        auto += assemble(Solver(x[:n], gram, auto_ridge(gram, n, k, checkpoints, rho)), x[:n], x[n:])
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
    assert solved.self_influence(slice(0, n)).sum().item() == pytest.approx(
        6, abs=1e-9
    )  # a projection's trace is its rank


def test_features_that_are_all_zero_score_zero() -> None:
    x = np.zeros((4, 3), np.float32)
    gram = gram_matrix(x, CPU)
    solved = Solver(x, gram, auto_ridge(gram, 4, 3))
    assert (assemble(solved, x, features(M, 3)) == 0).all()
    assert (solved.self_influence(slice(0, 4)) == 0).all()


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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_subset_of_all_rows_gives_the_scores_of_the_whole(weighted: bool, normalize: bool) -> None:
    rng = np.random.default_rng(0)
    X, targets = rng.standard_normal((12, 30)).astype(np.float32), rng.standard_normal((3, 30)).astype(np.float32)
    weights = rng.uniform(0.1, 2, 12) if weighted else None
    every = np.arange(12)
    gram = gram_matrix(X, torch.device("cpu"), weights, normalize=normalize, rows=every)
    subset = SubsetSolver(X, every, gram, 0.7, weights, normalize)
    whole = Solver(X, gram, 0.7, weights, normalize)
    np.testing.assert_allclose(subset.coefficients(targets), whole.coefficients(targets), rtol=1e-9, atol=1e-12)
    rows = slice(2, 9)
    np.testing.assert_allclose(subset.self_influence(rows), whole.self_influence(rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_subset_s_scores_are_those_of_its_explicit_inverse(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    X, targets = rng.standard_normal((40, 25)).astype(np.float32), rng.standard_normal((3, 25)).astype(np.float32)
    chosen = np.array([0, 3, 11, 20, 39])
    weights = rng.uniform(0.1, 2, 5) if weighted else None
    gram = gram_matrix(X, torch.device("cpu"), weights, rows=chosen)
    solver = SubsetSolver(X, chosen, gram, 2.0, weights)
    part = X[chosen].astype(np.float64)
    curvature = 40 / 5 * part.T @ np.diag(np.ones(5) if weights is None else weights) @ part
    inverse = np.linalg.inv(curvature + 2.0 * np.eye(25))
    np.testing.assert_allclose(solver.coefficients(targets), inverse @ targets.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(joined(solver.solve(targets)), inverse @ targets.T, rtol=1e-5, atol=1e-6)
    own = np.einsum("ik,kl,il->i", X[1:9], inverse, X[1:9])
    np.testing.assert_allclose(solver.self_influence(slice(1, 9)), own, rtol=1e-9)
    with pytest.raises(ValueError, match="lambda_reg must be more than 0"):
        SubsetSolver(X, chosen, gram, 0.0, weights)
