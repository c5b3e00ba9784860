"""A case: one shape, dtype and kind of matrix at which projections are measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..projection.checks import DEFAULT_NONZEROS, KINDS, SPARSE, nonzeros_of

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
DENSE_TYPES = ("rademacher", "normal")
PROJ_TYPES = (*DENSE_TYPES, SPARSE)
NONZEROS = DEFAULT_NONZEROS
"""Entries in each column of the sparse kind."""
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
        proj_type: "rademacher", "normal" or "sjlt".
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
    def dense(self) -> bool:
        """True for a kind of matrix without zeros."""
        return self.proj_type != SPARSE

    @property
    def column_entries(self) -> int:
        """Number of entries of a column of P that are not 0, which is E‖Pg‖²/‖g‖² too: k, or 4 for "sjlt"."""
        return self.proj_dim if self.dense else NONZEROS

    @property
    def matrix_entries(self) -> int:
        """Number of entries of P that are not 0: D k, or 4 D for "sjlt"."""
        return self.grad_dim * self.column_entries

    @property
    def flop(self) -> int:
        """Additions and multiplications of the product: 2 B for each entry of P that is not 0."""
        return 2 * self.batch * self.matrix_entries

    def misfit(self) -> str | None:
        """Returns the reason why trak_fast's matrix of this kind cannot have k rows, or None."""
        try:
            nonzeros_of(KINDS[self.proj_type], self.proj_dim, None if self.dense else NONZEROS)
        except ValueError as error:
            return str(error)
        return None

    def asdict(self) -> dict[str, Any]:
        """Returns the fields by their names, for JSON."""
        return asdict(self)


def dtype_of(name: str) -> torch.dtype:
    """Returns the torch dtype of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
