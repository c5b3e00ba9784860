"""The tasks that have names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .base import FunctionTask, Task
from .classification import ImageClassification, IterativeImageClassification
from .clip import CLIP
from .regression import Regression
from .text import CausalLM, CausalLMPerToken, MaskedLM, MaskedLMPerToken, Seq2SeqLM, TextClassification

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
    "seq2seq_lm": Seq2SeqLM,
}


def resolve_task(task: str | Task | Callable[..., Tensor]) -> Task:
    """Returns the task of a name, a task made of a plain function, or `task` itself if it has a task's methods.

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
