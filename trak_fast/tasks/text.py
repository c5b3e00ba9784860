"""Tasks of text models: classification, masked and causal language modelling.

Models are called as those of Hugging Face's transformers are: with keyword arguments. They return logits or an object
that has them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BatchTask, bind
from .checks import tensor_of, within
from .classification import Classification, margin

IGNORED = -100
"""Label of positions that are not predicted."""


class TextClassification(Classification):
    """Text classification: batches are (input_ids, token_type_ids, attention_mask, labels).

    The model is called with the first three as keyword arguments, as Hugging Face's sequence classifiers are, and
    returns the logits or an object that has them.
    """

    inputs = ("input_ids", "token_type_ids", "attention_mask")

    def logits(self, model: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        if len(inputs) != len(self.inputs):
            raise ValueError(
                f"text_classification: batch must be ({', '.join(self.inputs)}, labels), {len(self.inputs) + 1} "
                f"tensors, not {len(inputs) + 1}"
            )
        return model(**dict(zip(self.inputs, inputs, strict=True)))

    def clear_padding(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns a batch whose texts begin at the front, with 0 after them, as its attention_mask says."""
        place = self.inputs.index("attention_mask")
        return without_padding(batch, batch[place]) if len(batch) > place else batch


def without_padding(batch: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """Moves what `mask` (B, T) keeps to the front, and sets the rest to 0, in each tensor of its shape."""
    kept = mask.bool()
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    return [torch.where(kept, x, torch.zeros_like(x)).gather(1, order) if x.shape == mask.shape else x for x in batch]


class LanguageModelling(BatchTask):
    """Base class for masked and causal language modelling: a model predicts tokens, each by a classification.

    The model is called with `input_ids` and `attention_mask` and returns logits (B, T, V), V the vocabulary's size. For
    a sequence, p is the geometric mean of its predicted tokens' probabilities: the loss is −log p, the tokens' mean
    cross-entropy, f = log p/(1 − p), and Q = 1 − p. With one predicted token this is a classification.
    """

    fields: tuple[str, ...]

    @abstractmethod
    def predicted(self, logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Picks logits (B, T', V) and the tokens that they should predict, (B, T'), IGNORED where there is none."""

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sequence of a batch, (B,)."""
        if len(batch) != len(self.fields):
            raise ValueError(
                f"{type(self).__name__}: batch must be ({', '.join(self.fields)}), {len(self.fields)} tensors, "
                f"not {len(batch)}"
            )
        output = bind(model, weights, buffers)(input_ids=batch[0], attention_mask=batch[1])
        logits, labels = self.predicted(_checked_logits(output, batch[0]), batch)
        counted = labels != IGNORED
        margins = margin(logits.flatten(0, 1), torch.where(counted, labels, 0).flatten()).view(labels.shape)
        # −log p, with its relative accuracy where p is close to 1
        losses = (F.softplus(-margins) * counted).sum(1) / counted.sum(1).clamp(min=1)
        losses = losses.clamp(min=torch.finfo(losses.dtype).tiny)  # 0 where a sequence has no predicted tokens
        return -losses - torch.log(-torch.expm1(-losses))

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Computes Q = 1 − p = σ(−f) of each sequence, (B,); 0 for one without predicted tokens, whose f is largest."""
        largest = -math.log(torch.finfo(outputs.dtype).tiny)
        return torch.where(outputs < largest * (1 - 1e-6), torch.sigmoid(-outputs), 0)

    def clear_padding(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns a batch whose texts begin at the front, with 0 after them, as its attention_mask says."""
        place = self.fields.index("attention_mask")
        return without_padding(batch, batch[place]) if len(batch) > place else batch


class CausalLM(LanguageModelling):
    """Causal language modelling: batches are (input_ids, attention_mask).

    Each token but the first is predicted from those before it.
    """

    fields = ("input_ids", "attention_mask")

    def predicted(self, logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        tokens = batch[0]
        mask = batch[1].bool()
        return logits[:, :-1], torch.where(mask[:, 1:] & mask[:, :-1], tokens[:, 1:], IGNORED)


class CausalLMPerToken(LanguageModelling):
    """Causal language modelling of single tokens: batches are (input_ids, attention_mask, position).

    A sample is the token at `position` (B,) ≥ 1 of a sequence.
    """

    fields = ("input_ids", "attention_mask", "position")

    def predicted(self, logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        position = _checked_positions(batch[2], 1, batch[0])
        return _at(logits, position - 1), batch[0].gather(1, position.unsqueeze(1))


class MaskedLM(LanguageModelling):
    """Masked language modelling: batches are (input_ids, attention_mask, labels).

    The labels are the tokens that were masked, and −100 elsewhere.
    """

    fields = ("input_ids", "attention_mask", "labels")

    def predicted(self, logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return logits, batch[2]


class MaskedLMPerToken(LanguageModelling):
    """Masked language modelling of single tokens: batches are (input_ids, attention_mask, labels, position).

    A sample is the token at `position` (B,) of a sequence.
    """

    fields = ("input_ids", "attention_mask", "labels", "position")

    def predicted(self, logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        position = _checked_positions(batch[3], 0, batch[0])
        return _at(logits, position), batch[2].gather(1, position.unsqueeze(1))


def _checked_logits(output: object, tokens: Tensor) -> Tensor:
    """Returns the logits (B, T, V) in what a model returned for tokens (B, T)."""
    logits = tensor_of(output, "logits (B, T, V), or an object that has them")
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"the model must return logits of shape (B, T, V), one row for each of the {tuple(tokens.shape)} tokens, "
            f"not {tuple(logits.shape)}"
        )
    return logits


def _checked_positions(positions: Tensor, low: int, tokens: Tensor) -> Tensor:
    """Returns positions (B,) in sequences (B, T), once all are in [low, T)."""
    length = tokens.shape[1]
    return within("position", positions, low, length - 1, f"as the sequences have {length} tokens")


def _at(logits: Tensor, positions: Tensor) -> Tensor:
    """Picks the logits (B, 1, V) at one position of each sequence."""
    return logits.gather(1, positions[:, None, None].expand(-1, 1, logits.shape[2]))
