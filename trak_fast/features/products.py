"""Inner products of gradients that are not projected, some rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..gradients.pieces import Piece, Workspace, exact, row_slices
from .sketches import Sketches
from .sums import DeviceSums
from .two_sided import device_of, show

Gradient = dict[str, Tensor]
"""The gradient of one sample, (D_p,) float32 by parameter."""


class GradientSums:
    """The gradient of one sample, which exists as a whole."""

    def __init__(self, gradient: Gradient, sizes: Mapping[str, int], *, sketches: Sequence[Sketches]) -> None:
        """Starts with zeros.

        Args:
            gradient: Gets the gradient in the end, in place of all that it has.
            sizes: Entries of each parameter.
            sketches: Get the gradient if the sample is checked.
        """
        self._gradient = gradient
        self._sizes = sizes
        self._sketches = sketches
        self._sums: Gradient = {}

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient."""
        own = self._sums.setdefault(name, torch.zeros(self._sizes[name], device=device_of(piece)))
        for rows, column in row_slices(piece, 4 * self._sizes[name], Workspace()):
            own[column : column + rows[0].numel()] += rows[0].flatten()
        show(self._sketches, name, piece, start, 4 * self._sizes[name])

    add_whole = add

    def flush(self) -> None:
        """Does nothing: pieces are added as they come."""

    def result(self, device: torch.device) -> Tensor:
        """Hands the gradient over; returns features without numbers, (1, 0)."""
        self._gradient.clear()
        self._gradient.update(self._sums)
        return torch.zeros(1, 0, device=device)


class ProductSums:
    """Inner products of the gradients of samples with one gradient, (B, 1)."""

    def __init__(self, gradient: Gradient, count: int, *, slice_bytes: int, sketches: Sequence[Sketches]) -> None:
        """Starts with zeros.

        Args:
            gradient: The gradient that those of samples are multiplied with.
            count: Samples, B.
            slice_bytes: Bytes of gradients that are formed at a time.
            sketches: Get the gradients of samples that are checked.
        """
        self._gradient = gradient
        self._slice_bytes = slice_bytes
        self._sketches = sketches
        self._sums = DeviceSums((count, 1))
        self._workspace = Workspace()

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        show(self._sketches, name, piece, start, self._slice_bytes)
        if (other := self._gradient.get(name)) is None:  # which does not depend on the parameter
            return
        for rows, column in row_slices(piece, self._slice_bytes, self._workspace):
            flat = rows.flatten(1)
            with exact(flat.device):
                products = flat.float() @ other[column : column + flat.shape[1]].to(flat.device)
            self._sums.on(rows.device)[start : start + len(rows), 0] += products
            del rows, flat  # before the next ones are formed

    add_whole = add

    def flush(self) -> None:
        """Frees memory: there is nothing left to add."""
        self._workspace.clear()

    def result(self, device: torch.device) -> Tensor:
        """Returns the products, (B, 1) float32."""
        return self._sums.total(device)
