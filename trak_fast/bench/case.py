"""A case: one shape, dtype and kind of matrix at which projections are measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
PROJ_TYPES = ("rademacher", "normal")
MOST_GRADIENTS = 2**32
"""Gradients in one call, B, at most."""


@dataclass(frozen=True)
class Case:
    """One shape, dtype, kind of matrix and device to measure at.

    Attributes:
        batch: Gradients at a time, B.
        grad_dim: Size of a gradient, D.
        proj_dim: Projected size, k.
        dtype: The gradients' dtype, by torch's name.
        proj_type: "rademacher" or "normal".
        device: "cpu" or "cuda".
    """

    batch: int
    grad_dim: int
    proj_dim: int
    dtype: str
    proj_type: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The gradients' dtype."""
        return dtype_of(self.dtype)

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients in memory."""
        return self.batch * self.grad_dim * self.torch_dtype.itemsize

    @property
    def matrix_entries(self) -> int:
        """Number of entries of P, D k."""
        return self.grad_dim * self.proj_dim

    @property
    def flop(self) -> int:
        """Additions and multiplications of the product: 2 B D k."""
        return 2 * self.batch * self.matrix_entries

    def asdict(self) -> dict[str, Any]:
        """Returns the fields by their names, for JSON."""
        return asdict(self)


def dtype_of(name: str) -> torch.dtype:
    """Returns the torch dtype of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
