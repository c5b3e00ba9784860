"""The contract of tasks: a model output function f and its loss term Q (Park et al., "TRAK: Attributing Model Behavior
at Scale", ICML 2023, sections 2 and 3).

A task says which scalar f(z, θ) of a model is attributed, and how the loss depends on this scalar. The methods have the
names and signatures of traker's, so tasks written for traker work here as they are.

A sample's f and Q depend on this sample alone. Each evaluation of the model therefore gets copies of the sample's
tensors and of the buffers, which the model may change, and its modules' attributes are put back afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call


class Task(ABC):
    """Base class for tasks of your own.

    A subclass has `get_output`, and one of these for Q: `loss`, a function of f that autograd then differentiates;
    `get_out_to_loss_grad`, which gives Q itself; or neither, where f is the negative loss. It may have the methods of
    `BatchOutputs` and of `LossCurvature` too. In all of them `weights` and `buffers` map the names of the model's
    parameters and buffers to the tensors to use in their place.
    """

    @abstractmethod
    def get_output(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *sample: Tensor
    ) -> Tensor:
        """Computes the model output f(z, θ) of one sample, which torch.func differentiates with respect to `weights`.

        Args:
            model: The module to call, with `torch.func.functional_call`.
            weights: Parameters, by name.
            buffers: Buffers, by name.
            *sample: The sample's tensors, without the batch dimension.

        Returns:
            A tensor with one element and no dimensions.
        """

    def get_settings(self) -> Mapping[str, Any]:
        """Returns all that f and Q depend on beside the model, by name. Folders of features are for one set of them.

        By default these are the attributes whose names begin with no underscore.
        """
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @property
    def _has_loss(self) -> bool:
        """True where `loss` is something other than −f."""
        return type(self).loss is not Task.loss

    def loss(self, output: Tensor, *sample: Tensor) -> Tensor:
        """Computes the training loss of one sample from its f: −f, unless a subclass says otherwise."""
        return -output

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes the weighting Q of each sample: minus the derivative of its loss with respect to f.

        With this sign, a positive score says that the training sample moves the target's f upwards.

        Args:
            model: The module to call, with `torch.func.functional_call`.
            weights: Parameters, by name.
            buffers: Buffers, by name.
            batch: The batch's tensors, (B, ...) each.

        Returns:
            (B,) or (B, 1).
        """
        outputs = []
        for sample in zip(*batch, strict=True):
            with torch.enable_grad(), restored(model):  # f may be made of derivatives
                output = self.get_output(model, weights, copy_buffers(buffers), *copy_tensors(sample))
            outputs.append(output.detach().reshape(()))
        return self.get_weightings(torch.stack(outputs), batch)

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample from its f: minus the derivative of `loss`.

        Args:
            outputs: f of each sample, (B,), detached.
            batch: The batch's tensors, (B, ...) each.

        Returns:
            (B,).
        """
        if not self._has_loss:
            return torch.ones_like(outputs)
        derivatives = []
        for output, *sample in zip(outputs, *batch, strict=True):
            with torch.enable_grad():
                output = output.detach().requires_grad_()
                loss = self.loss(output, *copy_tensors(sample))
                if not isinstance(loss, Tensor):
                    raise TypeError(f"loss must return a tensor of one element, not {type(loss).__name__}")
                derivatives.append(-torch.autograd.grad(loss, output)[0])
        return torch.stack(derivatives)


def weighs_by_outputs(task: object) -> bool:
    """Tells if the Q of a task is what its `get_weightings` makes of f, and nothing of its own."""
    own = getattr(type(task), "get_out_to_loss_grad", None)
    return own in (Task.get_out_to_loss_grad, BatchTask.get_out_to_loss_grad) and (
        "get_out_to_loss_grad" not in getattr(task, "__dict__", {})
    )


def copy_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors, which a model may then change."""
    return [tensor.clone() for tensor in tensors]


def copy_buffers(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies buffers, so that a forward pass that changes them leaves nothing behind for the next."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` into evaluation mode, and each of its modules back into its own mode at the end.

    `training` is set and neither `eval` nor `train` called, as some models override these to change weights: layers of
    low rank (LoRA) that merge their factors, for example.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


_OF_TORCH = vars(nn.Module()).keys() - {"_buffers"}
"""Attributes that every module has, and that torch looks after."""

_CONTAINERS = (dict, list, set, OrderedDict)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of a model's modules back at the end: caches, counters, states, tables that have grown.

    Containers are put back entry by entry. Tensors that are no buffers are replaced by copies meanwhile.
    """
    before = [(vars(module), vars(module).copy()) for module in model.modules()]
    contents: list[tuple[Any, Any]] = []
    copies: dict[int, Tensor] = {}
    for now, attributes in before:
        for name in attributes.keys() - _OF_TORCH:
            value = attributes[name]
            if type(value) in _CONTAINERS:
                contents.append((value, value.copy()))
            elif type(value) is Tensor:
                if id(value) not in copies:
                    copies[id(value)] = value.clone() if value.is_leaf else value
                now[name] = copies[id(value)]
    try:
        yield
    finally:
        for now, attributes in before:
            if now.keys() != attributes.keys():
                for name in now.keys() - attributes.keys():
                    del now[name]
            now.update(attributes)
        for container, content in contents:
            if isinstance(container, list):
                if len(container) != len(content) or any(x is not y for x, y in zip(container, content, strict=True)):
                    container[:] = content
            elif not _same_entries(container, content):
                container.clear()
                container.update(content)


def _same_entries(container: Any, content: Any) -> bool:
    """Tells if a dict has the very objects, or a set the entries, that another has."""
    if isinstance(container, set):
        return bool(container == content)
    return list(container) == list(content) and all(container[key] is content[key] for key in content)


def bind(model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Returns `model` as a function that uses other parameters and buffers.

    Parameters that are the model's own stay as they are: a sharded model gathers them in their places by itself.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: weight for name, weight in weights.items() if own.get(name) is not weight}
    return lambda *args, **kwargs: functional_call(model, (dict(weights), dict(buffers)), args, kwargs)


class BatchOutputs(Protocol):
    """A task that computes f of a whole batch at once, by which `HookGradientComputer` is faster."""

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sample of a batch; the arguments are those of `Task.get_out_to_loss_grad`.

        Returns:
            (B,).
        """


class PaddedBatches(Protocol):
    """A task whose samples are padded to the longest of a batch."""

    def clear_padding(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns a batch with nothing but zeros at the end for padding: a sample is the same however it is padded."""


class PaddedTexts(PaddedBatches, Protocol):
    """A task whose batches can be cut where only padding follows, which saves computing it."""

    def text_lengths(self, batch: Sequence[Tensor]) -> Tensor:
        """Counts the positions of each sample without the padding at its end, (B,) int64."""

    def without_spare_padding(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Returns a batch that is padded to its longest sample and no further."""


class NamedBatches(Protocol):
    """A task whose batches may be mappings (`batches.batch_tensors`), as those of tokenizers and collators are.

    Attributes:
        fields: Names of a batch's tensors, in the order in which the task takes them.
        optional_fields: Those of them that a batch may lack; a task without this attribute needs all.
    """

    fields: tuple[str, ...]
    optional_fields: tuple[str, ...]


class LossCurvature(Protocol):
    """A task that knows the curvature of its loss, by which `TRAKer` weighs training samples."""

    def get_loss_curvature(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Computes ∂²ℓ/∂f² of samples from their weightings Q, (n,) float64 each."""


class DrawnLabels(Protocol):
    """A task whose model says how likely each label is, so that it can draw some: gradients of these labels' losses
    have the Fisher matrix as their second moment."""

    def draw_labels(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Sequence[Tensor],
        uniform: Tensor,
    ) -> list[Tensor]:
        """Returns a batch like `batch` with labels drawn from the model; the arguments are those of `get_outputs`.

        Args:
            model: As in `Task.get_out_to_loss_grad`.
            weights: As in `Task.get_out_to_loss_grad`.
            buffers: As in `Task.get_out_to_loss_grad`.
            batch: As in `Task.get_out_to_loss_grad`.
            uniform: Random numbers in [0, 1), of the shape of the first tensor, by which labels are drawn: a sample's
                labels do not depend on the other samples of its batch.

        Returns:
            The tensors that the task asks for, (B, ...) each.
        """


class BatchTask(Task):
    """Base class for tasks that compute f of a whole batch at once (`BatchOutputs`)."""

    @abstractmethod
    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sample of a batch, (B,)."""

    def get_output(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *sample: Tensor
    ) -> Tensor:
        return self.get_outputs(model, weights, buffers, [x.unsqueeze(0) for x in sample]).squeeze(0)

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        with torch.no_grad(), restored(model):
            outputs = self.get_outputs(model, weights, copy_buffers(buffers), copy_tensors(batch))
        return self.get_weightings(outputs, batch)


class FunctionTask(Task):
    """A task made of plain functions."""

    def __init__(self, output: Callable[..., Tensor], loss: Callable[..., Tensor] | None = None) -> None:
        """Takes the functions.

        Args:
            output: f: `output(model, *sample)` returns a tensor of one element; it calls `model` as usual, with a batch
                of one sample.
            loss: `loss(output, *sample)` returns the training loss in terms of f, and autograd its derivative. By
                default the loss is −f.
        """
        self.output = output
        self._loss = loss
        self.name = f"{getattr(output, '__module__', '')}.{getattr(output, '__qualname__', type(output).__qualname__)}"

    def get_settings(self) -> Mapping[str, Any]:
        return {"output": self.output, "loss": self._loss}

    def get_output(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *sample: Tensor
    ) -> Tensor:
        output = self.output(bind(model, weights, buffers), *sample)
        if not isinstance(output, Tensor) or output.numel() != 1:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{self.name} must return a tensor of one element, not {shape}")
        return output.reshape(())

    @property
    def _has_loss(self) -> bool:
        return self._loss is not None

    def loss(self, output: Tensor, *sample: Tensor) -> Tensor:
        return -output if self._loss is None else self._loss(output, *sample)
