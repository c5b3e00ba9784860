"""The Gram matrix of projected gradients, X'RX or R½XX'R½, summed in float64 in blocks of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

BLOCK_BYTES = 64 << 20
Features = NDArray[np.floating[Any]]


def blocks(total: int, width: int) -> list[slice]:
    """Slices that cut `total` rows of `width` float64 numbers into blocks of at most BLOCK_BYTES, or of one row."""
    size = max(1, BLOCK_BYTES // (8 * width))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _load(array: Features, dtype: torch.dtype, device: torch.device, normalize: bool = False) -> Tensor:
    """A copy of a block of a memory-mapped array; with `normalize` each row divided by its norm, zero rows left."""
    block = torch.from_numpy(np.array(array)).to(device)
    return (normalized(block.double()) if normalize else block).to(dtype)


def normalized(rows: Tensor) -> Tensor:
    """Rows (B, k) divided by their norms, in the dtype that they have; rows of zeros stay."""
    wide = rows.double()  # where squares of float32 numbers neither overflow nor vanish
    return wide.div(wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).to(rows.dtype)


class GramAccumulator:
    """X'RX, summed over blocks of rows as they are made, so that X is not read a second time.

    Products and sums are in float64 whatever the features' dtype: those of float32 features are exact. Sums over
    disjoint blocks may be added up, from processes of their own say: `a.add_sum(b.value())`.
    """

    def __init__(self, proj_dim: int, device: torch.device | None = None, normalize: bool = False) -> None:
        """Starts from no rows.

        Args:
            proj_dim: k. The sum takes 8 k² bytes; where n < k, `gram_matrix` on the whole X is smaller.
            device: Where to compute; the CPU by default.
            normalize: Divides each row by its norm, for cosine scores.
        """
        self.normalize = normalize
        self._sum = torch.zeros(proj_dim, proj_dim, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []  # rows, until there are enough of them for an efficient product

    def add(self, features: Features | Tensor, weights: Features | Tensor | None = None) -> None:
        """Adds rows.

        Args:
            features: (B, k), floating.
            weights: (B,) ≥ 0, the diagonal of R; all 1 by default.

        Raises:
            ValueError: Shapes do not fit.
        """
        if isinstance(features, Tensor):
            features = features.detach().cpu().numpy()
        if features.ndim != 2 or features.shape[1] != len(self._sum):
            raise ValueError(f"features must have shape (B, {len(self._sum)}), not {features.shape}")
        roots = None if weights is None else torch.as_tensor(weights).double().sqrt().to(self._sum.device)
        if roots is not None and roots.shape != features.shape[:1]:
            raise ValueError(f"weights must have shape ({len(features)},), not {tuple(roots.shape)}")
        for rows in blocks(*features.shape):
            block = _load(features[rows], torch.float64, self._sum.device, self.normalize)
            if roots is not None:
                block *= roots[rows, None]
            self._waiting.append(block)
            if sum(map(len, self._waiting)) >= min(1024, len(self._sum)):
                self._flush()

    def add_sum(self, value: Tensor) -> None:
        """Adds the sum of another accumulator, (k, k) float64."""
        self._sum += value.to(self._sum)

    def value(self) -> Tensor:
        """The sum so far, (k, k) float64. It is the accumulator's own: copy it before adding more."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if self._waiting:
            block = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._sum.addmm_(block.mT, block)
            self._waiting = []


def gram_matrix(
    features: Features, device: torch.device, weights: NDArray[np.float64] | None = None, normalize: bool = False
) -> Tensor:
    """X'RX where k ≤ n, else R½XX'R½, with products and sums in float64.

    Args:
        features: X, (n, k) floating, which may be memory-mapped.
        device: Where to compute.
        weights: (n,) ≥ 0, the diagonal of R; all 1 by default.
        normalize: Divides each row of X by its norm.

    Returns:
        (s, s) float64 on `device`, s = min(n, k). Its trace is the (weighted) sum of the features' squared norms.
    """
    n, k = features.shape
    if k <= n:
        sum_ = GramAccumulator(k, device, normalize)
        for rows in tqdm(blocks(n, k), desc="X'X", unit="block", leave=False, disable=None):
            sum_.add(features[rows], None if weights is None else weights[rows])
        return sum_.value()
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    for columns in tqdm(blocks(k, n), desc="XX'", unit="block", leave=False, disable=None):
        block = _load(features.T[columns], torch.float64, device)
        gram.addmm_(block.mT, block)
    if normalize:
        lengths = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        gram /= lengths[:, None]
        gram /= lengths
    if weights is not None:
        roots = torch.from_numpy(weights).to(gram).sqrt()
        gram *= roots[:, None] * roots
    return gram


def weighted_gram(plain: Tensor, by_curvature: Tensor, mean_curvature: float) -> Tensor:
    """X'RX for the R of `curvature_weights`, from X'X and X'CX, with the curvatures themselves in C."""
    share = by_curvature / mean_curvature if mean_curvature > 0 else plain
    return (share + 0.1 * plain) / 1.1
