"""Per-sample gradients of a task's model output, by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..tasks.base import copy_buffers, copy_tensors, restored
from .base import WholeGradients
from .errors import is_out_of_memory
from .modes import requiring_grad
from .repeatable import RANDOM, RandomOutputsError, RandomWatch

T = TypeVar("T")


class FunctionalGradientComputer(WholeGradients):
    """Per-sample gradients by vmap over grad; only the selected parameters are differentiated.

    The model runs in the mode it is in. Random operations that are active even in evaluation mode are an error, as
    features would not be repeatable.
    """

    _fuses_attention = False

    def _differentiate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        # detached, as autograd outside of torch.func would record a graph through every gradient and keep it alive
        selected = {name: parameter.detach() for name, parameter in self.selected.items()}
        differentiate = vmap(grad_and_value(self._output), in_dims=(None, 0))
        grads, outputs = self._explaining(batch, lambda: differentiate(selected, tuple(copy_tensors(batch))))
        return {name: grads[name] for name in selected}, outputs.detach()

    def _evaluate(self, batch: Sequence[Tensor]) -> Tensor:
        selected = {name: parameter.detach() for name, parameter in self.selected.items()}
        evaluate = vmap(self._output, in_dims=(None, 0))
        return self._explaining(batch, lambda: evaluate(selected, tuple(copy_tensors(batch)))).detach()

    def _output(self, selected: dict[str, Tensor], sample: tuple[Tensor, ...]) -> Tensor:
        """Computes f of one sample with other values of the selected parameters."""
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()} | selected
        return self.task.get_output(self.model, weights, copy_buffers(self.buffers), *sample)

    def _explaining(self, batch: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """Calls `compute`. If it fails, finds the reason: a sample, the model, a random operation or torch.func.

        Raises:
            RuntimeError: torch.func cannot take the model, or one of its operations is random.
            Exception: As a plain evaluation of the samples, one by one, raises it.
        """
        try:
            with restored(self.model):
                return compute()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            watch = RandomWatch(self._device, self._generators)
            try:
                self._differentiate_plainly(batch)
            except (ValueError, TypeError) as of_one:
                if type(error) is type(of_one):
                    raise error from None  # it speaks of the whole batch
                raise
            if watch.drawn() or "randomness" in str(error):
                raise RandomOutputsError(f"{RANDOM} ({error})") from error
            indexed = (
                "; logits[y] with a tensor y is logits.gather(0, y[None]) for it" if ".item()" in str(error) else ""
            )
            raise RuntimeError(
                f"torch.func cannot differentiate this model or task: {error}\n"
                f"gradient_computer=trak_fast.HookGradientComputer does without it{indexed}"
            ) from error

    def _differentiate_plainly(self, batch: Sequence[Tensor]) -> None:
        """Evaluates the samples one by one, and differentiates the last one by autograd."""
        with requiring_grad(self.parameters.values(), self.selected.values()):
            for sample in zip(*copy_tensors(batch), strict=True):
                with restored(self.model):
                    output = self.task.get_output(self.model, self.parameters, copy_buffers(self.buffers), *sample)
            if output.requires_grad:
                torch.autograd.grad(output, list(self.selected.values()), allow_unused=True)
