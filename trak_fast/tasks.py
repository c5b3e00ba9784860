"""The tasks that have names, and those of images and of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .task import BatchTask, Classification, FunctionTask, Task, bind, margin
from .tasks_clip import CLIP
from .tasks_text import CausalLM, CausalLMPerToken, MaskedLM, MaskedLMPerToken, TextClassification

__all__ = [
    "CLIP",
    "TASKS",
    "CausalLM",
    "CausalLMPerToken",
    "Classification",
    "FunctionTask",
    "ImageClassification",
    "IterativeImageClassification",
    "MaskedLM",
    "MaskedLMPerToken",
    "Regression",
    "Task",
    "TextClassification",
    "margin",
    "resolve_task",
]


class ImageClassification(Classification):
    """Batches are (images, labels); the model takes the images and returns the logits."""

    def logits(self, model: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        return model(*inputs)


class IterativeImageClassification(ImageClassification):
    """The same for gradient computers that, as traker's iterative one, ask for f of a whole batch without weights."""

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


class Regression(BatchTask):
    """Batches are (inputs, values); the model returns one number a sample, (B,) or (B, 1).

    f is that number and the loss (f − y)²/2, so Q = y − f. A positive score says that the training sample raises the
    target's number.
    """

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """f of each sample of a batch, (B,)."""
        output: Tensor = bind(model, weights, buffers)(*batch[:-1])
        if output.shape not in ((len(batch[0]),), (len(batch[0]), 1)):
            raise ValueError(
                f"regression: the model must return one number a sample, (B,) or (B, 1), not {tuple(output.shape)}; "
                "with more, say which by an own function as the task"
            )
        return output.reshape(-1)

    @torch.no_grad()
    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        output = self.get_outputs(model, weights, buffers, batch)
        return batch[-1].reshape(output.shape) - output


TASKS: dict[str, type[Task]] = {
    "image_classification": ImageClassification,
    "iterative_image_classification": IterativeImageClassification,
    "text_classification": TextClassification,
    "regression": Regression,
    "clip": CLIP,
    "causal_lm": CausalLM,
    "causal_lm_per_token": CausalLMPerToken,
    "masked_lm": MaskedLM,
    "masked_lm_per_token": MaskedLMPerToken,
}


def resolve_task(task: str | Task | Callable[..., Tensor]) -> Task:
    """The task of that name, one made of a plain function, or `task` itself where it has a task's methods.

    Raises:
        ValueError: No task has that name.
        TypeError: `task` is neither a name, nor a function, nor an object with a task's methods.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, a Task or a function, not {task!r}")
        return TASKS[task]()
    if not isinstance(task, type):
        if hasattr(task, "get_output") and hasattr(task, "get_out_to_loss_grad"):
            return task  # type: ignore[return-value]  # one written for traker
        if callable(task):
            return FunctionTask(task)
    raise TypeError(
        "task must be a name, a function of (model, *sample), or an instance with get_output and "
        f"get_out_to_loss_grad, not {task!r}"
    )
