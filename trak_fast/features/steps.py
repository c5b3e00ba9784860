"""Sums of projected steps of Adam: gradients are turned into steps slice by slice before they are projected.

A step is no linear function of the gradient, so that the summands of a parameter's gradient, where its layer is called
several times or the parameter is shared, are added up before; and where the gradient is zero the step is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients.adam import AdamMoments
from ..gradients.pieces import Block, Piece
from .sums import FeatureSums


@dataclass(frozen=True)
class Total:
    """The sum of pieces for some of a batch's samples each.

    Attributes:
        parts: The pieces, each with its first sample.
        count: Samples of the batch, B.
    """

    parts: list[tuple[Piece, int]]
    count: int

    @property
    def height(self) -> int:
        return self.parts[0][0].height

    @property
    def width(self) -> int:
        return self.parts[0][0].width

    def rows(self, first: int, last: int) -> Tensor:
        """Forms rows `first` to `last` − 1, (B, last − first, width), in float32 at least."""
        total: Tensor | None = None
        for piece, start in self.parts:
            if isinstance(piece, Block) and total is not None and not piece.overlaps(first, last):
                continue
            rows = piece.rows(first, last)
            if total is None:
                dtype = torch.promote_types(rows.dtype, torch.float32)
                total = torch.zeros(self.count, last - first, self.width, dtype=dtype, device=rows.device)
            total[start : start + len(rows)] += rows
        assert total is not None
        return total


@dataclass(frozen=True)
class _Zero:
    """The gradient of a parameter that samples do not depend on."""

    count: int
    height: int
    width: int
    device: torch.device

    def rows(self, first: int, last: int) -> Tensor:
        """Forms rows `first` to `last` − 1, (B, last − first, width)."""
        return torch.zeros((), device=self.device).expand(self.count, last - first, self.width)


class StepSums:
    """Adds up the projections of Adam's steps, (B, k)."""

    def __init__(
        self,
        sums: FeatureSums,
        moments: AdamMoments,
        shapes: dict[str, torch.Size],
        count: int,
        device: torch.device,
        is_whole: Callable[[str], bool],
    ) -> None:
        """Starts with nothing.

        Args:
            sums: Takes the steps.
            moments: Adam's moments.
            shapes: The shapes of all parameters.
            count: Samples, B.
            device: The device of the model.
            is_whole: Tells if a parameter's gradient comes in one piece for each sample.
        """
        self._sums = sums
        self._moments = moments
        self._shapes = shapes
        self._count = count
        self._device = device
        self._is_whole = is_whole
        self._held: defaultdict[str, list[tuple[Piece, int]]] = defaultdict(list)
        self._done = {name: torch.zeros(count, dtype=torch.bool) for name in shapes}

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        if self._is_whole(name):
            self.add_whole(name, piece, start)
        else:
            self._held[name].append((piece, start))

    def add_whole(self, name: str, piece: Piece, start: int) -> None:
        """Adds the whole gradient of a parameter, for samples from `start` on."""
        step = self._sums.rows_at_once(piece)
        for first in range(0, piece.height, step):
            rows = piece.rows(first, min(first + step, piece.height))
            column = first * piece.width
            self._sums.check_rows(name, rows, column, start)
            self._sums.add_rows(name, self._moments.precondition(name, rows, column), column, start)
            del rows  # before the next ones are formed
        self._done[name][start : start + piece.count] = True

    def flush(self) -> None:
        """Adds what has come in several pieces."""
        for name, parts in self._held.items():
            self.add_whole(name, Total(parts, self._count), 0)
        self._held.clear()

    def result(self, device: torch.device) -> Tensor:
        """Returns the sum, with the steps of samples that do not depend on a parameter: (B, k) float32."""
        for name, done in self._done.items():
            for start in (~done).nonzero().flatten().tolist():
                shape = self._shapes[name]
                height = shape[0] if len(shape) > 1 else 1
                zero = _Zero(count=1, height=height, width=shape.numel() // max(1, height), device=self._device)
                self.add_whole(name, zero, start)
        return self._sums.result(device)
