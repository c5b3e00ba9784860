"""The comparison of streamed gradients with autograd's, for which neither is ever held as a whole.

Both gradients of a sample are projected to a few numbers a parameter, by a matrix of their own: random projections of a
difference are as large as the difference itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..gradients.parameters import Columns
from ..gradients.pieces import Piece
from ..projection.functions import project

CHECK_DIM = 16
"""Numbers that a parameter's gradient is compared by."""


class Sums(Protocol):
    """A sum of vectors, one for each sample, that pieces of gradients go to."""

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""

    def add_whole(self, name: str, piece: Piece, start: int) -> None:
        """Adds the whole gradient of a parameter, for samples from `start` on."""

    def flush(self) -> None:
        """Adds what has come in several pieces, where these had to be kept."""

    def result(self, device: torch.device) -> Tensor:
        """Returns the sum over all devices, (B, k) float32."""


class Sketches:
    """The projected gradients of one sample, a vector for each parameter.

    Attributes:
        sample: The sample's place in its batch.
        values: (CHECK_DIM,) float64 on the CPU, by parameter.
        norms: Norms of the gradients that were added as a whole.
        exponents: Powers of two that gradients are divided by before they are projected, for those far from 1.
    """

    def __init__(
        self, columns: Mapping[str, Columns], sample: int, names: Iterable[str], exponents: Mapping[str, int]
    ) -> None:
        """Starts with zeros.

        Args:
            columns: The columns of each parameter.
            sample: The sample's place in its batch.
            names: Parameters.
            exponents: Those of another sketch of the same gradients, where there is one.
        """
        self._columns = columns
        self.sample = sample
        self.values = {name: torch.zeros(CHECK_DIM, dtype=torch.float64) for name in names}
        self.norms = dict.fromkeys(self.values, 0.0)
        self.exponents = dict(exponents)

    @property
    def is_telling(self) -> bool:
        """True where gradients are finite, and not all 0: others say nothing about the way to them."""
        return all(map(math.isfinite, self.norms.values())) and any(self.norms.values())

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds the whole gradient of a parameter, as autograd computes it for a sample alone."""
        if name not in self.values or start != self.sample:
            return
        rows = piece.rows(0, piece.height)
        largest = float(torch.linalg.vector_norm(rows, torch.inf))
        if math.isfinite(largest) and largest and not 2.0**-60 <= largest <= 2.0**60:
            self.exponents[name] = math.frexp(largest)[1]
        exponent = self.exponents.get(name, 0)
        scaled = rows.double().mul_(2.0**-exponent) if exponent else rows
        norm = float(torch.linalg.vector_norm(scaled, dtype=torch.promote_types(scaled.dtype, torch.float32)))
        self.norms[name] = norm * 2.0**exponent
        self.add_rows(name, rows, 0, start)

    def add_rows(self, name: str, rows: Tensor, column: int, start: int) -> None:
        """Adds rows of a parameter's gradient.

        Args:
            name: The parameter.
            rows: (B, r, width), for samples from `start` on.
            column: The column of the first row, within the parameter.
            start: The first sample.
        """
        place = self.sample - start
        if name not in self.values or not 0 <= place < len(rows):
            return
        own = rows[place : place + 1]
        if exponent := self.exponents.get(name, 0):
            own = own.double() * 2.0**-exponent
        first = self._columns[name].first + column
        sketch = project([own], CHECK_DIM, offset=first, precision="highest")
        self.values[name] += sketch[0].double().cpu() * 2.0**exponent


def differing(found: Sketches, expected: Sketches, tolerance: float, negligible: float) -> Collection[str]:
    """Returns the names of the parameters whose gradients differ.

    Args:
        found: The gradients in question.
        expected: Those of autograd.
        tolerance: The difference that rounding explains, relative to the parameter's gradient.
        negligible: The same relative to the largest gradient of a parameter.
    """
    largest = max(expected.norms.values(), default=0.0)
    return [
        name
        for name, value in found.values.items()
        if not (value - expected.values[name]).abs().max() <= tolerance * expected.norms[name] + negligible * largest
    ]
