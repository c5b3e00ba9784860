"""The linear algebra of TRAK (Park et al., ICML 2023, section 3.2): the inverse of X'RX + λI, and scores.

X (n, k) holds the projected training gradients of one checkpoint, one sample a row. A target φ scores every training
sample by X (X'RX + λI)⁻¹ φ, where R is the identity, as in the paper, or a diagonal of sample weights such as the
curvature of each sample's loss. Where n < k the same scores come from an n × n system. Whichever of X'RX and
R½XX'R½ is smaller is formed, called the Gram matrix here. It is summed, factorised and solved in float64. Everything
is computed in blocks of rows, so memory stays bounded beside the Gram matrix and its factor.

Features may be of any floating dtype, memory-mapped or not: blocks are converted as they are read.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..scales import Scaled, split
from .gram import Features, blocks, load_block

logger = logging.getLogger("trak_fast")


@dataclass(frozen=True)
class Inverse:
    """The inverse of a symmetric positive semi-definite matrix.

    Attributes:
        solve: Maps (s, m) to (s, m) float64.
        condition: Ratio of the largest eigenvalue to the smallest that is inverted: exact for "eigh", else estimated
            from below by power iteration.
        method: "cholesky", or "eigh" where the matrix is singular to rounding, or "zero" where all of it is 0.
        jitter: The number that was added to the diagonal to make Cholesky's factorisation possible.
    """

    solve: Callable[[Tensor], Tensor]
    condition: float
    method: str
    jitter: float = 0.0


def factorize(matrix: Tensor, cutoff: float, jitter: bool = False) -> Inverse:
    """Inverts a positive semi-definite matrix by Cholesky, else by its eigenvectors.

    Args:
        matrix: (s, s) float64, symmetric.
        cutoff: Relative to the largest eigenvalue. A matrix with a pivot below it gets its pseudo-inverse: directions
            with an eigenvalue of at most `cutoff` times the largest are left out.
        jitter: Adds up to 1000 roundings of the largest entry to the diagonal of a matrix that is not positive definite
            to rounding. For matrices with a ridge, which is that uncertain anyway.
    """
    largest = matrix.diagonal().max().item()
    if largest == 0:
        return Inverse(torch.zeros_like, 1.0, "zero")
    rounding = len(matrix) * torch.finfo(torch.float64).eps * largest
    for added in (0.0, *((rounding * 10.0**power for power in range(4)) if jitter else ())):
        attempt = matrix
        if added:
            attempt = matrix.clone()
            attempt.diagonal().add_(added)
        lower, info = torch.linalg.cholesky_ex(attempt)
        pivots = lower.diagonal().square()
        if info.item() == 0 and pivots.min() > max(cutoff * pivots.max().item(), rounding if added else 0.0):
            solve = partial(_cholesky_solve, lower)
            condition = _norm(attempt.matmul, attempt) * _norm(solve, attempt)
            if added:
                logger.warning("singular to rounding: %.2g was added to the diagonal", added)
            return Inverse(solve, condition, "cholesky", added)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > max(cutoff * values[-1].item(), 0.0)
    logger.warning(
        "singular to rounding: %d of %d eigenvalues are inverted, the others left out; see lambda_reg",
        int(kept.sum()),
        len(values),
    )
    values, vectors = values[kept], vectors[:, kept]
    condition = (values[-1] / values[0]).item() if len(values) else 1.0
    return Inverse(lambda right: vectors @ ((vectors.mT @ right) / values.unsqueeze(1)), condition, "eigh")


def _cholesky_solve(lower: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, lower)


def _norm(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Estimates the largest eigenvalue of a symmetric operator by 20 power iterations, from below within some 20 %."""
    vector = torch.randn(len(like), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like)
    size = 1.0
    for _ in range(20):
        vector = apply(vector / vector.norm())
        size = vector.norm().item()
    return size


class _Direct(ABC):
    """Base class of solvers whose scores are always products of features with one vector a target."""

    primal = True

    def solve(self, targets: Features) -> Scaled:
        """Returns the vectors whose products with features are scores, (k, m) float32 with a power of two a column."""
        scaled = split(self.coefficients(targets), 0, 2.0**-50, 2.0**32)
        return Scaled(scaled.mantissas.float(), scaled.exponents)

    @abstractmethod
    def coefficients(self, targets: Features) -> Tensor:
        """Returns the vectors whose products with features are scores, (k, m) float64."""


class InnerProducts(_Direct):
    """Scores of one checkpoint that are inner products of features, divided by their mean square.

    They are what φ (X'X + λI)⁻¹ φ' tends to for a large ridge λ, with λ divided out. It has the methods of `Solver`.

    Attributes:
        mean_square: The mean squared norm of the training samples' features; 1 if all are 0 or divided by their norms.
    """

    def __init__(self, features: Features, squares: float, device: torch.device, normalize: bool = False) -> None:
        """Takes the features.

        Args:
            features: X, (n, k) floating, which may be memory-mapped.
            squares: The sum of the squares of X.
            device: The device to compute on.
            normalize: Divides the features of samples and targets by their norms: cosine scores.
        """
        self.features = features
        self.device = device
        self.normalize = normalize
        self.mean_square = 1.0 if normalize or not squares else squares / len(features)

    def coefficients(self, targets: Features) -> Tensor:
        """Returns the vectors whose products with features are scores, (k, m) float64."""
        return load_block(targets, torch.float64, self.device, self.normalize).mT / self.mean_square

    def self_influence(self, rows: slice) -> Tensor:
        """Computes the squared norms of training samples [start, stop) on the scale of scores, float64 on the CPU."""
        squares = torch.empty(rows.stop - rows.start, dtype=torch.float64)
        if hasattr(self.features, "squared_norms_of"):  # those before they were encoded
            squares = torch.from_numpy(self.features.squared_norms_of(rows))
        else:
            for part in blocks(len(squares), self.features.shape[1]):
                own = slice(rows.start + part.start, rows.start + part.stop)
                squares[part] = load_block(self.features[own], torch.float64, self.device).square().sum(1).cpu()
        return (squares > 0).double() if self.normalize else squares / self.mean_square


class SubsetSolver(_Direct):
    """Scores of one checkpoint with the curvature of some of its training samples, X_s (s, k).

    (n/s X_s'RX_s + λI)⁻¹ φ = (φ − X_s'R½ (R½X_sX_s'R½ + λ s/n I)⁻¹ R½X_s φ)/λ (Woodbury), so that systems of s
    equations stand for those of n or k. It has the methods of `Solver`.
    """

    def __init__(
        self,
        features: Features,
        chosen: NDArray[np.intp],
        gram: Tensor,
        ridge: float,
        weights: NDArray[np.float64] | None = None,
        normalize: bool = False,
    ) -> None:
        """Factorises the system.

        Args:
            features: X, (n, k) floating, which may be memory-mapped.
            chosen: (s,) the rows of X_s.
            gram: R½X_sX_s'R½, (s, s) float64.
            ridge: λ > 0, in the unit of X'X.
            weights: (s,) ≥ 0, the diagonal of R; all 1 by default.
            normalize: Divides the features of samples and targets by their norms: cosine scores.

        Raises:
            ValueError: `ridge` is 0.
        """
        if not ridge:
            raise ValueError(
                f"lambda_reg must be more than 0 where n and k are more than {len(chosen):,}: the curvature is that of "
                "so many samples"
            )
        self.features = features
        self.device = gram.device
        self.ridge = ridge
        self.normalize = normalize
        self._chosen = chosen
        self._roots = None if weights is None else torch.from_numpy(weights).to(gram).sqrt().unsqueeze(1)
        regularized = gram.clone()
        regularized.diagonal().add_(ridge * len(chosen) / len(features))
        self.inverse = factorize(regularized, float(torch.finfo(torch.float32).eps) ** 2, jitter=True)

    def coefficients(self, targets: Features) -> Tensor:
        """Returns the vectors whose products with features are scores, (k, m) float64."""
        right = load_block(targets, torch.float64, self.device, self.normalize).mT
        parts = blocks(len(self._chosen), self.features.shape[1])
        inner = torch.cat([self._rows(part) @ right for part in parts])
        if self._roots is not None:
            inner = self._roots * inner
        inner = self.inverse.solve(inner)
        if self._roots is not None:
            inner = self._roots * inner
        back = torch.zeros_like(right)
        for part in parts:
            back.addmm_(self._rows(part).mT, inner[part])
        return (right - back) / self.ridge

    def self_influence(self, rows: slice) -> Tensor:
        """Computes φ'(n/s X_s'RX_s + λI)⁻¹φ of training samples [start, stop), float64 on the CPU."""
        influence = torch.empty(rows.stop - rows.start, dtype=torch.float64)
        for part in blocks(len(influence), self.features.shape[1]):
            own = self.features[rows.start + part.start : rows.start + part.stop]
            block = load_block(own, torch.float64, self.device, self.normalize)
            influence[part] = (block * self.coefficients(own).mT).sum(1).cpu()
        return influence

    def _rows(self, part: slice) -> Tensor:
        """Returns some of the chosen rows, in float64 on the solver's device."""
        return load_block(self.features[self._chosen[part]], torch.float64, self.device, self.normalize)


class Solver:
    """Scores of one checkpoint, from its features X (n, k) and their Gram matrix."""

    def __init__(
        self,
        features: Features,
        gram: Tensor,
        ridge: float,
        weights: NDArray[np.float64] | None = None,
        normalize: bool = False,
    ) -> None:
        """Factorises the Gram matrix plus λI.

        Args:
            features: X, (n, k) floating, which may be memory-mapped.
            gram: `gram_matrix(features, device, weights, normalize)`; scores are computed on its device.
            ridge: λ ≥ 0, in the unit of X'X. With 0, dependent rows get the least-norm (pseudo-inverse) solution.
            weights: (n,) ≥ 0, the diagonal of R; all 1 by default. Where k > n they need λ > 0.
            normalize: Divides the features of samples and targets by their norms: cosine scores.

        Raises:
            ValueError: `weights` are given with λ = 0 and k > n, and not all features are 0.
        """
        self.features = features
        self.gram = gram
        self.device = gram.device
        self.ridge = ridge
        self.normalize = normalize
        self.primal = features.shape[0] >= features.shape[1]
        self.roots = None
        if weights is not None and not self.primal and gram.any():
            if not ridge:
                raise ValueError("weights with ridge = 0 need k <= n")
            self.roots = torch.from_numpy(weights).to(gram).sqrt().unsqueeze(1)
        regularized = gram.clone()
        regularized.diagonal().add_(ridge)
        # rounding X to its dtype is like adding noise of relative size ε, whose squared singular values reach about
        # max(n, k) ε² of the largest for float32: smaller eigenvalues carry no information. The same count would
        # be far too careful for float16, where ε² of the largest is what the noise really reaches.
        eps = np.finfo(features.dtype).eps
        cutoff = max(max(features.shape) * torch.finfo(torch.float32).eps ** 2, float(eps) ** 2)
        self.inverse = factorize(regularized, cutoff, jitter=ridge > 0)

    def solve(self, targets: Features) -> Scaled:
        """Solves for some targets: all that their scores need apart from X.

        Args:
            targets: Projected gradients of the targets, (m, k) floating.

        Returns:
            Float32 on the solver's device, with a power of two for each column; it is 1 where the column's largest
            magnitude is in [2^-50, 2^32]. If `primal`, the coefficients S = (X'RX + λI)⁻¹ Φ', (k, m), with scores X S;
            otherwise (n < k) the scores themselves, (n, m). The product X S may be in float32: nothing amplifies its
            error.
        """
        right = load_block(targets, torch.float64, self.device, self.normalize).mT
        if self.primal:
            solved = self.inverse.solve(right)
        else:
            solved = self._dual(torch.cat([self._rows(rows) @ right for rows in blocks(*self.features.shape)]))
        scaled = split(solved, 0, 2.0**-50, 2.0**32)
        return Scaled(scaled.mantissas.float(), scaled.exponents)

    def coefficients(self, targets: Features) -> Tensor:
        """Computes (X'RX + λI)⁻¹ φ for some targets, whose product with a training sample's feature is its score.

        Args:
            targets: Projected gradients of the targets, (m, k) floating.

        Returns:
            (k, m) float64 on the solver's device.
        """
        right = load_block(targets, torch.float64, self.device, self.normalize).mT
        if self.primal:
            return self.inverse.solve(right)
        n, k = self.features.shape
        inner = torch.cat([self._rows(rows) @ right for rows in blocks(n, k)])
        # λ > 0: φ − X'R½ (R½XX'R½ + λI)⁻¹ R½Xφ, over λ (Woodbury); λ = 0: X' (XX')⁻² Xφ, the pseudo-inverse's
        if self.roots is not None:
            inner = self.roots * self.inverse.solve(self.roots * inner)
        else:
            inner = self.inverse.solve(inner)
        if not self.ridge:
            inner = self.inverse.solve(inner)
        back = torch.zeros_like(right)
        for rows in blocks(n, k):
            back.addmm_(self._rows(rows).mT, inner[rows])
        return (right - back) / self.ridge if self.ridge else back

    def self_influence(self, rows: slice) -> Tensor:
        """Computes φ (X'RX + λI)⁻¹ φ' of training samples for themselves, a part of the diagonal of X (X'RX + λI)⁻¹ X'.

        Args:
            rows: The samples [start, stop).

        Returns:
            (stop − start,) float64 on the CPU; times the weights, each is in [0, 1].
        """
        influence = torch.empty(rows.stop - rows.start, dtype=torch.float64)
        parts = blocks(len(influence), self.features.shape[1])
        for part in tqdm(parts, desc="self-influence", unit="block", leave=False, disable=None):
            own = slice(rows.start + part.start, rows.start + part.stop)
            if self.primal:
                block = self._rows(own)
                influence[part] = (block * self.inverse.solve(block.mT).mT).sum(1).cpu()
            elif self.roots is None:  # φ_i (X'X + λI)⁻¹ φ_i' = [XX' (XX' + λI)⁻¹]_ii
                unit = torch.zeros_like(self.gram[own])
                unit.diagonal(own.start).fill_(1)
                influence[part] = (self.gram[own] * self.inverse.solve(unit.mT).mT).sum(1).cpu()
            else:
                block = self._rows(own)
                products = torch.cat([self._rows(others) @ block.mT for others in blocks(*self.features.shape)])
                influence[part] = self._dual(products)[own].diagonal().cpu()
        return influence

    def _dual(self, products: Tensor) -> Tensor:
        """Computes X (X'RX + λI)⁻¹ φ from the products Xφ (n, m), by the n × n system."""
        if self.roots is None:
            return self.inverse.solve(products)
        # Woodbury: (Xφ − XX'R½ (R½XX'R½ + λI)⁻¹ R½Xφ)/λ. XX'R½ is R⁻½ times the Gram matrix, but a weight may be 0,
        # so X is used: X(X'z) for z = R½ (…)⁻¹ R½ Xφ.
        inner = self.roots * self.inverse.solve(self.roots * products)
        n, k = self.features.shape
        back = torch.zeros(k, products.shape[1], dtype=torch.float64, device=self.device)
        for rows in blocks(n, k):
            back.addmm_(self._rows(rows).mT, inner[rows])
        return (products - torch.cat([self._rows(rows) @ back for rows in blocks(n, k)])) / self.ridge

    def _rows(self, rows: slice) -> Tensor:
        """Returns some rows of X, in float64 on the solver's device."""
        return load_block(self.features[rows], torch.float64, self.device, self.normalize)
