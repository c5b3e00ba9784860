"""Models whose layers are split over processes that have the same samples (tensor parallelism by DTensor).

Each process projects the gradients of its parts of the parameters, at their columns of the whole matrix, and the sums
of all processes are added up once. Of parameters that all processes have whole, such as those of norms, the gradients
are either the same in each process, and counted in the first one alone; or each has that of its tokens or heads,
summands that are counted in all. Where DTensors do not say which it is, the gradients of a sample are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..gradients.parameters import listed
from ..gradients.pieces import Lookup, Piece
from .sharded import gather_objects, mesh_of, shards_of

LONG_ROW = {"cpu": 1024, "cuda": 4096}
"""Columns from which on a row is projected by a call of its own, rather than many with zeros between them."""

SAME = 1e-3
"""The relative difference of the same gradients in two processes; those of other tokens or heads differ by far more."""


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a process has, a matrix of rows among the whole one's.

    Attributes:
        height: Rows.
        width: Entries of a row.
        first: The column of its first entry, within the parameter.
        pitch: Columns from one row to the next: the whole parameter's width.
        first_row: The first of its rows in the whole parameter.
    """

    height: int
    width: int
    first: int
    pitch: int
    first_row: int


def part_of(parameter: Any, name: str) -> Part | None:
    """Finds the part of a DTensor that this process has; None where all have all of it.

    Raises:
        ValueError: It is spread over a mesh of several dimensions, or by a dimension that rows are not cut by.
    """
    placement = parameter.placements[0]
    if len(parameter.placements) > 1:
        raise ValueError(
            f"model must be split over a mesh of one dimension, not {len(parameter.placements)} as {name} is; give "
            "parallelize_module the mesh of tensor parallelism alone"
        )
    if placement.is_replicate():
        return None
    shape = parameter.shape
    if type(placement).__name__ != "Shard" or placement.dim > 1:
        raise ValueError(f"parameters must be split by their first or second dimension, not {name} by {placement}")
    size = shape[placement.dim]
    step = -(-size // parameter.device_mesh.size())
    start = min(step * parameter.device_mesh.get_local_rank(), size)
    count = min(step, size - start)
    rest = math.prod(shape[placement.dim + 1 :])
    if len(shape) == 1:
        return Part(height=1, width=count, first=start, pitch=size, first_row=0)
    if placement.dim == 0:
        return Part(height=count, width=rest, first=start * rest, pitch=rest, first_row=start)
    return Part(height=shape[0], width=count * rest, first=start * rest, pitch=size * rest, first_row=0)


def spread(rows: Tensor, first: int, pitch: int) -> Iterator[tuple[Tensor, int]]:
    """Yields blocks of neighbouring columns that cover rows with gaps between them.

    Args:
        rows: (B, r, width).
        first: The column of the first entry.
        pitch: Columns from one row to the next.

    Yields:
        (B, ...) and the column of its first entry. Short rows come together with the columns between them, which are
        zero, in no more memory than the rows themselves take.
    """
    count, height, width = rows.shape
    if width == pitch or height == 1:
        yield rows, first
        return
    step = 1 if width >= LONG_ROW.get(rows.device.type, 4096) else max(1, height * width // pitch)
    for low in range(0, height, step):
        some = rows[:, low : low + step]
        if step > 1:
            filled = some.new_zeros(count, some.shape[1], pitch)
            filled[:, :, :width] = some
            some = filled.flatten(1)[:, : (some.shape[1] - 1) * pitch + width]
        yield some, first + low * pitch


class _Local:
    """A layer with the parts of its parameters that this process has."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        return value.to_local() if hasattr(value, "to_local") else value


class TensorParallel:
    """A model's division among processes that have the same samples.

    Attributes:
        parts: The parts that this process has of parameters that are split, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes a model's parameters, some of them DTensors.

        Raises:
            ValueError: They are spread over several meshes, or in a way that is not supported.
        """
        self._mesh = mesh_of(parameters)
        spread_over = {name: p for name, p in parameters.items() if hasattr(p, "placements")}
        found = {name: part_of(parameter, name) for name, parameter in spread_over.items()}
        self.parts = {name: part for name, part in found.items() if part is not None}
        self._parameters = spread_over
        self._plain = [name for name in parameters if name not in spread_over]
        self._summands: set[str] = set()  # of parameters that all have, those whose gradients are to be added up
        self.is_compared = not self._plain  # True once it is known which of the plain ones are

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, Tensor]) -> TensorParallel | None:
        """Makes the division of a model that is split; None for others."""
        if shards_of(model) or mesh_of(parameters) is None:
            return None
        return cls(parameters)

    def covers(self, layer: nn.Module) -> bool:
        """Tells if a layer has parameters that are DTensors, which cannot be differentiated apart from the model."""
        return any(hasattr(parameter, "placements") for parameter in layer.parameters())

    def localized(self, layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> _Localized | None:
        """Takes the part of a layer's call that is in this process; returns None where it is no such part."""
        inputs, input_dim = _local(inputs)
        output_grads, output_dim = _local(output_grads)
        is_split = input_dim is not None and input_dim == output_dim and 0 < input_dim < inputs.ndim - 1
        by_features = input_dim in (None, inputs.ndim - 1) and output_dim in (None, output_grads.ndim - 1)
        if not is_split and not by_features:
            return None
        return _Localized(layer=_Local(layer), inputs=inputs, output_grads=output_grads, is_split=is_split)

    def placed(self, name: str, piece: Piece, is_split: bool) -> Piece | None:
        """Returns the piece of a parameter's part, (height, width) of it; None where it is of another size.

        Args:
            name: The parameter.
            piece: A piece that the layer's rule has made of what is in this process.
            is_split: True where each process has some of the tokens.
        """
        part = self.parts.get(name)
        if part is None:
            if is_split:
                self._summands.add(name)
            return piece
        if is_split:
            return None
        if isinstance(piece, Lookup) and part.pitch == part.width:
            places = piece.indices - part.first_row
            inside = (places >= 0) & (places < part.height)
            piece = replace(
                piece,
                indices=torch.where(inside, places, 0),
                values=piece.values * inside.unsqueeze(2),
                height=part.height,
            )
        return piece if (piece.height, piece.width) == (part.height, part.width) else None

    def local_gradient(self, name: str, gradient: Any) -> Tensor:
        """Returns the part of a parameter's gradient, by autograd, that this process has."""
        if not hasattr(gradient, "placements"):
            return gradient  # type: ignore[no-any-return]
        parameter: Any = self._parameters[name]
        if name not in self.parts and gradient.placements[0].is_partial():
            self._summands.add(name)
        elif gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        local: Tensor = gradient.to_local()
        return local

    def blocks(self, name: str, rows: Tensor, column: int) -> Iterator[tuple[Tensor, int]]:
        """Yields what this process adds to the features for some rows of its part of a parameter.

        Args:
            name: The parameter.
            rows: (B, r, width).
            column: The column of the first row, within the part.

        Yields:
            (B, ...) and the column of its first entry, within the parameter.
        """
        part = self.parts.get(name)
        if part is not None:
            yield from spread(rows, part.first + column // part.width * part.pitch, part.pitch)
        elif name in self._summands or self._mesh.get_local_rank() == 0:
            yield rows, column

    def compare(self, sketches: Mapping[str, Tensor]) -> None:
        """Finds out which gradients of parameters that are no DTensors are the same in all processes.

        Args:
            sketches: Sketches of one sample's gradients, by parameter.

        Raises:
            RuntimeError: One was found to be something else before.
        """
        own = {name: sketches[name] for name in self._plain if name in sketches}
        others = self.gather(own)
        differing = self.union(
            name
            for name, sketch in own.items()
            if any((other[name] - sketch).abs().max() > SAME * sketch.abs().max() for other in others)
        )
        if self.is_compared and (new := sorted(differing - self._summands)):
            raise RuntimeError(
                f"gradients of {listed(new)} were the same in all processes, and are not now; make them DTensors "
                "(SequenceParallel, for example), by which it is known"
            )
        self._summands |= differing
        self.is_compared = True

    def gather(self, value: Any) -> list[Any]:
        """Collects a value of each process."""
        return gather_objects(self._mesh, value)

    def union(self, names: Iterable[str]) -> set[str]:
        """Collects the names that any process has."""
        return set().union(*self.gather(sorted(names)))

    def total(self, features: Tensor) -> Tensor:
        """Adds up the features of all processes, (B, k)."""
        dist.all_reduce(features, group=self._mesh.get_group())
        return features


@dataclass(frozen=True)
class _Localized:
    """The part of a layer's call that is in one process.

    Attributes:
        layer: The layer, with its own parts of parameters.
        inputs: Its input.
        output_grads: The gradient of its output.
        is_split: True where each process has some of the tokens.
    """

    layer: Any
    inputs: Tensor
    output_grads: Tensor
    is_split: bool


def _local(tensor: Any) -> tuple[Tensor, int | None]:
    """Returns what this process has of a tensor, and the dimension that it is split by, if it is."""
    if not hasattr(tensor, "placements"):
        return tensor, None
    placement = tensor.placements[0]
    if placement.is_partial():
        from torch.distributed.tensor import Replicate

        tensor = tensor.redistribute(placements=[Replicate()])
    return tensor.to_local(), placement.dim % tensor.ndim if placement.is_shard() else None
