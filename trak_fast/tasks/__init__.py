"""Tasks: the scalar f of a model that is attributed, and the weighting Q that follows from its loss."""

from .base import BatchOutputs, BatchTask, FunctionTask, LossCurvature, NamedBatches, PaddedBatches, Task, bind
from .batches import Batch, NamedTensors, batch_tensors
from .classification import Classification, ImageClassification, IterativeImageClassification, margin
from .clip import CLIP
from .registry import TASKS, resolve_task
from .regression import Regression
from .text import CausalLM, CausalLMPerToken, MaskedLM, MaskedLMPerToken, Seq2SeqLM, TextClassification

__all__ = [
    "CLIP",
    "TASKS",
    "Batch",
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
    "NamedBatches",
    "NamedTensors",
    "PaddedBatches",
    "Regression",
    "Seq2SeqLM",
    "Task",
    "TextClassification",
    "batch_tensors",
    "bind",
    "margin",
    "resolve_task",
]
