"""The ridge and the weights of samples that are chosen from the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..scales import split
from .gram import Features, load_block

DISAGREEMENT_ROWS = 1024
"""Training samples, evenly spaced, that the disagreement of checkpoints is measured on at most."""

LEAST_DISAGREEMENT = 0.2
"""The least ρ that networks are taken to have."""


def disagreement(features: Sequence[Features], normalize: bool = False) -> float:
    """Measures ρ, the distance between the kernels XX' of several checkpoints as a share of their size.

    With each kernel scaled to the same trace, ρ² is the mean of ‖K_c‖_F² less that of ⟨K_c, K_d⟩, c ≠ d, over the mean
    of ‖K_c‖_F². Each checkpoint has a projection of its own, which adds (tr(K)² + ‖K‖_F²)/k; this is taken off: a
    random projection estimates an inner product ⟨a, b⟩ with the variance (‖a‖² ‖b‖² + ⟨a, b⟩²)/k. At most 1024
    samples, evenly spaced, are compared.

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
        block = load_block(one[rows], torch.float64, total.device, normalize)
        block = split(block.reshape(1, -1), 1).mantissas.view_as(block)  # so that no square vanishes
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
    """Chooses λ = 2 ‖XX'‖_F/√n · √(max(0, 0.2² − ρ²) + ρ²/C) + tr(XX')/(k √C): the noise floor of the kernel XX'.

    Networks agree on the large eigenvalues of the kernel. Below some level its directions are peculiar to one network
    and one projection, and inverting them adds noise to scores. The two terms are the levels up to which random-matrix
    theory expects eigenvalues of such noise. A symmetric matrix with independent entries of standard deviation s has
    eigenvalues up to 2s√n (Wigner); the part that is peculiar to a network is the share ρ of the kernel, so that s = ρ
    ‖XX'‖_F/n. A projection to k rows turns directions that samples do not share into eigenvalues about their squared
    norms times n/k (Marchenko and Pastur), that is tr(XX')/k. Noise that is independent between C checkpoints falls
    with √C. ρ is measured between the checkpoints; the difference to 0.2, where it is smaller, is taken to be noise
    that they have in common: one checkpoint shows nothing of ρ, and moments of one training show too little of it.
    (Networks trained from different random weights showed 0.1 to 0.6, docs/choosing.md. The 0.2 is the one number here
    that is not from theory.)

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
    """Moves the weights Q of samples a third of the way to their mean, where no entry is negative.

    Q = −∂ℓ/∂f of a training sample, 1 − p for classification, comes from networks that were trained on the sample.
    Without the sample, and in other networks, it lies nearer to the mean. (The third was found on
    digits, docs/choosing.md.)

    Args:
        weights: (n,).

    Returns:
        (n,), with the same mean.
    """
    return weights if (weights < 0).any() else (2 * weights + weights.mean()) / 3


def curvature_weights(curvature: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Makes R from the curvature of each sample's loss in the model output: its mean is 1, a tenth is the same for all.

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
