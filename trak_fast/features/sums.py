"""Sums of projected pieces of gradients: rows of a piece are formed within a budget, projected, and dropped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..gradients.parameters import Columns
from ..gradients.pieces import Lookup, Piece, Whole
from ..projection.functions import project
from ..projection.projector import Projector
from .check import Sketches


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
        sketches: Sketches | None,
    ) -> None:
        """Starts with zeros.

        Args:
            projector: Names the matrix.
            columns: The columns of each parameter.
            count: Samples, B.
            model_id: The checkpoint's number.
            slice_bytes: Bytes of gradients that are formed at a time.
            sketches: Gets the rows of one sample too, for a check.
        """
        self._projector = projector
        self._columns = columns
        self._count = count
        self._model_id = model_id
        self._slice_bytes = slice_bytes
        self._sketches = sketches
        self._sums: dict[torch.device, Tensor] = {}

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        if isinstance(piece, Lookup):
            self._add_lookup(name, piece, start)
            return
        step = piece.height if isinstance(piece, Whole) else self.rows_at_once(piece)
        for first in range(0, piece.height, step):
            rows = piece.rows(first, min(first + step, piece.height))
            self._add_checked(name, rows, first * piece.width, start)
            del rows  # before the next ones are formed

    add_whole = add

    def flush(self) -> None:
        """Does nothing: sums of pieces are sums of their projections."""

    def rows_at_once(self, piece: Piece) -> int:
        """Counts the rows of a piece that may be formed at a time."""
        return max(1, self._slice_bytes // max(1, 4 * piece.count * piece.width))

    def _add_lookup(self, name: str, piece: Lookup, start: int) -> None:
        """Adds the rows of a table that tokens have read, and no others."""
        tokens, places = torch.unique(piece.indices, return_inverse=True)
        step = self.rows_at_once(piece)
        for low in range(0, len(tokens), step):
            chosen = tokens[low : low + step]
            inside = None if step >= len(tokens) else (places >= low) & (places < low + step)
            rows = piece.at(places - low, len(chosen), inside)
            # rows next to each other in the table go together
            ends = (chosen.diff() != 1).nonzero().flatten().add(1).tolist()
            for first, last in zip([0, *ends], [*ends, len(chosen)], strict=True):
                self._add_checked(name, rows[:, first:last], int(chosen[first]) * piece.width, start)

    def _add_checked(self, name: str, rows: Tensor, column: int, start: int) -> None:
        self.check_rows(name, rows, column, start)
        self.add_rows(name, rows, column, start)

    def check_rows(self, name: str, rows: Tensor, column: int, start: int) -> None:
        """Adds the rows of one sample to the sketches of a check; arguments as of `add_rows`."""
        if self._sketches is not None:
            self._sketches.add_rows(name, rows, column, start)

    def add_rows(self, name: str, rows: Tensor, column: int, start: int) -> None:
        """Adds the projection of some rows of a parameter's gradient.

        Args:
            name: The parameter.
            rows: (B, r, width), for samples from `start` on.
            column: The column of the first row, within the parameter.
            start: The first sample.
        """
        sums = self._sums_on(rows.device)[start : start + len(rows)]
        projector = self._projector
        project(
            [rows],
            projector.proj_dim,
            proj_type=projector.proj_type,
            seed=projector.seed,
            model_id=self._model_id,
            offset=self._columns[name].first + column,
            precision=projector.precision,
            nonzeros=projector.nonzeros,
            out=sums,
        )

    def _sums_on(self, device: torch.device) -> Tensor:
        if device not in self._sums:
            self._sums[device] = torch.zeros(self._count, self._projector.proj_dim, device=device)
        return self._sums[device]

    def result(self, device: torch.device) -> Tensor:
        """Returns the sum over all devices, (B, k) float32."""
        total = self._sums_on(device)
        for other, sums in self._sums.items():
            if other != device:
                total += sums.to(device)
        return total
