"""The projectors of traker 0.3.2 (`trak.projectors`), by name and keywords.

Call `patch()` to put them into traker. Or write `from trak_fast.compat.traker import BasicProjector, CudaProjector,
ProjectionType` in the place of `from trak.projectors import ...` (as in LESS and its forks); traker then need not be
installed. `trak.TRAKer(projector=...)` takes a `trak_fast.Projector` without any of this.

The keywords `block_size`, `max_batch_size` and `dtype` are accepted and have no influence: results are float32. Each
`model_id` has an independent matrix; seeds are taken modulo 2^64 and model_ids modulo 2^32. The kind "sjlt", which
traker does not have, is multiplied by √(k / nonzeros): its results are then as large as those of the other kinds, and a
number for `lambda_reg` keeps its meaning.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ..projection.checks import SPARSE
from ..projection.projector import Accumulator, Projector
from . import install_fast_jl
from .patching import Patch, bits

__all__ = ["BasicProjector", "ChunkedCudaProjector", "CudaProjector", "ProjectionType", "patch"]


class ProjectionType(str, enum.Enum):
    """The kinds of matrix."""

    normal = "normal"
    rademacher = "rademacher"
    sjlt = "sjlt"


class BasicProjector(Projector):
    """A stand-in for traker's BasicSingleBlockProjector, BasicProjector and CudaProjector, on any device."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: SupportsIndex,
        proj_type: str | enum.Enum,
        device: torch.device | str | None,
        *args: Any,
        nonzeros: SupportsIndex | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes traker's arguments.

        Args:
            grad_dim: D, the number of parameters.
            proj_dim: k.
            seed: Any integer; its low 64 bits count.
            proj_type: "normal", "rademacher" or "sjlt", as a string or an enum member.
            device: The device that mappings of gradients are moved to; a tensor stays on its own device.
            *args: Accepted without influence.
            nonzeros: Entries in each column of "sjlt": 1, 2, 4 or 8; by default 1, since traker's default λ = 0 needs a
                matrix of full rank.
            **kwargs: Accepted without influence.

        Raises:
            ValueError: A number or `proj_type` is out of range, or `proj_dim` does not fit `nonzeros`.
            TypeError: Something has the wrong type.
        """
        if nonzeros is None and getattr(proj_type, "value", proj_type) == SPARSE:
            nonzeros = 1
        super().__init__(grad_dim, proj_dim, bits("seed", seed, 64), proj_type, nonzeros=nonzeros)
        self._factor = super().dense_scale
        self.home = None if device is None else torch.device(device)

    @property
    def dense_scale(self) -> float:
        """1: results have the scale of the dense kinds."""
        return 1.0

    def project(self, grads: Tensor | Mapping[str, Tensor] | Sequence[Tensor], model_id: SupportsIndex = 0) -> Tensor:
        """Projects (B, D), or a mapping of (B, ...), to a new float32 tensor (B, k)."""
        if isinstance(grads, Mapping) and self.home is not None:
            grads = {name: grad.to(self.home) for name, grad in grads.items()}
        result = super().project(grads, bits("model_id", model_id, 32))
        return result if self.nonzeros is None else result.mul_(self._factor)

    def adjoint(self, y: Tensor, model_id: SupportsIndex = 0) -> Tensor:
        """Takes y (B, k) back by the transpose of the matrix that `project` multiplies by."""
        result = super().adjoint(y, bits("model_id", model_id, 32))
        return result if self.nonzeros is None else result.mul_(self._factor)

    def accumulator(self, batch_size: int, model_id: SupportsIndex = 0) -> Accumulator:
        """Makes a sum over slices of gradients, which ends in what `project` returns for the whole."""
        return _ScaledAccumulator(self, batch_size, bits("model_id", model_id, 32))


class _ScaledAccumulator(Accumulator):
    """A sum over slices that has the factor of a `BasicProjector`."""

    def __init__(self, projector: BasicProjector, batch_size: int, model_id: int) -> None:
        super().__init__(projector, batch_size, model_id)
        self._factor = projector._factor

    def result(self) -> Tensor:
        """Returns the sum so far: a new float32 tensor (batch_size, k)."""
        return super().result().mul_(self._factor)


CudaProjector = BasicProjector


class ChunkedCudaProjector(BasicProjector):
    """A stand-in for the projector that traker makes for large models: one matrix, no chunks, no workspace.

    traker draws each chunk's seed from 500 numbers, so that chunks often share their matrix; here the seeds of all
    chunks together make one seed.
    """

    def __init__(
        self,
        projector_per_chunk: Sequence[Any],
        max_chunk_size: int,
        params_per_chunk: Sequence[int],
        feat_bs: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        first = projector_per_chunk[0]
        seed = 0
        for projector in projector_per_chunk:
            seed = seed * 0x9E3779B97F4A7C15 + int(projector.seed)
        nonzeros = getattr(first, "nonzeros", None)
        super().__init__(
            sum(map(int, params_per_chunk)), first.proj_dim, seed, first.proj_type, device, nonzeros=nonzeros
        )
        self.params_per_chunk = params_per_chunk


_patch: Patch | None = None


def patch() -> Patch:
    """Puts these projectors, and `fast_jl`, into an installed traker, and into all modules that have imported its own.

    Returns:
        The patch, which can be undone.

    Raises:
        ImportError: traker is not installed.
    """
    global _patch
    if _patch is None or not _patch.active:
        projectors = importlib.import_module("trak.projectors")
        install_fast_jl()
        projectors.AbstractProjector.register(BasicProjector)
        _patch = Patch(
            projectors,
            {
                "BasicSingleBlockProjector": BasicProjector,
                "BasicProjector": BasicProjector,
                "CudaProjector": CudaProjector,
                "ChunkedCudaProjector": ChunkedCudaProjector,
            },
        )
    return _patch
