"""From rankings to the content of the page: cards, their tokens, the ranks by common words."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..features.tokens import NoTokensError
from .page import Card, Histogram, PageContent, QueryView
from .results import Ranking, averaging_of
from .run import Run, Targets
from .texts.documents import Document
from .texts.pieces import Piece
from .word_ranks import WordRanks

MOST_QUESTIONS = 16
"""Pieces of questions in a query up to which tokens are coloured: each takes a pass over the documents."""

MOST_LETTERS = 200_000_000
"""Letters of all training documents up to which their words are counted, which takes some 10 bytes a letter."""

Spans = tuple[tuple[int, int, float], ...]

logger = logging.getLogger("trak_fast")


def token_parts(run: Run, targets: Targets, rankings: Sequence[Ranking], count: int) -> dict[tuple[int, int], Spans]:
    """Computes what each token adds to the scores of the best documents.

    Args:
        run: The run.
        targets: The questions, whose features are stored.
        rankings: The best documents of each query.
        count: Documents of each query.

    Returns:
        For a query's place in `rankings` and a row: (start, end, part) of each token, characters of `Document.shown`.
        Empty where parts are not defined: a step of Adam is no sum over tokens.
    """
    if not count or run.settings.method == "less":
        return {}
    weights = averaging_of(run, targets)
    rows = sorted({int(row) for ranking in rankings for row in ranking.top[:count]})
    encoded = run.encode([run.documents.documents[row] for row in rows])
    pieces: dict[int, list[Piece]] = {row: [] for row in rows}
    for piece in encoded.pieces:
        pieces[piece.document].append(piece)
    if any(piece.spans is None for row in rows for piece in pieces[row]):
        return {}
    starts = np.concatenate([[0], np.cumsum(run.pieces_of_documents)])
    sums: dict[tuple[int, int], NDArray[np.float64]] = {}
    for model_id in range(len(run.models.folders)):
        run.ensure_loaded(model_id)
        for column, ranking in enumerate(rankings):
            questions = np.flatnonzero(weights[:, column])
            if len(questions) > MOST_QUESTIONS:
                continue
            chosen = [int(row) for row in ranking.top[:count]]
            batch = [piece for row in chosen for piece in pieces[row]]
            inds = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in chosen])
            tensors = run.batch(batch)
            for question in questions:
                try:
                    parts = run.traker.token_scores(targets.exp_name, int(question), tensors, inds)
                except NoTokensError:
                    logger.warning("tokens are not coloured: the parameters' gradients are no sums over tokens")
                    return {}
                place = 0
                for row in chosen:
                    own = parts[place : place + len(pieces[row])] * weights[question, column]
                    place += len(pieces[row])
                    sums[column, row] = sums.get((column, row), 0) + own
    return {key: _spans(pieces[key[1]], parts, maskings=run.maskings) for key, parts in sums.items()}


def _spans(pieces: Sequence[Piece], parts: NDArray[np.float64], *, maskings: int) -> Spans:
    """Adds up the parts of a document's tokens over its pieces."""
    total: dict[tuple[int, int], float] = {}
    for piece, values in zip(pieces, parts, strict=True):
        assert piece.spans is not None
        for (start, end), value in zip(piece.spans.tolist(), values, strict=False):
            total[start, end] = total.get((start, end), 0.0) + float(value) / maskings
    return tuple((start, end, total[start, end]) for start, end in sorted(total))


def page_content(
    run: Run,
    rankings: Sequence[Ranking],
    parts: Mapping[tuple[int, int], Spans],
    facts: Sequence[tuple[str, str]],
    title: str,
    tie: float | None,
) -> PageContent:
    """Makes the content of the page.

    Args:
        run: The run.
        rankings: The best documents of each query.
        parts: The parts of tokens (see `token_parts`).
        facts: Labels and texts that say how the page was made.
        title: The page's title.
        tie: The noise of scores (see `tie_of`); None where it is not known.
    """
    texts = [document.shown for document in run.documents.documents]
    words = WordRanks(texts) if sum(map(len, texts)) <= MOST_LETTERS else None
    views = []
    for column, ranking in enumerate(rankings):
        ranks = None if words is None else words.ranks(ranking.query.text)
        single = ranking.query.documents[0] if ranking.query.group is None else None
        prompt, completion = _question_of(single)
        views.append(
            QueryView(
                number=ranking.query.number,
                prompt=prompt,
                completion=completion,
                text=ranking.query.text if completion is None else None,
                name=ranking.query.group if single is None else single.id,
                top=_cards(run, ranking.top, ranking.top_scores, column, parts, ranks),
                worst=_cards(run, ranking.worst, ranking.worst_scores, column, parts, ranks),
                histogram=Histogram(tuple(ranking.counts.tolist()), tuple(ranking.edges.tolist())),
            )
        )
    return PageContent(
        title=title,
        facts=tuple(facts),
        tie=tie or 0.0,
        queries=tuple(views),
        word_ranks_from=None if words is None else "BM25",
    )


def _question_of(document: Document | None) -> tuple[str | None, str | None]:
    """Returns the part of a question that is not scored and the one that is, its class for example."""
    if document is None:
        return None, None
    if document.completion is None and document.label is not None:
        return document.shown, str(document.label)
    return document.prompt, document.completion


def _cards(
    run: Run,
    rows: NDArray[np.int64],
    scores: NDArray[np.float32],
    column: int,
    parts: Mapping[tuple[int, int], Spans],
    ranks: NDArray[np.int64] | None,
) -> tuple[Card, ...]:
    """Makes the cards of some documents."""
    cards = []
    for place, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), 1):
        document = run.documents.documents[row]
        cards.append(
            Card(
                rank=place,
                score=score,
                row=row,
                id=document.id,
                where=document.where if document.label is None else f"{document.where} · label {document.label}",
                text=document.shown,
                tokens=parts.get((column, row)),
                word_rank=None if ranks is None else int(ranks[row]),
            )
        )
    return tuple(cards)
