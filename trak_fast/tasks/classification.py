"""The tasks of classification, and of image classification."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import BatchTask, bind
from .checks import described, tensor_of, within


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes log p/(1 − p) of the labelled class, p by softmax: its logit minus the logsumexp of the others.

    p itself is never formed, so the margin keeps its relative accuracy where p rounds to 0 or to 1.

    Args:
        logits: (B, C), floating point, C ≥ 2.
        labels: (B,), integers in [0, C).

    Returns:
        (B,), float32, or float64 where `logits` is.

    Raises:
        ValueError: `logits` or `labels` has another shape, or a label is out of range, also under vmap.
        TypeError: `labels` holds no integers, or `logits` is no tensor of floating-point numbers.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        given = logits.dtype if isinstance(logits, Tensor) else described(logits)
        raise TypeError(f"logits must be a tensor of floating-point numbers, not {given}")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model must return logits of shape (B, C) with C >= 2, not {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape (B,), one for each sample, not {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)}"
        )
    classes = logits.shape[1]
    index = within("labels", labels, 0, classes - 1, f"as the model has {classes} classes").unsqueeze(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return logits.gather(-1, index).squeeze(-1) - others


class Classification(BatchTask):
    """Classification with f = log p/(1 − p) and the cross-entropy loss −log p, so −∂ℓ/∂f = 1 − p (section 3.3)."""

    @abstractmethod
    def logits(self, model: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """Calls `model` with `inputs`, the batch without its labels; returns logits (B, C) or an object with them."""

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sample of a batch, (B,)."""
        *inputs, labels = batch
        output = self.logits(bind(model, weights, buffers), inputs)
        return margin(tensor_of(output, "logits (B, C), or an object that has them"), labels)

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Computes Q = 1 − p = σ(−f) of each sample, (B,), without cancellation where p is close to 1."""
        return torch.sigmoid(-outputs)

    def get_loss_curvature(self, weights: Any) -> Any:
        """Computes ∂²ℓ/∂f² = p (1 − p) of samples from their weightings Q = 1 − p, tensors or arrays of any shape."""
        return weights * (1 - weights)


class ImageClassification(Classification):
    """Batches are (images, labels); the model takes the images and returns the logits.

    By name the images are `pixel_values`, as in batches of transformers.
    """

    fields = ("pixel_values", "labels")

    def logits(self, model: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        return model(*inputs)


class IterativeImageClassification(ImageClassification):
    """Image classification for gradient computers that give batches and no weights, as traker's iterative one does."""

    def get_output(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor] | None,
        buffers: Mapping[str, Tensor] | None,
        *sample: Tensor,
    ) -> Tensor:
        if weights is None:
            return self.get_outputs(model, {}, {}, sample)
        return super().get_output(model, weights, buffers or {}, *sample)

    def get_out_to_loss_grad(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor] | None,
        buffers: Mapping[str, Tensor] | None,
        batch: Sequence[Tensor],
    ) -> Tensor:
        return super().get_out_to_loss_grad(model, weights or {}, buffers or {}, batch)
