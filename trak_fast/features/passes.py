"""Passes over a model: of a batch without gradients, or of one sample whose gradients are taken one by one.

Each pass restores what it changes: attributes, modes, and which parameters require gradients. The passes over a model
that is sharded over processes are made by all of these together (sharded.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.base import ParameterGradients, singles_of
from ..gradients.errors import is_out_of_memory
from ..gradients.graph import gradients_kept, gradients_taken
from ..gradients.layers import Rule
from ..gradients.modes import checkpointing, differentiable, no_key_caches, requiring_grad, uncompiled
from ..gradients.pieces import Piece, Whole
from ..tasks.base import evaluation_mode, restored
from .sharded import Kind, Lockstep, shards_of
from .taps import TappedLayer, Taps
from .tensor_parallel import TensorParallel

FORWARD: Kind = ("forward",)
"""The kind of a pass without gradients."""

_ANY = Rule(lambda layer, inputs, output_grads: {})
"""A rule of no parameters, to tap a layer as one with a rule."""


class ModelPasses(ParameterGradients):
    """Makes passes over a model, alone or together with other processes."""

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        super().load_model_params(model)
        self._lockstep = Lockstep(model, self.parameters, self._imitate) if shards_of(model) else None
        self._parallel = TensorParallel.of(model, self.parameters)

    @property
    def _stripping(self) -> object:
        """The task, which takes the padding off single samples; processes with parts of sequences need their length."""
        return None if self._parallel is not None else self.task

    @property
    def is_sharded(self) -> bool:
        """True where all processes have to make the same passes over the model (FSDP2, tensor parallelism)."""
        return self._lockstep is not None or self._parallel is not None

    @contextmanager
    def turn(self, batch: Sequence[Tensor], kind: Kind = FORWARD) -> Iterator[None]:
        """Makes room for one pass over the model in the block: all processes that a model is sharded over make it.

        Args:
            batch: The samples, (B, ...) each.
            kind: The kind of the pass; weights require no gradients unless it says so.
        """
        if self._lockstep is None:
            yield
            return
        with self._lockstep.turn(kind, batch), requiring_grad(self.parameters.values(), ()):
            yield

    def finish_call(self) -> None:
        """Makes the passes over a sharded model that other processes have to make, until all have ended this call."""
        if self._lockstep is not None:
            with evaluation_mode(self.model), differentiable(self.model, fused=True):
                self._lockstep.finish_call()

    def finish(self) -> None:
        """Makes the passes that other processes have to make in this and more calls, until all have called this."""
        if self._lockstep is not None:
            with evaluation_mode(self.model), differentiable(self.model, fused=True):
                self._lockstep.finish()

    def _imitate(self, kind: Kind, sample: Sequence[Tensor]) -> None:
        """Makes a pass of a kind that another process has to make, on a batch of one, and drops its result."""
        assert isinstance(kind, tuple)
        details: list[Any]
        name, *details = kind
        sample = [x.to(self._device) for x in sample]
        with torch.enable_grad():
            if name == "stream":
                layers = [
                    TappedLayer(self.model.get_submodule(path), rule=_ANY if has_rule else None, names={})
                    for path, has_rule in details[0]
                ]
                taps = Taps(layers, 1, self._device, add=True)
                with self._running(()), self._checkpoint_inputs.attached(), taps.attached():
                    outputs = self._outputs(sample)
                    if outputs.requires_grad:  # taps show nothing unless they were given a place for it
                        torch.autograd.backward(outputs, torch.zeros_like(outputs))
            elif name == "alone":
                chosen = {own: self.selected[own] for own in details[0]}
                self._pass_alone(sample, torch.zeros(1), chosen, lambda own, gradient: None)
            elif name == "weightings":
                super()._ask_for_weightings([x.expand(details[0], *x.shape[1:]) for x in sample])
            else:
                with self._running(()), torch.no_grad():
                    self._outputs(sample)

    def _ask_for_weightings(self, batch: Sequence[Tensor]) -> Tensor:
        with self.turn(batch, ("weightings", len(batch[0]))):
            return super()._ask_for_weightings(batch)

    @property
    def _dtypes(self) -> set[torch.dtype]:
        return super()._dtypes if self._lockstep is None else super()._dtypes | self._lockstep.dtypes

    def _constants(self) -> dict[str, Tensor]:
        # shards are known by what they are, and require no gradients in a turn
        return super()._constants() if self._lockstep is None else dict(self.parameters)

    def _outputs_alone(self, batch: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._forward(sample) for sample in singles_of(batch, self._stripping)])

    def _forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes f of samples, (B,), by one pass without gradients."""
        with self.turn(batch), self._running(()), torch.no_grad():
            return self._outputs(batch).detach()

    def _compute(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        if not self.is_sharded:
            return super()._compute(batch)
        try:
            return super()._compute(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise RuntimeError(
                    f"memory ran out in a pass over {len(batch[0])} samples, which the other processes of a sharded "
                    "model are in too, so that it cannot be made again in halves; give smaller batches, or a smaller "
                    "memory_budget"
                ) from error
            raise

    @contextmanager
    def _running(self, chosen: Iterable[Tensor]) -> Iterator[None]:
        """Has the model run as it is written, and `chosen` parameters alone require gradients."""
        with ExitStack() as modes:
            modes.enter_context(restored(self.model))
            modes.enter_context(uncompiled(self.model))
            modes.enter_context(no_key_caches(self.model))
            modes.enter_context(checkpointing(self.model))
            modes.enter_context(requiring_grad(self.parameters.values(), chosen))
            yield

    def _weighted(self, seeds: Tensor, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Returns the factors of f that are differentiated, (B,), in the dtype of f."""
        return seeds.to(outputs)

    def _add_alone(
        self, batch: Sequence[Tensor], names: Sequence[str], seeds: Tensor, take: Callable[[str, Piece, int], None]
    ) -> Tensor:
        """Differentiates with respect to some parameters by a forward and a backward pass for each sample.

        Args:
            batch: The samples' tensors, (B, ...) each.
            names: The parameters.
            seeds: Factors of f, (B,).
            take: Takes each gradient, which is freed then.

        Returns:
            f of each sample, (B,), detached.
        """
        outputs: list[Tensor] = []
        chosen = {name: self.selected[name] for name in names}
        for sample, single in enumerate(singles_of(batch, self._stripping)):

            def take_gradient(name: str, gradient: Tensor, sample: int = sample) -> None:
                if self._parallel is not None:
                    gradient = self._parallel.local_gradient(name, gradient)
                dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
                if dense.numel():  # or this process has no part of it
                    take(name, Whole(dense.unsqueeze(0)), sample)

            with self.turn(single, ("alone", tuple(names))):
                outputs.append(self._pass_alone(single, seeds[sample : sample + 1], chosen, take_gradient))
        return torch.cat(outputs)

    def _pass_alone(
        self,
        single: Sequence[Tensor],
        seed: Tensor,
        chosen: Mapping[str, Tensor],
        take: Callable[[str, Tensor], None],
        evaluate: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Differentiates one sample with respect to some parameters.

        Args:
            single: The sample's tensors, (1, ...) each.
            seed: The factor of f, (1,), or the gradient of what `evaluate` returns.
            chosen: The parameters, by name.
            take: Takes each gradient, which is freed then.
            evaluate: Computes something else than f of the sample.

        Returns:
            f, (1,), or the other thing, detached.
        """
        with ExitStack() as modes:
            modes.enter_context(self._running(chosen.values()))
            modes.enter_context(self._checkpoint_inputs.attached())
            hook = modes.enter_context(gradients_taken(chosen, take))
            if self._lockstep is not None:  # gradients are those of what is gathered for the shards
                modes.enter_context(self._lockstep.gathered(chosen, hook))
            output = self._checkpoint_inputs.provided_to(evaluate or partial(self._outputs, single))
            if output.requires_grad:
                weighted = self._weighted(seed, output, single) if evaluate is None else seed.to(output)
                with gradients_kept(output, chosen.values()):
                    torch.autograd.backward(output, weighted)
        return output.detach()
