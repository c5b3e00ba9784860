"""Encoders of texts whose every window has the special tokens of a text: for masking, and for classification."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...tasks.tokens import IGNORED
from .documents import Document
from .pieces import Limits, Made, Piece, piece_of
from .tokens import Tokens, find_special, tokenized

_MASKED = 0.15
"""Share of the tokens that are masked (Devlin et al., "BERT", 2018, section 3.1)."""


class WholeTexts(ABC):
    """Base class of encoders of texts whose windows each have the special tokens around them."""

    task: str

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.around: tuple[int, int] | None = None  # special tokens before and after a text

    def encode(self, documents: Sequence[Document]) -> Iterator[Made]:
        """Encodes documents in order.

        Raises:
            ValueError: A document has no text or no label that fits, or a token is beyond the model's.
        """
        texts = [self._text(document) for document in documents]
        if self.around is None:
            before, after = find_special(self.tokenizer, texts)
            self.around = len(before), len(after)
            if sum(self.around) >= self.limits.max_tokens:
                raise ValueError(
                    f"`max_tokens` must be more than the {sum(self.around)} special tokens of a text, not "
                    f"{self.limits.max_tokens}; --max-tokens"
                )
        for document, tokens in zip(documents, tokenized(self.tokenizer, texts), strict=True):
            self.limits.check(tokens.ids, document)
            if len(tokens.ids):
                windows = self._windows(tokens)
                cut = len(windows) > 1 and not self.limits.split
                pieces = self.pieces(document, windows[:1] if cut else windows)
                yield Made(pieces, cut, any((piece.labels != IGNORED).any() for piece in pieces))
            else:
                yield self.limits.stand_in(self.tokenizer, document, self.empty_labels(document))

    @abstractmethod
    def pieces(self, document: Document, windows: Sequence[Tokens]) -> list[Piece]:
        """Makes the pieces of a document of its windows."""

    @abstractmethod
    def empty_labels(self, document: Document) -> list[int]:
        """Returns the labels of a document without tokens."""

    def _text(self, document: Document) -> str:
        if document.text is None:
            kind = "messages" if document.messages is not None else "a prompt and a completion"
            raise ValueError(f"{document.where} has {kind}, and {self.task} takes a text; --text names its field")
        return document.text

    def _windows(self, tokens: Tokens) -> list[Tokens]:
        before, after = self.around or (0, 0)
        last = len(tokens.ids) - after
        size = self.limits.max_tokens - before - after
        place = np.arange(len(tokens.ids))
        return [
            tokens.chosen(np.r_[place[:before], place[start : min(start + size, last)], place[last:]])
            for start in range(before, max(last, before + 1), size)
        ]


class MaskedTexts(WholeTexts):
    """Encodes texts for masked language models."""

    task = "masked_lm"

    def __init__(self, tokenizer: Any, limits: Limits, maskings: int, seed: int) -> None:
        super().__init__(tokenizer, limits)
        self.maskings = maskings
        self.seed = seed
        self.special = np.array(tokenizer.all_special_ids, np.int32)
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token, which masked_lm needs; --tokenizer DIR, or another --task"
            )

    def pieces(self, document: Document, windows: Sequence[Tokens]) -> list[Piece]:
        return [self._masked(document, window, masking) for window in windows for masking in range(self.maskings)]

    def empty_labels(self, document: Document) -> list[int]:
        return [IGNORED]

    def _masked(self, document: Document, tokens: Tokens, masking: int) -> Piece:
        ids = tokens.ids.copy()
        labels = np.full_like(ids, IGNORED)
        places = np.flatnonzero(~np.isin(ids, self.special))
        if len(places):
            named = f"{self.seed} {masking} ".encode() + ids.astype("<i4").tobytes()
            draws = np.random.default_rng(int.from_bytes(hashlib.sha256(named).digest(), "big"))
            chosen = draws.choice(places, max(1, round(_MASKED * len(places))), replace=False)
            labels[chosen] = ids[chosen]
            ids[chosen] = self.tokenizer.mask_token_id
        return piece_of(document, Tokens(ids, tokens.spans), labels)


class LabelledTexts(WholeTexts):
    """Encodes texts with their labels for classifiers."""

    task = "text_classification"

    def __init__(self, tokenizer: Any, limits: Limits, label_ids: Mapping[str, int] | None) -> None:
        super().__init__(tokenizer, limits)
        self.label_ids = label_ids

    def pieces(self, document: Document, windows: Sequence[Tokens]) -> list[Piece]:
        label = np.array(self.empty_labels(document), np.int32)
        return [piece_of(document, window, label) for window in windows]

    def empty_labels(self, document: Document) -> list[int]:
        label = document.label
        if label is None:
            raise ValueError(f"{document.where} has no label, a string or a whole number; --label names its field")
        names = self.label_ids
        if names is not None and isinstance(label, str) and label in names:
            return [names[label]]
        try:
            number = int(label)  # of CSV too, where numbers are strings
        except ValueError:
            number = -1
        if number < 0 or (names is not None and number not in names.values()):
            known = "numbers from 0" if names is None else ", ".join(f'"{name}" ({i})' for name, i in names.items())
            shown = f'"{label}"' if isinstance(label, str) else label
            raise ValueError(
                f"{document.where} has the label {shown}, and the model's labels are {known}; mend one of them"
            )
        return [number]
