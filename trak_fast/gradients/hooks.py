"""Per-sample gradients without torch.func, layer by layer.

The gradient of a layer's parameters for one sample follows from the layer's input and from the gradient of its output,
so one forward and one backward pass over a batch give the gradients of all its samples: for a linear layer they are
outer products (Goodfellow, "Efficient per-example gradient computations", 2015). An expanded zero is added to the
output of each layer. The gradient of this zero is that of the output, whatever happens to the output afterwards, in
place or not, and the gradients of the weights are not computed at all.

Parameters of layers without a rule (layers.py) are differentiated one sample at a time. So are those of layers whose
rule gives wrong results: the first batch of each checkpoint is compared with autograd's gradients of its first and its
last sample. This catches weights that are used in a second place, inputs whose first dimension is not the batch, and
anything else that breaks the rule.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks.base import BatchOutputs
from .base import ParameterGradients
from .layers import Rule, rule_of
from .modes import no_fast_path, unfused_attention
from .parameters import select_parameters

logger = logging.getLogger("trak_fast")

TOLERANCE = 1e-3
"""Relative difference from autograd's gradient up to which a layer's rule is trusted; rounding is far below it."""

NEGLIGIBLE = 1e-6
"""Share of the whole gradient's norm up to which a difference does not count."""


@dataclass(frozen=True)
class _Layer:
    """A layer that has a rule.

    Attributes:
        rule: The rule.
        names: Maps the layer's names of its selected parameters to the model's.
    """

    rule: Rule
    names: dict[str, str]


@dataclass(frozen=True)
class _Call:
    """A call of a layer.

    Attributes:
        layer: The layer.
        inputs: Its input, detached.
        version: The number that autograd gave the input's contents at the time; it grows with each change in place.
        probe: The zero that was added to the output.
    """

    layer: nn.Module
    inputs: Tensor
    version: int
    probe: Tensor


class _Broken(Exception):
    """The gradients of these parameters cannot be told apart by sample in their layers."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


class HookGradientComputer(ParameterGradients):
    """Per-sample gradients for models that torch.func cannot take; the same as `FunctionalGradientComputer`'s.

    A task without `get_outputs` (`BatchOutputs`) is evaluated sample by sample.
    """

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        self.model = model
        selected = select_parameters(model, self.grad_wrt)
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
        model_names = {id(parameter): name for name, parameter in selected.items()}
        self._layers: dict[nn.Module, _Layer] = {}
        explained: set[str] = set()
        for layer in model.modules():
            own = layer.named_parameters(recurse=False)
            names = {name: model_names[id(p)] for name, p in own if id(p) in model_names}
            if names and (rule := rule_of(layer)) is not None:
                self._layers[layer] = _Layer(rule, names)
                explained |= set(names.values())
        self.selected = list(selected)
        self._per_sample = set(self.selected) - explained  # parameters that are differentiated sample by sample
        self._checked = not explained

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes the gradient of each sample's model output.

        Args:
            batch: The batch's tensors, (B, ...) each.

        Returns:
            For each selected parameter, in the model's order, (B, *shape) in its dtype, detached.
        """
        with torch.enable_grad(), unfused_attention(), no_fast_path():
            if not hasattr(self.task, "get_outputs"):
                return self._one_by_one(batch)
            while True:
                try:
                    return self._at_once(self.task, batch)
                except _Broken as broken:
                    self._leave_to_autograd(broken.names)

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample (`Task.get_out_to_loss_grad`), (B,) or (B, 1)."""
        return self.task.get_out_to_loss_grad(self.model, self.weights, self.buffers, batch)

    def _leave_to_autograd(self, names: set[str]) -> None:
        """Has parameters differentiated sample by sample from now on."""
        logger.debug("differentiated sample by sample: %s", ", ".join(sorted(names)))
        self._per_sample |= names

    def _one_by_one(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes all gradients by a forward and a backward pass for each sample."""
        weights = self._requiring_grad(self.selected)
        rows = []
        for sample in zip(*batch, strict=True):
            output = self.task.get_output(self.model, weights, self.buffers, *sample)
            rows.append(self._differentiate(output, weights, self.selected))
        return _stacked(rows, self.selected)

    def _at_once(self, task: BatchOutputs, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes the gradients by one forward and one backward pass, and those that no layer explains by autograd.

        Raises:
            _Broken: Gradients that layers should explain cannot be told apart by sample.
        """
        count = len(batch[0])
        weights = self._requiring_grad(self._per_sample if self._checked else self.selected)
        with self._recording(count) as calls:
            outputs = task.get_outputs(self.model, weights, self.buffers, batch)
        grads: dict[str, Tensor] = {}
        if calls:
            probes = [call.probe for call in calls]
            output_grads = torch.autograd.grad(
                outputs.sum(), probes, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            grads = self._by_layers(calls, output_grads, count)
        with torch.no_grad():
            for name in self.selected:
                if name not in grads and name not in self._per_sample:  # its layer was not called
                    grads[name] = self.weights[name].new_zeros(count, *self.weights[name].shape)
        if not self._checked:
            self._check(grads, outputs, weights)
            self._checked = True
        if self._per_sample:
            names = [name for name in self.selected if name in self._per_sample]
            grads |= _stacked([self._differentiate(output, weights, names) for output in outputs], names)
        return {name: grads[name].detach() for name in self.selected}

    def _requiring_grad(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns all weights; those in `names` are new leaves that require gradients."""
        names = set(names)
        return {name: w.detach().requires_grad_() if name in names else w for name, w in self.weights.items()}

    def _differentiate(self, output: Tensor, weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """Computes the gradients of one sample's output by autograd."""
        inputs = [weights[name] for name in names]
        grads = torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        return dict(zip(names, grads, strict=True))

    @contextmanager
    def _recording(self, count: int) -> Iterator[list[_Call]]:
        """Lists each call of a layer, and adds a zero to its output."""
        calls: list[_Call] = []

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            inputs = args[0] if args else kwargs["input"]
            if len(output) == 1 and count > 1:  # the same for all samples, as the embeddings of positions are
                inputs = inputs.expand(count, *inputs.shape[1:])
                output = output.expand(count, *output.shape[1:])
            probe = output.new_zeros(()).expand(output.shape).requires_grad_()
            calls.append(_Call(layer, inputs.detach(), inputs._version, probe))
            return output + probe

        handles = [
            layer.register_forward_hook(hook, with_kwargs=True)
            for layer, known in self._layers.items()
            if not set(known.names.values()) <= self._per_sample
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _by_layers(self, calls: list[_Call], output_grads: Sequence[Tensor], count: int) -> dict[str, Tensor]:
        """Adds up what the rules say for each call.

        Raises:
            _Broken: The input of a call was changed after it, or has another first dimension than the batch.
        """
        grads: dict[str, Tensor] = {}
        broken: set[str] = set()
        for call, output_grad in zip(calls, output_grads, strict=True):
            rule = self._layers[call.layer].rule
            names = self._layers[call.layer].names
            changed = call.inputs._version != call.version
            if changed or call.inputs.ndim < rule.least_dims or not len(call.inputs) == len(output_grad) == count:
                broken |= set(names.values())
                continue
            for own_name, value in rule.gradients(call.layer, call.inputs, output_grad).items():
                if (name := names.get(own_name)) is not None and name not in self._per_sample:
                    grads[name] = grads[name] + value if name in grads else value
        if broken := broken - self._per_sample:
            raise _Broken(broken)
        return grads

    def _check(self, grads: dict[str, Tensor], outputs: Tensor, weights: dict[str, Tensor]) -> None:
        """Compares with autograd's gradients of the first and the last sample, and drops what differs."""
        broken: set[str] = set()
        for i in {0, len(outputs) - 1}:
            exact = self._differentiate(outputs[i], weights, list(grads))
            whole = torch.stack([value.norm() for value in exact.values()]).norm()
            for name, value in exact.items():
                error = (grads[name][i] - value).norm()
                # a gradient that is nothing but rounding of zero, as that of attention's key biases is, has no correct
                # digits to compare
                if not error <= TOLERANCE * value.norm() + NEGLIGIBLE * whole:
                    broken.add(name)
        if broken:
            self._leave_to_autograd(broken)


def _stacked(rows: Sequence[dict[str, Tensor]], names: Iterable[str]) -> dict[str, Tensor]:
    """Stacks the gradients of samples to one tensor (B, *shape) for each parameter."""
    return {name: torch.stack([row[name] for row in rows]) for name in names}
