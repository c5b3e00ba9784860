"""The projectors of traker 0.3.2 (`trak.projectors`), by name and keywords.

Call `patch()` to put them into traker. Or write `from trak_fast.compat.traker import BasicProjector, CudaProjector,
ProjectionType` in the place of `from trak.projectors import ...` (as in LESS and its forks); traker then need not be
installed. `trak.TRAKer(projector=...)` takes a `trak_fast.Projector` without any of this.

The keywords `block_size`, `max_batch_size` and `dtype` are accepted and have no influence: results are float32. Each
`model_id` has an independent matrix; seeds are taken modulo 2**64 and model_ids modulo 2**32.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ..projection.projector import Projector
from . import install_fast_jl
from .patching import Patch, bits

__all__ = ["BasicProjector", "ChunkedCudaProjector", "CudaProjector", "ProjectionType", "patch"]


class ProjectionType(str, enum.Enum):
    """The kinds of matrix."""

    normal = "normal"
    rademacher = "rademacher"


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
        **kwargs: Any,
    ) -> None:
        """Takes traker's arguments.

        Args:
            grad_dim: D, the number of parameters.
            proj_dim: k.
            seed: Any integer; its low 64 bits count.
            proj_type: "normal" or "rademacher", as a string or an enum member.
            device: The device that mappings of gradients are moved to; a tensor stays on its own device.
            *args: Accepted without influence.
            **kwargs: Accepted without influence.

        Raises:
            ValueError: A number or `proj_type` is out of range.
            TypeError: Something has the wrong type.
        """
        super().__init__(grad_dim, proj_dim, bits("seed", seed, 64), proj_type)
        self.home = None if device is None else torch.device(device)

    def project(self, grads: Tensor | Mapping[str, Tensor] | Sequence[Tensor], model_id: SupportsIndex = 0) -> Tensor:
        """Projects (B, D), or a mapping of (B, ...), to a new float32 tensor (B, k)."""
        if isinstance(grads, Mapping) and self.home is not None:
            grads = {name: grad.to(self.home) for name, grad in grads.items()}
        return super().project(grads, bits("model_id", model_id, 32))


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
        super().__init__(sum(map(int, params_per_chunk)), first.proj_dim, seed, first.proj_type, device)
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
