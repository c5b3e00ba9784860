"""The contract of gradient computers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..tasks.base import Task


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
