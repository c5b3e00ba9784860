"""Features token by token, and the parts of tokens in the products of features with a vector.

A sample's gradient is a sum over its tokens of what their factors make (gradients/pieces.py). Each summand can be
projected by itself, (B, T, k): `TokenSums`. And of a product y'φ, φ = P g, each token's part follows from a vector in
the space of gradients, v = P'y, since y'P g = v'g: `TokenShares`. Slices of v are made as layers need them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..gradients.parameters import Columns, listed
from ..gradients.pieces import Lookup, Outer, Piece, Summed, exact, part_of, runs
from ..projection.functions import project, project_adjoint
from ..projection.projector import Projector
from .sketches import Sketches
from .sums import DeviceSums
from .two_sided import BoundSketch, Layout, device_of, sample_slices, show


class NoTokensError(ValueError):
    """Some parameters' gradients are no sums over the tokens of the samples."""


class _TokenSink(ABC):
    """Base class of sums over the parameters, of numbers of each token."""

    def __init__(
        self,
        projector: Projector,
        columns: Mapping[str, Columns],
        layout: Layout | None,
        shape: tuple[int, ...],
        *,
        model_id: int,
        slice_bytes: int,
        sketches: Sequence[Sketches],
    ) -> None:
        """Starts with zeros.

        Args:
            projector: Names the matrix.
            columns: The columns of each parameter; virtual ones where there is a layout.
            layout: The sketched parameters; None: there are none.
            shape: The shape of the sums, (B, T, ...).
            model_id: The checkpoint's number.
            slice_bytes: Bytes of numbers that are formed at a time.
            sketches: Get the gradients of samples that are checked, too.
        """
        self._projector = projector
        self._columns = columns
        self._layout = layout
        self._shape = shape
        self._model_id = model_id
        self._slice_bytes = slice_bytes
        self._sketches = sketches
        self._sums = DeviceSums(shape)
        self._without: dict[str, None] = {}  # parameters that are no sums over tokens

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        device = device_of(piece)
        if isinstance(piece, Outer):
            tokens = piece.left.shape[1]
        elif isinstance(piece, (Lookup, Summed)):
            tokens = piece.values.shape[1]
        else:
            tokens = None
        if tokens == self._shape[1]:
            self._add_tokens(name, piece, start, device)
        else:
            self._without[name] = None
        show(self._sketches, name, piece, start, self._slice_bytes)

    add_whole = add

    def flush(self) -> None:  # noqa: B027 (it is no method to override)
        """Does nothing: pieces are added as they come."""

    def _add_tokens(self, name: str, piece: Piece, start: int, device: torch.device) -> None:
        """Adds a piece that is a sum over the tokens, some samples at a time."""
        columns = self._columns[name]
        sketch = None if self._layout is None else self._layout.sketches.get(name)
        bound = None if sketch is None else sketch.bind(self._projector.seed, self._model_id, device)
        for samples in sample_slices(piece, self._slice_bytes):
            part = part_of(piece, samples)
            sums = self._sums.on(device)[start + samples.start : start + samples.stop]
            if bound is None:
                self._add_plain(columns.first, part, sums)
            else:
                self._add_sketched(columns, bound, part, sums)

    @abstractmethod
    def _add_sketched(self, columns: Columns, bound: BoundSketch, piece: Piece, sums: Tensor) -> None:
        """Adds a piece of a sketched parameter to the sums of its samples."""

    @abstractmethod
    def _add_plain(self, first: int, piece: Piece, sums: Tensor) -> None:
        """Adds a piece of a parameter whose columns begin at `first` to the sums of its samples."""

    def result(self, device: torch.device) -> Tensor:
        """Returns the sums over all devices, (B, T · ...) float32.

        Raises:
            NoTokensError: Some parameters' gradients are no sums over the tokens.
        """
        if self._without:
            raise NoTokensError(
                f"grad_wrt must name parameters whose gradients are sums over the {self._shape[1]} tokens of a sample, "
                f"not {listed(list(self._without))}; leave these out with grad_wrt"
            )
        return self._sums.total(device).flatten(1)


class TokenSums(_TokenSink):
    """Projected gradients of each token, (B, T · k)."""

    def __init__(
        self,
        projector: Projector,
        layout: Layout,
        count: int,
        tokens: int,
        *,
        model_id: int,
        slice_bytes: int,
        sketches: Sequence[Sketches],
        is_projected: bool,
    ) -> None:
        """Starts with zeros.

        Args:
            projector: Names the matrix.
            layout: The sketches and virtual columns.
            count: Samples, B.
            tokens: Tokens of each, T.
            model_id: The checkpoint's number.
            slice_bytes: Bytes of numbers that are formed at a time.
            sketches: Get the gradients of samples that are checked, too.
            is_projected: False to leave sketches as they are.
        """
        super().__init__(
            projector,
            layout.columns,
            layout,
            (count, tokens, projector.proj_dim),
            model_id=model_id,
            slice_bytes=slice_bytes,
            sketches=sketches,
        )
        self._is_projected = is_projected

    def _add_sketched(self, columns: Columns, bound: BoundSketch, piece: Piece, sums: Tensor) -> None:
        factors = bound.factors(piece)
        assert factors is not None
        left, right = (factor.flatten(0, 1) for factor in factors)
        flat = sums.flatten(0, 1)
        step = max(1, self._slice_bytes // max(1, 4 * columns.count))
        for first in range(0, len(flat), step):
            part = slice(first, first + step)
            block = left[part, :, None] * right[part, None, :] * bound.scale
            self._put(block.flatten(1), columns.first, flat[part])

    def _add_plain(self, first: int, piece: Piece, sums: Tensor) -> None:
        flat = sums.flatten(0, 1)
        if isinstance(piece, Summed):
            self._put(piece.values.flatten(0, 1), first, flat)
            return
        assert isinstance(piece, Lookup)
        values = piece.values.flatten(0, 1)
        tokens, order = piece.indices.flatten().sort()
        bounds = [0, *tokens.diff().nonzero().flatten().add(1).tolist(), len(tokens)]
        for low, high in itertools.pairwise(bounds):
            places = order[low:high]
            part = flat[places]
            self._put(values[places], first + int(tokens[low]) * piece.width, part)
            flat[places] = part

    def _put(self, rows: Tensor, first: int, out: Tensor) -> None:
        """Adds rows (N, c), at the columns from `first` on, to `out`, (N, k)."""
        projector = self._projector
        if not self._is_projected:
            out[:, first : first + rows.shape[1]] += rows
            return
        project(
            [rows],
            projector.proj_dim,
            proj_type=projector.proj_type,
            seed=projector.seed,
            model_id=self._model_id,
            offset=first,
            precision=projector.precision,
            nonzeros=projector.nonzeros,
            out=out,
        )


class TokenShares(_TokenSink):
    """The part of each token in the product of a sample's feature with a vector, (B, T)."""

    def __init__(
        self,
        projector: Projector,
        columns: Mapping[str, Columns],
        layout: Layout | None,
        direction: Tensor,
        count: int,
        tokens: int,
        *,
        model_id: int,
        slice_bytes: int,
        sketches: Sequence[Sketches],
        is_projected: bool,
    ) -> None:
        """Starts with zeros.

        Args:
            projector: Names the matrix.
            columns: The columns of each parameter; virtual ones where there is a layout.
            layout: The sketched parameters; None: there are none.
            direction: The vector, (k,) float32.
            count: Samples, B.
            tokens: Tokens of each, T.
            model_id: The checkpoint's number.
            slice_bytes: Bytes of numbers that are formed at a time.
            sketches: Get the gradients of samples that are checked, too.
            is_projected: False where features are sketches as they are.
        """
        super().__init__(
            projector,
            columns,
            layout,
            (count, tokens),
            model_id=model_id,
            slice_bytes=slice_bytes,
            sketches=sketches,
        )
        self._direction = direction
        self._is_projected = is_projected

    def _add_sketched(self, columns: Columns, bound: BoundSketch, piece: Piece, sums: Tensor) -> None:
        factors = bound.factors(piece)
        assert factors is not None
        left, right = factors
        back = self._back(columns.first, columns.count, sums.device).view(left.shape[2], right.shape[2])
        with exact(sums.device):
            sums += ((left @ (back * bound.scale)) * right).sum(2)

    def _add_plain(self, first: int, piece: Piece, sums: Tensor) -> None:
        if isinstance(piece, Outer):
            self._add_outer(first, piece, sums)
            return
        assert isinstance(piece, (Lookup, Summed))
        values = piece.values.float()
        if isinstance(piece, Summed):
            with exact(sums.device):
                sums += values @ self._back(first, piece.width, sums.device)
            return
        tokens, places = torch.unique(piece.indices, return_inverse=True)
        back = torch.empty(len(tokens), piece.width, device=sums.device)
        for low, high in runs(tokens):
            column = first + int(tokens[low]) * piece.width
            back[low:high] = self._back(column, (high - low) * piece.width, sums.device).view(-1, piece.width)
        sums += (back[places] * values).sum(2)

    def _add_outer(self, first: int, piece: Outer, sums: Tensor) -> None:
        """Adds Σ_r left_r (v_r · right), some rows v_r of v at a time."""
        right = piece.right.float()
        numbers = piece.width + math.prod(piece.left.shape[:2])  # of a row of v, and of all tokens' products with it
        step = max(1, self._slice_bytes // (4 * numbers))
        for low in range(0, piece.height, step):
            left = piece.left[:, :, low : low + step].float()
            back = self._back(first + low * piece.width, left.shape[2] * piece.width, sums.device)
            with exact(sums.device):
                sums += (left * (right @ back.view(-1, piece.width).mT)).sum(2)

    def _back(self, first: int, count: int, device: torch.device) -> Tensor:
        """Returns `count` numbers of v from column `first` on, float32."""
        direction = self._direction.to(device)
        if not self._is_projected:
            return direction[first : first + count]
        projector = self._projector
        return project_adjoint(
            direction.unsqueeze(0),
            count,
            proj_type=projector.proj_type,
            seed=projector.seed,
            model_id=self._model_id,
            offset=first,
            nonzeros=projector.nonzeros,
        )[0]
