"""Pieces of documents: the tokens that a model sees at once, their labels, and the model's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..tasks.tokens import IGNORED
from .documents import Document
from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that a model sees at once: a document, or a window of one.

    Attributes:
        document: The document's `row`.
        input_ids: (T,) int32, one token at least.
        labels: (T,) int32, `labels[t]` the token at t that is predicted, −100 where none is; for classification (1,),
            the label.
        spans: (T, 2) int32, the first character of each token in `Document.shown` and the one after its last, equal for
            a token that stands for none; None where the tokenizer does not tell.
    """

    document: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    spans: NDArray[np.int32] | None


class Made(NamedTuple):
    """Pieces of a document, and whether it was cut and has a scored token."""

    pieces: list[Piece]
    cut: bool
    scored: bool


class Limits(NamedTuple):
    """What a model takes, and what becomes of longer documents."""

    max_tokens: int
    split: bool
    vocab_size: int

    def check(self, ids: Sequence[int], document: Document) -> None:
        if ids and max(ids) >= self.vocab_size:
            token = next(token for token in ids if token >= self.vocab_size)
            raise ValueError(
                f"token {token} of {document.where} is beyond the model's {self.vocab_size:,}: the tokenizer is "
                "another model's"
            )

    def stand_in(self, tokenizer: Any, document: Document, labels: Sequence[int] = (IGNORED,)) -> Made:
        """Makes the piece of a document without tokens: one token, so that batches have no empty row."""
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        known = [getattr(tokenizer, name, None) for name in names]
        usable = [token for token in known if isinstance(token, int) and 0 <= token < self.vocab_size]
        piece = piece_of(document, Tokens([usable[0] if usable else 0], [(0, 0)]), labels)
        return Made([piece], cut=False, scored=False)


def piece_of(document: Document, tokens: Tokens, labels: Sequence[int]) -> Piece:
    """Makes a piece of a document of lists."""
    spans = None if tokens.spans is None else np.array(tokens.spans, np.int32)
    return Piece(document.row, np.array(tokens.ids, np.int32), np.array(labels, np.int32), spans)
