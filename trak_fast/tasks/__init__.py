"""Tasks: the scalar f of a model that is attributed, and the weighting Q that follows from its loss."""

from .base import BatchOutputs, BatchTask, FunctionTask, LossCurvature, PaddedBatches, Task, bind
from .classification import Classification, ImageClassification, IterativeImageClassification, margin
from .clip import CLIP
from .registry import TASKS, resolve_task
from .regression import Regression
from .text import CausalLM, CausalLMPerToken, MaskedLM, MaskedLMPerToken, TextClassification

__all__ = [
    "CLIP",
    "TASKS",
    "BatchOutputs",
    "BatchTask",
    "CausalLM",
    "CausalLMPerToken",
    "Classification",
    "FunctionTask",
    "ImageClassification",
    "IterativeImageClassification",
    "LossCurvature",
    "MaskedLM",
    "MaskedLMPerToken",
    "PaddedBatches",
    "Regression",
    "Task",
    "TextClassification",
    "bind",
    "margin",
    "resolve_task",
]
