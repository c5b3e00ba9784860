"""The metric that inner products of gradients are taken in: factors of the Fisher matrix, layer by layer.

A sample's gradient of a matrix is a sum of outer products of two factors, a layer's inputs and the gradients of its
outputs. K-FAC (Martens and Grosse, ICML 2015) takes these for independent, so that the Fisher matrix of a layer is the
Kronecker product of the factors' second moments, L ⊗ R. Gradients are multiplied by its inverse root before they are
projected, which is one small product for each factor: frequent tokens and directions that all samples share no longer
drown the others. The moments come from gradients of labels that the model itself draws, for which a few samples are
enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gradients.pieces import Block, Lookup, Outer, Piece, Summed, Whole, Workspace, exact, row_slices
from .sketches import Sketches, Sums
from .steps import Total
from .two_sided import device_of, show

BLOCK_SIDE = 512
"""Rows and columns of a block of a factor's second moments at most: longer factors have several blocks."""

LONGEST_SIDE = 16384
"""Entries of a factor at most whose second moments are blocks; of longer ones, entries have a moment each."""

VOCABULARY_DAMPING = 1.0
"""The multiple of a factor's mean squared entry that is added to its second moments, for matrices with a row a token:
the embedding and the output layer. Most tokens are rare, and their moments uncertain."""

LAYERS_DAMPING = 0.03
"""The same for other parameters."""

LAYERS_SHARE = 0.5
"""The mean squared norm of the gradients of other parameters, relative to that of those with a row a token."""

DRAWS = 4
"""Labels that are drawn for each token."""


def vocabulary_of(model: nn.Module) -> int | None:
    """Returns the number of words that a model knows; None if it has no embedding.

    These are the rows of its input embedding, if it names one as those of transformers do, else of the largest
    embedding that a linear layer has as many outputs as, else of the largest.
    """
    named = getattr(model, "get_input_embeddings", lambda: None)
    try:
        embedding = named()
    except (NotImplementedError, AttributeError, TypeError):  # of models without words
        embedding = None
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    rows = {layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)}
    outputs = {layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)}
    return max(rows & outputs or rows, default=None)


def matrices_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Lists those of some parameters that a metric is made for: all matrices but embeddings of positions and the like.

    Args:
        model: The model.
        names: Names of parameters.
    """
    vocabulary = vocabulary_of(model)
    others = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, nn.Embedding) and layer.num_embeddings != vocabulary
        for parameter in layer.parameters(recurse=False)
    }
    parameters = dict(model.named_parameters())
    return [name for name in names if parameters[name].ndim > 1 and id(parameters[name]) not in others]


def _in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """Cuts rows (N, side) into blocks of equal width, (blocks, N, width), with zeros after the end."""
    width = -(-rows.shape[1] // blocks)
    return nn.functional.pad(rows, (0, blocks * width - rows.shape[1])).view(len(rows), blocks, width).transpose(0, 1)


def _second_moment(rows: Tensor, blocks: int) -> Tensor:
    """Computes Σ x x' of rows x (N, side) in blocks, (blocks, width, width); Σ x² by entries for 0 blocks, (side,)."""
    if not blocks:
        return rows.square().sum(0)
    cut = _in_blocks(rows, blocks)
    return cut.mT @ cut


def _diagonal(moment: Tensor, side: int) -> Tensor:
    """Returns the diagonal of a second moment, (side,)."""
    return moment if moment.ndim == 1 else moment.diagonal(dim1=1, dim2=2).flatten()[:side]


@dataclass
class _Moments:
    """Second moments of the factors of one parameter's gradients, from pieces of one kind.

    Attributes:
        left: Moments of rows: (height,), or (blocks, width, width).
        right: Moments of columns.
        count: L ⊗ R / `count` is the sum of squares over samples that they stand for.
    """

    left: Tensor
    right: Tensor
    count: float


class Moments:
    """Second moments of factors, summed over samples.

    Attributes:
        samples: Samples that were added.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], vocabulary: int | None) -> None:
        """Starts with nothing.

        Args:
            shapes: Height and width of each parameter as a matrix.
            vocabulary: Rows of the parameters whose rows stand for tokens, which have a moment each.
        """
        self.shapes = dict(shapes)
        self.vocabulary = vocabulary
        self.samples = 0
        self._sums: dict[tuple[str, type], _Moments] = {}

    def blocks(self, side: int) -> int:
        """Counts the blocks of a factor's second moments; 0: entries have a moment each."""
        return 0 if side == self.vocabulary or side > LONGEST_SIDE else -(-side // BLOCK_SIDE)

    def add(self, found: Mapping[tuple[str, type], _Moments], samples: int) -> None:
        """Adds the moments of some samples."""
        self.samples += samples
        for key, own in found.items():
            if (known := self._sums.get(key)) is None:
                self._sums[key] = own
            else:
                known.left += own.left
                known.right += own.right
                known.count += own.count

    def metric(self) -> Metric:
        """Makes the metric.

        Raises:
            ValueError: No sample was added, or moments are not finite.
        """
        if not self.samples:
            raise ValueError("batch must have samples for a metric, not none")
        joined = {name: own for name in self.shapes if (own := self._joined(name)) is not None}
        if not joined:
            raise ValueError("samples that a metric is made of must have gradients other than 0 (are all labels -100?)")
        for name, own in joined.items():
            if not (own.left.isfinite().all() and own.right.isfinite().all() and math.isfinite(own.count)):
                raise ValueError(
                    f"gradients of the samples that the metric is made of must be finite; {name}'s are not"
                )
        entries = sum(math.prod(self.shapes[name]) for name in joined)
        squares = sum(own.count for own in joined.values()) / self.samples
        usual = squares / entries  # an entry's mean square, for parameters without gradients
        roots = {}
        for name, (height, width) in self.shapes.items():
            if (own := joined.get(name)) is None:
                roots[name] = _Roots(left=torch.full((height,), usual**-0.5), right=torch.ones(width))
                continue
            damping = VOCABULARY_DAMPING if height == self.vocabulary else LAYERS_DAMPING
            left = _inverse_root(own.left, height, damping) * math.sqrt(own.count * self.samples)
            roots[name] = _Roots(left=left, right=_inverse_root(own.right, width, damping))
        return Metric(roots)

    def _joined(self, name: str) -> _Moments | None:
        """Joins the moments of a parameter's pieces of all kinds, in float64; None if all are zero."""
        height, width = self.shapes[name]
        left: Tensor | None = None
        right: Tensor | None = None
        total = 0.0
        kinds = [own for (known, _), own in self._sums.items() if known == name]
        by_entry = {side: any(getattr(own, side).ndim == 1 for own in kinds) for side in ("left", "right")}
        for own in kinds:
            own_left, own_right = own.left.double(), own.right.double()
            own_left = _diagonal(own_left, height) if by_entry["left"] else own_left
            own_right = _diagonal(own_right, width) if by_entry["right"] else own_right
            trace_left = _diagonal(own_left, height).sum().item()
            trace_right = _diagonal(own_right, width).sum().item()
            if not trace_left * trace_right:
                continue
            total += trace_left * trace_right / own.count
            # each kind counts by its share of the squares
            part_left, part_right = own_left * (trace_right / own.count), own_right * (trace_left / own.count)
            left = part_left if left is None else left + part_left
            right = part_right if right is None else right + part_right
        if left is None or right is None:
            return None
        return _Moments(left=left, right=right, count=total)


def _inverse_root(moment: Tensor, side: int, damping: float) -> Tensor:
    """Returns W with W'W the inverse of a damped second moment, in its form, float32."""
    added = damping * _diagonal(moment, side).mean()
    if moment.ndim == 1:
        return (moment + added).rsqrt().float()
    unit: Tensor = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    lower = torch.linalg.cholesky(moment + added * unit)
    root: Tensor = torch.linalg.solve_triangular(lower, unit.expand_as(lower), upper=False)
    return root.float()


class MomentSums:
    """Collects the second moments of a batch's factors; its features are empty."""

    def __init__(self, moments: Moments, count: int, *, slice_bytes: int, sketches: Sequence[Sketches]) -> None:
        """Starts with nothing.

        Args:
            moments: Gets the batch's moments in the end.
            count: Samples, B.
            slice_bytes: Bytes of gradients that are formed at a time.
            sketches: Get the gradients of samples that are checked.
        """
        self._moments = moments
        self._count = count
        self._slice_bytes = slice_bytes
        self._sketches = sketches
        self._found: dict[tuple[str, type], _Moments] = {}

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        show(self._sketches, name, piece, start, self._slice_bytes)
        height, width = self._moments.shapes[name]
        with exact(device_of(piece)):
            if isinstance(piece, Outer):
                own = self._of_factors(piece.left.flatten(0, 1).double(), piece.right.flatten(0, 1).double())
            elif isinstance(piece, Lookup):
                values = piece.values.flatten(0, 1).double()
                used = values.any(1)
                rows = torch.bincount(piece.indices.flatten()[used], minlength=height).double()
                right = _second_moment(values[used], self._moments.blocks(width))
                own = _Moments(left=rows, right=right, count=float(used.sum()))
            else:
                own = self._of_rows(piece, height, width)
        key = name, type(piece) if isinstance(piece, (Outer, Lookup)) else Whole
        if (known := self._found.get(key)) is None:
            self._found[key] = own
        else:
            known.left += own.left.to(known.left.device)
            known.right += own.right.to(known.right.device)
            known.count += own.count

    add_whole = add

    def _of_factors(self, left: Tensor, right: Tensor) -> _Moments:
        """Computes the moments of the factors of tokens, (N, height) and (N, width), that have a gradient."""
        used = left.any(1) & right.any(1)
        left, right = left[used], right[used]
        return _Moments(
            left=_second_moment(left, self._moments.blocks(left.shape[1])),
            right=_second_moment(right, self._moments.blocks(right.shape[1])),
            count=float(used.sum()),
        )

    def _of_rows(self, piece: Piece, height: int, width: int) -> _Moments:
        """Computes the moments of the rows and columns of whole gradients."""
        left = torch.zeros(height * width, dtype=torch.float64, device=device_of(piece))
        for rows, column in row_slices(piece, self._slice_bytes, Workspace()):
            squares = rows.double().square().sum(0).flatten()
            left[column : column + len(squares)] += squares
            del rows  # before the next ones are formed
        squares = left.view(height, width)
        return _Moments(left=squares.sum(1), right=squares.sum(0), count=float(squares.sum()))

    def flush(self) -> None:
        """Does nothing: pieces are added as they come."""

    def result(self, device: torch.device) -> Tensor:
        """Hands the moments over; returns features without numbers, (B, 0)."""
        for own in self._found.values():
            own.left, own.right = own.left.to(device), own.right.to(device)
        self._moments.add(self._found, self._count)
        return torch.zeros(self._count, 0, device=device)


@dataclass(frozen=True)
class _Roots:
    """The inverse roots of the second moments of a parameter's factors, W with W'W = (moment + damping)⁻¹.

    Attributes:
        left: The root for rows: (height,), or lower triangular blocks (blocks, width, width).
        right: The root for columns.
    """

    left: Tensor
    right: Tensor


class Metric:
    """Multiplies gradients by the inverse root of K-FAC's Fisher matrix."""

    def __init__(self, roots: Mapping[str, _Roots]) -> None:
        """Takes the inverse roots of each parameter's factors."""
        self._roots = dict(roots)
        self._on_devices: dict[tuple[str, torch.device], _Roots] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the metric as tensors on the CPU."""
        sides = [(f"{name}:{side}", getattr(own, side)) for name, own in self._roots.items() for side in _SIDES]
        return {name: tensor.cpu() for name, tensor in sides}

    @property
    def names(self) -> set[str]:
        """The parameters that the metric is of."""
        return set(self._roots)

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> Metric:
        """Makes the metric again that `state_dict` was called of."""
        names = dict.fromkeys(name.rpartition(":")[0] for name in state)
        return Metric({name: _Roots(**{side: state[f"{name}:{side}"] for side in _SIDES}) for name in names})

    def balanced(self, squares: Mapping[str, float], vocabulary: int | None) -> Metric:
        """Returns the metric with gradients of other parameters on the scale of those with a row a token.

        Args:
            squares: The sum of squares, by parameter, of some gradients in this metric.
            vocabulary: Rows of the parameters with a row a token.

        Raises:
            ValueError: The sums are not finite.
        """
        own = {name for name, roots in self._roots.items() if len(roots.left) == vocabulary and roots.left.ndim == 1}
        tokens = sum(square for name, square in squares.items() if name in own)
        layers = sum(square for name, square in squares.items() if name not in own)
        if not tokens or not layers:
            return self
        if not math.isfinite(tokens + layers):
            raise ValueError("gradients of the samples that the metric is made of must be finite")
        factor = math.sqrt(LAYERS_SHARE * tokens / layers)
        return Metric(
            {
                name: roots if name in own else _Roots(left=roots.left * factor, right=roots.right)
                for name, roots in self._roots.items()
            }
        )

    def whitened(self, name: str, piece: Piece) -> Piece:
        """Multiplies a piece of a parameter's gradient by the metric's root."""
        roots = self._on(name, device_of(piece))
        with exact(device_of(piece)):
            if isinstance(piece, Outer):
                return Outer(left=_product(piece.left, roots.left), right=_product(piece.right, roots.right))
            if isinstance(piece, Lookup) and roots.left.ndim == 1:
                values = _product(piece.values, roots.right) * roots.left[piece.indices].unsqueeze(2)
                return Lookup(indices=piece.indices, values=values, height=piece.height)
            if isinstance(piece, Summed):
                return Summed(_product(piece.values, roots.right) * roots.left.flatten()[0])
            if isinstance(piece, Block) and roots.left.ndim == 1:
                own = _Roots(roots.left[piece.first : piece.first + piece.part.height], roots.right)
                part = Metric({name: own}).whitened(name, piece.part)
                return Block(part=part, first=piece.first, height=piece.height)
            rows = piece.rows(0, piece.height)
            shape = rows.shape
            if roots.left.ndim == 1 and len(roots.left) != shape[1]:  # a stack of matrices
                rows = rows.reshape(shape[0], len(roots.left), -1)
            rows = _product(rows, roots.right)
            rows = rows * roots.left.unsqueeze(1) if roots.left.ndim == 1 else _product(rows.mT, roots.left).mT
            return Whole(rows.reshape(shape))

    def _on(self, name: str, device: torch.device) -> _Roots:
        """Returns the roots of a parameter on a device."""
        if (name, device) not in self._on_devices:
            own = self._roots[name]
            self._on_devices[name, device] = _Roots(left=own.left.to(device), right=own.right.to(device))
        return self._on_devices[name, device]


_SIDES = ("left", "right")


def _product(values: Tensor, root: Tensor) -> Tensor:
    """Multiplies the last dimension of values by a root, in float32 at least."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if root.ndim == 1:
        return values * root
    rows = values.reshape(-1, values.shape[-1])
    cut = _in_blocks(rows, len(root)) @ root.to(values.dtype).mT
    return cut.transpose(0, 1).reshape(len(rows), -1)[:, : rows.shape[1]].reshape(values.shape)


class SquareSums:
    """The sum of squares of gradients, by parameter; its features are empty."""

    def __init__(
        self, squares: dict[str, float], count: int, *, slice_bytes: int, is_whole: Callable[[str], bool]
    ) -> None:
        """Starts with nothing.

        Args:
            squares: Gets the sums of a batch added in the end.
            count: Samples, B.
            slice_bytes: Bytes of gradients that are formed at a time.
            is_whole: Tells if a parameter's gradient comes in one piece for each sample.
        """
        self._squares = squares
        self._count = count
        self._slice_bytes = slice_bytes
        self._is_whole = is_whole
        self._found: dict[str, float] = {}
        self._held: dict[str, list[tuple[Piece, int]]] = {}

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        if self._is_whole(name):
            self.add_whole(name, piece, start)
        else:
            self._held.setdefault(name, []).append((piece, start))

    def add_whole(self, name: str, piece: Piece, start: int) -> None:
        """Adds the whole gradient of a parameter, for samples from `start` on."""
        step = max(1, self._slice_bytes // max(1, 4 * piece.count * piece.width))
        for first in range(0, piece.height, step):
            square = piece.rows(first, min(first + step, piece.height)).double().square().sum()
            self._found[name] = self._found.get(name, 0.0) + float(square)

    def flush(self) -> None:
        """Adds what has come in several pieces."""
        for name, parts in self._held.items():
            self.add_whole(name, Total(parts, self._count), 0)
        self._held.clear()

    def result(self, device: torch.device) -> Tensor:
        """Hands the sums over; returns features without numbers, (B, 0)."""
        for name, square in self._found.items():
            self._squares[name] = self._squares.get(name, 0.0) + square
        return torch.zeros(self._count, 0, device=device)


class WhitenedSums:
    """Sums of gradients that are multiplied by a metric's root; those that are checked stay as they are."""

    def __init__(self, sums: Sums, metric: Metric, *, slice_bytes: int, sketches: Sequence[Sketches]) -> None:
        """Takes the sums.

        Args:
            sums: Get the gradients multiplied by the root.
            metric: The metric.
            slice_bytes: Bytes of gradients that are formed at a time.
            sketches: Get the gradients of samples that are checked.
        """
        self._sums = sums
        self._metric = metric
        self._slice_bytes = slice_bytes
        self._sketches = sketches

    def add(self, name: str, piece: Piece, start: int) -> None:
        """Adds a piece of a parameter's gradient, for samples from `start` on."""
        show(self._sketches, name, piece, start, self._slice_bytes)
        self._sums.add(name, self._metric.whitened(name, piece), start)

    def add_whole(self, name: str, piece: Piece, start: int) -> None:
        """Adds the whole gradient of a parameter, for samples from `start` on."""
        show(self._sketches, name, piece, start, self._slice_bytes)
        self._sums.add_whole(name, self._metric.whitened(name, piece), start)

    def flush(self) -> None:
        """Adds what is left to add."""
        self._sums.flush()

    def result(self, device: torch.device) -> Tensor:
        """Returns the sums, (B, k) float32."""
        return self._sums.result(device)
