"""The lines that the command prints: the model, the documents, the way to features, the best documents."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..traker import TRAKer
from .results import Query, Ranking
from .run import Run, Targets
from .texts.documents import Documents
from .texts.encoding import Encoded

KINDS = {"sjlt": "sparse", "rademacher": "dense", "normal": "dense"}
"""Kinds of projection, in a word."""

LABEL = 10
"""Letters of the label at the start of a line."""

SHOWN_QUERIES = 3
"""Queries whose best documents are printed."""

SHOWN_DOCUMENTS = 3
"""Documents of each of them."""

LISTED = 10
"""Documents that are listed one a line."""

SHORT = 60
"""Letters of a text in a line."""


def label(name: str, text: str) -> str:
    """Puts the label of a line before it."""
    return f"{name:<{LABEL}}{text}"


def model_line(run: Run) -> str:
    """Describes the model."""
    folders = run.models.folders
    count = sum(parameter.numel() for parameter in run.model.parameters())
    first = next(run.model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    adapter = f", adapter of {folders[0].base}" if folders[0].is_adapter else ""
    return label(
        "model",
        f"{folders[0].path}{more}: {folders[0].architecture}{adapter}, {count:,} parameters, {dtype} on "
        f"{first.device}; task {run.models.task}",
    )


def documents_line(run: Run, name: str, documents: Documents, encoded: Encoded, note: str = "") -> str:
    """Describes documents and their tokens."""
    files = list(dict.fromkeys(document.file for document in documents.documents))
    shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    fields = ", ".join(f'"{field}"' for field in documents.fields)
    count = len(documents.documents)
    noun = "document" if name == "train" else "question"
    parts = [f"{shown} ({fields}): {count:,} {noun}{'s' if count != 1 else ''}, {encoded.tokens:,} tokens"]
    if encoded.cut:
        parts.append(f"{encoded.cut:,} cut at {run.max_tokens:,} (--max-tokens; --long split takes all)")
    if len(encoded.pieces) > len(documents.documents):
        parts.append(f"{len(encoded.pieces):,} {'windows' if run.maskings == 1 else 'maskings'}")
    if encoded.empty:
        parts.append(f"{len(encoded.empty):,} without a scored token")
    return label(name, "; ".join(parts) + note)


def gradients_line(run: Run, traker: TRAKer) -> str:
    """Describes the way from gradients to features."""
    store_dtype = traker.store.store_dtype
    bits = {"1bit": 1, "int8": 8, "float16": 16}.get(store_dtype, 32)
    kilobytes = bits * traker.proj_dim / 8 / 1024
    count = sum(parameter.numel() for parameter in run.model.parameters())
    adam = " as Adam's steps" if run.settings.method == "less" else ""
    kind = KINDS[str(getattr(traker.projector, "proj_type", "normal"))]
    return label(
        "gradients",
        f"{traker.grad_dim:,} of {count:,} parameters{adam}, {kind} projection to k = {traker.proj_dim:,} "
        f"({run.choice.text}); {kilobytes:,.3g} KB a document, {store_dtype}",
    )


def scores_line(run: Run, tie: float | None) -> str:
    """Says which numbers the scores are."""
    return label("scores", _scores_text(run, tie))


def _scores_text(run: Run, tie: float | None) -> str:
    traker = run.traker
    several = f", averaged over {len(run.models.folders)} checkpoints" if len(run.models.folders) > 1 else ""
    if traker._estimator.inverts:
        return f"TRAK's: cosines with the inverse of the features' second moments, with a chosen ridge{several}"
    kinds = {
        "trak": "cosines of gradients in K-FAC's metric",
        "cosine": "cosines of gradients",
        "dot": "products of gradients, over their mean square",
        "less": "cosines of Adam's steps and gradients",
    }
    if run.settings.method == "less" and several:
        several = f", weighed by the learning rates of {len(run.models.folders)} checkpoints"
    noise = f"; ±{tie:.2g} by projection" if tie else ""
    return kinds[run.settings.method] + several + noise


def ranking_lines(rankings: Sequence[Ranking], run: Run) -> list[str]:
    """Tells the best documents of the first queries, each in a line."""
    lines = []
    for ranking in rankings[:SHOWN_QUERIES]:
        best = zip(ranking.top[:SHOWN_DOCUMENTS], ranking.top_scores, strict=False)
        found = [f"{score:+.3f} {name_of(run, row)}" for row, score in best]
        lines.append(label("", f"Q{ranking.query.number} {quoted(query_text(ranking.query))}  " + "  ".join(found)))
    if len(rankings) > SHOWN_QUERIES:
        lines.append(label("", f"({SHOWN_QUERIES} of {len(rankings):,} shown)"))
    return lines


def document_lines(ranking: Ranking, run: Run) -> list[str]:
    """Lists a query's best documents, one a line."""
    best = zip(ranking.top[:LISTED], ranking.top_scores, strict=False)
    return [_listed(place, f"{score:+.4f}", row, run) for place, (row, score) in enumerate(best, 1)]


def influence_lines(entries: Sequence[Mapping[str, Any]], run: Run) -> list[str]:
    """Lists documents and their self-influence, one a line."""
    return [_listed(entry["rank"], f"{entry['score']:.4g}", entry["row"], run) for entry in entries]


def _listed(place: int, score: str, row: int, run: Run) -> str:
    """Tells a document in one line."""
    return label("", f"{place:>3}  {score}  {name_of(run, row)}  {shorten(run.documents.documents[row].shown)}")


def name_of(run: Run, row: int) -> str:
    """Returns the id of a training document, or its place."""
    document = run.documents.documents[row]
    return document.id if document.id is not None else document.where


def query_text(query: Query) -> str:
    """Returns the text by which a query is known in a line."""
    return query.group if query.group is not None else query.documents[0].shown


def quoted(text: str) -> str:
    """Shortens a text to a line's length, in quotation marks."""
    return f'"{shorten(text)}"'


def shorten(text: str, most: int = SHORT) -> str:
    """Shortens a text to one line."""
    words = " ".join(text.split())
    return words if len(words) <= most else textwrap.shorten(words, most, placeholder=" …") or words[:most] + "…"


def stored_text(run: Run, stored: Sequence[int]) -> str:
    """Says how much is stored: "6,310 of 10,000 documents", or "10,000, 6,310 and 0 of 10,000 documents"."""
    numbers = [f"{count:,}" for count in stored]
    told = numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    checkpoints = " at the checkpoints" if len(numbers) > 1 else ""
    return f"{told} of {len(run.documents.documents):,} documents{checkpoints}"


def left_out_warning(targets: Targets) -> str:
    """Names the questions that are left out."""
    numbers = list(targets.left_out)
    shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    verb = "queries have" if len(numbers) > 1 else "query has"
    pronoun = "they are" if len(numbers) > 1 else "it is"
    return f"{len(numbers)} {verb} no scored token (empty completion): {shown}; {pronoun} left out"


def skipped_warning(documents: Documents) -> str:
    """Names the files in folders that are of no kind that is read."""
    names = list(documents.skipped)
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} file{'s are' if len(names) > 1 else ' is'} of no kind that is read, and left out: {shown}"


def made_facts(lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Splits printed lines into labels and texts, for the foot of the page."""
    return tuple((line[:LABEL].strip(), line[LABEL:]) for line in lines)
