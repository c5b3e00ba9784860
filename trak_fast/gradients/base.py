"""The contract of gradient computers, and the constructor that those of this package share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..tasks.base import Task
from .parameters import select_parameters


class GradientComputer(Protocol):
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
            grad_wrt: Names or patterns of the parameters to differentiate with respect to; None: all.
        """

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, which has the next checkpoint's weights."""

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> Mapping[str, Tensor] | Tensor:
        """Computes the gradient of each sample's model output.

        Args:
            batch: The batch's tensors, (B, ...) each, on the model's device.

        Returns:
            (B, *shape) for each selected parameter, in the model's order; or (B, D), these flattened side by side.
        """

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample (`Task.get_out_to_loss_grad`), (B,) or (B, 1)."""


class ParameterGradients(ABC):
    """Base class of the gradient computers here: holds the task and the choice of parameters."""

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
            grad_wrt: Names or patterns of the parameters to differentiate with respect to; None: all.

        Raises:
            TypeError: `grad_wrt` is a single string.
            ValueError: `grad_wrt` is empty, or one of its entries fits no parameter of `model`.
        """
        self.task = task
        self.grad_wrt = None if grad_wrt is None else list(select_parameters(model, grad_wrt))
        self.load_model_params(model)

    @abstractmethod
    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
