"""Per-sample gradients without torch.func, layer by layer.

The gradient of a layer's parameters for one sample follows from the layer's input and from the gradient of its output,
so one forward and one backward pass over a batch give the gradients of all its samples: for a linear layer they are
outer products (Goodfellow, "Efficient per-example gradient computations", 2015). An expanded zero is added to the
output of each layer, which changes neither its values nor its shape. The gradient of this zero is that of the output,
whatever happens to the output afterwards, in place or not, and the gradients of the weights are not computed at all.

Each batch is checked. A second backward pass gives autograd's gradient of Σ c_i f_i for random factors c_i, which must
be Σ c_i g_i; this catches weights that are used in a second place, inputs whose first dimension is not the batch,
samples that are sorted inside the model, and anything else that breaks a rule. And samples drawn at random, one of 32,
are differentiated alone by the unaltered model; this catches samples that change each other, by statistics of the batch
for example. In the first batch, f of each sample is compared too. Parameters that fail, and those of layers without a
rule (layers.py), are differentiated in true batches of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks.base import restored
from .base import WholeGradients, singles_of
from .errors import is_out_of_memory
from .graph import edges_of, gradients_kept, gradients_taken
from .layers import Rule, rule_of
from .modes import requiring_grad
from .parameters import layers_of
from .repeatable import NEGLIGIBLE_ROUNDINGS, RANDOM, RandomOutputsError, differ, tolerance_of

logger = logging.getLogger("trak_fast")

SAMPLES_A_CHECK = 32
"""Samples of a batch for each one that is differentiated alone, to compare with: about a thirtieth of the time."""


@dataclass(frozen=True)
class _Layer:
    """A layer that has a rule.

    Attributes:
        rule: The rule.
        names: Maps the layer's names of its selected parameters to the model's.
    """

    rule: Rule
    names: dict[str, str]


@dataclass
class _Call:
    """A call of a layer.

    Attributes:
        layer: The layer.
        inputs: Its input, detached.
        version: The number that autograd gave the input's contents at the time; it grows with each change in place.
        probe: The zero that was added to the output.
        output: The node of autograd's graph that made the output, where all samples share it.
        output_grad: The gradient of the output, (B, ...).
    """

    layer: nn.Module
    inputs: Tensor
    version: int
    probe: Tensor
    output: Any = None
    output_grad: Tensor | None = None


@dataclass
class _Recording:
    """The calls of layers in one forward pass.

    Attributes:
        calls: The calls from which gradients follow.
        unexplained: Names of the parameters of layers that were called in a way that no rule knows.
        open: False once the forward pass is over. Layers that are called again in the backward pass, by activation
            checkpointing, must do the same operations, but are not recorded twice.
    """

    calls: list[_Call] = field(default_factory=list)
    unexplained: set[str] = field(default_factory=set)
    open: bool = True


COUPLED = "samples of a batch change each other's results (by statistics of the batch, for example)"
"""The reason for which samples are computed alone that makes earlier batches doubtful."""


class HookGradientComputer(WholeGradients):
    """Per-sample gradients for models that torch.func cannot take; the same as `FunctionalGradientComputer`'s.

    A task without `get_outputs` (`BatchOutputs`) is evaluated sample by sample.
    """

    _fallen: frozenset[str] = frozenset()  # parameters that failed the check of a batch
    _alone = False  # True once a batch gave other outputs than its samples alone, or failed
    _compared_all = False  # True once all samples of a batch were compared with their outputs alone

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        super().load_model_params(model)
        self._at_once = 0  # samples of this checkpoint that came in batches
        self._layers: dict[nn.Module, _Layer] = {}
        explained: set[str] = set()
        for layer, names in layers_of(model, self.selected).items():
            if (rule := rule_of(layer)) is not None:
                self._layers[layer] = _Layer(rule, names)
                explained |= set(names.values())
        self._unexplained = frozenset(self.selected) - explained  # parameters of layers without a rule

    @property
    def singly(self) -> frozenset[str]:
        """Names of the parameters that are differentiated in batches of one."""
        everything = self._alone or not hasattr(self.task, "get_outputs")
        return frozenset(self.selected) if everything else self._unexplained | self._fallen

    def _differentiate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        if not self._in_batches(batch):
            return self._in_batches_of_one(batch, list(self.selected))
        try:
            grads, outputs = self._by_layers(batch)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, RandomOutputsError):
                raise
            return self._after_failure(batch, error)
        if left := [name for name in self.selected if name not in grads]:
            singly, alone = self._in_batches_of_one(batch, left)
            if differ(alone, outputs, self._output_tolerance):
                self._stay_alone(COUPLED)
                return self._in_batches_of_one(batch, list(self.selected))
            grads |= singly
            outputs = alone
        self._at_once += len(outputs)
        return {name: grads[name] for name in self.selected}, outputs

    def _after_failure(self, batch: Sequence[Tensor], error: Exception) -> tuple[dict[str, Tensor], Tensor]:
        """Differentiates samples alone from now on, if that works where a batch has failed."""
        try:
            result = self._in_batches_of_one(batch, list(self.selected))
        except (ValueError, TypeError) as of_one:
            if type(error) is type(of_one):
                raise error from None  # it speaks of the whole batch
            raise
        self._stay_alone(f"layers cannot be differentiated in a batch ({(str(error) or repr(error)).splitlines()[0]})")
        return result

    def _stay_alone(self, reason: str) -> None:
        """Has samples computed alone from now on, and says so."""
        before = ""
        if reason is COUPLED and self._at_once:
            before = (
                f". The {self._at_once} samples that came before in batches may be wrong: featurize them again, by "
                "TRAKer(chunk_size=1) and load_checkpoint(..., _allow_featurizing_already_registered=True)"
            )
        logger.warning(
            "%s; each sample is computed alone from here on, in a forward and a backward pass of its own%s",
            reason,
            before,
        )
        self._alone = True

    def _evaluate(self, batch: Sequence[Tensor]) -> Tensor:
        with requiring_grad(self.parameters.values(), ()):
            if self._in_batches(batch):
                outputs = self._outputs(batch).detach()
                chosen = self._choose(len(outputs))
                alone = self._outputs_alone([x[chosen.to(x.device)] for x in batch])
                if not differ(outputs, _replaced(outputs, chosen, alone), self._output_tolerance):
                    return outputs
                self._stay_alone(COUPLED)
            return self._outputs_alone(batch)

    def _in_batches(self, batch: Sequence[Tensor]) -> bool:
        """Tells if some gradients of a batch may follow from one pass over it."""
        return len(batch[0]) > 1 and not self.singly >= set(self.selected)

    def _choose(self, count: int) -> Tensor:
        """Draws the samples of a batch that are computed alone, to compare with."""
        order = torch.randperm(count, generator=self._choices, device="cpu")
        return order[: max(1, count // SAMPLES_A_CHECK)]

    def _are_their_own(self, batch: Sequence[Tensor], outputs: Tensor, grads: dict[str, Tensor]) -> bool:
        """Compares the results for a batch with those of some samples alone.

        Raises:
            RandomOutputsError: Results are random.
        """
        if not self._compared_all:
            with requiring_grad(self.parameters.values(), ()):
                if differ(outputs, self._outputs_alone(batch), self._output_tolerance):
                    return self._are_random([x[:1] for x in batch], list(grads))
        chosen = self._choose(len(outputs))
        some = [x[chosen.to(x.device)] for x in batch]
        expected, alone = self._in_batches_of_one(some, list(grads))
        rows = {name: value[chosen.to(value.device)] for name, value in grads.items()}
        if differ(outputs, _replaced(outputs, chosen, alone), self._output_tolerance):
            return self._are_random(some, list(grads))
        if self._differing(rows, expected):
            return self._are_random(some, list(grads))
        self._is_first_batch = False
        self._compared_all = True
        return True

    def _are_random(self, some: Sequence[Tensor], names: list[str]) -> bool:
        """Checks that samples alone give the same results each time, and returns False.

        Raises:
            RandomOutputsError: They do not.
        """
        grads, outputs = self._in_batches_of_one(some, names)
        again, others = self._in_batches_of_one(some, names)
        if differ(outputs, others, self._output_tolerance) or self._differing(again, grads):
            raise RandomOutputsError(RANDOM)
        return False

    def _in_batches_of_one(self, batch: Sequence[Tensor], names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Computes some gradients, and all outputs, by a forward and a backward pass for each sample."""
        chosen = {name: self.selected[name] for name in names}
        rows: list[dict[str, Tensor]] = []
        outputs: list[Tensor] = []
        inputs_needed = self._checkpoint_inputs.are_needed

        def add(name: str, gradient: Tensor) -> None:
            rows[-1][name] = rows[-1][name] + gradient if name in rows[-1] else gradient

        with ExitStack() as modes:
            modes.enter_context(requiring_grad(self.parameters.values(), chosen.values()))
            modes.enter_context(self._checkpoint_inputs.attached())
            modes.enter_context(gradients_taken(chosen, add))
            for sample in singles_of(batch, self.task):
                rows.append({})
                output = self._checkpoint_inputs.provided_to(partial(self._outputs, sample))
                if output.requires_grad:
                    with gradients_kept(output, chosen.values()):
                        torch.autograd.backward(output.sum())  # reentrant checkpointing allows no torch.autograd.grad
                outputs.append(output.detach()[0])
        if self._checkpoint_inputs.are_needed and not inputs_needed:
            return self._in_batches_of_one(batch, names)  # a backward pass has shown it, whose own gradients lack some
        columns = {name: [_dense(row.get(name), parameter) for row in rows] for name, parameter in chosen.items()}
        return {name: torch.stack(column) for name, column in columns.items()}, torch.stack(outputs)

    def _by_layers(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the gradients that follow from layers and pass the check; and f of each sample in the batch."""
        count = len(batch[0])
        chosen = {name: parameter for name, parameter in self.selected.items() if name not in self.singly}
        factors = self._draw_factors(count)
        recording = _Recording()
        with ExitStack() as modes:
            modes.enter_context(restored(self.model))
            modes.enter_context(requiring_grad(self.parameters.values(), chosen.values()))
            # checkpointing of a model's own adds to `.grad` even here
            modes.enter_context(gradients_taken(chosen, lambda *taken: None))
            modes.enter_context(self._recording(recording, count))
            outputs = self._outputs(batch)
            recording.open = False
            sums = self._sum_by_autograd(outputs, factors, list(chosen))
            self._find_output_grads(recording, outputs)
        outputs = outputs.detach()
        if not outputs.isfinite().all() or not _largest(sums.values()).isfinite().all():
            return self._in_batches_of_one(batch, list(self.selected))  # sums of what is not finite tell nothing
        grads = self._add_calls(recording, count)
        for name, parameter in chosen.items():
            if name not in grads and name not in recording.unexplained:  # its layer was not called
                grads[name] = parameter.detach().new_zeros(count, *parameter.shape)
        failed = recording.unexplained | self._compare(grads, factors, sums)
        grads = {name: value for name, value in grads.items() if name not in failed}
        if not self._are_their_own(batch, outputs, grads):
            self._stay_alone(COUPLED)
            return self._in_batches_of_one(batch, list(self.selected))
        if failed:
            self._fall_back(failed)
        return grads, outputs

    def _fall_back(self, failed: set[str]) -> None:
        """Has parameters differentiated in batches of one from now on, and says so."""
        layers: dict[str, None] = {}
        for name in self.selected:
            if name in failed:
                path = name.rpartition(".")[0]
                layer = type(self.model.get_submodule(path)).__name__
                layers[f"{path or 'the model itself'} ({layer})"] = None
        share = sum(self.selected[name].numel() for name in failed) / sum(p.numel() for p in self.selected.values())
        logger.warning(
            "gradients of %s do not follow from the layer's inputs and outputs in a batch; these %.2g%% of the "
            "gradient are computed sample by sample from here on, by a forward and a backward pass for each",
            ", ".join(layers),
            100 * share,
        )
        self._fallen |= failed

    @contextmanager
    def _recording(self, recording: _Recording, count: int) -> Iterator[None]:
        """Lists each call of a layer while `recording` is open, and adds a zero to its output."""

        singly = self.singly

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            tensors = [value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor)]
            fits = len(tensors) == 1 or (args and isinstance(args[0], Tensor))
            known = self._layers[layer]
            fits = fits and torch.is_grad_enabled()  # unlike the first pass of reentrant checkpointing
            if not fits or not tensors[0].ndim or not isinstance(output, Tensor) or not output.ndim:
                recording.unexplained |= set(known.names.values()) - singly
                return None
            # -0.0 and no other zero leaves every number as it is
            probe = output.new_full((), -0.0).expand(output.shape).requires_grad_()
            inputs = tensors[0]
            probed = output + probe
            if recording.open:
                call = _Call(layer, inputs=inputs.detach(), version=inputs._version, probe=probe)
                if len(output) != count:
                    call.output = probed.grad_fn
                recording.calls.append(call)
            return probed

        handles = [
            layer.register_forward_hook(hook, with_kwargs=True)
            for layer, known in self._layers.items()
            if not set(known.names.values()) <= singly
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _draw_factors(self, count: int) -> Tensor:
        """Draws factors c of samples, (B,) float64, that differ, so that gradients of exchanged samples are noticed."""
        factors = torch.linspace(1 / 3, 1, count, dtype=torch.float64, device="cpu")
        factors = factors[torch.randperm(count, generator=self._choices, device="cpu")]
        factors *= torch.randint(2, (count,), generator=self._choices, device="cpu") * 2 - 1
        for dtype in self._dtypes:
            factors = factors.to(dtype).double()  # the same number in each dtype
        return factors.to(self._device)

    def _sum_by_autograd(self, outputs: Tensor, factors: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Computes Σ c_i g_i for some parameters by a backward pass; another one may follow.

        Raises:
            RuntimeError: Reentrant checkpointing hides from `torch.autograd.grad` which parameters it computes with.
        """
        weighted = (outputs * factors.to(outputs)).sum()
        if weighted.requires_grad and any(
            node.name() == "CheckpointFunctionBackward" for _, node in edges_of(weighted.grad_fn)
        ):
            raise RuntimeError(
                "reentrant activation checkpointing allows no torch.autograd.grad; use_reentrant=False does"
            )
        sums = _gradients(weighted, [self.selected[name] for name in names], retain_graph=True)
        return dict(zip(names, sums, strict=True))

    def _find_output_grads(self, recording: _Recording, outputs: Tensor) -> None:
        """Computes the gradients of the outputs of all calls.

        An output that all samples share, as the embeddings of positions are, has a leading dimension of 1, or none for
        samples. Added to something that has, its gradient for each sample is that of the sum, which autograd would
        reduce.
        """
        shared = {call.output: call for call in recording.calls if call.output is not None}
        handles = []
        for node, following in edges_of(outputs.grad_fn) if shared else ():
            if following in shared and node.name() == "AddBackward0":
                handles.append(node.register_prehook(_keep_gradient(shared[following])))
        probes = [call.probe for call in recording.calls]
        try:
            for call, value in zip(recording.calls, _gradients(outputs.sum(), probes), strict=True):
                if call.output_grad is None:
                    call.output_grad = value
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add_calls(self, recording: _Recording, count: int) -> dict[str, Tensor]:
        """Adds up what the rules say for each call; calls that no rule can explain are noted in `recording`."""
        grads: dict[str, Tensor] = {}
        singly = self.singly
        for call in recording.calls:
            known = self._layers[call.layer]
            inputs = call.inputs
            output_grad = call.output_grad
            assert output_grad is not None
            shape = call.probe.shape
            if call.output is not None and output_grad.shape == (count, *shape):
                inputs = inputs.expand(count, *inputs.shape)
            elif call.output is not None and len(inputs) == 1 and output_grad.shape == (count, *shape[1:]):
                inputs = inputs.expand(count, *inputs.shape[1:])
            changed = call.inputs._version != call.version
            few = inputs.ndim < known.rule.least_dims
            values: dict[str, Tensor] | None = None
            if not changed and not few and len(inputs) == len(output_grad) == count:
                values = self._apply(known, call.layer, inputs, output_grad)
            if values is None:
                recording.unexplained |= set(known.names.values()) - singly
                continue
            for name, value in values.items():
                if name not in singly:
                    grads[name] = grads[name] + value if name in grads else value
        for name in recording.unexplained:
            grads.pop(name, None)
        return {name: value.detach() for name, value in grads.items()}

    def _apply(self, known: _Layer, layer: nn.Module, inputs: Tensor, output_grad: Tensor) -> dict[str, Tensor] | None:
        """Applies the rule of a layer; returns None if the layer, of a subclass perhaps, has another kind of input."""
        try:
            pieces = known.rule.gradients(layer, inputs, output_grad)
            values = {
                known.names[name]: piece.rows(0, piece.height)
                for name, piece in pieces.items()
                if name in known.names and known.names[name] not in self.singly
            }
            values = {name: value.reshape(len(value), *self.selected[name].shape) for name, value in values.items()}
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
        return {name: value.to(self.selected[name].dtype) for name, value in values.items()}

    @torch.no_grad()
    def _compare(self, grads: dict[str, Tensor], factors: Tensor, sums: dict[str, Tensor]) -> set[str]:
        """Returns the names of the parameters whose gradients do not add up to Σ c_i g_i as autograd computes it."""
        totals = {
            name: torch.mv(value.reshape(len(value), -1).T, factors.to(value)).view(value.shape[1:])
            for name, value in grads.items()
        }
        # the sum may cancel, which the gradients of single samples do not
        return self._differing(totals, {name: sums[name] for name in grads}, sizes=grads)

    def _differing(
        self, found: dict[str, Tensor], expected: dict[str, Tensor], sizes: dict[str, Tensor] | None = None
    ) -> set[str]:
        """Returns the names of gradients that differ by more than rounding explains.

        Args:
            found: Gradients by parameter.
            expected: The right ones.
            sizes: Tensors whose largest entries rounding is relative to, if it is larger than those of `expected`.
        """
        if not found:
            return set()
        names = list(found)
        negligible = tolerance_of(NEGLIGIBLE_ROUNDINGS, self._dtypes)
        errors = _largest(found[name] - expected[name] for name in names)
        largest = _largest(expected[name] for name in names)
        bound = negligible * largest.amax()
        differing: set[str] = set()
        for place in (~(errors <= self._gradient_tolerance * largest + bound)).nonzero().flatten().tolist():
            size = _largest([(sizes or expected)[names[place]]])[0]
            if not errors[place] <= self._gradient_tolerance * size + bound:
                differing.add(names[place])
        return differing


def _replaced(outputs: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """Returns outputs (B,) with other values for some samples."""
    replaced = outputs.clone()
    replaced[chosen.to(outputs.device)] = values
    return replaced


def _gradients(output: Tensor, inputs: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """Differentiates a number by autograd; gradients are dense, and 0 where the number does not depend on an input."""
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    grads = torch.autograd.grad(output, inputs, retain_graph=retain_graph, allow_unused=True)
    return [_dense(grad, x) for x, grad in zip(inputs, grads, strict=True)]


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Returns a gradient as a dense tensor, 0 for none."""
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _largest(values: Iterable[Tensor]) -> Tensor:
    """Returns the largest magnitude in each tensor, float64 on the CPU: a norm that neither overflows nor vanishes."""
    norms: list[Tensor] = []
    for value in values:
        least, most = torch.aminmax(value if value.numel() else value.new_zeros(1))
        norms.append(torch.maximum(-least, most))
    devices = {norm.device for norm in norms}
    together = [norm if len(devices) == 1 else norm.cpu() for norm in norms]
    return torch.stack([norm.double() for norm in together]).cpu() if norms else torch.zeros(0, dtype=torch.float64)


def _keep_gradient(call: _Call) -> Callable[[tuple[Tensor, ...]], None]:
    """Returns a hook that takes the gradient of a sum for that of one of its summands."""

    def keep(grads: tuple[Tensor, ...]) -> None:
        call.output_grad = grads[0]

    return keep
