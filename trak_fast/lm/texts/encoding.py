"""Tokens of documents, with the labels that say which of them are scored, and batches of pieces of like lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...tasks.tokens import IGNORED
from .chats import ChatTemplate
from .documents import Document
from .pieces import Limits, Made, Piece, piece_of
from .tokens import TEXTS_AT_ONCE, Tokens, find_special, tokenized
from .whole_texts import LabelledTexts, MaskedTexts

__all__ = ["TASKS", "Encoded", "Piece", "collate", "encode", "make_batches"]

TASKS = ("causal_lm", "masked_lm", "text_classification")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Pieces of documents in order; how many documents were cut; rows of those that have no scored token."""

    pieces: list[Piece]
    cut: int
    empty: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each piece."""
        return [len(piece.input_ids) for piece in self.pieces]

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(self.lengths)


def encode(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    task: str = "causal_lm",
    max_tokens: int,
    long: str = "cut",
    vocab_size: int,
    label_ids: Mapping[str, int] | None = None,
    maskings: int = 1,
    seed: int = 0,
    ends_with_eos: bool | None = None,
) -> Encoded:
    """Encodes documents for a task.

    causal_lm:
        A text is `tokenizer(text)`, all tokens but the first scored. A prompt has the special tokens that the tokenizer
        puts before a text, none after it; its completion follows without special tokens, and alone is scored. A chat is
        `tokenizer.apply_chat_template(messages)`; scored is what the assistant says.
    masked_lm:
        A text is `tokenizer(text)`, and 15 % of its tokens that are not special, rounded, one at least, are replaced by
        the mask token and scored. They depend on `seed`, the text's tokens and the masking's number alone.
    text_classification:
        A text is `tokenizer(text)`, with the document's label.

    A document without tokens becomes one token that is not scored.

    Args:
        documents: Those that `read_documents` returns, or some of them.
        tokenizer: A tokenizer of transformers.
        task: One of the above.
        max_tokens: Tokens that the model takes, 2 or more.
        long: A document of more tokens is "cut": the first ones are kept, of a prompt and its completion the completion
            and the end of the prompt. Or "split": it becomes several pieces. Of causal_lm each repeats the last token
            of the one before as context, so that every token is predicted once; pieces without a scored token are left
            out. Of other tasks each has the special tokens of a text.
        vocab_size: Tokens that the model knows.
        label_ids: The model's names of labels (`config.label2id`), by which names are translated and numbers checked.
        maskings: Pieces of each window of masked_lm.
        seed: Chooses the masked tokens.
        ends_with_eos: Adds the end-of-sequence token to completions, scored too. None adds it where training did:
            to Alpaca's, not to a plain prompt's, whose completion may be the beginning of an answer. A chat has what
            its template says.

    Raises:
        ValueError: A document does not fit the task, the tokenizer or the model.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, not {task!r}")
    if long not in ("cut", "split"):
        raise ValueError(f"`long` must be cut or split, not {long!r}; --long cut")
    if max_tokens < 2:
        raise ValueError(
            f"`max_tokens` must be 2 or more, not {max_tokens}, as one token predicts another; --max-tokens"
        )
    if maskings < 1 or (maskings > 1 and task != "masked_lm"):
        raise ValueError(f"`maskings` must be 1, or more for masked_lm, not {maskings} for {task}; leave it out")
    limits = Limits(max_tokens, long == "split", vocab_size)
    encoder: _Causal | MaskedTexts | LabelledTexts
    if task == "causal_lm":
        encoder = _Causal(tokenizer, limits, ends_with_eos)
    elif task == "masked_lm":
        encoder = MaskedTexts(tokenizer, limits, maskings, seed)
    else:
        encoder = LabelledTexts(tokenizer, limits, label_ids)
    pieces: list[Piece] = []
    empty: list[int] = []
    cut = 0
    rest = iter(documents)
    while group := list(islice(rest, TEXTS_AT_ONCE)):
        for document, made in zip(group, encoder.encode(group), strict=True):
            pieces += made.pieces
            cut += made.cut
            if not made.scored:
                empty.append(document.row)
    return Encoded(pieces, cut, tuple(empty))


def make_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches pieces of like lengths, the longest first; those of one length stay in order.

    Args:
        lengths: Tokens of each piece.
        batch_tokens: Tokens of a batch at most, padding counted, unless one piece alone has more.

    Returns:
        Numbers of the pieces of each batch.
    """
    if batch_tokens < 1:
        raise ValueError(f"`batch_tokens` must be 1 or more, not {batch_tokens}; --batch-tokens")
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            batches.append([])
            room = max(1, batch_tokens // max(1, lengths[i]))
        batches[-1].append(i)
        room -= 1
    return batches


def collate(pieces: Sequence[Piece], task: str, *, pad_id: int = 0) -> dict[str, Tensor]:
    """Makes a batch of pieces, padded at the right, as `trak_fast.tasks` takes it.

    Args:
        pieces: One or more.
        task: As in `encode`.
        pad_id: The token that pads. Some classifiers of transformers find the last token of a text by their config's
            `pad_token_id`, not by the mask: give them that.

    Returns:
        `input_ids` and `attention_mask`, (B, T) int64, and `labels`: (B, T) int64, −100 where none is scored and in the
        padding; of text_classification (B,).
    """
    shape = (len(pieces), max(len(piece.input_ids) for piece in pieces))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        length = len(piece.input_ids)
        ids[row, :length] = torch.from_numpy(piece.input_ids)
        mask[row, :length] = 1
        labels[row, : len(piece.labels)] = torch.from_numpy(piece.labels)
    if task == "text_classification":
        labels = labels[:, 0]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Sequence(NamedTuple):
    """Tokens of a document, which of them are scored, and how many at the front are special and how many a prompt."""

    tokens: Tokens
    scored: NDArray[np.bool_]
    special: int = 0
    prompt: int = 0


class _Causal:
    """Encodes documents for causal language models."""

    def __init__(self, tokenizer: Any, limits: Limits, ends_with_eos: bool | None) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.ends_with_eos = ends_with_eos
        self.template = ChatTemplate(tokenizer)
        self.before: list[int] | None = None

    def encode(self, documents: Sequence[Document]) -> Iterator[Made]:
        """Encodes documents in order."""
        texts = iter(tokenized(self.tokenizer, [x.text for x in documents if x.text is not None]))
        asked = [x for x in documents if x.text is None and x.messages is None]
        prompts = iter(tokenized(self.tokenizer, [x.prompt or "" for x in asked], special=False))
        completions = iter(tokenized(self.tokenizer, [x.completion or "" for x in asked], special=False))
        if asked and self.before is None:
            self.before = find_special(self.tokenizer, (document.shown for document in asked))[0]
        for document in documents:
            if document.text is not None:
                tokens = next(texts)
                sequence = _Sequence(tokens, np.ones(len(tokens.ids), bool))
            elif document.messages is not None:
                sequence = _Sequence(*self.template.encode(document))
            else:
                sequence = self._answered(document, next(prompts), next(completions))
            self.limits.check(sequence.tokens.ids, document)
            if len(sequence.tokens.ids):
                yield self._made(document, sequence)
            else:
                yield self.limits.stand_in(self.tokenizer, document)

    def _answered(self, document: Document, prompt: Tokens, completion: Tokens) -> _Sequence:
        before = self.before or []
        ends = document.ends_with_eos if self.ends_with_eos is None else self.ends_with_eos
        end = [self.tokenizer.eos_token_id] if ends and self.tokenizer.eos_token_id is not None else []
        ids = np.concatenate([np.array(before, np.int32), prompt.ids, completion.ids, np.array(end, np.int32)])
        spans = None
        if prompt.spans is not None and completion.spans is not None:
            start = np.zeros((len(before), 2), np.int32)
            last = np.full((len(end), 2), len(document.shown), np.int32)
            moved = completion.spans + np.int32(len(document.prompt or ""))
            spans = np.concatenate([start, prompt.spans, moved, last])
        count = len(before) + len(prompt.ids)
        return _Sequence(Tokens(ids, spans), np.arange(len(ids)) >= count, len(before), count)

    def _made(self, document: Document, sequence: _Sequence) -> Made:
        size = self.limits.max_tokens
        count = len(sequence.tokens.ids)
        if count <= size or not self.limits.split:
            pieces = [self._window(document, sequence, self._kept(sequence))]
        else:
            windows = [slice(start, start + size) for start in range(0, count - 1, size - 1)]
            pieces = [self._window(document, sequence, window) for window in windows]
            pieces = [piece for piece in pieces if (piece.labels != IGNORED).any()] or pieces[:1]
        scored = any((piece.labels != IGNORED).any() for piece in pieces)
        return Made(pieces, count > size and not self.limits.split, scored)

    def _kept(self, sequence: _Sequence) -> slice | NDArray[np.int64]:
        """Chooses the tokens that a cut leaves: special ones, the prompt's last ones, the completion's first ones."""
        count = len(sequence.tokens.ids)
        size = self.limits.max_tokens
        if count <= size or not sequence.prompt:
            return slice(size)
        # One token of context at least, as it predicts the completion's first
        context = max(sequence.special, 1, min(sequence.prompt, size - (count - sequence.prompt)))
        context = min(context, size)
        special = min(sequence.special, context)
        begin = sequence.prompt - (context - special)
        place = np.arange(count)
        return np.concatenate([place[:special], place[begin : begin + size - special]])

    def _window(self, document: Document, sequence: _Sequence, kept: slice | NDArray[np.int64]) -> Piece:
        tokens = sequence.tokens.chosen(kept)
        labels = np.where(sequence.scored[kept], tokens.ids, np.int32(IGNORED))
        labels[0] = IGNORED  # nothing before it predicts it
        return piece_of(document, tokens, labels)
