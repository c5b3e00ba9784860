"""The tasks of the methods: those of TRAK, and the same without weights, for methods that compare gradients alone."""

from __future__ import annotations

from collections.abc import Sequence

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


_BY_METHOD: dict[bool, dict[str, type[Task]]] = {
    True: {"causal_lm": CausalLM, "masked_lm": MaskedLM, "text_classification": TextClassification},
    False: {
        "causal_lm": UnweightedCausalLM,
        "masked_lm": UnweightedMaskedLM,
        "text_classification": UnweightedTextClassification,
    },
}


def task_of(name: str, method: str) -> Task:
    """Returns the task of a method: weighted for "trak", "dot" and "less", else unweighted."""
    return _BY_METHOD[method != "cosine"][name]()
