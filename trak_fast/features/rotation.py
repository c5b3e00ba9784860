"""A random rotation of features, which spreads what is in a few of their numbers over all.

Numbers of one bit keep inner products only where no number of a feature stands out: after the rotation they are sums of
many with random signs, whatever they were before (Gao and Long, "RaBitQ", SIGMOD 2024). Inner products stay as they
are. The rotation is a change of signs and a Hadamard transform, which takes k log k additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..projection.functions import matrix


class Rotation:
    """An orthogonal map of features (B, k)."""

    def __init__(self, proj_dim: int, seed: int = 0) -> None:
        """Chooses the rotation of a size and a seed."""
        self.proj_dim = proj_dim
        self._length = 1 << (proj_dim.bit_length() - 1)  # of a transform, a power of two
        self._signs = matrix("rademacher", seed, 2**32 - 1, range(1), range(proj_dim))[0].sign()

    def apply(self, features: Tensor) -> Tensor:
        """Rotates features, (B, k) floating."""
        rotated = features * self._signs.to(features)
        rotated[:, : self._length] = hadamard(rotated[:, : self._length])
        if self._length < self.proj_dim:
            rotated[:, -self._length :] = hadamard(rotated[:, -self._length :])
        return rotated

    def revert(self, rotated: Tensor) -> Tensor:
        """Returns the features that were rotated, (B, k)."""
        features = rotated.clone()
        if self._length < self.proj_dim:
            features[:, -self._length :] = hadamard(features[:, -self._length :])
        features[:, : self._length] = hadamard(features[:, : self._length])
        return features * self._signs.to(features)


def hadamard(rows: Tensor) -> Tensor:
    """Computes the Hadamard transform of rows (B, p), p a power of two, divided by √p: it is its own inverse."""
    count, length = rows.shape
    step = 1
    while step < length:
        pairs = rows.reshape(count, -1, 2, step)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        step *= 2
    transformed: Tensor = rows.reshape(count, length) / length**0.5
    return transformed
