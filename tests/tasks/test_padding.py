"""Padding on the left, right or both sides: f and its gradient are those of each text alone, without padding."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trak_fast.gradients import FunctionalGradientComputer, HookGradientComputer
from trak_fast.tasks import (
    CausalLM,
    CausalLMPerToken,
    MaskedLM,
    MaskedLMPerToken,
    Seq2SeqLM,
    Task,
    TextClassification,
)
from trak_fast.tasks.padding import leading, moved_to_front

WORDS = 13
LENGTHS = (4, 6, 2)
PADDED = 7
FILLINGS = {"labels": -100, "input_ids": 1}
"""Field -> the value that it is padded with, if not 0."""


class Reader(nn.Module):
    """A model that adds an embedding of each token's place, and sums up what the mask keeps so far or, if
    bidirectional, in all; `labels` are what a decoder has read, with the place of each added too."""

    def __init__(self, bidirectional: bool = False, classes: int | None = None) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 5), nn.Embedding(16, 5)
        self.types, self.head = nn.Embedding(2, 5), nn.Linear(5, classes or WORDS)
        self.bidirectional, self.pools = bidirectional, classes is not None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        x = torch.tanh(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))
        if token_type_ids is not None:
            x = x * self.types(token_type_ids)
        x = x * attention_mask.unsqueeze(2)
        if self.pools:
            return self.head(x.sum(1))
        if labels is not None:
            before = torch.nn.functional.pad(labels, (1, 0), value=0)[:, :-1].clamp(min=0)
            read = self.words(before) * self.places(torch.arange(before.shape[1]))
            return self.head(torch.tanh(x.sum(1, keepdim=True) + read.cumsum(1)))
        context = x.sum(1, keepdim=True) if self.bidirectional else x.cumsum(1)
        return self.head(torch.tanh(context + self.places(torch.arange(input_ids.shape[1]))))


def padded(texts: Sequence[Tensor], value: int, before: Sequence[int]) -> Tensor:
    """Puts texts into rows of one length, each behind some padding."""
    rows = torch.full((len(texts), PADDED), value)
    for row, text, start in zip(rows, texts, before, strict=True):
        row[start : start + len(text)] = text
    return rows


def texts(low: int = 0, high: int = WORDS) -> list[Tensor]:
    return [torch.randint(low, high, (length,)) for length in LENGTHS]


def sparse_labels() -> list[Tensor]:
    """Draws labels for some tokens of each text, the last one included."""
    labels = texts()
    for row in labels:
        row[::2] = -100
        row[-1] = 3
    return labels


CLASSES = torch.tensor([2, 0, 1])
POSITIONS = torch.tensor([3, 1, 1])


def case(name: str) -> tuple[Task, nn.Module, dict[str, Any]]:
    """Makes a task, its model, and its fields: lists of texts are padded, tensors are as they are."""
    ids = {"input_ids": texts(), "attention_mask": [torch.ones(length, dtype=torch.long) for length in LENGTHS]}
    return {
        "causal": (CausalLM(), Reader(), ids),
        "causal with labels": (CausalLM(), Reader(), {**ids, "labels": sparse_labels()}),
        "masked": (MaskedLM(), Reader(bidirectional=True), {**ids, "labels": sparse_labels()}),
        "causal token": (CausalLMPerToken(), Reader(), {**ids, "position": POSITIONS}),
        "masked token": (
            MaskedLMPerToken(),
            Reader(bidirectional=True),
            {**ids, "labels": sparse_labels(), "position": POSITIONS},
        ),
        "seq2seq": (Seq2SeqLM(), Reader(), {**ids, "labels": [torch.randint(WORDS, (n,)) for n in (3, 1, 6)]}),
        "classification": (
            TextClassification(),
            Reader(classes=3),
            {"input_ids": ids["input_ids"], "token_type_ids": texts(high=2), **ids, "labels": CLASSES},
        ),
        "classification without types": (TextClassification(), Reader(classes=3), {**ids, "labels": CLASSES}),
    }[name]


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, HookGradientComputer])
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "causal with labels",
        "masked",
        "causal token",
        "masked token",
        "seq2seq",
        "classification",
        "classification without types",
    ],
)
def test_padding_on_any_side_changes_nothing(name: str, computer: type[FunctionalGradientComputer]) -> None:
    task, model, fields = case(name)
    model = model.double()
    weights = dict(model.named_parameters())
    gradients = computer(model, task)
    alone = [[x[i][None] if isinstance(x, list) else x[i : i + 1] for x in fields.values()] for i in range(3)]
    f = torch.cat([task.get_outputs(model, weights, {}, sample) for sample in alone])
    slopes = [gradients.compute_per_sample_grad(sample) for sample in alone]
    for before in ((0, 0, 0), [PADDED - n for n in LENGTHS], (1, 0, 3)):
        batch = []
        for field, x in fields.items():
            if field == "position":
                batch.append(x + torch.tensor(before))
            elif not isinstance(x, list):
                batch.append(x)
            else:
                starts = before
                if name == "seq2seq" and field == "labels" and any(before):
                    starts = [PADDED - len(text) for text in x]  # not those of the inputs
                batch.append(padded(x, FILLINGS.get(field, 0), starts))
        torch.testing.assert_close(task.get_outputs(model, weights, {}, batch), f, rtol=1e-11, atol=1e-11)
        found = gradients.compute_per_sample_grad(batch)
        for i, slope in enumerate(slopes):
            for parameter, value in slope.items():
                torch.testing.assert_close(found[parameter][i], value[0], rtol=1e-9, atol=1e-12)


def test_only_leading_padding_is_moved() -> None:
    mask = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    count = leading(mask == 0)
    assert count.tolist() == [2, 0, 0, 5]
    values = torch.arange(6).expand(4, 6)
    assert moved_to_front(values, count).tolist() == [
        [2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [5, 0, 1, 2, 3, 4],
    ]


@pytest.mark.parametrize(("position", "shifted"), [(2, 0), (0, -2)])
def test_a_token_with_nothing_but_padding_before_it_is_no_causal_sample(position: int, shifted: int) -> None:
    ids = torch.randint(WORDS, (1, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    batch = [ids, mask, torch.tensor([position])]
    model = Reader()
    allowed = r"\[1, 4\], counted from the first token that attention_mask keeps" if position else r"\[1, 4\], as the"
    found = shifted if position else position
    with pytest.raises(ValueError, match=rf"position must be in {allowed}.*, not {found}; leave out"):
        CausalLMPerToken().get_outputs(model, dict(model.named_parameters()), {}, batch)
