"""The matrix behaves as independent entries of mean 0 and variance 1, in every direction that has failed elsewhere.

Each statistic has a known mean and standard deviation under independence. Seeds are fixed, so a pass stays a pass; the
limit is the one that a fair matrix exceeds with probability 1e-6 (a union bound over all values looked at).
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

import trak_fast

KINDS = ["rademacher", "normal"]
KURTOSIS = {"rademacher": 1.0, "normal": 3.0}


def limit(values: int) -> float:
    """So many standard deviations that none of `values` normal variables is farther out, but for a chance of 1e-6."""
    return -NormalDist().inv_cdf(0.5e-6 / values)


def entries(proj_type: str, rows: int, columns: int, seed: int = 0, model_id: int = 0) -> np.ndarray:
    return trak_fast.matrix(proj_type, seed, model_id, range(rows), range(columns)).numpy().astype(np.float64)


def assert_uncorrelated(products: np.ndarray, terms: int) -> None:
    """`products` are sums of `terms` independent values of mean 0 and variance 1, such as products of two entries."""
    assert np.abs(products).max() <= limit(products.size) * math.sqrt(terms)


@pytest.mark.parametrize("proj_type", KINDS)
def test_moments(proj_type: str) -> None:
    P = entries(proj_type, 256, 8192)
    # Moments 1 to 4 of one entry and, from moments 2 to 8, their variances.
    moment = {n: 1.0 if proj_type == "rademacher" else math.prod(range(1, n, 2)) for n in (2, 4, 6, 8)}
    for n in (1, 2, 3, 4):
        mean = moment.get(n, 0.0)
        deviation = math.sqrt((moment[2 * n] - mean**2) / P.size)
        # The table's variance is 1.000001, its fourth moment 2.9997: quantiles of 1/65536 leave the tails out.
        assert abs(np.mean(P**n) - mean) <= limit(1) * deviation + 5e-4


@pytest.mark.parametrize("proj_type", KINDS)
def test_every_row_and_column_is_balanced(proj_type: str) -> None:
    signs = np.sign(entries(proj_type, 512, 8192))
    for axis in (0, 1):
        assert_uncorrelated(signs.sum(axis), signs.shape[axis])


@pytest.mark.parametrize("proj_type", KINDS)
def test_rows_are_independent(proj_type: str) -> None:
    P = entries(proj_type, 1024, 4096)
    assert_uncorrelated((P @ P.T)[np.triu_indices(1024, 1)], 4096)


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("first", [0, 7850 - 512])
def test_columns_are_independent(proj_type: str, first: int) -> None:
    """Two parameters must not share their projection, not even within the first few hundred or across two blocks."""
    P = entries(proj_type, 4096, first + 1024)[:, first:]
    assert_uncorrelated((P.T @ P)[np.triu_indices(1024, 1)], 4096)


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0), (0, 1)),
        ((0, 0), (1, 0)),
        ((1, 0), (0, 1)),
        ((0, 0), (10_000, 0)),
        ((0, 0), (2**32, 0)),
        ((0, 0), (2**63, 0)),
        ((5, 6), (6, 5)),
        ((0, 2**31), (0, 2**32 - 1)),
    ],
)
def test_seeds_and_checkpoints_are_independent(proj_type: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    """No row of one matrix is a row of the other, at whatever place, and no column a column."""
    A, B = (entries(proj_type, 512, 1024, *seed_and_model) for seed_and_model in (first, second))
    assert_uncorrelated(A @ B.T, 1024)
    assert_uncorrelated(A.T @ B, 512)


@pytest.mark.parametrize("proj_type", KINDS)
def test_kinds_are_independent(proj_type: str) -> None:
    A, B = entries("rademacher", 512, 1024), entries("normal", 512, 1024)
    assert_uncorrelated(A @ B.T, 1024)
    assert_uncorrelated(A.T @ B, 512)


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("grad_dim", [650, 7850, 50000])
def test_norms_and_inner_products_are_distorted_as_theory_says(proj_type: str, grad_dim: int) -> None:
    """Johnson–Lindenstrauss: <Pa, Pb>/k has mean <a, b> and, with κ the fourth moment of an entry, the variance

        (‖a‖² ‖b‖² + <a, b>² + (κ - 3) Σ_j a_j² b_j²) / k

    (expand the square and keep the products of entries in which none stands alone). Norms are the case a = b.
    """
    k, matrices = 256, 200
    j = torch.arange(grad_dim)
    generator = torch.Generator().manual_seed(grad_dim)
    vectors = torch.stack(
        [
            torch.ones(grad_dim),
            torch.where(j % 2 == 0, 1.0, -0.5),
            (j < 40).float(),  # few parameters matter
            (1 + j) ** -0.5,  # some matter more
            torch.randn(grad_dim, generator=generator),
            torch.randn(grad_dim, generator=generator) * (torch.rand(grad_dim, generator=generator) < 0.1),
        ]
    )
    G = vectors.double().numpy()
    inner = G @ G.T
    squares = np.diag(inner)
    variance = (np.outer(squares, squares) + inner**2 + (KURTOSIS[proj_type] - 3) * (G**2 @ G.T**2)) / k

    y = np.stack(
        [
            trak_fast.project(vectors, k, proj_type=proj_type, seed=2, model_id=m, precision="highest")
            for m in range(matrices)
        ]
    ).astype(np.float64)
    estimates = y @ y.transpose(0, 2, 1) / k  # (matrices, 6, 6)
    pairs = np.triu_indices(len(G))
    error = ((estimates - inner) / np.sqrt(variance))[:, pairs[0], pairs[1]]  # (matrices, 21)

    values = error.shape[1]
    assert np.abs(error.mean(0)).max() <= limit(values) / math.sqrt(matrices)
    # An estimate is a mean of 256 independent terms whose own kurtosis is at most 15 - 3, that of a squared normal, so
    # the error's kurtosis is below 3 + 12/256 and a mean of squared errors deviates by sqrt(2.05 / matrices).
    assert np.abs((error**2).mean(0) - 1).max() <= limit(values) * math.sqrt(2.05 / matrices)


def test_signs_of_sparse_columns_are_independent() -> None:
    """A column has one sign in all its blocks; those of different columns are uncorrelated, balanced and change."""
    matrices = 4096
    parts = [
        trak_fast.matrix("sjlt", 0, m, range(16), range(512), proj_dim=16, nonzeros=1).sum(0) for m in range(matrices)
    ]
    signs = torch.stack(parts).numpy().astype(np.float64)  # (matrices, 512)
    assert_uncorrelated(signs.sum(0), matrices)
    assert_uncorrelated((signs.T @ signs)[np.triu_indices(512, 1)], matrices)
    assert_uncorrelated((signs[1:] * signs[:-1]).sum(0), matrices - 1)


@pytest.mark.parametrize(("k", "nonzeros"), [(16, 1), (32, 2), (64, 4), (128, 8), (256, 4)])
def test_sparse_inner_products_are_distorted_as_theory_says(k: int, nonzeros: int) -> None:
    """<Pa, Pb>/c has mean <a, b> and, with K = k/c and a_m the part of a in the m-th chunk of K columns, the variance

        (1 + (c - 1)/K) (‖a‖² ‖b‖² + <a, b>² - Σ_m (‖a_m‖² ‖b_m‖² + <a_m, b_m>²)) / k

    The estimate is Σ_{j, l} s_j s_l a_j b_l M_jl / c, where M_jl counts the blocks in which columns j and l meet. With
    independent signs s, no two pairs of columns are correlated, so the variance is Σ_{j < l} (a_j b_l + a_l b_j)²
    E[M_jl²] / c². Columns of one chunk never meet. Those of two chunks meet in each block with probability 1/K, so M_jl
    is binomial with E[M_jl²] = (c/K) (1 + (c - 1)/K).
    """
    matrices, grad_dim = 4000, 600
    width = k // nonzeros
    j = torch.arange(grad_dim)
    generator = torch.Generator().manual_seed(k)
    vectors = torch.stack(
        [
            torch.ones(grad_dim),
            torch.where(j % 2 == 0, 1.0, -0.5),
            (j % width == 5).float(),  # one place in every chunk
            ((j == 3) | (j == width + 9)).float(),  # two parameters matter, in two chunks
            ((j % 4 == 1) & (j < 2 * width)).float(),  # an affine hash takes all of these to one place modulo 4
            (1 + j) ** -0.5,
            torch.randn(grad_dim, generator=generator),
            ((j >= width) & (j < 2 * width)) * torch.randn(grad_dim, generator=generator),  # one chunk
            ((j >= width) & (j < 2 * width)) * torch.randn(grad_dim, generator=generator),
        ]
    )
    G = vectors.double().numpy()
    inner = G @ G.T
    variance = np.outer(np.diag(inner), np.diag(inner)) + inner**2
    for start in range(0, grad_dim, width):
        part = G[:, start : start + width]
        products = part @ part.T
        variance -= np.outer(np.diag(products), np.diag(products)) + products**2
    variance *= (1 + (nonzeros - 1) / width) / k

    y = torch.stack(
        [
            trak_fast.project(vectors, k, proj_type="sjlt", seed=2, model_id=m, nonzeros=nonzeros, precision="highest")
            for m in range(matrices)
        ]
    )
    estimates = (y.double() @ y.double().mT).numpy() / nonzeros  # (matrices, 9, 9)
    pairs = np.triu_indices(len(G))
    error = (estimates - inner)[:, pairs[0], pairs[1]]  # (matrices, 45)
    theory = variance[pairs]

    exact = theory <= 1e-9 * np.outer(np.diag(inner), np.diag(inner))[pairs]
    assert exact.sum() == 3  # the two vectors of one chunk
    np.testing.assert_allclose(error[:, exact], 0, atol=1e-4)
    error = error[:, ~exact] / np.sqrt(theory[~exact])
    values = error.shape[1]
    assert np.abs(error.mean(0)).max() <= limit(values) / math.sqrt(matrices)
    # Few meetings make few large errors, so the deviation of their squares is taken from the sample. It is small enough
    # that a variance that is half as large again would be found.
    deviation = (error**2).std(0, ddof=1) / math.sqrt(matrices)
    assert limit(values) * deviation.max() < 0.5
    assert (np.abs((error**2).mean(0) - 1) / deviation).max() <= limit(values)
