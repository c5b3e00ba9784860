"""Model output functions f and their loss terms Q (Park et al., "TRAK: Attributing Model Behavior at Scale",
ICML 2023, sections 2 and 3).

A task says which scalar f(z, θ) of a model is attributed, and how the loss depends on it. The methods have the
names and signatures of traker's, so tasks written for traker work here as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Task(ABC):
    """Base class for own tasks. `weights` and `buffers` map the names of `model`'s to the tensors to use instead."""

    @abstractmethod
    def get_output(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *sample: Tensor
    ) -> Tensor:
        """The model output f(z, θ) of one sample, which torch.func differentiates with respect to `weights`.

        Args:
            model: The module to call, with `torch.func.functional_call`.
            weights: Parameters, by name.
            buffers: Buffers, by name.
            *sample: The sample's tensors, without the batch dimension.

        Returns:
            A tensor with one element and no dimensions.
        """

    @abstractmethod
    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """The weighting Q of each sample: the magnitude of the derivative of its loss with respect to f.

        Args:
            model: The module to call, with `torch.func.functional_call`.
            weights: Parameters, by name.
            buffers: Buffers, by name.
            batch: The batch's tensors, (B, ...) each.

        Returns:
            (B,) or (B, 1).
        """


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log p/(1 − p) of the labelled class, p by softmax: its logit minus the logsumexp of the others.

    p itself is never formed, so the margin keeps its relative accuracy where p rounds to 0 or to 1.

    Args:
        logits: (B, C), floating point, C ≥ 2.
        labels: (B,), integers in [0, C).

    Returns:
        (B,), float32, or float64 where `logits` is.

    Raises:
        ValueError: `logits` has another shape.
        TypeError: `labels` holds no integers.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model must return logits of shape (B, C) with C >= 2, not {tuple(logits.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, not {labels.dtype}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = labels.long().unsqueeze(-1)
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return logits.gather(-1, index).squeeze(-1) - others


class _Classification(Task):
    """f = log p/(1 − p) with the cross-entropy loss −log p, so |∂ℓ/∂f| = 1 − p (section 3.3 of the paper)."""

    @abstractmethod
    def logits(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Sequence[Tensor]
    ) -> Any:
        """What `model` returns for `inputs`, the batch without its labels."""

    def _margins(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        *inputs, labels = batch
        output = self.logits(model, weights, buffers, inputs)
        return margin(getattr(output, "logits", output), labels)

    def get_output(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *sample: Tensor
    ) -> Tensor:
        return self._margins(model, weights, buffers, [x.unsqueeze(0) for x in sample]).squeeze(0)

    @torch.no_grad()
    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        # 1 − p = σ(−f), which has no cancellation where p is close to 1
        return torch.sigmoid(-self._margins(model, weights, buffers, batch))

    def get_loss_curvature(self, weights: Any) -> Any:
        """∂²ℓ/∂f² of each sample, p (1 − p), from its weighting Q = 1 − p; tensors and arrays of any shape."""
        return weights * (1 - weights)


class ImageClassification(_Classification):
    """Batches are (images, labels); the model takes the images and returns the logits."""

    def logits(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Sequence[Tensor]
    ) -> Any:
        return functional_call(model, (dict(weights), dict(buffers)), tuple(inputs))


class TextClassification(_Classification):
    """Batches are (input_ids, token_type_ids, attention_mask, labels), as Hugging Face's sequence classifiers take.

    The model is called with the first three as keyword arguments; it returns the logits or an object that has them.
    """

    inputs = ("input_ids", "token_type_ids", "attention_mask")

    def logits(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Sequence[Tensor]
    ) -> Any:
        if len(inputs) != len(self.inputs):
            raise ValueError(
                f"text_classification: a batch is ({', '.join(self.inputs)}, labels), {len(self.inputs) + 1} "
                f"tensors, not {len(inputs) + 1}"
            )
        return functional_call(model, (dict(weights), dict(buffers)), (), dict(zip(self.inputs, inputs, strict=True)))


TASKS: dict[str, type[Task]] = {"image_classification": ImageClassification, "text_classification": TextClassification}


def resolve_task(task: str | Task) -> Task:
    """The task of that name, or `task` itself where it already has a task's methods.

    Raises:
        ValueError: No task has that name.
        TypeError: `task` is neither a name nor an object with a task's methods.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, or a Task, not {task!r}")
        return TASKS[task]()
    if isinstance(task, type) or not (hasattr(task, "get_output") and hasattr(task, "get_out_to_loss_grad")):
        raise TypeError(f"task must be a name or an instance with get_output and get_out_to_loss_grad, not {task!r}")
    return task
