"""A random rotation of features, which spreads what is in a few of their numbers over all.

Numbers of one bit keep inner products only where no number of a feature stands out: after the rotation they are sums of
many with random signs, whatever they were before (Gao and Long, "RaBitQ", SIGMOD 2024). Inner products stay as they
are. The rotation changes signs and makes a Hadamard transform, twice, since after the first the numbers of a feature
with few entries still have few values.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..gradients.pieces import exact
from ..projection.functions import matrix

ROUNDS = 2
"""Changes of signs, each with a transform."""

FACTOR = 64
"""Rows of the matrices that a transform is made of at most: products of these are faster than additions of pairs."""


class Rotation:
    """An orthogonal map of features (B, k)."""

    def __init__(self, proj_dim: int, seed: int = 0) -> None:
        """Chooses the rotation of a size and a seed."""
        self.proj_dim = proj_dim
        length = 1 << (proj_dim.bit_length() - 1)  # of a transform, a power of two
        windows = [slice(length)] if length == proj_dim else [slice(length), slice(proj_dim - length, proj_dim)]
        self._windows = windows * ROUNDS
        signs = matrix("rademacher", seed, 2**32 - 1, range(len(self._windows)), range(proj_dim))
        self._signs = signs.sign()

    def apply(self, features: Tensor) -> Tensor:
        """Rotates features, (B, k) floating."""
        for window, signs in zip(self._windows, self._signs.to(features), strict=True):
            features = features * signs
            features[:, window] = hadamard(features[:, window])
        return features

    def revert(self, rotated: Tensor) -> Tensor:
        """Returns the features that were rotated, (B, k)."""
        for window, signs in zip(reversed(self._windows), self._signs.flip(0).to(rotated), strict=True):
            rotated = rotated.clone()
            rotated[:, window] = hadamard(rotated[:, window])
            rotated *= signs
        return rotated


def hadamard(rows: Tensor) -> Tensor:
    """Computes the Hadamard transform of rows (B, p), p a power of two, divided by √p: it is its own inverse."""
    count, length = rows.shape
    inner = 1
    while inner < length:
        size = min(FACTOR, length // inner)
        factor = _hadamard_matrix(size).to(rows)
        with exact(rows.device):
            rows = factor @ rows.reshape(-1, size, inner) if inner > 1 else rows.reshape(-1, size) @ factor
        inner *= size
    return rows.reshape(count, length)


@lru_cache
def _hadamard_matrix(size: int) -> Tensor:
    """Makes Hadamard's matrix, symmetric and orthogonal, (size, size) float64; size is a power of two."""
    own = torch.ones(1, 1, dtype=torch.float64)
    while len(own) < size:
        own = torch.cat([torch.cat([own, own], 1), torch.cat([own, -own], 1)]) / 2**0.5
    return own
