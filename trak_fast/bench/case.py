"""A case: one shape, dtype and kind of matrix at which projections are measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    Attributes:
        batch: Gradients at a time, B.
        grad_dim: D.
        proj_dim: k.
        dtype: Of the gradients, by torch's name.
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
        """Size of the gradients."""
        return self.batch * self.grad_dim * self.torch_dtype.itemsize

    @property
    def matrix_entries(self) -> int:
        """Of P."""
        return self.grad_dim * self.proj_dim

    @property
    def flop(self) -> int:
        """Additions and multiplications of the product: 2 B D k."""
        return 2 * self.batch * self.matrix_entries

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def dtype_of(name: str) -> torch.dtype:
    """A torch dtype by its name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} is none of torch's")
    return dtype
