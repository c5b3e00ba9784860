"""The answer to questions: scores, rankings, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..store.files import advising_on_denied, atomic_file
from . import results
from .page import render
from .run import Run, Targets
from .view import page_content, token_parts

ALL_SCORES = "scores.npy"
"""The file with the score of each document for each query."""

SELECTED = "selected.jsonl"
"""The file with the documents that were selected."""


@dataclass(frozen=True)
class Wanted:
    """The results that are wanted.

    Attributes:
        top: Best documents of each query.
        worst: Most harmful documents of each query.
        tokens: Best documents of each query whose tokens are coloured.
        scores: Keeps all scores.
        select: Share or number of training documents to select; None: none.
    """

    top: int
    worst: int
    tokens: int
    scores: bool = False
    select: str | None = None


@dataclass(frozen=True)
class Answer:
    """The results for some questions.

    Attributes:
        rankings: The best and worst documents of each query.
        entries: The lines of top.jsonl.
        folder: The folder of the files.
        selected: Number of documents that were selected.
    """

    rankings: Sequence[results.Ranking]
    entries: Sequence[dict[str, Any]]
    folder: Path
    selected: int = 0


def has_other_answer(run: Run, targets: Targets, name: str | None) -> bool:
    """Tells if the folder of results has those of other questions."""
    path = run.folder.results(name) / "top.jsonl"
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    known = [{key: line.get(key) for key in results.QUESTION} for line in lines]
    own = [query.content() for query in results.queries_of(targets)]
    return known != [{key: content.get(key) for key in results.QUESTION} for content in own]


def answer(
    run: Run,
    targets: Targets,
    control: Targets | None,
    wanted: Wanted,
    *,
    name: str | None,
    title: str,
    facts: Sequence[tuple[str, str]],
    tie: float | None,
) -> Answer:
    """Answers questions, and writes top.jsonl, top.csv, index.html and what else is wanted.

    Under torchrun all processes make the call; the first one writes.

    Args:
        run: The run, with the features of all documents and questions.
        targets: The questions.
        control: Questions whose mean score is subtracted.
        wanted: The results that are wanted.
        name: Name of the folder of results in that of the run; None: the run's own.
        title: The page's title.
        facts: Labels and texts that say how the page was made.
        tie: The noise of scores (see `results.tie_of`); None where it is not known.

    Raises:
        ValueError: --select is no share of the documents.
        OSError: The disk is full, for example.
    """
    documents = run.documents.documents
    count = 0 if wanted.select is None else results.number_to_select(wanted.select, len(documents))
    folder = run.folder.results(name)
    path = folder / ALL_SCORES
    results.write_scores(run, targets, path, control)
    queries = results.queries_of(targets)
    try:
        with run.ranks.together():  # the file is deleted once all processes have read it
            scores = np.load(path, mmap_mode="r", allow_pickle=False)
            rankings = list(results.rank(scores, queries, top=wanted.top, worst=wanted.worst))
            selected = results.select(scores, queries, documents, count) if count else []
            del scores
    finally:
        if not wanted.scores:
            run.ranks.first(path.unlink, missing_ok=True)
    parts = token_parts(run, targets, rankings, wanted.tokens)
    entries = [results.line_of(ranking, documents) for ranking in rankings]
    if run.ranks.rank == 0:
        results.write_lines(folder / "top.jsonl", entries)
        results.write_table(folder / "top.csv", entries)
        if count:
            results.write_lines(folder / SELECTED, selected)
        else:
            (folder / SELECTED).unlink(missing_ok=True)  # chosen by other questions, maybe
        html = render(page_content(run, rankings, parts, facts, title, tie))
        with advising_on_denied(folder), atomic_file(folder / "index.html") as temporary:
            temporary.write_text(html, encoding="utf-8")
    return Answer(rankings=rankings, entries=entries, folder=folder, selected=count)
