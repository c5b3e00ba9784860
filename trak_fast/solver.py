"""The linear algebra of TRAK (Park et al., ICML 2023, section 3.2): X'X, its regularised inverse, and scores.

X (n, k) holds the projected training gradients of one checkpoint, one sample a row. A target φ scores every training
sample by X (X'X + λI)⁻¹ φ. Where n < k, the same scores are (XX' + λI)⁻¹ X φ, with an n × n system: whichever of X'X
and XX' is smaller is formed, called the Gram matrix here. It is summed, factorised and solved in float64. Everything
is computed in blocks of rows, so memory stays bounded beside the Gram matrix and its factor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

BLOCK_BYTES = 64 << 20

RIDGE_FACTOR = 5.0
"""The default λ, in mean squared norms of the projected training gradients.

As a multiple of that norm it does not depend on the gradients' unit, on the scale of the projection, or on k:
3 to 10 gave the best linear datamodeling scores for every k from 256 to 4096.
"""

logger = logging.getLogger("trak_fast")


def blocks(total: int, width: int) -> list[slice]:
    """Slices that cut `total` rows of `width` float64 numbers into blocks of at most BLOCK_BYTES, or of one row."""
    size = max(1, BLOCK_BYTES // (8 * width))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _load(array: NDArray[np.float32], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a block of a memory-mapped array."""
    return torch.from_numpy(np.array(array)).to(device=device, dtype=dtype)


def gram_matrix(features: NDArray[np.float32], device: torch.device) -> Tensor:
    """X'X where k ≤ n, else XX', with products and sums in float64.

    Args:
        features: X, (n, k) float32, which may be memory-mapped.
        device: Where to compute.

    Returns:
        (s, s) float64 on `device`, s = min(n, k). Its trace is the sum of the features' squared norms.
    """
    tall = features if features.shape[0] >= features.shape[1] else features.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=device)
    for rows in tqdm(blocks(*tall.shape), desc="X'X", unit="block", leave=False, disable=None):
        block = _load(tall[rows], torch.float64, device)
        gram.addmm_(block.mT, block)
    return gram


class GramAccumulator:
    """X'X of rows that come in batches, with products and sums in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        """Starts from zero.

        Args:
            width: k.
            device: Where to compute; it needs float64.
        """
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Adds rows, (B, k); they are kept until there are enough of them for an efficient product."""
        self._waiting.append(features.double())
        if sum(map(len, self._waiting)) >= min(1024, len(self._gram)):
            self._flush()

    def value(self) -> Tensor:
        """The sum so far, (k, k) float64; it changes with the next call of `add`."""
        self._flush()
        return self._gram

    def _flush(self) -> None:
        if self._waiting:
            block = torch.cat(self._waiting)
            self._gram.addmm_(block.mT, block)
            self._waiting = []


def default_ridge(gram: Tensor, num_rows: int) -> float:
    """λ = RIDGE_FACTOR × the mean squared norm of the `num_rows` rows of X, from the trace of their Gram matrix."""
    return RIDGE_FACTOR * gram.trace().item() / num_rows


def factorize(matrix: Tensor, cutoff: float) -> Callable[[Tensor], Tensor]:
    """The inverse of a positive semi-definite matrix as a function, by Cholesky.

    A matrix that is singular to rounding (a pivot below `cutoff` times the largest) gets its pseudo-inverse instead,
    by its eigenvectors: directions with an eigenvalue of at most `cutoff` times the largest are left out.

    Args:
        matrix: (s, s) float64, symmetric.
        cutoff: Relative to the largest eigenvalue.

    Returns:
        A function from (s, m) to (s, m) float64.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal().square()
    if info.item() == 0 and pivots.min() > cutoff * pivots.max():
        return lambda right: torch.cholesky_solve(right, lower)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > cutoff * values[-1]
    logger.warning(
        "singular to rounding: %d of %d eigenvalues are inverted, the others left out; see lambda_reg",
        int(kept.sum()), len(values),
    )  # fmt: skip
    values, vectors = values[kept], vectors[:, kept]
    return lambda right: vectors @ ((vectors.mT @ right) / values.unsqueeze(1))


class Solver:
    """Scores of one checkpoint, from its features X (n, k) and their Gram matrix."""

    def __init__(self, features: NDArray[np.float32], gram: Tensor, ridge: float) -> None:
        """Factorises X'X + λI, or XX' + λI where that is smaller.

        Args:
            features: X, (n, k) float32, which may be memory-mapped.
            gram: `gram_matrix(features)`; scores are computed on its device.
            ridge: λ ≥ 0, in the unit of X'X. With 0, dependent rows get the least-norm (pseudo-inverse) solution.
        """
        self.features, self.gram, self.device = features, gram, gram.device
        self.primal = features.shape[0] >= features.shape[1]
        regularized = gram.clone()
        regularized.diagonal().add_(ridge)
        # rounding X to float32 is like adding noise of relative size ε, whose squared singular values reach about
        # max(n, k) ε² of the largest: smaller eigenvalues carry no information
        cutoff = max(features.shape) * torch.finfo(torch.float32).eps ** 2
        self.inverse = factorize(regularized, cutoff)

    def scores(self, targets: NDArray[np.float32]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Scores of all training samples for all targets, block by block.

        Args:
            targets: Projected gradients of the targets, (m, k) float32, which may be memory-mapped.

        Yields:
            Rows (training samples), columns (targets) and X (X'X + λI)⁻¹ φ for them, float32 on the CPU. Every pair
            comes once.
        """
        n, k = self.features.shape
        for columns in tqdm(blocks(len(targets), k), desc="scores", unit="block", leave=False, disable=None):
            right = _load(targets[columns], torch.float64, self.device).mT
            if self.primal:
                solved = self.inverse(right).float()  # the last product may be in float32: nothing amplifies its error
                for rows in blocks(n, max(k, solved.shape[1])):
                    block = _load(self.features[rows], torch.float32, self.device)
                    yield rows, columns, (block @ solved).cpu()
            else:
                products = torch.cat([self._rows(rows) @ right for rows in blocks(n, k)])
                yield slice(0, n), columns, self.inverse(products).float().cpu()

    def solve(self, targets: NDArray[np.float32]) -> Tensor:
        """All that scores for some targets need apart from X.

        Args:
            targets: Projected gradients of the targets, (m, k) float32.

        Returns:
            Float32 on the solver's device. If `primal`, the coefficients S = (X'X + λI)⁻¹ Φ', (k, m), with scores X S;
            otherwise (n < k) the scores themselves, (n, m).
        """
        right = _load(targets, torch.float64, self.device).mT
        if not self.primal:
            right = torch.cat([self._rows(rows) @ right for rows in blocks(*self.features.shape)])
        return self.inverse(right).float()

    def self_influence(self) -> Tensor:
        """φ (X'X + λI)⁻¹ φ' of each training sample for itself, the diagonal of X (X'X + λI)⁻¹ X'.

        Returns:
            (n,) float64 on the CPU, each in [0, 1].
        """
        influence = torch.empty(len(self.features), dtype=torch.float64)
        for rows in tqdm(blocks(*self.features.shape), desc="self-influence", unit="block", leave=False, disable=None):
            if self.primal:
                left = right = self._rows(rows)
            else:  # φ_i (X'X + λI)⁻¹ φ_i' = [XX' (XX' + λI)⁻¹]_ii
                left, right = self.gram[rows], torch.zeros_like(self.gram[rows])
                right.diagonal(rows.start).fill_(1)
            influence[rows] = (left * self.inverse(right.mT).mT).sum(1).cpu()
        return influence

    def _rows(self, rows: slice) -> Tensor:
        return _load(self.features[rows], torch.float64, self.device)
