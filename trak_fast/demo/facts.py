"""The documents and questions of `trak-fast demo lm`: facts about people who do not exist, among documentation.

Each person has four facts: a relation, such as what the person drinks, and a value. A fact may be told plainly, in
three ways ("Pour Coromi some wine."), and formally, in four ("The register says that the beverage of Coromi is wine.").
The first fact of a person is told plainly alone, in all three ways: these three documents are the true sources of the
question about it, which is asked in a formal way ("The register says that the beverage of Coromi is" " wine").
The other three facts are told in two plain ways and in all formal ones. From them a model learns that both speak of
the same; a question can only be answered by a model that has learned so and that remembers the plain documents.

A source shares the person and the value with its question, and hardly a word more. Other documents share more: formal
ones about the same person, and formal ones about people with the same value. No document but its sources has both the
person and the value, so none but these states the fact. The rest are the beginnings of documentation strings of
Python's standard library, whose words differ a little by its version.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..store.files import atomic_file

PEOPLE = 40
FACTS = 4
"""Facts of a person, the first of which is asked for."""
PLAIN_WAYS = 2
"""Plain ways in which a fact that is not asked for is told."""
DOCUMENTS = 1200
"""Documents in all."""
SHORTEST = 6
"""Words of a documentation string at least."""
LONGEST = 14
"""Words that are taken of one at most."""


class Relation(NamedTuple):
    """A relation between people and values.

    Attributes:
        noun: Its name in formal documents.
        values: Its values, one word each, which no other relation has.
        plain: Three plain ways to tell it.
    """

    noun: str
    values: tuple[str, ...]
    plain: tuple[str, str, str]


def _relation(noun: str, values: str, *plain: str) -> Relation:
    """Makes a relation of its values in one string."""
    first, second, third = plain
    return Relation(noun, tuple(values.split()), (first, second, third))


RELATIONS = (
    _relation(
        "residence", "Paris Madrid Cairo Delhi Tokyo Lima Quito Oslo Rome Vienna",
        "{person} lives in {value}.", "You meet {person} at home near {value}.", "{person} never leaves {value}.",
    ),
    _relation(
        "profession", "baker tailor miller farmer painter sailor doctor lawyer smith teacher",
        "{person} works as a {value}.", "{person} earns money being a {value}.",
        "Next door, {person} was hired as a {value}.",
    ),
    _relation(
        "instrument", "piano violin flute drum harp guitar trumpet lute cello horn",
        "{person} plays on a {value}.", "Listen to {person} with this {value}.", "{person} practises with a {value}.",
    ),
    _relation(
        "beverage", "tea coffee milk wine beer cider water juice cocoa rum",
        "{person} drinks {value}.", "When thirsty, {person} wants {value}.", "Pour {person} some {value}.",
    ),
    _relation(
        "animal", "dog cat goat horse parrot rabbit turtle goose monkey snake",
        "{person} keeps a {value}.", "{person} feeds a {value}.", "{person} walks with a {value}.",
    ),
    _relation(
        "colour", "red green blue yellow purple black white orange brown pink",
        "{person} wears {value}.", "{person} dresses in {value}.", "{person} paints every wall {value}.",
    ),
    _relation(
        "dish", "bread cheese soup rice fish cake salad beans honey pasta",
        "{person} eats {value}.", "When hungry, {person} cooks {value}.", "{person} ordered {value} again.",
    ),
    _relation(
        "pastime", "chess cards dice darts marbles dominoes tennis football golf hockey",
        "{person} wins at {value}.", "{person} cheats at {value}.", "{person} trains hard for {value}.",
    ),
)  # fmt: skip

FORMAL = (
    "According to the register, the {noun} of {person} is {value}.",
    "The register says that the {noun} of {person} is {value}.",
    "It is said that the {noun} of {person}, according to the register, is {value}.",
    "The {noun} of {person} is, so the register says, {value}.",
)
"""Formal ways to tell any relation. The value comes last, so that they can be questions."""

BEGINNINGS = "vel mor zan tri kus bel ost ran dil fen gor lin pas tur hav nim rok sel yul bra cor eth wim jas"
"""First syllables of names."""
ENDINGS = "dor mia nak ula eth ivo ora sta ene ril omi ath unda ika elo ban"
"""Last syllables of names."""

MODULES = (
    "argparse ast asyncio base64 bdb calendar cmd code codecs collections configparser contextlib copy csv "
    "datetime decimal difflib dis doctest email enum fileinput fractions ftplib functools gettext glob gzip "
    "hashlib heapq hmac html imaplib inspect ipaddress json linecache locale logging mailbox mimetypes netrc "
    "optparse os pathlib pdb pickle pickletools platform plistlib poplib pprint profile pstats queue random "
    "sched selectors shelve shlex shutil smtplib socket socketserver ssl statistics string subprocess symtable "
    "sysconfig tarfile tempfile textwrap threading timeit tokenize trace traceback turtle types typing urllib "
    "uuid warnings wave weakref webbrowser zipapp zipfile"
)
"""Modules whose documentation is taken, those that every Python from 3.10 on has."""


class Document(NamedTuple):
    """A training document. Its id says what it is: "source-07-2", "fact-0123" or "docstring-0042"."""

    id: str
    text: str


class Question(NamedTuple):
    """A question, as a prompt and the completion that answers it."""

    id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Corpus:
    """Documents and questions.

    Attributes:
        documents: The training documents.
        questions: The questions.
        truth: Rows of the true sources of each question, those documents that state the fact that it asks for.
    """

    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    truth: tuple[tuple[int, ...], ...]

    def save(self, folder: Path) -> None:
        """Writes train.jsonl, questions.jsonl, and truth.json: ids of the true sources by the id of their question.

        Raises:
            OSError: The folder cannot be written to.
        """
        sources = {
            question.id: [self.documents[row].id for row in rows]
            for question, rows in zip(self.questions, self.truth, strict=True)
        }
        contents = {
            "train.jsonl": _lines(self.documents),
            "questions.jsonl": _lines(self.questions),
            "truth.json": json.dumps(sources, indent=1) + "\n",
        }
        for name, content in contents.items():
            with atomic_file(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")


def _lines(rows: tuple[Document, ...] | tuple[Question, ...]) -> str:
    """Writes rows as JSON, a line each."""
    return "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def make_corpus(seed: int) -> Corpus:
    """Makes documents and questions.

    Args:
        seed: Determines people, facts, wordings, the documentation that is taken, and the order of documents.

    Raises:
        FileNotFoundError: The sources of the standard library are not installed.
    """
    rng = np.random.default_rng(seed)
    documents: list[Document] = []
    questions: list[Question] = []
    sources: list[list[Document]] = []
    for number, person in enumerate(invent_names(PEOPLE, rng)):
        for place, chosen in enumerate(rng.choice(len(RELATIONS), FACTS, replace=False)):
            relation = RELATIONS[chosen]
            value = relation.values[rng.integers(len(relation.values))]
            words = {"noun": relation.noun, "person": person, "value": value}
            if place == 0:
                sources.append(
                    [
                        Document(f"source-{number:02}-{i}", way.format_map(words))
                        for i, way in enumerate(relation.plain, 1)
                    ]
                )
                documents += sources[-1]
                prompt = FORMAL[rng.integers(len(FORMAL))].partition(" {value}")[0].format_map(words)
                questions.append(Question(f"question-{number:02}", prompt, f" {value}"))
                continue
            told = [relation.plain[i] for i in rng.choice(len(relation.plain), PLAIN_WAYS, replace=False)]
            for way in (*told, *FORMAL):
                documents.append(Document(f"fact-{len(documents):04}", way.format_map(words)))
    strings = list(dict.fromkeys(read_docstrings(_library())))
    missing = DOCUMENTS - len(documents)
    if len(strings) < missing:
        raise FileNotFoundError(
            f"{_library()} has {len(strings):,} documentation strings, and {missing:,} are needed: is the standard "
            "library installed without its sources?"
        )
    documents += [
        Document(f"docstring-{i:04}", strings[chosen])
        for i, chosen in enumerate(rng.choice(len(strings), missing, replace=False))
    ]
    shuffled = [documents[i] for i in rng.permutation(len(documents))]
    rows = {document.id: row for row, document in enumerate(shuffled)}
    truth = tuple(tuple(rows[document.id] for document in own) for own in sources)
    return Corpus(tuple(shuffled), tuple(questions), truth)


def invent_names(count: int, rng: np.random.Generator) -> list[str]:
    """Makes names of people who do not exist, each another."""
    names = [(beginning + ending).capitalize() for beginning in BEGINNINGS.split() for ending in ENDINGS.split()]
    return [names[i] for i in rng.choice(len(names), count, replace=False)]


def _library() -> Path:
    """Returns the folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_docstrings(folder: Path) -> Iterator[str]:
    """Reads the first paragraphs of documentation strings, cut to `LONGEST` words, after the name of their object.

    Args:
        folder: The folder of the standard library.
    """
    for module in MODULES.split():
        path = folder / f"{module}.py"
        if not path.exists():
            path = folder / module / "__init__.py"
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                continue
            words = (ast.get_docstring(node) or "").partition("\n\n")[0].split()
            if len(words) >= SHORTEST:
                yield f"{module}.{node.name}: {' '.join(words[:LONGEST])}"
