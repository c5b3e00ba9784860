"""The module of the package sjlt 0.1.7 (`sjlt.SJLTProjection`), for CUDA and the CPU.

Write `from trak_fast.compat.sjlt import SJLTProjection` in the place of `from sjlt import SJLTProjection` (sjlt then
need not be installed), or call `patch()` to put it into an installed sjlt. It holds a seed in the place of D · c
indexes with signs, sums in float32 without atomics, and gives the same bits every time.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..arguments import integer, one_of
from ..projection.checks import MAX_COLUMNS, MAX_ROWS, NONZEROS, SPARSE, check_tensor
from ..projection.projector import Projector
from .patching import Patch

__all__ = ["SJLTProjection", "patch"]
_patch: Patch | None = None


class SJLTProjection(nn.Module):
    """A sparse Johnson-Lindenstrauss transform Sx that keeps norms on average: S has c entries ±1/√c in each column.

    The seed is part of the module's state_dict.

    Args:
        original_dim: D.
        proj_dim: k; k / c must be a power of two, 16 to 2^20.
        c: The entries in each column: 1, 2, 4 or 8.
        threads: Has no influence.
        fixed_blocks: Has no influence.
        device: The device that inputs are moved to; None: a CUDA device if there is one, else the CPU.
        seed: 0 to 2^64 - 1. None: drawn from torch's generator, so that `torch.manual_seed` repeats the matrix.

    Attributes:
        normalization_factor: 1/√c.

    Raises:
        ValueError: A number is out of range, or `proj_dim` does not fit `c`.
        TypeError: Something has the wrong type.
    """

    def __init__(
        self,
        original_dim: int,
        proj_dim: int,
        c: int = 1,
        threads: int = 1024,
        fixed_blocks: int = 84,
        device: str | torch.device | None = None,
        *,
        seed: SupportsIndex | None = None,
    ) -> None:
        super().__init__()
        self.original_dim = integer("original_dim", original_dim, 1, MAX_COLUMNS)
        self.proj_dim = integer("proj_dim", proj_dim, 1, MAX_ROWS)
        self.c = one_of("c", c, NONZEROS)
        self.threads = threads
        self.fixed_blocks = fixed_blocks
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.normalization_factor = 1 / math.sqrt(self.c)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        self._projector = self._with_seed(seed)

    @property
    def seed(self) -> int:
        """The seed of the matrix."""
        return self._projector.seed

    def forward(self, x: Tensor) -> Tensor:
        """Computes Sx of each row.

        Args:
            x: (B, D), float32, float64, bfloat16 or float16, any strides.

        Returns:
            (B, k) on the module's device, in the dtype of x, right to float32's precision. Nothing is recorded for
            autograd, as in sjlt.

        Raises:
            ValueError: x has another shape.
            TypeError: x is no tensor, or has another dtype.
        """
        check_tensor("x", x, memory=False)
        return self._scaled(self._projector.project(x.to(self.device)), x)

    def transpose(self, y: Tensor) -> Tensor:
        """Computes S'y of each row; the result is to y as that of `forward` to x.

        Args:
            y: (B, k), float32, float64, bfloat16 or float16, any strides.

        Returns:
            (B, D).

        Raises:
            ValueError: y has another shape.
            TypeError: y is no tensor, or has another dtype.
        """
        check_tensor("y", y, memory=False)
        return self._scaled(self._projector.adjoint(y.to(self.device)), y)

    def get_compression_ratio(self) -> float:
        """Returns D / k."""
        return self.original_dim / self.proj_dim

    def get_sparsity_ratio(self) -> float:
        """Returns the share of the matrix that is 0."""
        return 1 - self.c / self.proj_dim

    def extra_repr(self) -> str:
        """Describes the module."""
        return (
            f"original_dim={self.original_dim}, proj_dim={self.proj_dim}, c={self.c}, seed={self.seed}, "
            f"device={self.device}"
        )

    def get_extra_state(self) -> dict[str, int]:
        """Returns the numbers that name the matrix, for the state_dict."""
        return {"original_dim": self.original_dim, "proj_dim": self.proj_dim, "c": self.c, "seed": self.seed}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Takes the seed from a state_dict.

        Raises:
            ValueError: It is that of a matrix of another size.
        """
        for name in ("original_dim", "proj_dim", "c"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} must be that of the state_dict, {state[name]}, not {getattr(self, name)}")
        self._projector = self._with_seed(state["seed"])

    def __getattr__(self, name: str) -> Any:
        if name in ("rand_indices", "rand_signs"):
            raise AttributeError(
                f"{type(self).__name__} of trak_fast has no {name}: it stores no matrix. "
                "trak_fast.matrix gives entries; for dattri, which writes to them, call trak_fast.compat.dattri.patch()"
            )
        return super().__getattr__(name)

    def _with_seed(self, seed: SupportsIndex) -> Projector:
        """Makes the projector with a seed."""
        number = integer("seed", seed, 0, 2**64 - 1)
        return Projector(self.original_dim, self.proj_dim, number, SPARSE, nonzeros=self.c)

    def _scaled(self, result: Tensor, given: Tensor) -> Tensor:
        """Scales a result by 1/√c, and returns it in the dtype of what was given."""
        return result.mul_(self.normalization_factor).to(given.dtype)


def patch() -> Patch:
    """Puts `SJLTProjection` into an installed sjlt, and into all modules that have imported sjlt's own.

    Returns:
        The patch, which can be undone.

    Raises:
        ImportError: sjlt is not installed.
    """
    global _patch
    if _patch is None or not _patch.active:
        try:
            module = importlib.import_module("sjlt")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "sjlt is not installed: write `from trak_fast.compat.sjlt import SJLTProjection` in its place",
                name=error.name,
            ) from error
        _patch = Patch(module, {"SJLTProjection": SJLTProjection})
    return _patch
