"""Tokens of chats by a tokenizer's chat template, and which of them the assistant said."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .documents import Document, tell
from .tokens import Tokens, knows_spans, silent, tokens_of

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Begins what the assistant said in a template that marks it."""

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class Chat(NamedTuple):
    """Tokens of a chat, with spans into `Document.shown`, and whether the assistant said each."""

    tokens: Tokens
    said: NDArray[np.bool_]


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.exists = getattr(tokenizer, "chat_template", None) is not None
        self.spans = knows_spans(tokenizer)
        self.marked = self.exists and self.spans and bool(_MARKER.search(tokenizer.get_chat_template()))

    def encode(self, document: Document) -> Chat:
        """Encodes a chat: its ids are those of `tokenizer.apply_chat_template(messages, tokenize=True)`.

        The assistant's turns are those that the template marks ({% generation %}), by the mask that transformers makes,
        and all tokens of their last character.
        In a template without marks a turn is what its message adds to the messages before it and the prompt that asks
        for it (`add_generation_prompt`); a token counts where any of its characters do.

        Raises:
            ValueError: There is no template, it refuses the chat, or a turn cannot be told from the rest.
        """
        messages = document.messages or ()
        if not self.exists:
            raise ValueError(
                f"{document.where} is a chat, and the tokenizer has no chat template; --tokenizer DIR with one, or "
                "--text names a field of text"
            )
        try:
            with silent():
                return self._encoded(messages, document.where)
        except ImportError:
            raise ValueError("chat templates need jinja2: pip install jinja2") from None

    def _encoded(self, messages: Messages, where: str) -> Chat:
        options: dict[str, Any] = {"tokenize": True, "return_dict": True}
        if self.spans:
            options["tokenizer_kwargs"] = {"return_offsets_mapping": True}
        if self.marked:
            options["return_assistant_tokens_mask"] = True
        encoding = self._apply(messages, where, options)
        ids: list[int] = encoding["input_ids"]
        if not self.spans:
            turns = self._turns(messages, where, ids, lambda part, asks: self._ids(part, where, asks))
            return Chat(
                tokens_of(ids, None), np.array([any(a <= t < b for a, b in turns) for t in range(len(ids))], bool)
            )
        places: list[Span] = encoding["offset_mapping"]
        rendered = self._text(messages, where)
        if self.marked:
            said = [bool(x) for x in encoding["assistant_masks"]]
            for t in range(1, len(ids)):  # the mask ends at the first of a last character's tokens
                said[t] |= said[t - 1] and places[t][0] < places[t - 1][1]
        else:
            turns = self._turns(messages, where, rendered, lambda part, asks: self._text(part, where, asks))
            said = [any(max(a, start) < min(b, end) for a, b in turns) for start, end in places]
        contents = self._contents(messages, where, rendered)
        return Chat(tokens_of(ids, [_moved(place, contents) for place in places]), np.array(said, bool))

    def _apply(self, messages: Messages, where: str, options: Mapping[str, Any]) -> Any:
        try:
            return self.tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except ImportError:
            raise
        except Exception as error:  # whatever a template raises; many refuse an order of roles
            raise ValueError(
                f"{where} does not fit the tokenizer's chat template ({error}); mend its messages"
            ) from None

    def _text(self, messages: Messages, where: str, asks: bool = False) -> str:
        text: str = self._apply(messages, where, {"tokenize": False, "add_generation_prompt": asks})
        return text

    def _ids(self, messages: Messages, where: str, asks: bool) -> list[int]:
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": asks}
        ids: list[int] = self._apply(messages, where, options)["input_ids"]
        return ids

    def _turns(
        self, messages: Messages, where: str, whole: Sequence[Any], render: Callable[[Messages, bool], Sequence[Any]]
    ) -> list[Span]:
        """Returns where the assistant's turns begin and end in the rendered chat, characters or tokens."""
        turns = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(messages[:i], True) if i else whole[:0]
            until = render(messages[: i + 1], False)
            if not i or until[: len(before)] != before or whole[: len(until)] != until:
                raise ValueError(
                    f"{where}: the assistant's message {i + 1} cannot be told from the rest, as the chat template "
                    "changes what is before it; --tokenizer DIR with a template that has {% generation %}"
                )
            turns.append((len(before), len(until)))
        return turns

    def _contents(self, messages: Messages, where: str, rendered: str) -> list[tuple[Span, int]]:
        """Finds the messages' contents in the rendered chat: (start, end) there, and the start in `Document.shown`.

        The template is applied to placeholders too: what it puts between them is what stands between the contents.
        """
        starts = tell(messages)[1]
        held = [i for i, message in enumerate(messages) if message.get("content")]
        marks = {i: f"\ue000{i}\ue001" for i in held}
        replaced = [{**message, "content": marks[i]} if i in marks else message for i, message in enumerate(messages)]
        try:
            rest = self._text(replaced, where)
        except ValueError:
            return []  # a template that looks into the contents
        found: list[tuple[Span, int]] = []
        place = 0
        for i in held:
            between, mark, rest = rest.partition(marks[i])
            place += len(between)
            content = str(messages[i]["content"])
            said = content if rendered.startswith(content, place) else content.strip()
            if not mark or not rendered.startswith(said, place) or not rendered[:place].endswith(between):
                return []
            found.append(((place, place + len(said)), starts[i] + content.index(said)))
            place += len(said)
        return found


def _moved(place: Span, contents: Sequence[tuple[Span, int]]) -> Span:
    """Moves characters of the rendered chat to those of the shown one; (0, 0) for what only the template says."""
    for (start, end), shown in contents:
        if place[0] < end and place[1] > start:
            return max(place[0], start) - start + shown, min(place[1], end) - start + shown
    return 0, 0
