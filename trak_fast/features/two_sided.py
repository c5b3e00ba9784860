"""Two-sided sketches of the gradients of linear layers, made from their factors: the gradients are never formed.

The gradient of a linear layer's weight is a sum over tokens of outer products. Z = P_left G P_right' follows from the
projected factors alone, and has few numbers. It takes the gradient's place: the Z of all layers, side by side with the
gradients of the other parameters, are projected as gradients are, or kept. (Choe et al., "What is Your Data Worth to
GPT?", arXiv:2405.13954, 2024, section 3; there they are kept.) docs/two-sided.md has the definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import choice, integer
from ..gradients.layers import rule_of
from ..gradients.parameters import Columns, layers_of
from ..gradients.pieces import Block, Lookup, Outer, Piece, Whole, Workspace, exact, part_of, row_slices
from ..projection.functions import project_adjoint
from .sketches import Sketches, Sums
from .sums import DeviceSums

SKETCHES = ("full", "two_sided")
"""The forms in which gradients are projected."""

DEFAULT_SIDE = 64
"""Rows and columns of a sketch unless a number is given."""

FIRST_COLUMN = 2**47
"""The first of the columns that sketches are made of; those of gradients end before it."""


def side_of(sketch: str, sketch_side: int | None) -> int | None:
    """Checks `sketch` and `sketch_side`, and returns the rows and columns that a sketch has at most; None for "full".

    Raises:
        ValueError: `sketch` is neither, or the number is out of range, or given for "full".
        TypeError: It is no integer.
    """
    if choice("sketch", sketch, SKETCHES) == "two_sided":
        return integer("sketch_side", DEFAULT_SIDE if sketch_side is None else sketch_side, 1, 2**31)
    if sketch_side is not None:
        raise ValueError(f'sketch_side must be None with sketch="full", not {sketch_side}; add sketch="two_sided"')
    return None


@dataclass(frozen=True)
class Sketch:
    """The two-sided sketch of one parameter, a matrix.

    Attributes:
        height: Rows of the parameter.
        width: Its columns.
        side: Numbers that a longer side is projected to.
        first: The column of the ±1 matrix that P_left begins at; P_right follows `height` columns later.
    """

    height: int
    width: int
    side: int
    first: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of Z: a side that is not longer than `side` stays as it is."""
        return min(self.side, self.height), min(self.side, self.width)

    @property
    def scale(self) -> float:
        """The factor that keeps expected inner products."""
        return 1 / math.sqrt(
            (self.side if self.height > self.side else 1) * (self.side if self.width > self.side else 1)
        )

    def bind(self, seed: int, model_id: int, device: torch.device) -> BoundSketch:
        """Makes P_left and P_right."""
        return BoundSketch(
            left=self._matrix(self.height, self.first, seed, model_id, device),
            right=self._matrix(self.width, self.first + self.height, seed, model_id, device),
            scale=self.scale,
        )

    def _matrix(self, size: int, first: int, seed: int, model_id: int, device: torch.device) -> Tensor | None:
        if size <= self.side:
            return None
        unit = torch.eye(self.side, device=device)
        return project_adjoint(unit, size, proj_type="rademacher", seed=seed, model_id=model_id, offset=first)


@dataclass(frozen=True)
class BoundSketch:
    """The matrices of a sketch. All that is computed with them is in float32, whatever autocast says.

    Attributes:
        left: P_left, (p_left, height); None: the identity.
        right: P_right, (p_right, width); None: the identity.
        scale: The factor of Z.
    """

    left: Tensor | None
    right: Tensor | None
    scale: float

    def apply(self, piece: Piece) -> Tensor:
        """Computes Z of each sample, (B, p_left, p_right) float32."""
        factors = self.factors(piece)
        if factors is not None:
            left, right = factors
            with exact(left.device):
                return left.mT @ right * self.scale
        rows = piece.rows(0, piece.height).float()
        with exact(rows.device):
            half = rows if self.left is None else self.left @ rows
            return (half if self.right is None else half @ self.right.mT) * self.scale

    def factors(self, piece: Piece) -> tuple[Tensor, Tensor] | None:
        """Projects the factors of each token: P_left left_t, (B, T, p_left), and P_right right_t, (B, T, p_right).

        Returns:
            Both, float32; None for a gradient without tokens.
        """
        if isinstance(piece, Outer):
            return _projected(piece.left, self.left), _projected(piece.right, self.right)
        if isinstance(piece, Lookup):
            # a token that has read row i is one whose left factor is the i-th unit vector
            if self.left is None:
                left = F.one_hot(piece.indices, piece.height).float()
            else:
                left = F.embedding(piece.indices, self.left.mT)
            return left, _projected(piece.values, self.right)
        return None


def _projected(factors: Tensor, matrix: Tensor | None) -> Tensor:
    factors = factors.float()
    if matrix is None:
        return factors
    with exact(factors.device):
        return factors @ matrix.mT


class Layout:
    """The virtual columns: those of the matrix that sketches and the other gradients are projected by.

    Attributes:
        sketches: The sketches, by the names of their parameters.
        columns: The virtual columns of each parameter, in the model's order.
        dim: Their number.
        side: Numbers that a longer side is projected to.
    """

    def __init__(self, model: nn.Module, selected: Mapping[str, Tensor], side: int) -> None:
        """Chooses the parameters that are sketched: weights of linear layers, shared with others or not."""
        linear = {
            names["weight"]
            for layer, names in layers_of(model, selected).items()
            if "weight" in names and (rule := rule_of(layer)) is not None and rule.is_linear
        }
        self.side = side
        self.sketches: dict[str, Sketch] = {}
        self.columns: dict[str, Columns] = {}
        self.dim = 0
        first = FIRST_COLUMN
        for name, parameter in selected.items():
            count = parameter.numel()
            if name in linear and parameter.ndim == 2:
                height, width = parameter.shape
                self.sketches[name] = Sketch(height=height, width=width, side=side, first=first)
                count = math.prod(self.sketches[name].shape)
                first += height + width
            self.columns[name] = Columns(first=self.dim, count=count)
            self.dim += count


def sample_slices(piece: Piece, size: int) -> Iterator[slice]:
    """Cuts the samples of a piece into slices of which float32 copies have at most `size` bytes, or one sample."""
    if isinstance(piece, Outer):
        tensors = [piece.left, piece.right]
    elif isinstance(piece, Lookup):
        tensors = [piece.values]
    else:
        tensors = []
    numbers = sum(math.prod(tensor.shape[1:]) for tensor in tensors if tensor.dtype != torch.float32)
    if not tensors:
        numbers = piece.height * piece.width
    step = max(1, size // max(1, 4 * numbers))
    for first in range(0, piece.count, step):
        yield slice(first, min(first + step, piece.count))


class TwoSidedSums:
    """Sums of projected two-sided sketches, or of sketches as they are."""

    def __init__(
        self,
        layout: Layout,
        inner: Sums,
        *,
        seed: int,
        model_id: int,
        slice_bytes: int,
        sketches: Sequence[Sketches],
    ) -> None:
        """Starts with zeros.

        Args:
            layout: The virtual columns.
            inner: Adds up what is at the virtual columns.
            seed: Selects the sketches' matrices, as does the next.
            model_id: The checkpoint's number.
            slice_bytes: Bytes of numbers that are formed at a time.
            sketches: Get the gradients of samples that are checked, too.
        """
        self._layout = layout
        self._inner = inner
        self._seed = seed
        self._model_id = model_id
        self._slice_bytes = slice_bytes
        self._sketches = sketches

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        sketch = self._layout.sketches.get(name)
        if sketch is None:
            self._inner.add(name, piece, start)
        else:
            bound = sketch.bind(self._seed, self._model_id, device_of(piece))
            for samples in sample_slices(piece, self._slice_bytes):
                block = bound.apply(part_of(piece, samples))
                self._inner.add(name, Whole(block), start + samples.start)
        show(self._sketches, name, piece, start, self._slice_bytes)

    add_whole = add

    def flush(self) -> None:
        """Frees memory: there is nothing left to add, as pieces are added as they come."""
        self._inner.flush()

    def result(self, device: torch.device) -> Tensor:
        """Returns the sums, (B, k) float32."""
        return self._inner.result(device)


class BlockSums:
    """Sums of numbers at their virtual columns, which are not projected."""

    def __init__(self, columns: Mapping[str, Columns], count: int, dim: int, slice_bytes: int) -> None:
        """Starts with zeros, (B, dim)."""
        self._columns = columns
        self._slice_bytes = slice_bytes
        self._sums = DeviceSums((count, dim))
        self._workspace = Workspace()

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        for rows, column in row_slices(piece, self._slice_bytes, self._workspace):
            first = self._columns[name].first + column
            self._sums.on(rows.device)[start : start + len(rows), first : first + rows[0].numel()] += rows.flatten(1)
            del rows  # before the next ones are formed

    add_whole = add

    def flush(self) -> None:
        """Frees memory: there is nothing left to add, as pieces are added as they come."""
        self._workspace.clear()

    def result(self, device: torch.device) -> Tensor:
        """Returns the sum over all devices, (B, dim) float32."""
        return self._sums.total(device)


def show(checked: Sequence[Sketches], name: str, piece: Piece, start: int, slice_bytes: int) -> None:
    """Gives sketches the gradients of the samples that they are of."""
    for sketches in checked:
        place = sketches.sample - start
        if name not in sketches.values or not 0 <= place < piece.count:
            continue
        for rows, column in row_slices(part_of(piece, slice(place, place + 1)), slice_bytes, Workspace()):
            sketches.add_rows(name, rows, column, sketches.sample)


def device_of(piece: Piece) -> torch.device:
    """Returns the device that a piece's tensors are on."""
    if isinstance(piece, Block):
        return device_of(piece.part)
    device: torch.device = next(x.device for x in vars(piece).values() if isinstance(x, Tensor))
    return device
