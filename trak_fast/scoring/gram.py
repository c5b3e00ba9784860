"""The Gram matrix of projected gradients, X'RX or R½XX'R½, summed in float64 in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..scales import LARGEST_FEATURE, split

BLOCK_BYTES = 64 << 20
"""Bytes of float64 rows that are computed with at a time."""

Features = NDArray[np.floating[Any]]


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Computes in the dtypes that are asked for, and on the CPU by default, whatever the caller has set for models."""
    with ExitStack() as modes:
        modes.enter_context(torch.no_grad())
        modes.enter_context(torch.device("cpu"))
        modes.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            modes.enter_context(torch.autocast("cuda", enabled=False))
        yield


def blocks(total: int, width: int) -> list[slice]:
    """Cuts `total` rows of `width` float64 numbers into slices of at most BLOCK_BYTES, or of one row."""
    size = max(1, BLOCK_BYTES // (8 * width))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def load_block(array: Features, dtype: torch.dtype, device: torch.device, normalize: bool = False) -> Tensor:
    """Copies a block of a memory-mapped array to a device; with `normalize` each row is divided by its norm."""
    block = torch.from_numpy(np.array(array)).to(device)
    return (normalized(block.double()) if normalize else block).to(dtype)


def normalized(rows: Tensor) -> Tensor:
    """Divides rows (B, k) by their norms, in the dtype that they have; rows of zeros stay."""
    wide = rows.double()  # where squares of float32 numbers neither overflow nor vanish; those of others may vanish
    wide = split(wide, 1, 1 / LARGEST_FEATURE, LARGEST_FEATURE).mantissas
    return wide.div(wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).to(rows.dtype)


class GramAccumulator:
    """X'RX, summed over blocks of rows as they are made, so that X is not read a second time.

    Products and sums are in float64 whatever the features' dtype: products of float32 features are exact. Values of
    accumulators over disjoint rows may be added up, those of several processes for example.
    """

    def __init__(self, proj_dim: int, device: torch.device | None = None, normalize: bool = False) -> None:
        """Starts from no rows.

        Args:
            proj_dim: Size of a feature, k. The sum takes 8 k² bytes; where n < k, `gram_matrix` of the whole X takes
                fewer.
            device: The device to compute on; the CPU by default.
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
            block = load_block(features[rows], torch.float64, self._sum.device, self.normalize)
            if roots is not None:
                block *= roots[rows, None]
            self._waiting.append(block)
            if sum(map(len, self._waiting)) >= min(1024, len(self._sum)):
                self._flush()

    def value(self) -> Tensor:
        """Returns the sum so far, (k, k) float64. The tensor is the accumulator's own: copy it before adding more."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        """Multiplies the rows that wait, and adds the product to the sum."""
        if self._waiting:
            block = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._sum.addmm_(block.mT, block)
            self._waiting = []


def gram_matrix(
    features: Features,
    device: torch.device,
    weights: NDArray[np.float64] | None = None,
    normalize: bool = False,
    rows: NDArray[np.intp] | None = None,
) -> Tensor:
    """Computes X'RX where k ≤ n, else R½XX'R½, with products and sums in float64.

    Args:
        features: X, (n, k) floating, which may be memory-mapped.
        device: The device to compute on.
        weights: (n,) ≥ 0, the diagonal of R; all 1 by default.
        normalize: Divides each row of X by its norm.
        rows: (s,) the rows of X to take, fewer than k; `weights` are theirs. All by default.

    Returns:
        (s, s) float64 on `device`, s = min(n, k). Its trace is the (weighted) sum of the features' squared norms.
    """
    n, k = features.shape
    if rows is not None:
        n = len(rows)
    if k <= n:
        accumulator = GramAccumulator(k, device, normalize)
        for part in tqdm(blocks(n, k), desc="X'X", unit="block", leave=False, disable=None):
            accumulator.add(features[part], None if weights is None else weights[part])
        return accumulator.value()
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    if normalize:  # a row's power of two does not change its direction, but its square might vanish
        features = getattr(features, "mantissas", features)
    for columns in tqdm(blocks(k, n), desc="XX'", unit="block", leave=False, disable=None):
        block = load_block(_columns(features, columns, rows), torch.float64, device)
        gram.addmm_(block.mT, block)
    if normalize:
        lengths = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        gram /= lengths[:, None]
        gram /= lengths
    if weights is not None:
        roots = torch.from_numpy(weights).to(gram).sqrt()
        gram *= roots[:, None] * roots
    return gram


def _columns(features: Features, columns: slice, rows: NDArray[np.intp] | None) -> Features:
    """Reads columns of some rows, (columns, rows), and no others."""
    taken: Features
    if rows is None:
        taken = features.T[columns]
    elif hasattr(features, "take_columns"):
        taken = features.take_columns(rows, columns).T
    else:
        taken = features[:, columns][rows].T
    return taken


def sum_of_squares(features: Features) -> float:
    """Computes the sum of the squares of features (n, k), which may be memory-mapped, in float64.

    Features in few bits count as they were before they were encoded.
    """
    if hasattr(features, "squared_norms"):
        return float(features.squared_norms.sum())
    return sum(float(np.square(features[rows], dtype=np.float64).sum()) for rows in blocks(*features.shape))


def weighted_gram(plain: Tensor, by_curvature: Tensor, mean_curvature: float) -> Tensor:
    """Computes X'RX for the R of `curvature_weights` from X'X and X'CX, where C has the curvatures themselves."""
    share = by_curvature / mean_curvature if mean_curvature > 0 else plain
    return (share + 0.1 * plain) / 1.1
