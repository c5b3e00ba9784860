"""Tasks of text models: classification, masked, causal and sequence-to-sequence language modelling.

Models are called as those of Hugging Face's transformers are: with keyword arguments. They return logits or an object
that has them. Texts may be padded on either side: all are moved to the front before the model sees them, as many models
count positions from there.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BatchTask, bind
from .batches import by_name
from .checks import tensor_of, within
from .classification import Classification
from .padding import leading, lengths_of, moved_to_front, without_padding
from .tokens import IGNORED, token_losses

logger = logging.getLogger("trak_fast")


class _Texts:
    """Base class for tasks whose batches have texts, `input_ids` and `attention_mask` (B, T) among their fields."""

    fields: tuple[str, ...]
    optional_fields: tuple[str, ...] = ()

    def clear_padding(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns a batch whose texts begin at the front, with 0 after them, as its attention_mask says."""
        return list(self._cleared(self._at_front(by_name(batch, self))).values()) if len(batch) else batch

    def text_lengths(self, batch: Sequence[Tensor]) -> Tensor:
        """Counts the positions of each text up to its last that is no padding, (B,) int64."""
        return self._lengths(self._at_front(by_name(batch, self)))

    def _lengths(self, named: Mapping[str, Tensor]) -> Tensor:
        mask = named["attention_mask"]
        if mask.ndim != 2:
            return torch.full((len(mask),), named["input_ids"].shape[1])
        return lengths_of(mask == 0)

    def without_spare_padding(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Returns a batch whose texts begin at the front, cut after the longest of them."""
        named = self._at_front(by_name(batch, self))
        shape = named["input_ids"].shape
        longest = max(1, int(self._lengths(named).max()))
        return [x[:, :longest] if x.shape == shape else x for x in named.values()]

    def _cleared(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sets padding to 0 and moves all of it to the end."""
        mask = named["attention_mask"]
        return dict(zip(named, without_padding(list(named.values()), mask), strict=True)) if mask.ndim == 2 else named

    def _at_front(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves leading padding of `attention_mask` to the end, in all that has the mask's shape; shifts `position`."""
        mask = named["attention_mask"]
        tokens = named["input_ids"]
        if mask.ndim != 2 or tokens.ndim != 2:
            return dict(named)
        if mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(tokens.shape)}, not {tuple(mask.shape)}"
            )
        count = leading(mask == 0)
        moved = {name: moved_to_front(x, count) if x.shape == mask.shape else x for name, x in named.items()}
        if "position" in moved:
            moved["position"] = moved["position"] - count
        return moved


class TextClassification(_Texts, Classification):
    """Text classification: batches are (input_ids, token_type_ids, attention_mask, labels).

    The model is called with all but the labels as keyword arguments, as Hugging Face's sequence classifiers are, and
    returns the logits or an object that has them. Batches may lack token_type_ids, which many models do not take.
    """

    fields = ("input_ids", "token_type_ids", "attention_mask", "labels")
    optional_fields = ("token_type_ids",)

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sample of a batch, (B,)."""
        named = self._at_front(by_name(batch, self))
        return super().get_outputs(model, weights, buffers, list(named.values()))

    def logits(self, model: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        *names, _ = by_name([*inputs, inputs[0]], self)
        return model(**dict(zip(names, inputs, strict=True)))


class LanguageModelling(_Texts, BatchTask):
    """Base class for language modelling: a model predicts tokens, each by a classification.

    The model is called with `input_ids` and `attention_mask` and returns logits (B, T, V), V the vocabulary's size. For
    a sequence, p is the geometric mean of its predicted tokens' probabilities: the loss is −log p, the tokens' mean
    cross-entropy, f = log p/(1 − p), and Q = 1 − p. With one predicted token this is a classification.
    """

    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    _warned = False  # True once it was said that samples have no predicted tokens

    def _refuse_other_kinds(self, model: nn.Module) -> None:
        """Refuses a model of transformers that encodes and decodes where the task is for others, or the reverse.

        Raises:
            ValueError: So it is.
        """
        takes_both = isinstance(self, Seq2SeqLM)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", takes_both) is not takes_both:
            wanted, other = ("", "no ") if takes_both else ("no ", "")
            fix = "take another task" if takes_both else 'task="seq2seq_lm" takes it'
            raise ValueError(
                f"model must be {wanted}encoder-decoder for {type(self).__name__}, and its config says that it is "
                f"{other}one; {fix}"
            )

    @abstractmethod
    def labels(self, named: Mapping[str, Tensor]) -> Tensor:
        """Returns the token that the logits at each position should predict, IGNORED where there is none.

        Args:
            named: The batch's tensors by name; texts begin at the front.

        Returns:
            (B, T) integers.
        """

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sequence of a batch, (B,)."""
        named = self._at_front(by_name(batch, self))
        labels = self.labels(named)
        self._refuse_other_kinds(model)
        output = bind(model, weights, buffers)(**{name: named[name] for name in self.inputs})
        # −log p, with its relative accuracy where p is close to 1
        losses = token_losses(_checked_logits(output, labels.shape), labels)
        losses = losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
        losses = losses.clamp(min=torch.finfo(losses.dtype).tiny)  # 0 where a sequence has no predicted tokens
        return -losses - torch.log(-torch.expm1(-losses))

    def get_weightings(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Computes Q = 1 − p = σ(−f) of each sequence, (B,); 0 for one without predicted tokens, whose f is largest.

        The first batch with such sequences is logged.
        """
        if not self._warned:
            empty = (self.labels(self._at_front(by_name(batch, self))) == IGNORED).all(1)
            if empty.any():
                self._warned = True
                logger.warning(
                    "some samples have no predicted token (too short, or all labels -100): their gradient and Q are 0, "
                    "and so are all scores of them; this is said once"
                )
        largest = -math.log(torch.finfo(outputs.dtype).tiny)
        return torch.where(outputs < largest * (1 - 1e-6), torch.sigmoid(-outputs), 0)


class _LabelsAside(LanguageModelling):
    """Base class for language modelling whose labels the model does not see, so that it can draw others."""

    fields = ("input_ids", "attention_mask", "labels")

    def draw_labels(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Sequence[Tensor],
        uniform: Tensor,
    ) -> list[Tensor]:
        """Returns a batch with labels that the model draws for each token that is predicted (`DrawnLabels`).

        Raises:
            ValueError: `labels`, in a class that has its own, does not give those of the batch.
        """
        named = self._at_front(by_name(batch, self))
        labels = self.labels(named)
        self._refuse_other_kinds(model)
        with torch.no_grad():
            output = bind(model, weights, buffers)(**{name: named[name] for name in self.inputs})
            sums = _checked_logits(output, labels.shape).float().softmax(2).cumsum(2)
        numbers = uniform[:, : labels.shape[1]].to(sums).unsqueeze(2)
        drawn = torch.searchsorted(sums, numbers * sums[:, :, -1:]).squeeze(2).clamp(max=sums.shape[2] - 1)
        drawn = torch.where(labels == IGNORED, IGNORED, drawn)
        result = [named["input_ids"], named["attention_mask"], self._labels_of(drawn)]
        if not torch.equal(self.labels(self._at_front(by_name(result, self))), drawn):
            raise ValueError(
                f"{type(self).__name__}.labels must give the labels of a batch for a metric, which needs drawn ones; "
                "metric=None does without"
            )
        return result

    def _labels_of(self, drawn: Tensor) -> Tensor:
        """Returns the labels of a batch (B, T) by which the logits at each position are to predict these tokens."""
        return drawn


class CausalLM(_LabelsAside):
    """Causal language modelling: batches are (input_ids, attention_mask), or (input_ids, attention_mask, labels).

    Each token but the first is predicted from those before it. With labels (B, T), those that are not −100 are, as in
    Hugging Face's models: the logits at t − 1 predict the label at t. Padding is not predicted, whatever its label is.
    """

    optional_fields = ("labels",)

    def labels(self, named: Mapping[str, Tensor]) -> Tensor:
        tokens = _checked_labels(named) if "labels" in named else named["input_ids"]
        mask = named["attention_mask"].bool()
        following = torch.where(mask[:, 1:] & mask[:, :-1], tokens[:, 1:], IGNORED)
        return F.pad(following, (0, 1), value=IGNORED)

    def _labels_of(self, drawn: Tensor) -> Tensor:
        return F.pad(drawn[:, :-1], (1, 0), value=IGNORED)


class MaskedLM(_LabelsAside):
    """Masked language modelling: batches are (input_ids, attention_mask, labels).

    The labels are the tokens that were masked, and −100 elsewhere.
    """

    def labels(self, named: Mapping[str, Tensor]) -> Tensor:
        return _checked_labels(named)


class Seq2SeqLM(LanguageModelling):
    """Sequence-to-sequence language modelling: batches are (input_ids, attention_mask, labels).

    The labels (B, T') are the tokens of the output, padded by −100. The model is called with them too, makes the
    decoder's input from them as Hugging Face's models do, and returns logits (B, T', V) that predict them.
    """

    fields = ("input_ids", "attention_mask", "labels")
    inputs = fields

    def without_spare_padding(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Returns a batch whose texts begin at the front, cut after the longest of them, as the labels are."""
        named = self._at_front(by_name(batch, self))
        labels = named.pop("labels")
        longest = max(1, int(self._lengths(named).max()))
        longest_label = max(1, int(lengths_of(labels == IGNORED).max()))
        return [*(x[:, :longest] for x in named.values()), labels[:, :longest_label]]

    def _cleared(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sets padding to 0; labels count from 1 then, so that the token 0 at the end is none."""
        labels = named["labels"]
        texts = {name: x for name, x in named.items() if name != "labels"}
        return super()._cleared(texts) | {"labels": torch.where(labels == IGNORED, -1, labels) + 1}

    def _at_front(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves leading padding to the end, that of the labels by themselves."""
        labels = named["labels"]
        if labels.ndim != 2:
            raise ValueError(f"labels must have shape (B, T), not {tuple(labels.shape)}")
        moved = super()._at_front({name: x for name, x in named.items() if name != "labels"})
        return moved | {"labels": moved_to_front(labels, leading(labels == IGNORED))}

    def labels(self, named: Mapping[str, Tensor]) -> Tensor:
        return named["labels"]


class _PerToken(LanguageModelling):
    """Base class for language modelling of single tokens: a sample is the token at `position` (B,) of a sequence."""

    first: int
    """The first position that is predicted."""

    def _at_front(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves leading padding to the end, and shifts positions that were checked."""
        length = named["input_ids"].shape[1]
        reason = f"as the sequences have {length} tokens"
        position = within("position", named["position"], self.first, length - 1, reason)
        return super()._at_front({**named, "position": position})

    def place(self, named: Mapping[str, Tensor]) -> Tensor:
        """Returns the tokens' positions, (B, 1) int64, once they are known to be no padding at the front."""
        last = named["input_ids"].shape[1] - 1
        reason = "counted from the first token that attention_mask keeps"
        return within("position", named["position"], self.first, last, reason).unsqueeze(1)


class CausalLMPerToken(_PerToken):
    """Causal language modelling of single tokens: batches are (input_ids, attention_mask, position).

    A sample is the token at `position` (B,) of a sequence, which has a token before it.
    """

    fields = ("input_ids", "attention_mask", "position")
    first = 1

    def labels(self, named: Mapping[str, Tensor]) -> Tensor:
        tokens = named["input_ids"]
        place = self.place(named)
        return torch.full_like(tokens, IGNORED).scatter(1, place - 1, tokens.gather(1, place))


class MaskedLMPerToken(_PerToken):
    """Masked language modelling of single tokens: batches are (input_ids, attention_mask, labels, position).

    A sample is the token at `position` (B,) of a sequence.
    """

    fields = ("input_ids", "attention_mask", "labels", "position")
    first = 0

    def labels(self, named: Mapping[str, Tensor]) -> Tensor:
        tokens = _checked_labels(named)
        place = self.place(named)
        return torch.full_like(tokens, IGNORED).scatter(1, place, tokens.gather(1, place))


def _checked_labels(named: Mapping[str, Tensor]) -> Tensor:
    """Returns the labels (B, T), once they are known to have the tokens' shape."""
    labels = named["labels"]
    shape = named["input_ids"].shape
    if labels.shape != shape:
        raise ValueError(f"labels must have the shape of input_ids, {tuple(shape)}, not {tuple(labels.shape)}")
    return labels


def _checked_logits(output: object, shape: torch.Size) -> Tensor:
    """Returns the logits (B, T, V) in what a model returned for tokens of shape (B, T)."""
    logits = tensor_of(output, "logits (B, T, V), or an object that has them")
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ValueError(
            f"the model must return logits of shape (B, T, V), one row for each of the {tuple(shape)} tokens, "
            f"not {tuple(logits.shape)}"
        )
    return logits
