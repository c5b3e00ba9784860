"""Pipelines of stages: the features of a module that is a part of the model, while others run its passes.

A schedule (torch.distributed.pipelining, or code of one's own) runs the forward and backward passes of micro-batches
through the module. The module's gradients of Σ f are projected on the way, at their columns of the whole model's; the
features of the whole model are the sum of those of its stages.

One sample is checked in each batch: the module is differentiated for it alone, from the input and the gradient of the
output that it had in the batch, which takes no other stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arguments import integer
from ..gradients.modes import differentiable
from ..gradients.parameters import listed
from ..gradients.pieces import Whole
from ..gradients.repeatable import differ
from ..tasks.base import evaluation_mode
from .sketches import Sketches, Sums
from .taps import Taps

if TYPE_CHECKING:
    from .streaming import GradientProjector


class StagePass:
    """The passes of one batch through a stage.

    Attributes:
        features: The stage's summand of the features, (B, k) float32, once the block of `projecting` is over.
    """

    features: Tensor

    def __init__(self, projector: GradientProjector, size: int, micro_batches: int, sums: Sums) -> None:
        """Takes what is common to all micro-batches, of `size` samples each."""
        self._projector = projector
        self._size = size
        self._micro_batches = micro_batches
        self._sums = sums
        self._taps: list[Taps] = []
        self._attached = ExitStack()
        self._first: dict[str, Any] = {}  # input, output and its gradient, of the first micro-batch

    @property
    def count(self) -> int:
        """The micro-batches so far."""
        return len(self._taps)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Taps the layers for the forward pass of a micro-batch; leaves those without gradients alone."""
        if not torch.is_grad_enabled():
            return
        if len(self._taps) == self._micro_batches:
            raise RuntimeError(
                f"more than {self._micro_batches} micro-batches pass through the stage; if a schedule's first step "
                "finds out shapes by a pass of its own, give PipelineStage input_args and output_args"
            )
        start = self._size * len(self._taps)
        projector = self._projector
        taps = Taps(projector._layers, self._size, projector._device, add=True)
        taps.show_to(lambda name, piece, first: self._sums.add(name, piece, start + first))
        self._taps.append(taps)
        self._attached.enter_context(taps.attached())
        if not start:
            self._first["input"] = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Takes the taps off after the forward pass."""
        if not torch.is_grad_enabled():
            return
        self._attached.close()
        if not isinstance(output, Tensor) or not len(output) == self._size:
            raise RuntimeError(
                f"a stage must return a tensor ({self._size}, ...), a row for each sample of a micro-batch, not "
                f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}"
            )
        if len(self._taps) == 1:
            self._first["output"] = output.detach()
            if output.requires_grad:
                output.register_hook(self._keep_gradient)  # type: ignore[no-untyped-call]

    def _keep_gradient(self, gradient: Tensor) -> None:
        self._first["gradient"] = gradient.detach()

    @property
    def unexplained(self) -> set[str]:
        """The parameters of layers that were called in a way that no rule knows."""
        return {name for taps in self._taps for name in taps.unexplained | taps.shared}

    def alone(self, sample: int) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
        """Returns the stage's pass over a sample, its output in the batch, and the gradient of that, (1, ...) each."""

        def single(value: object) -> object:
            is_batch = isinstance(value, Tensor) and value.ndim and len(value) == self._size
            return value[sample : sample + 1].clone() if is_batch and isinstance(value, Tensor) else value

        args, kwargs = tree_map(single, self._first["input"])
        rows = slice(sample, sample + 1)
        return (
            lambda: self._projector.model(*args, **kwargs),
            self._first["output"][rows],
            self._first["gradient"][rows],
        )

    @property
    def is_differentiated(self) -> bool:
        """True once the backward pass of the first micro-batch has come by."""
        return "gradient" in self._first


@contextmanager
def projecting(projector: GradientProjector, batch_size: int, micro_batches: int) -> Iterator[StagePass]:
    """Projects the gradients of passes through a stage that the block makes; see `GradientProjector.stage`."""
    batch_size = integer("batch_size", batch_size, 1, 2**48)
    micro_batches = integer("micro_batches", micro_batches, 1, batch_size)
    if batch_size % micro_batches:
        raise ValueError(f"batch_size must be a multiple of micro_batches, {micro_batches}, not {batch_size}")
    if projector._moments is not None or projector._side is not None or projector.has_metric:
        raise RuntimeError('a stage must have gradients as they are: sketch="full", no optimizer_state and no metric')
    if projector.singly:
        raise RuntimeError(
            f"a stage must have parameters of layers alone, not {listed(sorted(projector.singly))}, which follow from "
            "no layer's input and output; leave them out with grad_wrt"
        )
    size = batch_size // micro_batches
    sample = int(torch.randint(size, (), generator=projector._choices, device="cpu"))
    names = list(projector.selected)
    found = Sketches(projector.columns, sample, names, {})
    stage = StagePass(projector, size, micro_batches, projector._new_sums([torch.empty(batch_size)], [found]))
    with evaluation_mode(projector.model):
        handles = [
            projector.model.register_forward_pre_hook(stage.begin, with_kwargs=True),
            projector.model.register_forward_hook(stage.end, with_kwargs=True),
        ]
        try:
            with projector._running(()), differentiable(projector.model, fused=True):
                yield stage
        finally:
            for handle in handles:
                handle.remove()
        if stage.count != micro_batches:
            raise RuntimeError(f"{micro_batches} micro-batches were to pass through the stage, not {stage.count}")
        if stage.unexplained:
            raise RuntimeError(
                f"gradients of {listed(sorted(stage.unexplained))} do not follow from the layers' inputs and outputs; "
                "leave them out with grad_wrt"
            )
        if stage.is_differentiated:  # or the gradients are 0
            with differentiable(projector.model, fused=True):
                _check(projector, stage, sample, found)
    stage.features = stage._sums.result(projector._device)


def _check(projector: GradientProjector, stage: StagePass, sample: int, found: Sketches) -> None:
    """Compares the gradients of a sample of the first micro-batch with those of the stage for this sample alone.

    Raises:
        RuntimeError: They differ, or the stage's outputs do.
    """
    evaluate, output, gradient = stage.alone(sample)
    expected = Sketches(projector.columns, sample, list(projector.selected), {})

    def take(name: str, gradient: Tensor) -> None:
        dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
        expected.add(name, Whole(dense.unsqueeze(0)), sample)

    alone = projector._pass_alone((), gradient, projector.selected, take, evaluate)
    if differ(alone, output, projector._output_tolerance):
        raise RuntimeError(
            "samples of a batch change each other's results (by statistics of the batch, for example), or the stage is "
            "random; micro-batches of one sample are right in the first case"
        )
    if failed := projector._differing(found, expected):
        raise RuntimeError(
            f"gradients of {listed(sorted(failed))} do not follow from the layers' inputs and outputs in a batch; "
            "leave them out with grad_wrt, or take micro-batches of one sample"
        )
