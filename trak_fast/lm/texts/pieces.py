"""Pieces of documents: the tokens that a model sees at once, their labels, and the model's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...tasks.tokens import IGNORED
from .documents import Document
from .tokens import Tokens, tokens_of


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
    """The limits of a model: its tokens, and True where longer documents are split instead of cut."""

    max_tokens: int
    split: bool
    vocab_size: int

    def check(self, ids: NDArray[np.int32], document: Document) -> None:
        """Refuses tokens that the model does not know.

        Raises:
            ValueError: There is one.
        """
        beyond = ids[ids >= self.vocab_size]
        if len(beyond):
            raise ValueError(
                f"token {beyond[0]} of {document.where} is beyond the model's {self.vocab_size:,}: the tokenizer is "
                "another model's"
            )

    def stand_in(self, tokenizer: Any, document: Document, labels: Sequence[int] = (IGNORED,)) -> Made:
        """Makes the piece of a document without tokens: one token, so that batches have no empty row."""
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        known = [getattr(tokenizer, name, None) for name in names]
        usable = [token for token in known if isinstance(token, int) and 0 <= token < self.vocab_size]
        tokens = tokens_of([usable[0] if usable else 0], [(0, 0)])
        return Made([piece_of(document, tokens, np.array(labels, np.int32))], cut=False, scored=False)


def piece_of(document: Document, tokens: Tokens, labels: NDArray[np.int32]) -> Piece:
    """Makes a piece of a document."""
    return Piece(document.row, tokens.ids, labels, tokens.spans)
