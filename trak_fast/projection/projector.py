"""Objects that project the gradients of one model: whole, slice by slice, or not at all."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Protocol, SupportsIndex

import torch
from torch import Tensor

from ..arguments import integer
from . import checks, kernels, operators
from .checks import Gradients
from .functions import project_adjoint


class ProjectorLike(Protocol):
    """The projectors that `TRAKer` takes; those of traker are such ones.

    One that has `grad_dim` is refused for gradients of another size. `proj_type`, `seed`, `nonzeros` and `definition`
    go into the manifest of the features, and features are multiplied by `dense_scale`, where it has these.

    Attributes:
        proj_dim: Size of a projected gradient, k; 0: that of the gradient.
    """

    proj_dim: int

    def project(self, grads: Mapping[str, Tensor] | Tensor, model_id: int) -> Tensor:
        """Projects gradients, (B, D) or (B, ...) by parameter, to (B, k), by the matrix of `model_id`."""

    def free_memory(self) -> None:
        """Frees the memory that is not needed until the next projection."""


class NoProjection:
    """The projector behind proj_dim=0: features are the gradients themselves, one row a sample."""

    proj_dim = 0
    proj_type = "none"

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Returns gradients as they are, (B, D)."""
        if isinstance(grads, Tensor):
            return grads.clone()
        return torch.cat([g.flatten(1) if g.ndim > 1 else g.unsqueeze(1) for g in grads.values()], dim=1)

    def free_memory(self) -> None:
        """Does nothing."""


class Projector:
    """Projects gradients of one model; can be handed to `trak.TRAKer(projector=...)`.

    Args:
        grad_dim: D, the number of columns of every gradient.
        proj_dim: k.
        seed: See `project`.
        proj_type: See `project`.
        device: The device that the gradients must be on; None: any.
        precision: See `project`.
        nonzeros: See `project`.

    Raises:
        ValueError: A number is out of range, or `proj_dim` does not fit `nonzeros`.
        TypeError: Something has the wrong type.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str | enum.Enum = "rademacher",
        device: torch.device | str | None = None,
        *,
        precision: str | None = None,
        nonzeros: SupportsIndex | None = None,
    ) -> None:
        self.grad_dim = integer("grad_dim", grad_dim, 0, checks.MAX_COLUMNS)
        self.proj_dim = integer("proj_dim", proj_dim, 1, checks.MAX_ROWS)
        self.seed = integer("seed", seed, 0, 2**64 - 1)
        checks.check_precision(precision)
        kind = checks.kind_of(proj_type)
        self.proj_type = str(getattr(proj_type, "value", proj_type))
        self.device = None if device is None else torch.device(device)
        if self.device is not None and self.device.type == "cuda" and torch.cuda.is_available():
            kernels.prepare(kind, self.device)  # before anyone captures a graph
        self.precision = precision
        self.nonzeros = checks.nonzeros_of(kind, self.proj_dim, nonzeros) or None
        self.definition = kernels.definition()

    @property
    def dense_scale(self) -> float:
        """The factor that brings results to the scale of the dense kinds, E‖Pg‖² = k ‖g‖²: √(k / nonzeros), or 1."""
        return 1.0 if self.nonzeros is None else math.sqrt(self.proj_dim / self.nonzeros)

    def project(self, grads: Gradients, model_id: int = 0) -> Tensor:
        """Projects gradients (B, D), or a mapping or sequence of (B, ...), to a new float32 tensor (B, k).

        Raises:
            ValueError: The gradients do not have `grad_dim` columns; otherwise as `project`.
            TypeError: As `project`.
        """
        compiling = torch.compiler.is_compiling()
        tensors = self._tensors(grads, memory=not compiling)
        columns = checks.count_columns(tensors)
        if columns != self.grad_dim:
            raise ValueError(f"grads has {columns} columns, but grad_dim is {self.grad_dim}")
        projection = self._checked(tensors, columns, model_id)
        return operators.project(projection, None, False) if compiling else kernels.project(projection)

    def adjoint(self, y: Tensor, model_id: int = 0) -> Tensor:
        """Takes y (B, k) back to P'y, a new float32 tensor (B, grad_dim); see `project_adjoint`.

        Raises:
            ValueError: `y` does not have `proj_dim` columns; otherwise as `project_adjoint`.
            TypeError: As `project_adjoint`.
        """
        if isinstance(y, Tensor) and y.ndim == 2 and y.shape[1] != self.proj_dim:
            raise ValueError(f"y has {y.shape[1]} columns, but proj_dim is {self.proj_dim}")
        return project_adjoint(
            y,
            self.grad_dim,
            proj_type=self.proj_type,
            seed=self.seed,
            model_id=model_id,
            nonzeros=self.nonzeros,
        )

    def accumulator(self, batch_size: int, model_id: int = 0) -> Accumulator:
        """Makes a sum over slices of gradients of `batch_size` samples, for gradients that are never whole."""
        return Accumulator(self, batch_size, model_id)

    def free_memory(self) -> None:
        """Does nothing: there is no matrix to free. Part of traker's protocol."""

    def _tensors(self, grads: Gradients, memory: bool) -> list[Tensor]:
        """Checks gradients, and that they are on the projector's device; returns their tensors."""
        tensors = checks.gradient_tensors(grads, memory)
        device = tensors[0].device
        if self.device is not None and (
            device.type != self.device.type or self.device.index not in (None, device.index)
        ):
            raise ValueError(f"grads is on device {device}, but this projector's device is {self.device}")
        return tensors

    def _checked(self, tensors: list[Tensor], columns: int, model_id: int, offset: int = 0) -> checks.Projection:
        """Checks everything but the tensors, which have so many columns."""
        return checks.check_projection(
            tensors,
            columns,
            self.proj_dim,
            proj_type=self.proj_type,
            seed=self.seed,
            model_id=model_id,
            offset=offset,
            precision=self.precision,
            nonzeros=self.nonzeros,
        )

    def __repr__(self) -> str:
        nonzeros = "" if self.nonzeros is None else f", nonzeros={self.nonzeros}"
        return (
            f"Projector(grad_dim={self.grad_dim}, proj_dim={self.proj_dim}, seed={self.seed}, "
            f"proj_type={self.proj_type!r}, device={self.device}, precision={self.precision!r}{nonzeros})"
        )


class Accumulator:
    """Adds up projections of slices of a gradient. Made by `Projector.accumulator`."""

    def __init__(self, projector: Projector, batch_size: int, model_id: int) -> None:
        self._projector = projector
        self._batch_size = integer("batch_size", batch_size, 0, 2**62)
        self._model_id = integer("model_id", model_id, 0, 2**32 - 1)
        self._sum: Tensor | None = None

    def add(self, grads: Gradients, offset: int) -> None:
        """Adds the projection of columns `offset` onwards of the gradients.

        A call that an exception such as KeyboardInterrupt ends may have added a part: begin the sum anew then.

        Args:
            grads: (batch_size, columns), or a mapping or sequence of (batch_size, ...).
            offset: The slice's first column within the whole gradient.

        Raises:
            ValueError: The slice does not fit into `grad_dim` columns or has another batch size; otherwise as
                `project`.
            TypeError: As `project`.
        """
        compiling = torch.compiler.is_compiling()
        projector = self._projector
        tensors = projector._tensors(grads, memory=not compiling)
        columns = checks.count_columns(tensors)
        offset = integer("offset", offset, 0, checks.MAX_COLUMNS)
        if offset + columns > projector.grad_dim:
            raise ValueError(f"columns {offset} to {offset + columns} do not fit into grad_dim = {projector.grad_dim}")
        samples = len(tensors[0])
        if samples != self._batch_size:
            raise ValueError(f"grads holds {samples} samples, but batch_size is {self._batch_size}")
        if self._sum is None:
            self._sum = self._zeros(tensors[0].device)
        projection = projector._checked(tensors, columns, self._model_id, offset)
        checks.check_projection_out(self._sum, projection, memory=not compiling)
        if compiling:
            operators.project(projection, self._sum, False)
        else:
            kernels.project(projection, self._sum)

    def result(self) -> Tensor:
        """Returns the sum so far: a new float32 tensor (batch_size, k)."""
        if self._sum is None:
            return self._zeros(self._projector.device)
        return self._sum.clone()

    def _zeros(self, device: torch.device | None) -> Tensor:
        return torch.zeros(self._batch_size, self._projector.proj_dim, dtype=torch.float32, device=device)
