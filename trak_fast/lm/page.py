"""The page of `trak-fast lm`: queries, the documents that help and harm most on each, one file that needs no other."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike

from ..webpage import document

UNSAFE = re.compile("[<>&\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")
"""Characters that the page's data escapes: those of HTML, halves of pairs, and all that an editor does not show."""
BROKEN = re.compile("[\x00\ud800-\udfff]")
"""Characters that HTML cannot hold."""


@dataclass(frozen=True)
class Card:
    """A document as it is shown for a query.

    Attributes:
        rank: Its place, from 1: from the best among the top, from the most harmful among the worst.
        score: Its score for the query.
        row: Its number in the whole set, from 0.
        id: Its name, or None.
        where: Its source, such as "wiki.jsonl:812".
        text: Its text.
        tokens: The first character in `text`, the one after the last, and the part of the score of each token, or None.
            A token without characters (start = end) is told of below the text.
        word_rank: Its rank by shared words among all documents, from 1, or None.
    """

    rank: int
    score: float
    row: int
    id: str | None
    where: str
    text: str
    tokens: tuple[tuple[int, int, float], ...] | None = None
    word_rank: int | None = None


@dataclass(frozen=True)
class Histogram:
    """The distribution of the scores of all documents for a query.

    Attributes:
        counts: Documents in each bin, (bins,).
        edges: Borders of the bins, rising, (bins + 1,).
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]

    @classmethod
    def count(cls, scores: ArrayLike, bins: int = 60) -> Histogram:
        """Counts the scores of all documents, (n,), in bins of one width."""
        counts, edges = np.histogram(np.asarray(scores, np.float64), bins=bins)
        return cls(counts=tuple(counts.tolist()), edges=tuple(edges.tolist()))


@dataclass(frozen=True)
class QueryView:
    """A query with its documents.

    Attributes:
        number: Its number, the one of links to it (#q3).
        prompt: The text before the completion, which is not scored, or None.
        completion: The scored text, or None.
        text: The scored text of a query without prompt and completion, or None.
        name: Its name, or None.
        top: The most helpful documents, best first.
        worst: The most harmful documents, most harmful first.
        histogram: The scores of all documents.
    """

    number: int
    prompt: str | None
    completion: str | None
    text: str | None
    name: str | None
    top: tuple[Card, ...]
    worst: tuple[Card, ...]
    histogram: Histogram


@dataclass(frozen=True)
class PageContent:
    """All that a page shows.

    Attributes:
        title: Its heading.
        facts: Labels and values that tell how the scores were made.
        tie: The difference of scores below which documents are ties; 0 if there is none.
        queries: The queries, at least one.
        word_ranks_from: The method of the cards' word ranks, "BM25", or None.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    tie: float
    queries: tuple[QueryView, ...]
    word_ranks_from: str | None = None


def render(content: PageContent) -> str:
    """Makes the page.

    Args:
        content: All that it shows.

    Returns:
        HTML that loads nothing and that UTF-8 can encode, whatever the texts hold.

    Raises:
        ValueError: There is no query, two have one number, a number is not finite, a histogram's edges do not fit its
            counts, a token lies outside its text, or cards of one row show different documents.
    """
    if not content.queries:
        raise ValueError("`queries` must hold at least one query, not none; leave the page out")
    if not (math.isfinite(content.tie) and content.tie >= 0):
        raise ValueError(f"`tie` must be finite and not negative, not {content.tie}; 0 for no ties")
    facts = "".join(f"<div><dt>{_html(label)}</dt><dd>{_html(value)}</dd></div>" for label, value in content.facts)
    folder = files(__package__)
    body = f"""<header class="top">
<h1>{_html(content.title)}</h1>
<p>For each query, the training documents that help the model most on it, and those that harm it most.</p>
</header>
<noscript><p class="noscript">A small script in this file draws the queries and documents, and scripts are switched
off here. Allow them for this file (it loads nothing), or read top.jsonl beside it.</p></noscript>
<div id="page" hidden></div>
<footer>
<h2>How it was made</h2>
<dl class="facts">{facts}</dl>
{_honest_line(content.tie)}
</footer>
<script type="application/json" id="content">{_island(_data(content))}</script>"""
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("text.js", "page.js"))
    return document(BROKEN.sub("\ufffd", content.title), body, style, script)


def _honest_line(tie: float) -> str:
    """Tells how far scores can be trusted."""
    if not tie:
        return ""
    return (
        f"<p>Scores are ±{tie:.2g}: documents whose scores are closer than that are ties, and their order means "
        "nothing.</p>"
    )


def _html(text: str) -> str:
    """Escapes text for HTML."""
    return escape(BROKEN.sub("\ufffd", text))


def _island(data: object) -> str:
    """Writes data as JSON that neither ends its HTML element nor holds a character that UTF-8 or a reader misses."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _data(content: PageContent) -> dict[str, object]:
    """Collects what the script draws; a document's text is there once, however many queries show it."""
    documents: dict[int, tuple[str | None, str, str]] = {}
    places: dict[int, int] = {}
    queries = []
    for query in content.queries:
        for card in (*query.top, *query.worst):
            shown = (card.id, card.where, card.text)
            if documents.setdefault(card.row, shown) != shown:
                raise ValueError(f"cards of row {card.row} must show one document, not {shown[:2]} and another")
            places.setdefault(card.row, len(places))
        queries.append(_query_data(query, places))
    if len({query.number for query in content.queries}) < len(queries):
        raise ValueError("queries must have different numbers, not one twice: links need them")
    return {
        "title": content.title,
        "tie": content.tie,
        "wordRanksFrom": content.word_ranks_from,
        "documents": [
            {"row": row, "id": name, "where": where, "text": text} for row, (name, where, text) in documents.items()
        ],
        "queries": queries,
    }


def _query_data(query: QueryView, places: dict[int, int]) -> dict[str, object]:
    """Collects what the script draws of a query.

    Args:
        query: The query.
        places: Row -> place in the list of documents.
    """
    counts, edges = query.histogram.counts, query.histogram.edges
    if len(edges) != len(counts) + 1 or not np.isfinite(edges).all():
        raise ValueError(
            f"query {query.number}: the histogram must have one finite edge more than counts, "
            f"not {len(edges)} edges of {len(counts)} counts"
        )
    return {
        "number": query.number,
        "name": query.name,
        "prompt": query.prompt,
        "completion": query.completion,
        "text": query.text,
        "counts": counts,
        "edges": edges,
        "top": [_card_data(card, places[card.row]) for card in query.top],
        "worst": [_card_data(card, places[card.row]) for card in query.worst],
    }


def _card_data(card: Card, place: int) -> dict[str, object]:
    """Collects what the script draws of a document for one query."""
    if not math.isfinite(card.score):
        raise ValueError(f"the score of row {card.row} must be finite, not {card.score}")
    data: dict[str, object] = {"document": place, "rank": card.rank, "score": card.score, "wordRank": card.word_rank}
    if card.tokens is not None:
        spans, rest = _merge(card)
        data["tokens"] = _in_utf16(card.text, spans)
        data["rest"] = rest
    return data


def _merge(card: Card) -> tuple[list[tuple[int, int, float]], float | None]:
    """Joins tokens that share a character, such as those of one emoji: their parts add up.

    Returns:
        The spans in order, apart from each other, and the sum of the parts of tokens without characters, or None.
    """
    spans: list[tuple[int, int, float]] = []
    rest: float | None = None
    for start, end, part in sorted(card.tokens or ()):
        if not (0 <= start <= end <= len(card.text) and math.isfinite(part)):
            raise ValueError(
                f"tokens of row {card.row} must lie in its text of {len(card.text)} characters and have finite parts, "
                f"not {(start, end, part)}"
            )
        if start == end:
            rest = (rest or 0.0) + part
        elif spans and start < spans[-1][1]:
            first, last, before = spans[-1]
            spans[-1] = (first, max(last, end), before + part)
        else:
            spans.append((start, end, part))
    return spans, rest


def _in_utf16(text: str, spans: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Counts characters as JavaScript does: those beyond U+FFFF are two. Parts keep three digits."""
    doubles = [] if text.isascii() else [place for place, letter in enumerate(text) if letter > "\uffff"]
    return [
        (start + bisect_left(doubles, start), end + bisect_left(doubles, end), float(f"{part:.3g}"))
        for start, end, part in spans
    ]
