"""The computing of a run: features of documents and questions that are not stored yet, checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..tasks.tokens import IGNORED
from ..traker import TRAKer
from .run import Run, Targets
from .texts.encoding import make_batches
from .texts.pieces import Piece

BAR = "{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} tokens · {rate_fmt} · {remaining} left"
"""The form of a bar."""

METRIC_DOCUMENTS = (64, 256)
"""Documents that a metric is made of, at least and at most."""

METRIC_SHARE = 1 / 8
"""Share of all tokens that a metric may be made of, where that is enough documents."""


def compute(run: Run, sets: Sequence[Targets]) -> None:
    """Computes the features of documents and questions that are missing, one checkpoint after the other.

    Args:
        run: The run.
        sets: Sets of questions.

    Raises:
        ValueError: A checkpoint has other weights than its features were made with, or gradients are not finite.
        OSError: The disk is full, for example.
    """
    traker = run.traker
    work: list[tuple[int, NDArray[np.intp], list[Targets]]] = []
    tokens = 0
    for model_id in range(len(run.models.folders)):
        missing = np.flatnonzero(~run.done(model_id))
        share = traker.rows(len(run.owners))
        missing = missing[(missing >= share.start) & (missing < share.stop)]
        finalized = model_id in traker.store.model_ids() and traker.store.is_finalized(model_id)
        wanted = [targets for targets in sets if targets.pieces and not _has_targets(run, model_id, targets)]
        needs = run.ranks.gather(bool(len(missing)) or not finalized or bool(wanted))
        if any(needs):
            work.append((model_id, missing, wanted))
            tokens += sum(len(run.encoded.pieces[i].input_ids) for i in missing)
            tokens += sum(len(piece.input_ids) for targets in wanted for piece in targets.pieces)
    if not work:
        return
    hidden = None if run.ranks.rank == 0 else True
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=hidden, bar_format=BAR, desc="train    ") as bar:
        for model_id, missing, wanted in work:
            _compute_checkpoint(run, model_id, missing, wanted, bar)


def _has_targets(run: Run, model_id: int, targets: Targets) -> bool:
    """Tells if a checkpoint has the features of all questions."""
    store = run.traker.store
    if targets.exp_name not in store.experiments_of(model_id):
        return False
    return bool(np.array(store.targets(model_id, targets.exp_name).done).all())


def _compute_checkpoint(
    run: Run, model_id: int, missing: NDArray[np.intp], wanted: Sequence[Targets], bar: tqdm[Any]
) -> None:
    """Computes what is missing of one checkpoint."""
    traker = run.traker
    state = run.load(model_id)
    if any(run.ranks.gather(bool(len(missing)))):
        if run.choice.arguments["metric"] is not None:
            bar.set_description_str("metric   ")
            fit_metric(run, traker, metric_pieces(run))
        bar.set_description_str("train    ")
        lengths = [len(run.encoded.pieces[i].input_ids) for i in missing]
        for batch in make_batches(lengths, run.machine.tokens):
            rows = missing[batch]
            pieces = [run.encoded.pieces[i] for i in rows]
            traker.featurize(run.batch(pieces), inds=rows)
            _advance(bar, pieces)
    traker.finalize_features([model_id])
    for targets in wanted:
        bar.set_description_str("query    ")
        _delete_older(run, targets)
        traker.start_scoring_checkpoint(targets.exp_name, state, model_id, len(targets.pieces))
        lengths = [len(piece.input_ids) for piece in targets.pieces]
        for batch in make_batches(lengths, run.machine.tokens):
            pieces = [targets.pieces[i] for i in batch]
            traker.score(run.batch(pieces), inds=batch)
            _advance(bar, pieces)


def _advance(bar: tqdm[Any], pieces: Sequence[Piece]) -> None:
    """Moves a bar by the tokens of pieces."""
    bar.update(sum(len(piece.input_ids) for piece in pieces))


def _delete_older(run: Run, targets: Targets) -> None:
    """Deletes the features of earlier questions of the same name."""
    prefix = targets.exp_name.rpartition("-")[0]
    for name in run.ranks.gather(run.traker.store.experiments())[0]:
        if name != targets.exp_name and name.rpartition("-")[0] == prefix:
            run.traker.delete_experiment(name)


def fit_metric(run: Run, traker: TRAKer, pieces: Sequence[Piece]) -> None:
    """Makes the metric of the loaded checkpoint, unless there is one, within the tokens of a batch at a time."""
    at_a_time = max(1, run.machine.tokens // max(len(piece.input_ids) for piece in pieces))
    traker.fit_metric(run.batch(pieces), chunk_size=at_a_time)


def metric_pieces(run: Run) -> list[Piece]:
    """Chooses the documents that a metric is made of: at random, the longest first."""
    pieces = run.encoded.pieces
    scored = np.array([i for i, piece in enumerate(pieces) if (piece.labels != IGNORED).any()])
    order = np.random.default_rng(run.settings.seed).permutation(scored)[: METRIC_DOCUMENTS[1]]
    sums = np.cumsum([len(pieces[i].input_ids) for i in order])
    count = max(METRIC_DOCUMENTS[0], int(np.searchsorted(sums, METRIC_SHARE * run.encoded.tokens)))
    return sorted((pieces[i] for i in order[:count]), key=lambda piece: -len(piece.input_ids))
