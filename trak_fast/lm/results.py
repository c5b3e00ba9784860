"""From the scores of pieces to those of documents, the best of each query, and the files that hold them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ..store.files import advising_on_denied, atomic_file
from .run import Run, Targets
from .texts.documents import Document

BLOCK_NUMBERS = 2**24
"""Scores that are in memory at a time."""

BINS = 60
"""Bars of a histogram."""


LINE_ENDS = {place: f"\\u{place:04x}" for place in (0x85, 0x2028, 0x2029)}
"""Characters at which some programs end a line, though JSON may hold them, and how JSON escapes them."""


@dataclass(frozen=True)
class Query:
    """A question, or several that are scored as one.

    Attributes:
        number: Its number in its file, from 0, or that of its group.
        documents: The documents that it is made of.
        group: Their common group; None where each document is a query.
    """

    number: int
    documents: tuple[Document, ...]
    group: str | None = None

    @property
    def text(self) -> str:
        """The text of all its documents."""
        return "\n".join(document.shown for document in self.documents)

    def content(self) -> dict[str, Any]:
        """Returns the entries of its line of top.jsonl that say which query it is."""
        if self.group is not None:
            return {"group": self.group, "queries": len(self.documents)}
        return content_of(self.documents[0])


QUESTION = ("group", "id", "text", "prompt", "completion", "messages", "label")
"""Entries of a line of top.jsonl by which a question is told from others."""


def content_of(document: Document) -> dict[str, Any]:
    """Returns the name and texts of a document as they are called in files: id, text, prompt, completion, messages."""
    names = ("id", "text", "prompt", "completion", "messages", "label")
    content = {name: getattr(document, name) for name in names}
    return {name: list(x) if name == "messages" else x for name, x in content.items() if x is not None}


def queries_of(targets: Targets) -> list[Query]:
    """Makes the queries of documents: one each, or one for each group, in the order of their first documents."""
    if all(document.group is None for document in targets.documents):
        return [Query(document.row, (document,)) for document in targets.documents]
    groups: dict[str, list[Document]] = {}
    for document in targets.documents:
        groups.setdefault(str(document.group), []).append(document)
    return [Query(number, tuple(group), name) for number, (name, group) in enumerate(groups.items())]


def checkpoint_weights(run: Run) -> list[float] | None:
    """Returns the weights of checkpoints, which add up to 1; None: all alike.

    LESS weighs by learning rates (Xia et al., ICML 2024, section 3).

    Raises:
        ValueError: The learning rate of a checkpoint is not known.
    """
    if run.settings.method != "less" or len(run.models.folders) == 1:
        return None
    rates = [folder.learning_rate for folder in run.models.folders]
    for folder, rate in zip(run.models.folders, rates, strict=True):
        if rate is None:
            raise ValueError(
                f"--method less weighs checkpoints by their learning rates, and {folder.path} has none: no "
                "trainer_state.json, scheduler.pt or optimizer.pt with it; --method cosine"
            )
    known = [rate for rate in rates if rate is not None]
    if not sum(known) > 0:
        raise ValueError("--method less weighs checkpoints by their learning rates, and all of them are 0")
    return [rate / sum(known) for rate in known]


def write_scores(run: Run, targets: Targets, path: Path, control: Targets | None = None) -> None:
    """Writes the score of each document for each query to a .npy file, (n, m) float32.

    The score of a document is the sum over its pieces, or the mean over its maskings; that of a group of questions is
    their mean.

    Args:
        run: The run, with the features of all documents and questions.
        targets: The questions.
        path: The file; it appears when it is whole.
        control: Questions whose mean score is subtracted.
    """
    pieces = [_PieceScores(run, targets)]
    if control is not None:
        pieces.append(_PieceScores(run, control))
    run.ranks.first(_write_documents, run, pieces, path)
    for each in (targets, control):
        if each is not None:
            run.forget_scores(each)


class _PieceScores:
    """The scores of pieces of documents for pieces of questions, and the way from them to documents and queries."""

    def __init__(self, run: Run, targets: Targets) -> None:
        weights = checkpoint_weights(run)
        parts = [(None, 1.0)] if weights is None else [([i], weight) for i, weight in enumerate(weights)]
        # each matrix is a file of its own, which stays as long as it is mapped
        self.matrices = [(run.traker.finalize_scores(targets.exp_name, ids), weight) for ids, weight in parts]
        self.averaging = averaging_of(run, targets)
        self.counts = run.pieces_of_documents
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.maskings = run.maskings

    def read(self, documents: slice) -> NDArray[np.float64]:
        """Returns the scores of some documents for all queries."""
        total = np.zeros((documents.stop - documents.start, self.averaging.shape[1]))
        for matrix, weight in self.matrices:
            block = np.asarray(matrix[self.starts[documents.start] : self.starts[documents.stop]], np.float64)
            total += weight * _sums(block, self.counts[documents], maskings=self.maskings) @ self.averaging
        return total


def _write_documents(run: Run, pieces: Sequence[_PieceScores], path: Path) -> None:
    """Writes the scores of documents, from which the mean of those of a control set is subtracted."""
    shape = (len(run.pieces_of_documents), pieces[0].averaging.shape[1])
    step = max(1, BLOCK_NUMBERS // max(1, *(sum(each.averaging.shape) for each in pieces)))
    with advising_on_denied(path.parent), atomic_file(path) as temporary:
        total = open_memmap(temporary, "w+", np.float32, shape)
        for first in range(0, shape[0], step):
            documents = slice(first, min(shape[0], first + step))
            own, *controls = [each.read(documents) for each in pieces]
            total[documents] = own - sum(control.mean(1, keepdims=True) for control in controls)
        total.flush()
        del total


def _sums(block: NDArray[np.float64], counts: NDArray[np.int64], *, maskings: int) -> NDArray[np.float64]:
    """Adds up the rows of each document, which follow each other, and averages over maskings."""
    if maskings == 1 and (counts == 1).all():
        return block
    sums = np.zeros((len(counts), block.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(counts)), counts), block)
    return sums / maskings


def averaging_of(run: Run, targets: Targets) -> NDArray[np.float64]:
    """Returns the matrix from the scores of pieces of questions to those of queries, (pieces, queries)."""
    queries = queries_of(targets)
    columns = {id(document): column for column, query in enumerate(queries) for document in query.documents}
    owners = [columns[id(document)] for document in targets.documents]
    matrix = np.zeros((len(targets.pieces), len(queries)))
    for place, question in enumerate(targets.owners):
        matrix[place, owners[question]] = 1 / (run.maskings * len(queries[owners[question]].documents))
    return matrix


def tie_of(run: Run, targets: Targets, control: Targets | None = None) -> float | None:
    """Estimates the standard deviation of a score by projection and rounding; None where an inverse is in scores.

    The score of two pieces has the noise 1/√k, and that of signs √(π/2) times as much. Noises of different windows,
    questions and checkpoints are independent; those of M maskings, which are alike, are taken to fall by √M and not by
    M, as the mean over the pairs of M × M independent ones would.

    Args:
        run: The run, with the features of all documents and questions.
        targets: The questions.
        control: Questions whose mean score is subtracted.

    Returns:
        Its root mean square over the documents and queries.
    """
    traker = run.traker
    if traker._estimator.inverts or not traker.normalize:
        return None
    ids = range(len(run.models.folders))
    shares = np.array(checkpoint_weights(run) or np.full(len(ids), 1 / len(ids)))
    squares = (averaging_of(run, targets) ** 2).sum(0).mean()
    if control is not None:
        squares += (averaging_of(run, control).mean(1) ** 2).sum()
    windows = run.pieces_of_documents.mean() / run.maskings
    rounding = math.pi / 2 if traker.store.store_dtype == "1bit" else 1.0
    weight = np.mean([np.array(traker.store.train(i).weights).mean() for i in ids]) if traker.use_weights else 1.0
    variance = windows * squares * (shares**2).sum() * rounding / traker.proj_dim
    return float(weight * math.sqrt(variance))


@dataclass(frozen=True)
class Ranking:
    """The best and worst documents of a query.

    Attributes:
        query: The query.
        top: Rows of the best documents, from the highest score on; of equal scores, the lower row first.
        top_scores: Their scores.
        worst: Rows of the most harmful documents, from the lowest score on.
        worst_scores: Their scores.
        counts: Documents in each bin of the histogram of all scores.
        edges: Edges of the bins.
    """

    query: Query
    top: NDArray[np.int64]
    top_scores: NDArray[np.float32]
    worst: NDArray[np.int64]
    worst_scores: NDArray[np.float32]
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]


def rank(scores: NDArray[np.float32], queries: Sequence[Query], *, top: int, worst: int) -> Iterator[Ranking]:
    """Ranks the documents of each query.

    Args:
        scores: (n, m), in memory or not.
        queries: The m queries.
        top: Best documents of each.
        worst: Most harmful documents of each.
    """
    step = max(1, BLOCK_NUMBERS // max(1, len(scores)))
    for first in range(0, len(queries), step):
        block = np.ascontiguousarray(np.asarray(scores[:, first : first + step]).T)
        for query, values in zip(queries[first : first + step], block, strict=True):
            best = _lowest(-values, top)
            least = _lowest(values, worst)
            counts, edges = np.histogram(values.astype(np.float64), BINS)
            yield Ranking(
                query=query,
                top=best,
                top_scores=values[best],
                worst=least,
                worst_scores=values[least],
                counts=counts,
                edges=edges,
            )


def _lowest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Returns the places of the lowest values, from the lowest on; of equal ones, the lower place first."""
    count = min(count, len(values))
    if not count:
        return np.zeros(0, np.int64)
    bound = np.partition(values, count - 1)[count - 1]
    places = np.flatnonzero(values <= bound)
    return places[np.argsort(values[places], kind="stable")][:count]


def line_of(ranking: Ranking, documents: Sequence[Document]) -> dict[str, Any]:
    """Returns a query's line of top.jsonl."""
    return {
        "query": ranking.query.number,
        **ranking.query.content(),
        "top": _entries(ranking.top, ranking.top_scores, documents),
        "worst": _entries(ranking.worst, ranking.worst_scores, documents),
    }


def _entries(
    rows: NDArray[np.int64], scores: NDArray[np.float32], documents: Sequence[Document]
) -> list[dict[str, Any]]:
    """Describes documents with their ranks and scores."""
    return [
        {"rank": rank, "score": rounded(score), **_place_of(row, documents), **content_of(documents[row])}
        for rank, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), 1)
    ]


def _place_of(row: int, documents: Sequence[Document]) -> dict[str, Any]:
    """Returns the row of a document in the whole set, and its file."""
    return {"row": row, "file": documents[row].file}


def rounded(score: float) -> float:
    """Rounds a score to the digits that float32 has."""
    return float(f"{float(score):.7g}") if math.isfinite(score) else float(score)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a .jsonl file."""
    with _writing(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).translate(LINE_ENDS) + "\n")


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    """Opens a text file that appears when it is whole."""
    with (
        advising_on_denied(path.parent),
        atomic_file(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="replace", newline="") as file,
    ):
        yield file


TABLE = ("query", "query_id", "rank", "score", "row", "id", "file", "text")
"""Columns of top.csv. The most harmful documents have negative ranks, from −1 on."""


def write_table(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes lines of top.jsonl as CSV, a row for each document of each query."""
    with _writing(path) as file:
        writer = csv.DictWriter(file, TABLE, restval="", extrasaction="ignore")
        writer.writeheader()
        for line in lines:
            marks = {"query": line["query"], "query_id": line.get("group", line.get("id", ""))}
            for sign, key in ((1, "top"), (-1, "worst")):
                for entry in line[key]:
                    place = {"rank": sign * entry["rank"], "text": _text_of(entry)}
                    writer.writerow({**entry, **marks, **place})


def _text_of(entry: Mapping[str, Any]) -> str:
    """Returns the text of an entry in one column."""
    if "messages" in entry:
        return json.dumps(entry["messages"], ensure_ascii=False)
    return str(entry.get("text", entry.get("prompt", "") + entry.get("completion", "")))


def select(
    scores: NDArray[np.float32], queries: Sequence[Query], documents: Sequence[Document], count: int
) -> list[dict[str, Any]]:
    """Chooses the documents whose highest score for a query, or for a group of them, is highest (LESS, section 3).

    Args:
        scores: (n, m), in memory or not.
        queries: The m queries.
        documents: The n documents.
        count: Documents to choose.

    Returns:
        A line of selected.jsonl for each: rank, score, the query or group that it is chosen for, row, file, and the
        fields that it was read from, so that the file can be trained on.
    """
    step = max(1, BLOCK_NUMBERS // scores.shape[1])
    best = np.zeros(len(scores), np.float32)
    columns = np.zeros(len(scores), np.int64)
    for first in range(0, len(scores), step):
        block = np.asarray(scores[first : first + step])
        columns[first : first + step] = block.argmax(1)
        best[first : first + step] = block.max(1)
    lines = []
    for rank, row in enumerate(_lowest(-best, count), 1):
        query = queries[columns[row]]
        mark = {"query": query.number} if query.group is None else {"group": query.group}
        place = _place_of(int(row), documents)
        lines.append({"rank": rank, "score": rounded(best[row]), **mark, **place, **content_of(documents[row])})
    return lines


def number_to_select(wanted: str, total: int) -> int:
    """Reads --select: "5%" of the documents, or a number of them.

    Raises:
        ValueError: It is neither.
    """
    text = wanted.strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    count = number / 100 * total if text.endswith("%") else number
    if not 0 < count <= total or not (text.endswith("%") or number.is_integer()):
        raise ValueError(f"--select must be a share such as 5% or a number up to {total:,}, not {wanted!r}")
    return max(1, round(count))


def self_influence_lines(run: Run) -> list[dict[str, Any]]:
    """Ranks the training documents by their self-influence, the highest first: wrong labels, outliers, rare texts."""
    traker = run.traker
    normalize, traker.normalize = traker.normalize, False  # the norm is what is sought
    try:
        influence = traker.self_influence(range(len(run.models.folders)))
    finally:
        traker.normalize = normalize
    counts = run.pieces_of_documents
    values = _sums(influence[:, None].astype(np.float64), counts, maskings=run.maskings)[:, 0].astype(np.float32)
    order = _lowest(-values, len(values))
    return _entries(order, values[order], run.documents.documents)
