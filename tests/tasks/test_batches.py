"""Batches by name, against the same tensors in order."""

from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trak_fast
from trak_fast.arguments import row_numbers
from trak_fast.tasks import (
    CausalLM,
    ImageClassification,
    MaskedLM,
    Regression,
    Seq2SeqLM,
    Task,
    TextClassification,
    batch_tensors,
)

IDS, MASK, TYPES, CLASSES = torch.arange(6).view(2, 3), torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1, 0])
LABELS = torch.full((2, 3), -100)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as transformers' BatchEncoding is."""


class Keyed:
    """An object with `keys` and `[]`, and nothing else of a mapping."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.mark.parametrize("kind", [dict, Encoding, Keyed])
@pytest.mark.parametrize(
    ("task", "named", "expected"),
    [
        (CausalLM(), {"attention_mask": MASK, "input_ids": IDS}, [IDS, MASK]),
        (CausalLM(), {"labels": LABELS, "attention_mask": MASK, "input_ids": IDS}, [IDS, MASK, LABELS]),
        (CausalLM(), {"labels": None, "attention_mask": MASK, "input_ids": IDS}, [IDS, MASK]),
        (CausalLM(), {"token_type_ids": TYPES, "attention_mask": MASK, "input_ids": IDS, "n": 2}, [IDS, MASK]),
        (CausalLM(), {"label": CLASSES, "attention_mask": MASK, "input_ids": IDS}, [IDS, MASK]),
        (MaskedLM(), {"labels": LABELS, "attention_mask": MASK, "input_ids": IDS}, [IDS, MASK, LABELS]),
        (Seq2SeqLM(), {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, [IDS, MASK, LABELS]),
        (
            TextClassification(),
            {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES, "label": CLASSES},
            [IDS, TYPES, MASK, CLASSES],
        ),
        (
            TextClassification(),
            {"label": LABELS, "labels": CLASSES, "input_ids": IDS, "attention_mask": MASK},
            [IDS, MASK, CLASSES],
        ),
        (ImageClassification(), {"label": CLASSES, "pixel_values": TYPES}, [TYPES, CLASSES]),
    ],
)
def test_tensors_are_taken_in_the_order_of_the_fields(
    kind: type, task: Task, named: dict[str, Any], expected: list[Tensor]
) -> None:
    found = batch_tensors(kind(named), task)
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))


def test_sequences_and_tasks_without_fields_are_left_alone() -> None:
    batch = (IDS, MASK)
    assert batch_tensors(batch, CausalLM()) is batch
    named = {"x": IDS}
    assert batch_tensors(named, Regression()) is named
    with pytest.raises(TypeError, match=r"in the order that the task takes them, not dict; give \[batch\[name\].* x$"):
        row_numbers(named, None, 2, 0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "named", "error", "message"),
    [
        (
            TextClassification(),
            {"input_ids": IDS, "mask": MASK, "label": CLASSES},
            ValueError,
            r"^batch must have the keys 'input_ids', 'token_type_ids' \(optional\), 'attention_mask', 'labels', not "
            r"'input_ids', 'mask', 'label'; add 'attention_mask', or give the tensors in a list in this order$",
        ),
        (ImageClassification(), {}, ValueError, r"'pixel_values', 'labels', not none; add 'pixel_values', 'labels'"),
        (ImageClassification(), {f"x{i}": IDS for i in range(11)}, ValueError, r"'x9', \.\.\.; add"),
        (
            CausalLM(),
            {"input_ids": [[1, 2]], "attention_mask": MASK},
            TypeError,
            r"^batch\['input_ids'\] must be a tensor \(B, ...\), not list; .* return_tensors='pt'$",
        ),
        (
            TextClassification(),
            {"input_ids": IDS, "attention_mask": MASK, "label": np.zeros(2)},
            TypeError,
            r"^batch\['label'\] must be .*, not ndarray; torch.from_numpy\(batch\['label'\]\) is one$",
        ),
    ],
)
def test_batches_that_lack_tensors_are_refused(
    task: Task, named: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        batch_tensors(named, task)


class Bag(nn.Module):
    """A language model of single words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.words(input_ids))


def test_scores_of_batches_by_name_are_those_of_batches_in_order(tmp_path: Path) -> None:
    model = Bag()
    ids, mask = torch.randint(7, (6, 4)), torch.ones(6, 4, dtype=torch.long)
    labels = torch.where(torch.rand(6, 4) < 0.5, ids, -100)
    labels[:, 3] = ids[:, 3]
    scores = []
    for name in ("in order", "by name"):
        traker = trak_fast.TRAKer(model, "causal_lm", train_set_size=4, save_dir=tmp_path / name, proj_dim=32)
        named = {"labels": labels, "special_tokens_mask": mask, "attention_mask": mask, "input_ids": ids}
        batch = named if name == "by name" else [ids, mask, labels]
        train = {key: x[:4] for key, x in named.items()} if name == "by name" else [x[:4] for x in batch]
        targets = {key: x[4:] for key, x in named.items()} if name == "by name" else [x[4:] for x in batch]
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(train, num_samples=4)
        traker.finalize_features()
        traker.start_scoring_checkpoint("e", model.state_dict(), model_id=0, num_targets=2)
        traker.score(targets, inds=[1, 0])
        scores.append(np.array(traker.finalize_scores("e")))
    assert (scores[0] == scores[1]).all()
    assert scores[0].any()
