"""The tasks of the methods: those of TRAK, and the same without weights, for methods that compare gradients alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..tasks import Task
from ..tasks.text import CausalLM, MaskedLM, TextClassification


class _Unweighted:
    """Has samples weigh alike."""

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Returns ones, (B,)."""
        return torch.ones_like(outputs)


class UnweightedCausalLM(_Unweighted, CausalLM):
    """Causal language modelling whose samples weigh alike: cosines of the gradients of f are those of the losses'."""


class UnweightedMaskedLM(_Unweighted, MaskedLM):
    """Masked language modelling whose samples weigh alike."""


class UnweightedTextClassification(_Unweighted, TextClassification):
    """Text classification whose samples weigh alike."""


WEIGHTED: dict[str, Callable[[], Task]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "text_classification": TextClassification,
}
"""Tasks whose samples weigh Q = 1 − p, by which the gradient of f becomes that of the loss."""

UNWEIGHTED: dict[str, Callable[[], Task]] = {
    "causal_lm": UnweightedCausalLM,
    "masked_lm": UnweightedMaskedLM,
    "text_classification": UnweightedTextClassification,
}
"""Tasks whose samples weigh alike."""


def task_of(name: str, method: str) -> Task:
    """Returns the task of a method.

    "dot" multiplies gradients of losses, and "trak" weighs the samples of classifications as TRAK does (Park et al.,
    2023, section 3.2). For language models "trak" does not: with 1 − p documents that are known by heart would count
    for nothing, just those that taught the model its answer. "cosine" has no weights, and steps of Adam none to lose.
    """
    is_weighted = method in ("dot", "less") or (method == "trak" and name == "text_classification")
    return (WEIGHTED if is_weighted else UNWEIGHTED)[name]()
