"""Taps on a model's layers, by which the gradients of a batch's samples pass one layer after the other.

A tap is an identity on a layer's output. In the backward pass it gets the gradient of this output, makes of it and of
the layer's input the pieces of its parameters' per-sample gradients (gradients/pieces.py), hands them on, and drops
them: what it leaves behind is the sum of their projections. Weights need no gradient for that, so autograd computes
none. The input is kept as autograd keeps its own tensors, so that activation checkpointing frees and recomputes it.

A layer without a rule (gradients/layers.py) is evaluated once more by itself, and differentiated sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..gradients.errors import is_out_of_memory
from ..gradients.experts import ExpertsRule
from ..gradients.graph import gradients_kept
from ..gradients.layers import Rule
from ..gradients.pieces import Piece, nonzero_samples
from .repeated import RepeatedCall, SplitTensor, by_samples, split_by_samples
from .shared import hook_uses
from .tensor_parallel import TensorParallel

Take = Callable[[str, Piece, int], None]
"""Takes a piece of a parameter's gradient, by the parameter's name, for samples from a first one on."""


@dataclass(frozen=True)
class TappedLayer:
    """A layer, with some parameters that it computes with.

    Attributes:
        layer: The layer.
        rule: The rule of their gradients; None where there is none, so that the layer is differentiated by itself.
        names: Maps the layer's names of these parameters to the model's.
    """

    layer: nn.Module
    rule: Rule | ExpertsRule | None
    names: dict[str, str]


class Split(NamedTuple):
    """The way in which the gradient of a parameter is split by samples.

    Attributes:
        name: The parameter.
        by_rule: True for its layer's rule, False for differentiating the layer by itself.
        is_shared: True where samples share the layer's output, False where each has its own rows of it.
        rows: For each tensor of a call the rows that each sample has of it, as a multiple of the sample's positions: 0
            where the tensor's first dimension is the samples', None where all samples share the tensor.
    """

    name: str
    by_rule: bool
    is_shared: bool
    rows: tuple[Fraction | None, ...]


@dataclass
class _Call:
    """A call of a layer.

    Attributes:
        known: The layer.
        shapes: Shapes of its outputs that are floating-point tensors.
        arguments: All that a layer without a rule was called with, None in place of tensors.
        structure: The structure of these.
        is_shared: True where all samples share its output.
        is_shown: True once gradients of such an output were taken where it meets samples.
        kept: The input of the layer, once that was read for this.
        rows: See `Split`.
    """

    known: TappedLayer
    shapes: list[torch.Size]
    arguments: list[Any] = field(default_factory=list)
    structure: Any = None
    is_shared: bool = False
    is_shown: bool = False
    kept: Tensor | None = None
    rows: tuple[Fraction | None, ...] = ()


class _Tap(torch.autograd.Function):
    """The identity on a layer's outputs, whose backward pass shows their gradients and what the layer was given."""

    @staticmethod
    def forward(ctx: Any, show: Any, call: _Call, trigger: Tensor, outputs: int, *tensors: Tensor) -> Any:
        ctx.show = show
        ctx.call = call
        ctx.outputs = outputs
        ctx.save_for_backward(*tensors[outputs:])
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        count = len(ctx.needs_input_grad)
        ctx.show(ctx.call, _saved_by(ctx), grads)
        return (None, None, None, None, *grads, *(None for _ in range(count - 4 - len(grads))))


class _Probe(torch.autograd.Function):
    """Zeros to add to a layer's output, for models that change it in place; shows the gradient as a tap does."""

    @staticmethod
    def forward(ctx: Any, show: Any, call: _Call, trigger: Tensor, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.show = show
        ctx.call = call
        ctx.save_for_backward(*tensors)
        # -0.0 and no other zero leaves every number as it is
        return output.new_full((), -0.0).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.show(ctx.call, _saved_by(ctx), [gradient])
        return tuple(None for _ in ctx.needs_input_grad)


def _saved_by(ctx: Any) -> Sequence[Tensor]:
    """Returns what a tap has kept, once only: activation checkpointing gives it out once, and frees it."""
    saved: Sequence[Tensor] = () if ctx.call.is_shown else ctx.saved_tensors
    return saved


def _saved_once() -> bool:
    """Tells if what autograd saves now passes through hooks, such as those of activation checkpointing."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


class Taps:
    """The taps of one forward and backward pass over a batch.

    Attributes:
        unexplained: Names of the parameters of layers that were called in a way that no rule knows.
        watched: The samples whose gradient of a parameter may be other than 0, (B,) bool, by watched parameters.
    """

    def __init__(
        self,
        layers: Sequence[TappedLayer],
        count: int,
        device: torch.device,
        *,
        omitted: Collection[str] = (),
        add: bool = False,
        known_as_shared: Collection[str] = (),
        parallel: TensorParallel | None = None,
        positions: int = 1,
        watched: Collection[str] = (),
    ) -> None:
        """Prepares taps on some layers.

        Args:
            layers: The layers.
            count: Samples of the batch, B.
            device: The device of the model.
            omitted: Parameters of these layers whose gradients are not wanted.
            add: Adds zeros to outputs, instead of returning views of them: for models that change them in place.
            known_as_shared: Parameters of layers whose outputs all samples have shared so far, even if the shape of one
                happens to allow something else.
            parallel: Knows the parts of layers that this process has.
            positions: Positions of a sample, such as a text's tokens, which rows of tensors are compared with.
            watched: Parameters to watch.
        """
        self.unexplained: set[str] = set()
        self.watched = {name: torch.zeros(count, dtype=torch.bool) for name in watched}
        self._calls: dict[str, int] = {}
        self._omitted = omitted
        self._layers = layers
        self._count = count
        self._add = add
        self._parallel = parallel
        self._positions = max(1, positions)
        self._trigger = torch.zeros((), device=device, requires_grad=True)
        self._known_as_shared = frozenset(known_as_shared)
        self._taken: list[_Call] = []
        self._shared: dict[Any, _Call] = {}
        self._reads_once = False  # True once a tap was within activation checkpointing
        self._take: Take | None = None
        self._is_counting = True
        self._is_inert = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has the layers tapped during the block."""
        # before all other hooks, which see the tapped output: those that gather a layer's weights go around the tap
        handles = [
            known.layer.register_forward_hook(partial(self._tap, known), with_kwargs=True, prepend=True)
            for known in self._layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def shared(self) -> set[str]:
        """Names of the parameters of layers whose outputs all samples share, whose gradients are in their sums."""
        return {name for call in self._shared.values() for name in call.known.names.values()}

    def show_to(self, take: Take) -> None:
        """Has pieces handed to `take` in a backward pass that is run by others."""
        self._take = take

    def is_called(self, name: str) -> bool:
        """Tells if the layer of a parameter was called."""
        return name in self._calls

    def is_whole(self, name: str) -> bool:
        """Tells if a parameter's gradient comes in one piece for each sample."""
        return self._calls.get(name, 0) <= 1

    @property
    def splits(self) -> frozenset[Split]:
        """The ways in which gradients were split by samples, once the backward pass is over."""
        return frozenset(
            Split(name, by_rule=call.known.rule is not None, is_shared=call.is_shown, rows=call.rows)
            for call in self._taken
            for name in call.known.names.values()
        )

    def run_backward(self, outputs: Tensor, seeds: Tensor, take: Take) -> None:
        """Differentiates Σ_b seeds_b · outputs_b, and hands each piece of the gradients to `take`.

        Args:
            outputs: f of each sample, (B,), computed while the taps were attached, as they still are.
            seeds: The factor of each sample, (B,).
            take: Takes the pieces.
        """
        self._is_counting = False
        if not outputs.requires_grad:
            return
        handles = []
        if self._shared:
            shapes = {node: call.shapes[0] for node, call in self._shared.items()}
            handles = hook_uses(outputs.grad_fn, shapes, self._count, self._keep, once=self._reads_once)
        self._take = take
        try:
            # reentrant checkpointing allows no torch.autograd.grad; all that requires gradients is the trigger
            with gradients_kept(outputs, [self._trigger]):
                torch.autograd.backward(outputs, seeds.to(outputs))
        finally:
            self._take = None
            self._trigger.grad = None
            for handle in handles:
                handle.remove()

    def _tap(
        self, known: TappedLayer, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Puts a tap on the output of a call."""
        if self._is_inert:
            return None
        if self._is_counting:
            for name in known.names.values():
                self._calls[name] = self._calls.get(name, 0) + 1
        if not torch.is_grad_enabled():
            return None  # the first pass of reentrant checkpointing
        self._reads_once = self._reads_once or _saved_once()
        if known.rule is None:
            return self._tap_any(known, args, kwargs, output)
        if isinstance(known.rule, ExpertsRule):
            for name in known.names.values():
                self._calls[name] += 1  # each expert has a summand
            tensors = [value for value in args if isinstance(value, Tensor)]
            fits = len(tensors) == 3 and not kwargs
        else:
            tensors = [value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor)]
            fits = len(tensors) == 1 or isinstance(next(iter(args), None), Tensor)
            tensors = tensors[:1]
        if not fits or not tensors[0].ndim or not isinstance(output, Tensor) or not output.ndim:
            self.unexplained |= set(known.names.values())
            return None
        call = _Call(known, shapes=[output.shape])
        tapped = self._tapped(call, [output], [tensor.detach() for tensor in tensors])[0]
        if len(output) != self._count or not self._known_as_shared.isdisjoint(known.names.values()):
            call.is_shared = True
            self._shared[tapped.grad_fn] = call
            for name in known.names.values():
                self._calls[name] += 1  # it may be a summand more than once
        return tapped

    def _tap_any(self, known: TappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Puts a tap on all outputs of a layer without a rule."""
        results, result_structure = tree_flatten(result)
        places = [i for i, x in enumerate(results) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        if not places or not tensors:
            self.unexplained |= set(known.names.values())
            return None
        call = _Call(
            known,
            shapes=[results[i].shape for i in places],
            arguments=[None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves],
            structure=structure,
        )
        tapped = self._tapped(call, [results[i] for i in places], tensors)
        if len(tapped) == len(tensors) == len(tapped[0]) == len(tensors[0]) == 1 < self._count:
            call.is_shared = True
            self._shared[tapped[0].grad_fn] = call
        for place, output in zip(places, tapped, strict=True):
            results[place] = output
        return tree_unflatten(results, result_structure)

    def _tapped(self, call: _Call, outputs: list[Tensor], tensors: list[Tensor]) -> Sequence[Tensor]:
        if not self._add:
            tapped: Sequence[Tensor] = _Tap.apply(  # type: ignore[no-untyped-call]
                self._show, call, self._trigger, len(outputs), *outputs, *tensors
            )
            return tapped
        probes = [
            _Probe.apply(self._show_of(place), call, self._trigger, x, *tensors)  # type: ignore[no-untyped-call]
            for place, x in enumerate(outputs)
        ]
        return [x + probe for x, probe in zip(outputs, probes, strict=True)]

    def _show_of(self, place: int) -> Callable[[_Call, Sequence[Tensor], Sequence[Tensor | None]], None]:
        """Returns a function that shows the gradient of one of a call's outputs."""

        def show(call: _Call, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            self._show(call, tensors, [grads[0] if i == place else None for i in range(len(call.shapes))])

        return show

    @torch.no_grad()
    def _show(self, call: _Call, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Takes the pieces of a call; does nothing while a task differentiates by itself."""
        if self._take is None or all(gradient is None for gradient in grads):
            return
        known = call.known
        self._taken.append(call)
        if known.rule is None:
            if not call.is_shown and not self._differentiate(call, tensors, grads):
                self.unexplained |= set(known.names.values())
        elif not call.is_shown and grads[0] is not None and not self._apply(call, tensors, grads[0]):
            self.unexplained |= set(known.names.values())

    def _apply(self, call: _Call, inputs: Sequence[Tensor], output_grads: Tensor) -> bool:
        """Applies the rule of a layer; returns False if it does not fit."""
        known = call.known
        rule = known.rule
        assert rule is not None
        count = self._count
        layer: Any = known.layer
        is_split = False
        if self._parallel is not None:
            localized = self._parallel.localized(layer, inputs[0], output_grads) if len(inputs) == 1 else None
            if localized is None:
                return False
            layer = localized.layer
            inputs = [localized.inputs]
            output_grads = localized.output_grads
            is_split = localized.is_split
        if call.is_shared and not call.is_shown:
            if any(len(x) != len(output_grads) for x in inputs) or len(output_grads) % count:
                return False
            # all tokens in one dimension, sample by sample
            inputs = [by_samples(x, count) for x in inputs]
            output_grads = by_samples(output_grads, count)
            call.rows = (Fraction(output_grads.shape[1], self._positions),)
        if inputs[0].ndim < rule.least_dims or any(len(x) != count for x in (*inputs, output_grads)):
            return False
        failures: list[Exception] = []
        for name, piece in _pieces(rule, layer, inputs, output_grads, failures):
            if name in known.names:
                placed = piece if self._parallel is None else self._parallel.placed(known.names[name], piece, is_split)
                if placed is None:
                    return False
                self._hand_on(known.names[name], placed, 0)
            del piece  # before the next one is made
        return not failures

    def _hand_on(self, name: str, piece: Piece, start: int) -> None:
        assert self._take is not None
        if name in self._omitted:
            return
        if name in self.watched:
            self.watched[name][start : start + piece.count] |= nonzero_samples(piece).cpu()
        self._take(name, piece, start)

    def _keep(self, node: Any, grads: Tensor) -> None:
        """Takes the gradient of each sample for the output that a tap has made for all of them.

        Args:
            node: The tap's node.
            grads: (B, *shape).
        """
        call = self._shared[node]
        if call.kept is None:
            call.kept = self._saved(node)
        inputs = call.kept
        if inputs is None:
            return
        if len(inputs) == call.shapes[0][0] == 1:
            inputs = inputs.squeeze(0)
            grads = grads.squeeze(1)
        call.is_shown = False
        call.is_shared = False
        self._show(call, [inputs.expand(self._count, *inputs.shape)], [grads])
        call.is_shared = True
        call.is_shown = True

    def _saved(self, node: Any) -> Tensor | None:
        """Returns the input of the layer whose output a tap, or the sum with a probe, has made."""
        if self._add:
            nodes = [following for following, _ in node.next_functions if following is not None]
            node = next((x for x in nodes if hasattr(x, "call")), None)
        return node.saved_tensors[0] if node is not None else None

    def _differentiate(self, call: _Call, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
        """Differentiates a layer without a rule by itself, sample by sample; returns False if it cannot be split."""
        known = call.known
        lengths = {len(gradient) for gradient in grads if gradient is not None}
        if any(length % self._count or not length for length in lengths):
            return False
        repeated = RepeatedCall(
            known.layer,
            list(known.names),
            call.arguments,
            call.structure,
            split_by_samples(tensors, self._count, lengths),
            {place: split_by_samples([g], self._count, lengths)[0] for place, g in enumerate(grads) if g is not None},
            self._count,
        )
        call.rows = tuple(self._rows_of(part) for part in repeated.parts)
        self._is_inert = True
        try:
            for name, piece, start in repeated.gradients():
                self._hand_on(known.names[name], piece, start)
        finally:
            self._is_inert = False
        return True

    def _rows_of(self, part: SplitTensor) -> Fraction | None:
        """Returns the entry of `Split.rows` for a tensor."""
        if not part.is_split:
            return None
        return Fraction(0 if part.had_batch else part.values.shape[1], self._positions)


def _pieces(
    rule: Rule | ExpertsRule,
    layer: nn.Module,
    inputs: Sequence[Tensor],
    output_grads: Tensor,
    failures: list[Exception],
) -> Iterator[tuple[str, Piece]]:
    """Yields what a rule says; the error of one that does not fit goes to `failures`."""
    try:
        if isinstance(rule, ExpertsRule):
            hidden_states, index, weights = inputs
            yield from rule.gradients(layer, hidden_states, index, weights, output_grads)
        else:
            yield from rule.gradients(layer, inputs[0], output_grads).items()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        failures.append(error)
