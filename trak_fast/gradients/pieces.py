"""The forms in which a layer gives the per-sample gradients of a parameter: factors, of which rows are made on demand.

A parameter counts as a matrix of height × width, its first dimension by the others together (a vector is one row), so
that rows of its flattened gradient are neighbouring columns of the projection matrix. Large gradients need not be
formed as a whole: `rows` forms some rows for all samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


def exact(device: torch.device) -> torch.autocast:
    """Returns a context in which products are as their factors are, whatever the caller's autocast says."""
    return torch.autocast(device.type, enabled=False)


class Piece(Protocol):
    """A summand of the gradient of one parameter, for each sample of a batch.

    Attributes:
        count: Samples, B.
        height: Rows of the parameter.
        width: Entries of a row.
    """

    @property
    def count(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def rows(self, first: int, last: int) -> Tensor:
        """Forms rows `first` to `last` − 1, (B, last − first, width)."""


@dataclass(frozen=True)
class Whole:
    """A gradient that exists as a whole.

    Attributes:
        values: (B, *shape).
    """

    values: Tensor

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def height(self) -> int:
        return self.values.shape[1] if self.values.ndim > 2 else 1

    @property
    def width(self) -> int:
        return math.prod(self.values.shape[1:]) // max(1, self.height)

    def rows(self, first: int, last: int) -> Tensor:
        return self.values.reshape(self.count, self.height, self.width)[:, first:last]


@dataclass(frozen=True)
class Summed:
    """The gradient of a vector: a sum over tokens.

    Attributes:
        values: (B, T, C), summed over T in float32 at least.
    """

    values: Tensor

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def height(self) -> int:
        return 1

    @property
    def width(self) -> int:
        return self.values.shape[2]

    def rows(self, first: int, last: int) -> Tensor:
        values = self.values
        return values.sum(1, dtype=torch.promote_types(values.dtype, torch.float32)).unsqueeze(1)[:, first:last]


@dataclass(frozen=True)
class Outer:
    """The gradient of a matrix: a sum over tokens of outer products (Goodfellow, arXiv:1510.01799, 2015).

    Attributes:
        left: (B, T, height).
        right: (B, T, width).
    """

    left: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        return len(self.left)

    @property
    def height(self) -> int:
        return self.left.shape[2]

    @property
    def width(self) -> int:
        return self.right.shape[2]

    def rows(self, first: int, last: int) -> Tensor:
        return self.rows_in(Workspace(), first, last)

    def rows_in(self, workspace: Workspace, first: int, last: int) -> Tensor:
        """Forms rows as `rows` does, in memory that was used before."""
        dtype = torch.promote_types(self.left.dtype, self.right.dtype)
        left = self.left[:, :, first:last].mT.to(dtype)
        rows = workspace.tensor((self.count, last - first, self.width), like=left)
        with exact(left.device):
            return torch.bmm(left, self.right.to(dtype), out=rows)


class Workspace:
    """Memory in which rows are formed, some after the others.

    Fresh memory costs a page fault for every 4 KiB, which takes as long as the product itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def tensor(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns a tensor with the device and dtype of another, in place of the last one on this device."""
        size = math.prod(shape) * like.element_size()
        buffer = self._buffers.get(like.device)
        if buffer is None or len(buffer) < size:
            self._buffers.pop(like.device, None)
            del buffer  # before there is another one
            buffer = self._buffers[like.device] = like.new_empty(size, dtype=torch.uint8)
        return buffer[:size].view(like.dtype).view(shape)

    def clear(self) -> None:
        """Frees the memory."""
        self._buffers.clear()


@dataclass(frozen=True)
class Block:
    """A gradient of some rows of a parameter, which has zeros in all others.

    Attributes:
        part: The gradient of these rows.
        first: The first of them.
        height: Rows of the parameter.
    """

    part: Piece
    first: int
    height: int

    @property
    def count(self) -> int:
        return self.part.count

    @property
    def width(self) -> int:
        return self.part.width

    def overlaps(self, first: int, last: int) -> bool:
        """Tells if some of the rows `first` to `last` − 1 are not zero."""
        return first < self.first + self.part.height and self.first < last

    def rows(self, first: int, last: int) -> Tensor:
        low = min(max(first - self.first, 0), self.part.height)
        high = min(max(last - self.first, 0), self.part.height)
        part = self.part.rows(low, high)
        rows = part.new_zeros(self.count, last - first, self.width)
        start = self.first + low - first
        rows[:, start : start + high - low] = part
        return rows


@dataclass(frozen=True)
class Lookup:
    """The gradient of a table of which each token has read a row.

    Attributes:
        indices: (B, T) the rows that were read.
        values: (B, T, width) the gradients of what was read.
        height: Rows of the table.
    """

    indices: Tensor
    values: Tensor
    height: int

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        return self.values.shape[2]

    def rows(self, first: int, last: int) -> Tensor:
        inside = (self.indices >= first) & (self.indices < last)
        return self.at(self.indices - first, last - first, inside)

    def at(self, places: Tensor, height: int, inside: Tensor | None = None) -> Tensor:
        """Adds up values by their places.

        Args:
            places: (B, T) a place in [0, height) for each token.
            height: The number of places.
            inside: (B, T) False for tokens to leave out; None: none.

        Returns:
            (B, height, width).
        """
        count, width = self.count, self.width
        values = self.values
        if inside is not None:
            places = torch.where(inside, places, 0)
            values = values * inside.unsqueeze(2)
        starts = height * torch.arange(count, device=places.device).unsqueeze(1)
        sums = values.new_zeros(count * height, width)
        sums.index_add_(0, (places + starts).flatten(), values.reshape(-1, width))
        return sums.view(count, height, width)


@dataclass(frozen=True)
class Convolved:
    """The gradient of a convolution's kernels, padded by zeros on both sides alike.

    The samples are taken for groups of channels of one sample, so that one convolution keeps them apart.

    Attributes:
        layer: The convolution.
        inputs: (B, in, ...).
        output_grads: (B, out, ...).
    """

    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d
    inputs: Tensor
    output_grads: Tensor

    @property
    def count(self) -> int:
        return len(self.inputs)

    @property
    def height(self) -> int:
        return self.layer.weight.shape[0]

    @property
    def width(self) -> int:
        return math.prod(self.layer.weight.shape[1:])

    def rows(self, first: int, last: int) -> Tensor:
        outputs_a_group = self.layer.out_channels // self.layer.groups
        inputs_a_group = self.layer.in_channels // self.layer.groups
        groups = range(first // outputs_a_group, -(-last // outputs_a_group))
        # the rows of one group may be cut anywhere, those of several only between groups
        low, high = (
            (first, last) if len(groups) == 1 else (groups.start * outputs_a_group, groups.stop * outputs_a_group)
        )
        weight = self._kernels(
            self.inputs[:, groups.start * inputs_a_group : groups.stop * inputs_a_group],
            self.output_grads[:, low:high],
            len(groups),
        )
        return weight[:, first - low : last - low]

    def _kernels(self, inputs: Tensor, output_grads: Tensor, groups: int) -> Tensor:
        """Computes the gradients of the kernels of some groups, (B, out, width)."""
        layer: Any = self.layer
        function = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[inputs.ndim - 2]
        channels = output_grads.shape[1]
        weight: Tensor = function(  # type: ignore[no-untyped-call]
            inputs.reshape(1, -1, *inputs.shape[2:]),
            (self.count * channels, *layer.weight.shape[1:]),
            output_grads.reshape(1, -1, *output_grads.shape[2:]),
            layer.stride,
            0 if layer.padding == "valid" else layer.padding,
            layer.dilation,
            self.count * groups,
        )
        return weight.reshape(self.count, channels, self.width)


def part_of(piece: Piece, samples: slice) -> Piece:
    """Returns a piece's part for some of its samples: of these pieces, all tensors have one row a sample."""
    if isinstance(piece, Block):
        return replace(piece, part=part_of(piece.part, samples))
    assert isinstance(piece, (Whole, Summed, Outer, Lookup, Convolved))
    changes: dict[str, Any] = {name: x[samples] for name, x in vars(piece).items() if isinstance(x, Tensor)}
    part: Piece = replace(piece, **changes)
    return part


def nonzero_samples(piece: Piece) -> Tensor:
    """Tells which samples have a finite gradient that may be other than 0, (B,) bool, by its factors."""
    if isinstance(piece, Block):
        return nonzero_samples(piece.part)
    factors = [x.reshape(len(x), -1) for x in vars(piece).values() if isinstance(x, Tensor) and x.is_floating_point()]
    sizes = torch.stack(
        [torch.linalg.vector_norm(x, 1, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in factors]
    )
    return (sizes.isfinite() & (sizes > 0)).all(0)


def row_slices(piece: Piece, size: int, workspace: Workspace) -> Iterator[tuple[Tensor, int]]:
    """Forms the rows of a gradient, some at a time; those that are known to be 0 are left out.

    Args:
        piece: The gradient, or a summand of it.
        size: Bytes of float32 rows at a time, unless one row takes more.
        workspace: Memory to form them in.

    Yields:
        Consecutive rows, (B, r, width), and the place of their first entry in the flattened parameter. The caller frees
        rows before it asks for the next ones, which come in the same memory.
    """
    if isinstance(piece, Block):
        for rows, column in row_slices(piece.part, size, workspace):
            yield rows, piece.first * piece.width + column
            del rows  # before the next ones are formed
        return
    step = max(1, size // max(1, 4 * piece.count * piece.width))
    if not isinstance(piece, (Outer, Summed)):
        workspace.clear()  # as the others take memory of their own
    if isinstance(piece, Lookup):
        yield from _read_rows(piece, step)
        return
    if isinstance(piece, Whole):
        step = piece.height  # all of them are there
    for first in range(0, piece.height, step):
        last = min(first + step, piece.height)
        rows = piece.rows_in(workspace, first, last) if isinstance(piece, Outer) else piece.rows(first, last)
        yield rows, first * piece.width
        del rows  # before the next ones are formed


def _read_rows(piece: Lookup, step: int) -> Iterator[tuple[Tensor, int]]:
    """Forms the rows of a table that tokens have read, `step` at a time."""
    tokens, places = torch.unique(piece.indices, return_inverse=True)
    for low in range(0, len(tokens), step):
        chosen = tokens[low : low + step]
        inside = None if step >= len(tokens) else (places >= low) & (places < low + step)
        rows = piece.at(places - low, len(chosen), inside)
        for first, last in runs(chosen):
            yield rows[:, first:last], int(chosen[first]) * piece.width


def runs(numbers: Tensor) -> Iterator[tuple[int, int]]:
    """Yields the ranges [first, last) of places at which sorted numbers follow each other without a gap."""
    ends = (numbers.diff() != 1).nonzero().flatten().add(1).tolist()
    if len(numbers):
        yield from zip([0, *ends], [*ends, len(numbers)], strict=True)
