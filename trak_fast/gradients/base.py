"""The contract of gradient computers, and the constructor that those of this package share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..tasks.base import Task, copy_buffers, copy_tensors, restored, weighs_by_outputs
from .modes import CheckpointInputs, autocast_dtype, differentiable
from .parameters import select_parameters
from .repeatable import GRADIENT_ROUNDINGS, OUTPUT_ROUNDINGS, RandomWatch, generators_of, require_same, tolerance_of

logger = logging.getLogger("trak_fast")


class LossGradientComputer(Protocol):
    """The weightings of samples by the weights of one checkpoint."""

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, which has the next checkpoint's weights."""

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample (`Task.get_out_to_loss_grad`), (B,) or (B, 1)."""


class GradientComputer(LossGradientComputer, Protocol):
    """The gradients of samples; `TRAKer(gradient_computer=...)` takes a class that has this constructor and methods.

    `FunctionalGradientComputer` and `HookGradientComputer` are such classes. Others need not inherit from this one.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        grad_wrt: Iterable[str] | None = None,
    ) -> None:
        """Takes the parameters of `model` as they are now. The driver gives all arguments, by name.

        Args:
            model: The module to differentiate.
            task: The model output function.
            grad_dim: Size of a sample's gradient, D.
            dtype: The dtype of the first parameter to differentiate with respect to.
            device: The device of the parameters.
            grad_wrt: Names or patterns of the parameters to differentiate with respect to; None: those that require
                gradients.
        """

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> Mapping[str, Tensor] | Tensor:
        """Computes the gradient of each sample's model output.

        Args:
            batch: The batch's tensors, (B, ...) each, on the model's device.

        Returns:
            (B, *shape) for each selected parameter, in the model's order; or (B, D), these flattened side by side.
        """


class Contents:
    """Tensors, with the numbers that autograd gave their contents: a number grows with each change in place."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Notes the numbers as they are now; inference tensors have none."""
        self._numbered = [(tensor, -1 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def same_as(self, other: Contents) -> bool:
        """Tells if the other ones are the very tensors, and had the same contents."""
        return len(self._numbered) == len(other._numbered) and all(
            own is another and number == others_number
            for (own, number), (another, others_number) in zip(self._numbered, other._numbered, strict=True)
        )


@dataclass(frozen=True)
class _Evaluation:
    """The outputs of the last batch, from which its weightings follow.

    Attributes:
        outputs: f of each sample, (B,), detached.
        made_from: The batch's tensors and the parameters.
    """

    outputs: Tensor
    made_from: Contents


class ParameterGradients(ABC):
    """Base class of the gradient computers here: holds the task, the choice of parameters and the last outputs.

    Attributes:
        model: The model.
        parameters: All of its parameters, by name.
        selected: Those that gradients are taken with respect to, in the model's order.
        buffers: The checkpoint's buffers, by name. Each evaluation of the model gets copies.
    """

    _fuses_attention = True  # False where vmap has to batch it

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        grad_wrt: Iterable[str] | None = None,
    ) -> None:
        """Takes the parameters of `model` as they are now.

        Args:
            model: The module to differentiate.
            task: The model output function.
            grad_dim: Has no effect; part of the contract of gradient computers, as are the next two.
            dtype: Has no effect: gradients have their parameter's dtype.
            device: Has no effect: gradients are where their parameter is.
            grad_wrt: Names or patterns of the parameters to differentiate with respect to; None: those that require
                gradients.

        Raises:
            TypeError: `grad_wrt` is a single string.
            ValueError: `grad_wrt` is empty, or one of its entries fits no parameter of `model`.
        """
        self.task = task
        self.grad_wrt = list(select_parameters(model, grad_wrt))
        self._weighs_alone = False  # True once a batch has changed a sample's Q
        self._choices = torch.Generator("cpu").manual_seed(0)  # leaves the caller's random numbers alone
        self.load_model_params(model)

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.selected = select_parameters(model, self.grad_wrt)
        self.buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
        self._generators = generators_of(model)
        self._checkpoint_inputs = CheckpointInputs(model)
        self._evaluation: _Evaluation | None = None
        self._is_first_batch = True

    def _compute(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes results of `_differentiate`, none of them random, and keeps f for `compute_loss_grad`.

        Args:
            batch: The batch's tensors, (B, ...) each, at least one sample. The model gets copies of them.

        Raises:
            RuntimeError: The model cannot be differentiated, or its outputs are random.
        """
        with differentiable(self.model, fused=self._fuses_attention):
            watch = RandomWatch(self._device, self._generators)
            results, outputs = self._differentiate(batch)
            if watch.drawn():
                again, others = self._differentiate(batch)
                require_same(outputs, others, self._output_tolerance)
                for name, value in results.items():
                    require_same(value, again[name], self._gradient_tolerance)
            elif self._is_first_batch:
                require_same(outputs, self._evaluate(batch), self._output_tolerance)
        self._is_first_batch = False
        self._evaluation = _Evaluation(outputs, self._contents(batch))
        return results

    @abstractmethod
    def _differentiate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Computes results that follow from gradients, (B, ...) by name, and f of each sample, (B,), detached."""

    @abstractmethod
    def _evaluate(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes f of each sample, (B,), detached, as `_differentiate` does."""

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample (`Task.get_out_to_loss_grad`), (B,) or (B, 1).

        Right after `compute_per_sample_grad` of the same batch this takes no forward pass, where Q follows from f.
        """
        evaluation = self._evaluation
        self._evaluation = None
        with differentiable(self.model, fused=self._fuses_attention):
            if not weighs_by_outputs(self.task):
                return self._own_weightings(batch)
            if evaluation is not None and evaluation.made_from.same_as(self._contents(batch)):
                outputs = evaluation.outputs
            else:
                outputs = self._evaluate(batch)
            return self.task.get_weightings(outputs, copy_tensors(batch)).detach()

    def _own_weightings(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes Q by a task's own `get_out_to_loss_grad`.

        One sample of each batch is computed alone too. If that gives another Q, all are from then on.
        """
        count = len(batch[0])
        if not self._weighs_alone:
            whole = self._ask_for_weightings(batch)
            if count == 1 or len(whole.shape) == 0 or len(whole) != count:  # the caller checks shapes
                return whole
            chosen = int(torch.randint(count, (), generator=self._choices, device="cpu"))
            alone = self._ask_for_weightings([x[chosen : chosen + 1] for x in batch])
            scale = self._output_tolerance * whole.detach().double().abs().max()
            if (alone.detach().double().reshape(-1) - whole[chosen].detach().double().reshape(-1)).abs().max() <= scale:
                return whole
            logger.warning(
                "%s.get_out_to_loss_grad gives samples other weightings in a batch than alone; "
                "each is computed alone from here on",
                type(self.task).__name__,
            )
            self._weighs_alone = True
        return torch.cat([self._ask_for_weightings([x[i : i + 1] for x in batch]) for i in range(count)])

    def _ask_for_weightings(self, batch: Sequence[Tensor]) -> Tensor:
        weights = self._constants()
        batch = copy_tensors(batch)
        with restored(self.model):
            return self.task.get_out_to_loss_grad(self.model, weights, copy_buffers(self.buffers), batch).detach()

    def _constants(self) -> dict[str, Tensor]:
        """Returns the parameters for a task that does not differentiate with respect to them."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _outputs(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes f of each sample of a batch, (B,); of one sample for a task that takes single ones."""
        batch = copy_tensors(batch)
        buffers = copy_buffers(self.buffers)
        if hasattr(self.task, "get_outputs"):
            with restored(self.model):
                outputs: Tensor = self.task.get_outputs(self.model, self.parameters, buffers, batch)
            if outputs.numel() != len(batch[0]):
                raise ValueError(
                    f"{type(self.task).__name__}.get_outputs must return ({len(batch[0])},), one number a sample, "
                    f"not {tuple(outputs.shape)}"
                )
            return outputs.reshape(-1)
        with restored(self.model):
            return self.task.get_output(self.model, self.parameters, buffers, *[x[0] for x in batch]).reshape(1)

    def _outputs_alone(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes f of each sample in a batch of one, (B,), detached."""
        return torch.cat([self._outputs(sample).detach() for sample in singles_of(batch, self.task)])

    def _contents(self, batch: Sequence[Tensor]) -> Contents:
        """Notes the contents that outputs are made from."""
        return Contents([*batch, *self.parameters.values()])

    @property
    def _device(self) -> torch.device:
        return next(iter(self.selected.values())).device

    @property
    def _dtypes(self) -> set[torch.dtype]:
        """The dtypes that the model computes in."""
        dtypes = {p.dtype for p in self.parameters.values() if p.is_floating_point()}
        reduced = autocast_dtype(self._device.type)
        return dtypes if reduced is None else dtypes | {reduced}

    @property
    def _output_tolerance(self) -> float:
        return tolerance_of(OUTPUT_ROUNDINGS, self._dtypes)

    @property
    def _gradient_tolerance(self) -> float:
        return tolerance_of(GRADIENT_ROUNDINGS, self._dtypes)


def description_of(computer: object) -> dict[str, str | None]:
    """Describes the way to gradients for the manifest of the features that are made from them.

    The computers of this package give the same gradients up to rounding, so their features go together; those of others
    are known by their class.
    """
    if hasattr(computer, "describe"):
        described: dict[str, str | None] = computer.describe()
        return described
    exact = type(computer).__module__.startswith(f"{__name__.partition('.')[0]}.")
    name = "exact" if exact else type(computer).__qualname__
    return {"gradient_computer": name, "sketch": "full", "preconditioner": None}


class WholeGradients(ParameterGradients):
    """Base class of the computers whose results are the gradients themselves."""

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes the gradient of each sample's model output.

        Args:
            batch: The batch's tensors, (B, ...) each. The model gets copies of them.

        Returns:
            For each selected parameter, in the model's order, (B, *shape) in its dtype, detached.

        Raises:
            RuntimeError: The model cannot be differentiated, or its outputs are random.
        """
        if not len(batch[0]):
            return {name: p.detach().new_zeros(0, *p.shape) for name, p in self.selected.items()}
        return self._compute(batch)


def singles_of(batch: Sequence[Tensor], task: object) -> Iterator[list[Tensor]]:
    """Yields the samples of a batch as batches of one, without padding where the task knows it (`PaddedTexts`)."""
    for i in range(len(batch[0])):
        single = [x[i : i + 1] for x in batch]
        yield task.without_spare_padding(single) if hasattr(task, "without_spare_padding") else single
