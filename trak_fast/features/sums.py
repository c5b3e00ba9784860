"""Sums of projected pieces of gradients: rows of a piece are formed within a budget, projected, and dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..gradients.parameters import Columns
from ..gradients.pieces import Piece, Workspace, row_slices
from ..projection.functions import project
from ..projection.projector import Projector
from .sketches import Sketches
from .tensor_parallel import TensorParallel


class DeviceSums:
    """A sum whose summands are on several devices, as the layers of a model may be."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Starts with zeros, of a shape."""
        self._shape = shape
        self._sums: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Returns the sum of what is on a device, to add to."""
        if device not in self._sums:
            self._sums[device] = torch.zeros(self._shape, dtype=torch.float32, device=device)
        return self._sums[device]

    def total(self, device: torch.device) -> Tensor:
        """Returns the sum over all devices, float32."""
        total = self.on(device)
        for other, sums in self._sums.items():
            if other != device:
                total += sums.to(device)
        return total


class FeatureSums:
    """Sums of the projections of pieces, (B, k)."""

    def __init__(
        self,
        projector: Projector,
        columns: Mapping[str, Columns],
        count: int,
        *,
        model_id: int,
        slice_bytes: int,
        sketches: Sequence[Sketches],
        parallel: TensorParallel | None = None,
    ) -> None:
        """Starts with zeros.

        Args:
            projector: Names the matrix.
            columns: The columns of each parameter.
            count: Samples, B.
            model_id: The checkpoint's number.
            slice_bytes: Bytes of gradients that are formed at a time.
            sketches: Get the rows of samples that are checked, too.
            parallel: Knows the columns of the parts that this process has of parameters.
        """
        self._projector = projector
        self._columns = columns
        self._model_id = model_id
        self._slice_bytes = slice_bytes
        self._sketches = sketches
        self._parallel = parallel
        self._sums = DeviceSums((count, projector.proj_dim))
        self._workspace = Workspace()

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        for rows, column in row_slices(piece, self._slice_bytes, self._workspace):
            self._add_checked(name, rows, column, start)
            del rows  # before the next ones are formed

    add_whole = add

    def flush(self) -> None:
        """Frees memory: there is nothing left to add, as sums of pieces are sums of their projections."""
        self._workspace.clear()

    def rows_at_once(self, piece: Piece) -> int:
        """Counts the rows of a piece that may be formed at a time."""
        return max(1, self._slice_bytes // max(1, 4 * piece.count * piece.width))

    def _add_checked(self, name: str, rows: Tensor, column: int, start: int) -> None:
        self.check_rows(name, rows, column, start)
        self.add_rows(name, rows, column, start)

    def check_rows(self, name: str, rows: Tensor, column: int, start: int) -> None:
        """Adds the rows of samples that are checked to their sketches; arguments as of `add_rows`."""
        for sketches in self._sketches:
            sketches.add_rows(name, rows, column, start)

    def add_rows(self, name: str, rows: Tensor, column: int, start: int) -> None:
        """Adds the projection of some rows of a parameter's gradient.

        Args:
            name: The parameter.
            rows: (B, r, width), for samples from `start` on.
            column: The column of the first row, within the parameter.
            start: The first sample.
        """
        sums = self._sums.on(rows.device)[start : start + len(rows)]
        projector = self._projector
        blocks = [(rows, column)] if self._parallel is None else self._parallel.blocks(name, rows, column)
        for block, first in blocks:
            project(
                [block],
                projector.proj_dim,
                proj_type=projector.proj_type,
                seed=projector.seed,
                model_id=self._model_id,
                offset=self._columns[name].first + first,
                precision=projector.precision,
                nonzeros=projector.nonzeros,
                out=sums,
            )

    def result(self, device: torch.device) -> Tensor:
        """Returns the sum over all devices, and all processes that have parts of the model, (B, k) float32."""
        total = self._sums.total(device)
        return total if self._parallel is None else self._parallel.total(total)
