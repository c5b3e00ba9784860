"""Documents of files: which fields of the rows are text, prompt, completion or chat, and the texts in them.

Fields that flags name are taken. Without flags the first of these that all rows have is: chat messages ("messages" or
"conversations"), "prompt" and "completion", Alpaca's "instruction", "input" and "output", "text".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .files import Row, find_sources, kind_of, read_rows

_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT's chats -> those of chat templates."""

_ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)
"""The prompt that Alpaca was trained with (Taori et al., "Stanford Alpaca", 2023, its README)."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of fields that flags gave; None is one to be found."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    id: str | None = None
    group: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A document with its place: it has a text, or a prompt and a completion, or messages.

    `place` is a line of .jsonl and .txt, and the number of a row elsewhere, from 1; `row` is its number in the whole
    set, from 0. Messages have "role" and "content", and whatever else a chat template may use.
    """

    file: str
    place: int
    row: int
    id: str | None = None
    group: str | None = None
    label: str | int | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    ends_with_eos: bool = False
    """Alpaca's completions were trained with the end-of-sequence token after them."""

    @property
    def where(self) -> str:
        """Names file and place, such as "wiki.jsonl:812"."""
        return f"{self.file}:{self.place}"

    @property
    def shown(self) -> str:
        """Joins what the document says into one text for people."""
        if self.messages is not None:
            return tell(self.messages)[0]
        return (self.prompt or "") + (self.completion or "") if self.text is None else self.text


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents in order, the names of the fields that were read, and the files in folders that were not."""

    documents: tuple[Document, ...]
    fields: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def __getitem__(self, row: int) -> Document:
        return self.documents[row]


class NoSuchFieldError(ValueError):
    """A flag names a field that no row has.

    Attributes:
        flag: The flag, without its dashes.
    """

    def __init__(self, flag: str, message: str) -> None:
        super().__init__(message)
        self.flag = flag


def tell(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
    """Writes a chat as lines "role: content".

    Returns:
        The text, and the character at which each message's content begins.
    """
    lines: list[str] = []
    starts: list[int] = []
    length = 0
    for message in messages:
        head = f"{message['role']}: "
        starts.append(length + len(head))
        lines.append(head + (message.get("content") or ""))
        length += len(lines[-1]) + 1
    return "\n".join(lines), starts


def read_documents(
    paths: Iterable[str | Path], fields: Fields | None = None, *, by_file: bool = False, limit: int | None = None
) -> Documents:
    """Reads documents of files (.jsonl, .json, .csv, .parquet, .txt), of folders of them, and of `save_to_disk`.

    An id is the field that `fields` names, else "id" where that is a string or a whole number; ids may repeat. A label
    is the field that `fields` names, else "label" where that is a string or a whole number. Groups only have a name.

    Args:
        paths: Files and folders; a folder's files are sorted by name.
        fields: Names that flags gave.
        by_file: Takes a .txt file as one document, not each line that is not blank.
        limit: Reads this many documents at most, the first ones; what follows is not looked at.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file is empty or malformed, a row lacks a field, or has something else in it than text.
    """
    fields = Fields() if fields is None else fields
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {limit}")
    sources = find_sources(paths)
    rows = list(islice(read_rows(sources.paths, by_file=by_file), limit))
    reader = _Reader(fields, rows)
    documents = tuple(reader.document(number, row) for number, row in enumerate(rows))
    return Documents(documents, reader.shown_fields(), tuple(map(str, sources.skipped)))


def read_documents_of_some(
    paths: Sequence[str | Path], fields: Fields, optional: Collection[str], *, by_file: bool, limit: int | None = None
) -> tuple[Documents, Fields]:
    """Reads documents, of which some flags may not be meant: they name fields of other files.

    Args:
        paths: As for `read_documents`.
        fields: Names that flags gave.
        optional: Flags that are left out where no row has the field that they name.
        by_file: As for `read_documents`.
        limit: As for `read_documents`.

    Returns:
        The documents, and the names that were taken.

    Raises:
        FileNotFoundError: As `read_documents`.
        ValueError: As `read_documents`.
    """
    while True:
        try:
            return read_documents(paths, fields, by_file=by_file, limit=limit), fields
        except NoSuchFieldError as error:
            names = _PAIR if error.flag in _PAIR else {error.flag}
            if not names <= set(optional):
                raise
            fields = replace(fields, **dict.fromkeys(names))


_PAIR = {"prompt", "completion"}


class _Reader:
    """Makes documents of rows, once it found the fields that they have."""

    def __init__(self, fields: Fields, rows: Sequence[Row]) -> None:
        self.fields = fields
        named = _given(fields)
        self.names = named or _found(rows)
        self.chat = named is None and self.names in _CHATS
        self.alpaca = named is None and self.names == _ALPACA_FIELDS
        given = {flag: getattr(fields, flag) for flag in ("text", "prompt", "completion", "id", "group", "label")}
        for flag, name in given.items():
            if name is not None and not any(name in row.values for row in rows):
                raise NoSuchFieldError(
                    flag, f'no row of {rows[0].file} has the field "{name}" of --{flag}, only {_list(rows[0].values)}'
                )
        self.has_input = self.alpaca and any("input" in row.values for row in rows)

    def shown_fields(self) -> tuple[str, ...]:
        """Names the fields that are read, for people."""
        return ("instruction", "input", "output") if self.has_input else self.names

    def document(self, number: int, row: Row) -> Document:
        """Makes the document of a row."""
        content: dict[str, Any] = {}
        if self.chat:
            content["messages"] = _messages(row, self.names[0])
        elif self.alpaca:
            content["prompt"] = self._alpaca_prompt(row)
            content["completion"] = self._string(row, "output", "completion")
            content["ends_with_eos"] = True
        elif len(self.names) == 2:
            content["prompt"] = self._string(row, self.names[0], "prompt")
            content["completion"] = self._string(row, self.names[1], "completion")
        else:
            content["text"] = self._string(row, self.names[0], "text")
        return Document(
            file=row.file,
            place=row.place,
            row=number,
            id=_as_string(self._mark(row, "id")),
            group=_as_string(self._mark(row, "group")),
            label=self._mark(row, "label"),
            **content,
        )

    def _alpaca_prompt(self, row: Row) -> str:
        instruction = self._string(row, "instruction", "prompt")
        if row.values.get("input") is None or self._string(row, "input", "prompt") == "":
            return _ALPACA.format(context="", instruction=instruction, input="")
        context = ", paired with an input that provides further context"
        given = f"### Input:\n{row.values['input']}\n\n"
        return _ALPACA.format(context=context, instruction=instruction, input=given)

    def _string(self, row: Row, name: str, flag: str) -> str:
        """Returns the text in a field of a row."""
        if name not in row.values:
            raise ValueError(_lacks(row, name, flag, self.names))
        value = row.values[name]
        if not isinstance(value, str):
            raise ValueError(f'{row.file}:{row.place} has {kind_of(value)} in "{name}", which must be a string')
        _refuse_half_characters(value, row, name)
        return value

    def _mark(self, row: Row, flag: str) -> str | int | None:
        """Returns a row's id, group or label; None where no flag asks for it and there is none of the right kind."""
        given: str | None = getattr(self.fields, flag)
        name = given or ("" if flag == "group" else flag)
        value = row.values.get(name)
        if isinstance(value, str):
            _refuse_half_characters(value, row, name)
        right = isinstance(value, str | int) and not isinstance(value, bool)
        if given and name not in row.values:
            others = f", only {_list(row.values)}" if row.values else ""
            raise ValueError(
                f'{row.file}:{row.place} has no field "{name}"{others}; --{flag} takes a field that every row has'
            )
        if given and not right:
            raise ValueError(
                f'{row.file}:{row.place} has {kind_of(value)} in "{name}", which must be a string or a whole number'
            )
        return value if isinstance(value, str | int) and right else None


def _given(fields: Fields) -> tuple[str, ...] | None:
    """Returns the names of the fields of the text that flags name; a prompt or completion alone has its usual mate."""
    if fields.prompt is None and fields.completion is None:
        return None if fields.text is None else (fields.text,)
    if fields.text is not None:
        raise ValueError("--text must stand alone, without --prompt and --completion; leave out one or the other")
    return fields.prompt or "prompt", fields.completion or "completion"


_CHATS = (("messages",), ("conversations",))
_ALPACA_FIELDS = ("instruction", "output")
_QUESTIONS = (("question", "answer"), ("query", "response"), ("input", "output"))
"""Fields that may be a prompt and its completion; they are suggested, not taken."""
_STYLES = (*_CHATS, ("prompt", "completion"), _ALPACA_FIELDS, ("text",))
"""Fields of each way to hold a document, the first ones preferred."""


def _found(rows: Sequence[Row]) -> tuple[str, ...]:
    """Finds the first style that all rows have, else the one that most have, of which some row will be refused."""
    counts = [sum(all(row.values.get(name) is not None for name in style) for row in rows) for style in _STYLES]
    return _STYLES[counts.index(max(counts))] if any(counts) else ("text",)


def _list(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _lacks(row: Row, name: str, flag: str, used: Sequence[str]) -> str:
    """Says that a row lacks a field, and suggests the one with the longest text among those that are not taken."""
    if not row.values:
        return f'{row.file}:{row.place} has no field "{name}", nor any other'
    lengths = {other: len(x) for other, x in row.values.items() if isinstance(x, str) and other not in used}
    suggested = max(lengths, key=lambda other: lengths[other]) if lengths else "NAME"
    for prompt, completion in _QUESTIONS if flag == "text" else ():
        if prompt in lengths and completion in lengths:
            suggested = f"{prompt}, or --prompt {prompt} --completion {completion}"
    return f'{row.file}:{row.place} has no field "{name}", only {_list(row.values)}; --{flag} {suggested}'


def _refuse_half_characters(text: str, row: Row, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f'{row.file}:{row.place} has half a character ({half}) in "{name}"; mend the text') from None


def _as_string(value: str | int | None) -> str | None:
    return None if value is None else str(value)


def _messages(row: Row, name: str) -> tuple[Mapping[str, Any], ...]:
    """Returns the messages of a chat, {"role", "content"}, or ShareGPT's {"from", "value"} in these terms."""
    where = f"{row.file}:{row.place}"
    if name not in row.values:
        raise ValueError(_lacks(row, name, "text", ()))
    value = row.values[name]
    if not isinstance(value, list) or not value:
        kind = "an empty array" if value == [] else kind_of(value)
        raise ValueError(f'{where} has {kind} in "{name}", which must be an array of messages; --text names another')
    return tuple(
        _message(message, f'{where} has in message {number} of "{name}"', row, name)
        for number, message in enumerate(value, 1)
    )


def _message(message: object, begin: str, row: Row, name: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{begin} {kind_of(message)}, which must be an object")
    result = {key: x for key, x in message.items() if x is not None}  # tables have null for what is missing
    if "role" not in result and "from" in result:
        sender = result.pop("from")
        result = {"role": _ROLES.get(sender, sender) if isinstance(sender, str) else sender} | result
        if "value" in result:
            result["content"] = result.pop("value")
    for key in ("role", "content"):
        if key not in result and not (key == "content" and "tool_calls" in result):
            raise ValueError(f'{begin} no "{key}", only {_list(message)}')
        if not isinstance(result.get(key, ""), str):
            raise ValueError(f'{begin} {kind_of(result[key])} as "{key}", which must be a string')
        _refuse_half_characters(result.get(key, ""), row, name)
    return result
