"""A small attribution whose training set grows from 12 samples to 20, beside one that has all 20 from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from attribution import CHECKPOINTS, SEED, TARGETS, M, data, network
from numpy.typing import NDArray

from trak_fast.traker import TRAKer

OLD, NEW = 12, 20
ALL = data(NEW, 46)
BATCHES = ((0, 5), (5, 10), (10, 12), (12, 17), (17, 20))
"""Rows of each batch; the same in both ways, since sums in float32 may depend on what is computed together."""


def opened(folder: Path, size: int, **options: Any) -> TRAKer:
    return TRAKer(network(), "image_classification", size, folder, **{"proj_dim": 8, "projector_seed": SEED, **options})


def featurize(traker: TRAKer, start: int, stop: int, model_ids: tuple[int, ...] = (0, 1)) -> None:
    """Featurizes the batches in rows [start, stop) at each checkpoint."""
    for model_id in model_ids:
        traker.load_checkpoint(CHECKPOINTS[model_id], model_id)
        for first, last in BATCHES:
            if start <= first and last <= stop:
                traker.featurize([x[first:last] for x in ALL], inds=range(first, last))


def score(traker: TRAKer, model_ids: tuple[int, ...] = (0, 1)) -> NDArray[np.float32]:
    """Featurizes the targets at each checkpoint, and returns their scores."""
    for model_id in model_ids:
        traker.start_scoring_checkpoint("test", CHECKPOINTS[model_id], model_id, num_targets=M)
        traker.score(TARGETS, num_samples=M)
    return np.array(traker.finalize_scores("test"))


def run(folder: Path, size: int, model_ids: tuple[int, ...] = (0, 1), **options: Any) -> TRAKer:
    """Featurizes and scores as many samples, at once."""
    traker = opened(folder, size, **options)
    featurize(traker, 0, size, model_ids)
    traker.finalize_features()
    score(traker, model_ids)
    for largest in (True, False):
        traker.top_scores("test", 3, largest=largest)
    return traker


def contents(folder: Path) -> dict[str, bytes]:
    """Reads all files of a folder but those of locks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "writers.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
