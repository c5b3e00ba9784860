"""The highest or lowest scores of each target, and scores as CSV."""

from __future__ import annotations

import csv
import errno
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..store.files import atomic_file
from .scores import ScoreMatrix


@dataclass
class TopScores:
    """The highest, or the lowest, scores of each target.

    Attributes:
        indices: (m, k) int64: training samples, best first; of equal scores, the lower index first.
        scores: (m, k) float32.
        largest: True if they are the highest.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    largest: bool = True

    def save(self, path: str | Path) -> None:
        """Writes `indices`, `scores` and `largest` to a .npz file.

        Raises:
            FileNotFoundError: There is no folder for the file.
        """
        with _whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, indices=self.indices, scores=self.scores, largest=self.largest)

    @staticmethod
    def load(path: str | Path) -> TopScores:
        """Reads what `save` wrote."""
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            return TopScores(file["indices"], file["scores"], bool(file["largest"]))


class _Best:
    """The `count` highest values so far in each of m columns; of equal values, those that came first."""

    def __init__(self, count: int, num_columns: int) -> None:
        self.count = count
        self.columns = np.zeros(0, np.int64)  # of the values that are kept: sorted by column, then from high to low
        self.rows = np.zeros(0, np.int64)
        self.values = np.zeros(0, np.float32)
        self._least = torch.full((num_columns,), -torch.inf, dtype=torch.float32)

    def add(self, rows: slice, block: Tensor) -> None:
        """Takes (rows, m) values; rows come in increasing order."""
        good = block > self._least
        if len(block) > self.count and int(good.sum()) > 4 * self.count * block.shape[1]:
            good &= block >= block.topk(self.count, dim=0).values[-1]
        row, column = good.nonzero(as_tuple=True)
        self.merge(column.numpy(), row.numpy() + rows.start, block[row, column].numpy())

    def merge(self, columns: NDArray[np.int64], rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Takes values at given places."""
        if not len(columns):
            return
        columns, rows = np.concatenate([self.columns, columns]), np.concatenate([self.rows, rows])
        values = np.concatenate([self.values, values])
        order = np.lexsort((rows, -values, columns))
        columns = columns[order]
        rank = np.arange(len(columns)) - np.searchsorted(columns, columns)
        order, columns, rank = (x[rank < self.count] for x in (order, columns, rank))
        self.columns, self.rows, self.values = columns, rows[order], values[order]
        last = rank == self.count - 1
        self._least[columns[last]] = torch.from_numpy(self.values[last])


def top_scores(matrix: ScoreMatrix, rows: slice, count: int, largest: bool = True) -> TopScores:
    """Finds the `count` highest (or lowest) scores of each target among some training samples, in memory O(m · count).

    Args:
        matrix: The scores.
        rows: Training samples [start, stop).
        count: Scores to keep for each target; fewer if there are fewer samples.
        largest: Finds the highest if True, the lowest if False.
    """
    count = min(count, rows.stop - rows.start)
    sign = 1 if largest else -1
    result = TopScores(
        np.empty((matrix.shape[1], count), np.int64), np.empty((matrix.shape[1], count), np.float32), largest
    )
    with tqdm(
        total=(rows.stop - rows.start) * matrix.shape[1], desc="top scores", unit_scale=True, disable=None
    ) as bar:
        for columns in matrix.groups():
            best = _Best(count, columns.stop - columns.start)
            for part, block in matrix.blocks(rows, columns):
                best.add(part, block if largest else -block)
                bar.update(block.numel())
            shape = (columns.stop - columns.start, count)
            result.indices[columns] = best.rows.reshape(shape)
            result.scores[columns] = sign * best.values.reshape(shape)
    return result


def merge_top_scores(parts: Iterable[TopScores], count: int) -> TopScores:
    """Merges lists about different training samples into the `count` best scores of each target."""
    parts = list(parts)
    num_targets = len(parts[0].indices)
    largest = parts[0].largest
    sign = 1 if largest else -1
    best = _Best(count, num_targets)
    for part in parts:
        columns = np.repeat(np.arange(num_targets), part.indices.shape[1])
        best.merge(columns, part.indices.reshape(-1), sign * part.scores.reshape(-1))
    return TopScores(best.rows.reshape(num_targets, -1), sign * best.values.reshape(num_targets, -1), largest)


def _whole_file(path: str | Path) -> AbstractContextManager[Path]:
    """Prepares to write a file that a user named (see `atomic_file`)."""
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no folder for this file; make the folder first", str(path))
    return atomic_file(file)


def save_table(path: str | Path, scores: TopScores | NDArray[Any]) -> None:
    """Writes scores as CSV with the columns target, train_index and score, which any program reads (pandas.read_csv).

    Args:
        path: The file to write.
        scores: The result of `TRAKer.top_scores`; or an array (n, m), written target by target from the highest score
            to the lowest, or (n,), of one target.

    Raises:
        FileNotFoundError: There is no folder for the file.
    """
    with _whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "train_index", "score"])
        if not isinstance(scores, TopScores):
            scores = np.asarray(scores)
            scores = scores[:, None] if scores.ndim == 1 else scores
        for target in range(len(scores.indices) if isinstance(scores, TopScores) else scores.shape[1]):
            if isinstance(scores, TopScores):
                indices, values = scores.indices[target], scores.scores[target]
            else:
                indices = np.argsort(-scores[:, target], kind="stable")
                values = scores[indices, target]
            writer.writerows((target, i, f"{v:.9g}") for i, v in zip(indices.tolist(), values.tolist(), strict=True))
