"""The tasks of classification, and of image classification."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import BatchTask, bind


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes log p/(1 − p) of the labelled class, p by softmax: its logit minus the logsumexp of the others.

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
        return margin(getattr(output, "logits", output), labels)

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Computes Q = 1 − p = σ(−f) of each sample, (B,), without cancellation where p is close to 1."""
        return torch.sigmoid(-outputs)

    def get_loss_curvature(self, weights: Any) -> Any:
        """Computes ∂²ℓ/∂f² = p (1 − p) of samples from their weightings Q = 1 − p, tensors or arrays of any shape."""
        return weights * (1 - weights)


class ImageClassification(Classification):
    """Batches are (images, labels); the model takes the images and returns the logits."""

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
