"""Scores of many training samples for many targets, a block of rows at a time: all of them, or the extreme ones.

The features of each checkpoint are read once, from first to last, the next block while the present one is multiplied.
All n × m scores are never in memory at once: they go to a file, or only the highest (or lowest) of each target are
kept.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..scales import Scaled, beyond_float32, powers, split
from ..store.files import (
    DENIED,
    advising_on_full_disk,
    create_array,
    remove_leftovers,
    sync,
    temporary_name,
    write_at,
)
from ..store.rows import Rows
from .gram import Features, normalized
from .solver import InnerProducts, Solver, SubsetSolver

T = TypeVar("T")

BLOCK_BYTES = 32 << 20
"""Bytes of a checkpoint's features, as float32, that are read at a time."""

SOLVED_BYTES = 256 << 20
"""Bytes of solved systems (k × m numbers for each checkpoint) that are kept at a time. With more targets, features are
read again for each group of targets."""


@dataclass
class Checkpoint:
    """All that the scores of one checkpoint are computed from.

    Attributes:
        solver: The solver, with the training samples' features.
        train: The same features as rows on disk, which are read without a memory map.
        targets: (m, k) the targets' features, floating.
    """

    solver: Solver | InnerProducts | SubsetSolver
    train: Rows
    targets: Features

    def read_features(self, rows: slice) -> Tensor:
        """Reads the features of training samples [start, stop), divided by their norms where scores are cosines.

        Returns:
            (rows, k), float32, or float64 if one is beyond 2^-64 to 2^64.
        """
        features = self.train.read("features", rows)
        if not self.solver.normalize:
            return features
        if self.solver.primal and hasattr(self.train.features, "squared_norms_of"):  # those before they were encoded
            norms = torch.from_numpy(self.train.features.squared_norms_of(rows)).sqrt()
            return features.double().div(norms.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)).float()
        return normalized(features).float()


class ScoreMatrix:
    """The (n, m) scores of an experiment, which are computed when they are asked for.

    Attributes:
        shape: n and m.
        largest: (m,) float64, the largest magnitude of each target's scores so far, or one that is not too small.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], weights: Tensor) -> None:
        """Describes the matrix Σ_c X_c (X_c'X_c + λ_c I)⁻¹ Φ_c', with each row times its weight.

        Args:
            checkpoints: The checkpoints, with the same samples and targets.
            weights: (n,) a factor for each training sample's scores.
        """
        self.checkpoints = checkpoints
        self.weights = weights.float()
        self.shape = (len(weights), len(checkpoints[0].targets))
        self.largest = np.zeros(self.shape[1])
        self._small_weights = bool(self.weights.abs().max() < 2.0**-30)  # products might vanish in float32

    def groups(self) -> Iterator[slice]:
        """Cuts the targets into groups whose solved systems are kept at a time."""
        num_rows, num_targets = self.shape
        heights = (c.targets.shape[1] if c.solver.primal else num_rows for c in self.checkpoints)
        size = max(1, SOLVED_BYTES // (4 * sum(heights)))
        for start in range(0, num_targets, size):
            yield slice(start, min(start + size, num_targets))

    def blocks(self, rows: slice, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Computes the scores of some training samples and targets, in blocks of consecutive samples.

        Args:
            rows: Training samples [start, stop).
            columns: Targets [start, stop).

        Yields:
            The block's samples, and their scores for all of `columns`, (rows, columns) float32.

        Raises:
            ValueError: Scores are beyond float32.
        """
        solved = [c.solver.solve(c.targets[columns]) for c in self.checkpoints]
        width = max(self.checkpoints[0].targets.shape[1], columns.stop - columns.start)
        size = max(1, BLOCK_BYTES // (4 * width))
        parts = [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]
        count = len(self.checkpoints)
        total = torch.empty(0)
        jobs = list(itertools.product(parts, range(count)))
        for (part, index), features in zip(jobs, _read_ahead(self._features, jobs), strict=True):
            scores = self._product(features, solved[index], part)
            if index == 0:
                total = scores
            elif total.dtype == scores.dtype:
                total.add_(scores)
            else:
                total = total.double().add_(scores)
            if index == count - 1:
                yield part, self._weighted(total.cpu(), part, columns)

    def require_float32(self, largest: Iterable[NDArray[np.float64]]) -> None:
        """Checks that float32 holds the scores of each target, once all have been computed.

        Args:
            largest: (m,) `largest` of each process that computed scores.

        Raises:
            ValueError: The largest score of a target is beyond float32.
        """
        self.largest = np.max([*largest], axis=0)
        self._refuse(beyond_float32(self.largest))

    def _refuse(self, bad: NDArray[np.bool_]) -> None:
        """Refuses the scores if those of a target are bad."""
        if len(targets := np.flatnonzero(bad)):
            largest = self.largest[targets[0]]
            raise ValueError(
                f"the largest score of a target must be 0 or in [1.18e-38, 3.4e+38], not {largest:.3g} "
                f"(targets {targets.tolist()[:5]}); multiply these targets' model output f, and thereby their scores, "
                "by a constant, which their batch may hold"
            )

    def _features(self, rows: slice, index: int) -> Scaled | None:
        """Reads the features of some training samples at one checkpoint; None where the solver needs none."""
        checkpoint = self.checkpoints[index]
        if not checkpoint.solver.primal:
            return None
        features = checkpoint.read_features(rows)
        if features.dtype == torch.float32:  # in [2^-64, 2^64], or 0
            return Scaled(features, np.zeros(len(features), np.int16))
        scaled = split(features, 1)
        return Scaled(scaled.mantissas.float(), scaled.exponents)

    def _product(self, features: Scaled | None, solved: Scaled, rows: slice) -> Tensor:
        """Multiplies features and solved systems: float32, or float64 if there are powers of two to multiply by."""
        if features is None:
            product = solved.mantissas[rows].clone()
        else:
            # the product may be in float32: nothing amplifies its error
            product = features.mantissas.to(solved.mantissas.device) @ solved.mantissas
        if features is not None and features.exponents.any():
            product = product.double()
            product *= powers(features.exponents, product).unsqueeze(1)
        if solved.exponents.any():
            product = product.double()
            product *= powers(solved.exponents, product)
        return product

    def _weighted(self, total: Tensor, rows: slice, columns: slice) -> Tensor:
        """Multiplies scores by their samples' weights, and returns them as float32, which must hold them."""
        if self._small_weights:
            total = total.double()
        total.mul_(self.weights[rows, None])
        flat = total.reshape(-1)
        if total.dtype == torch.float64 or not math.isfinite(flat.dot(flat).item()):
            seen = np.arange(columns.start, columns.stop)
        else:  # all are finite, and few columns are looked at once their scores are not too small
            seen = columns.start + np.flatnonzero(self.largest[columns] < float(np.finfo(np.float32).tiny))
        if len(seen):
            sizes = total[:, seen - columns.start].abs().amax(0).double().numpy()
            self.largest[seen] = np.maximum(self.largest[seen], sizes)
            self._refuse(~(self.largest <= float(np.finfo(np.float32).max)))
        return total.float()


def _read_ahead(read: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Yields `read(*job)` of each job, and reads the next one in a thread while the present one is used."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(read, *jobs[0]) if jobs else None
        for job in [*jobs[1:], None]:
            present = following
            following = None if job is None else reader.submit(read, *job)
            if present is not None:
                yield present.result()


class ScoreFile:
    """A .npy file of (n, m) float32 scores that several processes fill and one of them publishes."""

    def __init__(self, path: Path, shape: tuple[int, int], partial: Path | None = None) -> None:
        """Names the file; `begin` makes it.

        Args:
            path: The file's name once it is published.
            shape: Its shape, (n, m).
            partial: The name until then, from `store.files.temporary_name`, the same in all processes that fill it; by
                default one of this process alone.
        """
        self.path = path
        self.shape = shape
        self._partial = temporary_name(path) if partial is None else partial

    def begin(self) -> bool:
        """Makes an empty file, and removes those that killed processes have left.

        Returns:
            False if the folder may not be written.

        Raises:
            OSError: The disk is full, for example.
        """
        remove_leftovers(self.path)
        try:
            with advising_on_full_disk(self.path):
                create_array(self._partial, self.shape, np.float32)
        except OSError as error:
            if error.errno not in DENIED:
                raise
            return False
        return True

    def fill(self, matrix: ScoreMatrix, rows: slice) -> None:
        """Computes and writes some rows.

        Raises:
            OSError: The disk is full, for example.
        """
        row_bytes = 4 * self.shape[1]
        with advising_on_full_disk(self.path), self._partial.open("r+b", buffering=0) as file:
            offset = self._partial.stat().st_size - row_bytes * self.shape[0]
            with tqdm(
                total=(rows.stop - rows.start) * self.shape[1], desc="scores", unit_scale=True, disable=None
            ) as bar:
                for columns in matrix.groups():
                    for part, block in matrix.blocks(rows, columns):
                        data = block.contiguous().numpy()
                        start = offset + part.start * row_bytes + 4 * columns.start
                        whole = columns.stop - columns.start == self.shape[1]
                        for i, piece in enumerate([data] if whole else data):
                            write_at(file.fileno(), piece.data.cast("B"), start + i * row_bytes)
                        bar.update(data.size)
            sync(file.fileno())

    def open(self) -> np.memmap:
        """Maps the filled file, (n, m) float32, copy-on-write; the map stays whatever happens to its name."""
        scores = open_memmap(self._partial, "c")
        scores.filename = self.path  # type: ignore[assignment]  # as numpy itself sets it
        return scores

    def publish(self) -> None:
        """Gives the file its name."""
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Removes the file if it was not published."""
        self._partial.unlink(missing_ok=True)


def unsaved_scores(matrix: ScoreMatrix) -> np.memmap:
    """Computes all scores in a temporary file of this process, which goes with the memory map.

    Returns:
        (n, m) float32, copy-on-write.

    Raises:
        OSError: The disk is full, for example.
    """
    handle, name = tempfile.mkstemp(prefix="trak_fast-", suffix=".npy")
    os.close(handle)
    path = Path(name)
    file = ScoreFile(path, matrix.shape, partial=path)
    try:
        file.begin()
        file.fill(matrix, slice(0, matrix.shape[0]))
        matrix.require_float32([matrix.largest])
        return file.open()
    finally:
        file.discard()
