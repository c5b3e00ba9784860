"""The linear algebra of TRAK (Park et al., ICML 2023, section 3.2): X'X, its ridge, its inverse, and scores.

X (n, k) holds the projected training gradients of one checkpoint, one sample a row. A target φ scores every training
sample by X (X'RX + λI)⁻¹ φ, where R is the identity, as in the paper, or a diagonal of sample weights such as the
curvature of each sample's loss. Where n < k the same scores come from an n × n system. Whichever of X'RX and
R½XX'R½ is smaller is formed, called the Gram matrix here. It is summed, factorised and solved in float64. Everything
is computed in blocks of rows, so memory stays bounded beside the Gram matrix and its factor.

Features may be of any floating dtype, memory-mapped or not: blocks are converted as they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

BLOCK_BYTES = 64 << 20

DISAGREEMENT_ROWS = 1024

LEAST_DISAGREEMENT = 0.2
"""ρ that networks are taken to have at least."""

Features = NDArray[np.floating[Any]]

logger = logging.getLogger("trak_fast")


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


def disagreement(features: Sequence[Features], normalize: bool = False) -> float:
    """ρ: how far the kernels XX' of several checkpoints lie apart, as a share of their size.

    With each kernel scaled to the same trace, ρ² is the mean of ‖K_c‖_F² less that of ⟨K_c, K_d⟩, c ≠ d, over the mean
    of ‖K_c‖_F². What projections of their own add, (tr(K)² + ‖K‖_F²)/k, is taken off: a random projection estimates an
    inner product ⟨a, b⟩ with the variance (‖a‖² ‖b‖² + ⟨a, b⟩²)/k. At most 1024 samples are looked at, which are
    evenly spaced.

    Args:
        features: X of each checkpoint, (n, k) floating, for the same samples.
        normalize: Divides each row by its norm.

    Returns:
        A number in [0, 1]; 0 for fewer than two checkpoints.
    """
    if len(features) < 2:
        return 0.0
    rows = np.unique(np.linspace(0, len(features[0]) - 1, DISAGREEMENT_ROWS).astype(np.intp))
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    sizes, noises = [], []
    for one in tqdm(features, desc="disagreement of checkpoints", leave=False, disable=None):
        block = _load(one[rows], torch.float64, total.device, normalize)
        kernel = block @ block.mT
        kernel *= len(rows) / (kernel.trace() or 1.0)
        total += kernel
        sizes.append(kernel.square().sum().item())
        noises.append((len(rows) ** 2 + sizes[-1]) / one.shape[1])
    size, count = sum(sizes) / len(sizes), len(sizes)
    common = (total.square().sum().item() - sum(sizes)) / (count * (count - 1))
    apart = size - common - sum(noises) / count
    return (min(max(apart, 0.0) / size, 1.0)) ** 0.5 if size else 0.0


def auto_ridge(gram: Tensor, num_rows: int, proj_dim: int, num_checkpoints: int = 1, rho: float = 0.0) -> float:
    """λ = 2 ‖XX'‖_F/√n · √(max(0, 0.2² − ρ²) + ρ²/C) + tr(XX')/(k √C): the noise floor of the kernel XX'.

    What networks agree on are the large eigenvalues of the kernel; below some level its directions are peculiar to one
    network and one projection, and inverting them adds noise to scores. The two terms are the levels up to which
    random-matrix theory expects eigenvalues of such noise. A symmetric matrix with independent entries of standard
    deviation s has eigenvalues up to 2s√n (Wigner); what is peculiar to a network is the share ρ of the kernel, so that
    s = ρ ‖XX'‖_F/n. A projection to k rows turns directions that samples do not share into eigenvalues about their
    squared norms times n/k (Marchenko and Pastur), that is tr(XX')/k. Noise that is independent between C checkpoints
    falls with √C. ρ is measured between the checkpoints. What it falls short of 0.2, they are taken to have in common:
    one checkpoint shows nothing of ρ, and moments of one training less than there is. (Networks trained from different
    random weights showed 0.1 to 0.6, docs/choosing.md. The 0.2 is the one number here that is not from theory.)

    λ has the unit of X'X, so scores do not depend on the scale of gradients and projection.

    Args:
        gram: The Gram matrix of X, on either side: both have the same trace and the same Frobenius norm.
        num_rows: Training samples, n.
        proj_dim: Size of a feature, k.
        num_checkpoints: Checkpoints that scores are averaged over, C.
        rho: Their `disagreement`, ρ.
    """
    shared = max(0.0, LEAST_DISAGREEMENT**2 - rho**2)
    network = 2 * (shared + rho**2 / num_checkpoints) ** 0.5 * torch.linalg.matrix_norm(gram).item() / num_rows**0.5
    return float(network + gram.trace().item() / (proj_dim * num_checkpoints**0.5))


def shrunk_weights(weights: Tensor) -> Tensor:
    """Q of the samples, moved a third of the way to its mean where no entry is negative.

    Q = −∂ℓ/∂f of a training sample, 1 − p for classification, comes from networks that were trained on the sample. What
    it would be without the sample, and what it is in other networks, lies nearer to the mean. (The third was found on
    digits, docs/choosing.md.)

    Args:
        weights: (n,).

    Returns:
        (n,), with the same mean.
    """
    return weights if (weights < 0).any() else (2 * weights + weights.mean()) / 3


def curvature_weights(curvature: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """R from the curvature of each sample's loss in the model output: its mean 1, a tenth of it the same for all.

    X'RX is then the Gauss-Newton matrix of the loss up to a factor. The uniform tenth bounds how far samples that are
    fitted to saturation, whose curvature is next to 0, lose their say.

    Args:
        curvature: (n,) ≥ 0.

    Returns:
        (n,) float64 with the mean 1; all 1 where all curvatures are 0.
    """
    relative = np.asarray(curvature, np.float64)
    mean = relative.mean()
    relative = relative / mean if mean > 0 else np.ones_like(relative)
    return (relative + 0.1) / 1.1


def weighted_gram(plain: Tensor, by_curvature: Tensor, mean_curvature: float) -> Tensor:
    """X'RX for the R of `curvature_weights`, from X'X and X'CX, with the curvatures themselves in C."""
    share = by_curvature / mean_curvature if mean_curvature > 0 else plain
    return (share + 0.1 * plain) / 1.1


@dataclass(frozen=True)
class Inverse:
    """The inverse of a symmetric positive semi-definite matrix.

    Attributes:
        solve: Maps (s, m) to (s, m) float64.
        condition: Ratio of the largest eigenvalue to the smallest that is inverted: exact for "eigh", else estimated
            from below by power iteration.
        method: "cholesky", or "eigh" where the matrix is singular to rounding.
        jitter: What was added to the diagonal to make Cholesky's factorisation possible.
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
        jitter: Whether a matrix that is not positive definite to rounding may have up to 1000 roundings of its largest
            entry added to its diagonal first. For matrices with a ridge, which is that much uncertain anyway.
    """
    largest = matrix.diagonal().max().item()
    rounding = len(matrix) * torch.finfo(torch.float64).eps * largest
    for added in (0.0, *((rounding * 10.0**power for power in range(4)) if jitter and largest > 0 else ())):
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
        int(kept.sum()), len(values),
    )  # fmt: skip
    values, vectors = values[kept], vectors[:, kept]
    condition = (values[-1] / values[0]).item() if len(values) else 1.0
    return Inverse(lambda right: vectors @ ((vectors.mT @ right) / values.unsqueeze(1)), condition, "eigh")


def _cholesky_solve(lower: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, lower)


def _norm(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue of a symmetric operator, by 20 power iterations: from below, mostly within 20 %."""
    vector = torch.randn(len(like), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like)
    size = 1.0
    for _ in range(20):
        vector = apply(vector / vector.norm())
        size = vector.norm().item()
    return size


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
            ValueError: `weights` are given with λ = 0 and k > n.
        """
        self.features, self.gram, self.device, self.ridge = features, gram, gram.device, ridge
        self.normalize = normalize
        self.primal = features.shape[0] >= features.shape[1]
        self.roots = None
        if weights is not None and not self.primal:
            if not ridge:
                raise ValueError("weights with ridge = 0 need k <= n")
            self.roots = torch.from_numpy(weights).to(gram).sqrt().unsqueeze(1)
        regularized = gram.clone()
        regularized.diagonal().add_(ridge)
        # rounding X to its dtype is like adding noise of relative size ε, whose squared singular values reach about
        # max(n, k) ε² of the largest for float32: smaller eigenvalues carry no information. The same count would
        # be far too careful for float16, where ε² of the largest is what the noise really reaches.
        eps = np.finfo(getattr(features, "stored_dtype", features.dtype)).eps
        cutoff = max(max(features.shape) * torch.finfo(torch.float32).eps ** 2, float(eps) ** 2)
        self.inverse = factorize(regularized, cutoff, jitter=ridge > 0)

    def solve(self, targets: Features) -> Tensor:
        """All that scores for some targets need apart from X.

        Args:
            targets: Projected gradients of the targets, (m, k) floating.

        Returns:
            Float32 on the solver's device. If `primal`, the coefficients S = (X'RX + λI)⁻¹ Φ', (k, m), with scores
            X S; otherwise (n < k) the scores themselves, (n, m). The product X S may be in float32: nothing
            amplifies its error.
        """
        right = _load(targets, torch.float64, self.device, self.normalize).mT
        if self.primal:
            return self.inverse.solve(right).float()
        return self._dual(torch.cat([self._rows(rows) @ right for rows in blocks(*self.features.shape)])).float()

    def self_influence(self, rows: slice) -> Tensor:
        """φ (X'RX + λI)⁻¹ φ' of training samples for themselves, a part of the diagonal of X (X'RX + λI)⁻¹ X'.

        Args:
            rows: Which samples, [start, stop).

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
        """X (X'RX + λI)⁻¹ φ from the products Xφ (n, m), by the n × n system."""
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

    def _rows(self, rows: slice, dtype: torch.dtype = torch.float64) -> Tensor:
        return _load(self.features[rows], dtype, self.device, self.normalize)
