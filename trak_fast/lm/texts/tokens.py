"""Calls of transformers' tokenizers: many texts at once, without warnings, with the characters of each token."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TEXTS_AT_ONCE = 1000
"""Texts a call of a tokenizer: enough that its threads are busy, few enough that their tokens take little memory."""


class Tokens(NamedTuple):
    """Token ids (T,) int32, and the characters [start, end) of each, (T, 2) int32, where the tokenizer knows them."""

    ids: NDArray[np.int32]
    spans: NDArray[np.int32] | None

    def chosen(self, kept: slice | NDArray[np.int64]) -> Tokens:
        """Returns some of the tokens."""
        return Tokens(self.ids[kept], None if self.spans is None else self.spans[kept])


def tokens_of(ids: Sequence[int], spans: Sequence[tuple[int, int]] | None) -> Tokens:
    """Makes tokens of lists."""
    flat = None if spans is None else np.fromiter(chain.from_iterable(spans), np.int32, 2 * len(spans)).reshape(-1, 2)
    return Tokens(np.array(ids, np.int32), flat)


def tokenized(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> list[Tokens]:
    """Tokenizes texts as `tokenizer(text)` does, or without special tokens around them."""
    if not texts:
        return []
    options = {"return_offsets_mapping": True, "return_attention_mask": False} if knows_spans(tokenizer) else {}
    with silent():
        encoding = tokenizer(list(texts), add_special_tokens=special, **options)
    spans = encoding["offset_mapping"] if options else [None] * len(texts)
    return [tokens_of(ids, span) for ids, span in zip(encoding["input_ids"], spans, strict=True)]


def find_special(tokenizer: Any, texts: Iterable[str]) -> tuple[list[int], list[int]]:
    """Finds the tokens that a tokenizer puts before and after each text.

    Args:
        texts: The first of them that has tokens of its own is the one that is looked at.
    """
    with silent():
        around: list[int] = list(tokenizer("")["input_ids"])
        if not around:
            return [], []
        for text in texts:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = tokenizer(text)["input_ids"]
            before = len(around)
            while own and before >= 0:
                if whole[before : before + len(own)] == own and len(whole) == len(around) + len(own):
                    return whole[:before], whole[before + len(own) :]
                before -= 1
    return around, []


def knows_spans(tokenizer: Any) -> bool:
    """Returns True for a tokenizer that tells which characters a token stands for."""
    return bool(getattr(tokenizer, "is_fast", False))


@contextmanager
def silent() -> Iterator[None]:
    """Keeps transformers from warning of texts longer than the model's limit, which are cut or split here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
