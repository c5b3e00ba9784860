"""The linear algebra against NumPy's explicit inverses in float64."""

import logging

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trak_fast import solver
from trak_fast.solver import RIDGE_FACTOR, Solver, default_ridge, factorize, gram_matrix

CPU = torch.device("cpu")
M = 7


def features(n: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows with singular values from 1 down to 0.1 of the largest, so that no inverse loses more than 2 digits."""
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.standard_normal((n, k)), full_matrices=False)
    return (u * np.geomspace(30, 3, min(n, k)) @ v).astype(np.float32)


def solution(x: NDArray[np.float32], targets: NDArray[np.float32], ridge: float) -> NDArray[np.float64]:
    """(X'X + λI)⁻¹ Φ' as it is written; with the pseudo-inverse where λ = 0."""
    kernel = x.T.astype(np.float64) @ x + ridge * np.eye(x.shape[1])
    return (np.linalg.inv(kernel) if ridge else np.linalg.pinv(kernel, rcond=1e-10, hermitian=True)) @ targets.T


def assemble(solved: Solver, targets: NDArray[np.float32], n: int) -> NDArray[np.float64]:
    result = np.zeros((n, len(targets)))
    for rows, columns, block in solved.scores(targets):
        result[rows, columns] += block.numpy()  # += so that a pair that came twice would show
    return result


def check(solved: Solver, x: NDArray[np.float32], targets: NDArray[np.float32], ridge: float) -> None:
    solution_ = solution(x, targets, ridge)
    error = np.abs(assemble(solved, targets, len(x)) - x @ solution_)
    # The last product sums k float32 terms, of which one factor was rounded: an error of at most (k + 2) ε of the
    # terms' magnitudes. All else is float64, and condition numbers of 100² leave it 12 digits.
    assert (error <= (x.shape[1] + 2) * 2.0**-23 * (np.abs(x) @ np.abs(solution_)) + 1e-11).all()
    itself = np.einsum("ik,ki->i", x, solution(x, x, ridge))
    np.testing.assert_allclose(solved.self_influence(), itself, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=[64 << 20, 400], ids=["one block", "many blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(("n", "k"), [(40, 9), (17, 17), (17, 23), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("ridge", [0.0, 0.5, 50.0])
def test_scores_are_those_of_the_explicit_inverse(n: int, k: int, ridge: float) -> None:
    x, targets = features(n, k), features(M, k, seed=1)
    check(Solver(x, gram_matrix(x, CPU), ridge), x, targets, ridge)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(("n", "k"), [(40, 9), (9, 40)])
def test_gram_matrix_is_exact_for_float32_features(n: int, k: int) -> None:
    # 22-bit integers times 2^20: float64 holds their products and sums exactly, float32 would round the products, and
    # float16 would overflow
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2**22), 2**22, (n, k))
    x = (integers * 2.0**20).astype(np.float32)
    product = integers.T @ integers if n >= k else integers @ integers.T
    assert (gram_matrix(x, CPU).numpy() == product * 2.0**40).all()


def test_default_ridge_is_a_multiple_of_the_mean_squared_norm() -> None:
    for n, k in [(40, 9), (9, 40)]:
        x = features(n, k)
        mean = np.mean([np.dot(row, row) for row in x.astype(np.float64)])
        assert default_ridge(gram_matrix(x, CPU), n) == pytest.approx(RIDGE_FACTOR * mean, rel=1e-12)


@pytest.mark.parametrize(("n", "k"), [(30, 12), (12, 30)])
def test_dependent_rows_get_the_least_norm_solution(n: int, k: int, caplog: pytest.LogCaptureFixture) -> None:
    base = features(6, k)
    x, targets = base[np.arange(n) % 6], features(M, k, seed=1)  # rank 6: every sample is there several times
    with caplog.at_level(logging.WARNING, "trak_fast"):
        solved = Solver(x, gram_matrix(x, CPU), 0.0)
    assert "6 of 12 eigenvalues are inverted" in caplog.text
    check(solved, x, targets, 0.0)
    assert solved.self_influence().sum().item() == pytest.approx(6, abs=1e-9)  # a projection's trace is its rank


def test_features_that_are_all_zero_score_zero() -> None:
    x = np.zeros((4, 3), np.float32)
    gram = gram_matrix(x, CPU)
    solved = Solver(x, gram, default_ridge(gram, 4))
    assert (assemble(solved, features(M, 3), 4) == 0).all()
    assert (solved.self_influence() == 0).all()


def test_factorize_keeps_what_is_above_the_cutoff_and_drops_the_rest() -> None:
    vectors = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.tensor([1.0, 0.1, 1e-3, 1e-5], dtype=torch.float64)
    matrix = (vectors * values) @ vectors.mT
    right = torch.eye(4, dtype=torch.float64)
    for cutoff, kept in [(1e-12, 4), (1e-4, 3), (0.5, 1)]:
        expected = (vectors[:, :kept] / values[:kept]) @ vectors[:, :kept].mT
        torch.testing.assert_close(factorize(matrix, cutoff)(right), expected, rtol=1e-9, atol=1e-9 / values[kept - 1])
