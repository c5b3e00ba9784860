"""X'X of the training rows, summed while they are featurized, so that finalizing needs no second pass over them.

Where the task knows the curvature of each sample's loss, X'CX is summed too, with the curvatures in C. The estimator
makes the weighted matrix from both sums, since its weights depend on a mean that is known in the end only.

Each process that writes rows of a checkpoint sums those into a matrix of its own, and now and then saves it together
with the set of rows that are in it:

    checkpoint_<model_id>/gram/<slot>.npz    gram (1 or 2, k, k) float64; rows, the set as packed bits

A process takes the lowest slot that no other has locked and goes on from what a process before it left there, so
however often a run is killed, there are no more files than there were processes at a time. Rows whose flags are set
but that no saved sum contains, those since the last save of a process that was killed, are read again at the end.
"""

from __future__ import annotations

import logging
import time
import uuid
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..store.files import atomic_file
from ..store.locks import LockFile
from ..store.rows import Rows
from .gram import Features, GramAccumulator, blocks

SAVE_SECONDS = 60.0
"""Seconds between two saves. After a kill, the rows that were written since the last save are read again."""

FIRST_SLOT = 2**48
"""First byte of the lock file that stands for a slot; those before stand for rows."""

logger = logging.getLogger("trak_fast")
_taken: set[tuple[Path, int]] = set()  # by this process, whose objects no lock keeps apart


class PartialGram:
    """The sum of X'X over the rows that this process writes, and over those of a process before it."""

    def __init__(
        self, folder: Path, num_rows: int, width: int, device: torch.device, locks: LockFile, weighted: bool = False
    ) -> None:
        """Takes a slot.

        Args:
            folder: The folder of the saved sums; made if need be.
            num_rows: Training samples, n.
            width: Size of a feature, k.
            device: The device to sum on; it needs float64.
            locks: The lock file of the checkpoint.
            weighted: Sums X'CX too.
        """
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._locks = locks
        self.slot = 0
        while (folder, self.slot) in _taken or not locks.acquire(FIRST_SLOT + self.slot):
            self.slot += 1
        _taken.add((folder, self.slot))
        # without locks, others may have the same slot
        self.path = folder / (f"{self.slot}.npz" if locks.supported else f"{uuid.uuid4().hex}.npz")
        for left in folder.glob(f".{self.path.name}.*"):  # by a process that was killed while it saved
            left.unlink(missing_ok=True)
        self._num_rows = num_rows
        self._width = width
        self._device = device
        self._weighted = weighted
        self._start_from(load(self.path, num_rows, (2 if weighted else 1, width, width)))

    def _start_from(self, saved: tuple[NDArray[np.float64], NDArray[np.bool_]] | None) -> None:
        """Goes on from a saved sum and its rows, or from nothing."""
        self._base: NDArray[np.float64] | None = None
        self.rows: NDArray[np.bool_] = np.zeros(self._num_rows, np.bool_)
        if saved is not None:
            self._base, self.rows = saved
        self._sums = [GramAccumulator(self._width, self._device) for _ in range(2 if self._weighted else 1)]
        self._saved = time.monotonic()
        self._changed = False
        self._doubtful = False  # True while rows are summed, and after an interruption of that

    def _drop_what_is_doubtful(self) -> None:
        """Goes back to the saved sum after an interruption: rows that are in no sum are read again in the end."""
        if self._doubtful:
            self._start_from(load(self.path, self._num_rows, (len(self._sums), self._width, self._width)))

    def discard(self) -> None:
        """Forgets the sum, once one of its rows is no longer what was added."""
        self._start_from(None)
        self.path.unlink(missing_ok=True)

    def add(self, inds: NDArray[np.integer], features: Features, curvature: NDArray[np.float64] | None = None) -> None:
        """Adds rows that are on disk with their flags set; saves the sum if it is time to.

        Args:
            inds: (B,) the rows' numbers.
            features: (B, k) as they are read from the disk.
            curvature: (B,), where X'CX is summed; rows without it are left out there, and read again in the end.
        """
        if self._weighted and curvature is None:
            return
        self._drop_what_is_doubtful()
        new = ~self.rows[inds]
        self._doubtful = True
        for total, weights in zip(self._sums, (None, curvature), strict=False):
            total.add(features[new], None if weights is None else weights[new])
        self.rows[inds] = self._changed = True
        self._doubtful = False
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def value(self) -> NDArray[np.float64]:
        """Returns the sums so far, (1 or 2, k, k): X'X and X'CX."""
        totals = torch.stack([total.value() for total in self._sums]).cpu().numpy()
        return totals if self._base is None else totals + self._base

    def save(self) -> None:
        """Puts the sum on disk."""
        self._drop_what_is_doubtful()
        # the folder goes when the checkpoint is finalized, and the lock file too when it is featurized anew
        if self._changed and self.folder.exists() and self._locks.in_place():
            self._doubtful = True
            value = self.value()
            self._doubtful = False
            with atomic_file(self.path) as temporary, temporary.open("wb") as file:
                np.savez(file, gram=value, rows=np.packbits(self.rows))
        self._saved = time.monotonic()
        self._changed = False

    def close(self) -> None:
        """Saves the sum and gives the slot up; without the sum its rows are only read again."""
        try:
            self.save()
        except OSError as error:
            logger.warning("%s is not saved (%s); its rows are read again", self.path, error)
        finally:
            _taken.discard((self.folder, self.slot))
            self._locks.release(FIRST_SLOT + self.slot)


def load(
    path: Path, num_rows: int, shape: tuple[int, int, int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """Reads a saved sum and its rows; returns None where there is none of use, and the rows are then read again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            gram, rows = saved["gram"], np.unpackbits(saved["rows"])[:num_rows].astype(np.bool_)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is of no use (%s); its rows are read again", path, error)
        return None
    if gram.shape != shape or gram.dtype != np.float64 or len(rows) != num_rows:
        logger.warning("%s holds a matrix of another kind; its rows are read again", path)
        return None
    return gram, rows


def total(
    folder: Path,
    train: Rows,
    device: torch.device,
    rank: int = 0,
    size: int = 1,
    curvature: NDArray[np.float64] | None = None,
) -> Tensor:
    """Computes one of `size` summands of X'X; each saved sum, and each row that no sum contains, is in one of them.

    Args:
        folder: The saved sums.
        train: The rows, all of them done; `features` is X (n, k).
        device: The device to compute on.
        rank: Number of the summand, from 0.
        size: The number of summands.
        curvature: (n,) the curvature of each row, for X'CX too.

    Returns:
        (1, k, k) float64 on `device`, or (2, k, k) with X'CX.
    """
    features = train.features
    num_rows, width = features.shape
    weightings = [None] if curvature is None else [None, curvature]
    shape = (len(weightings), width, width)
    gram = torch.zeros(shape, dtype=torch.float64, device=device)
    covered = np.zeros(num_rows, np.bool_)
    for i, path in enumerate(sorted(folder.glob("*.npz"))):
        saved = load(path, num_rows, shape)
        if saved is None or (covered & saved[1]).any():  # two processes without locks wrote the same rows
            continue
        covered |= saved[1]
        if i % size == rank:
            gram += torch.from_numpy(saved[0]).to(device)
    missing = np.array_split(np.flatnonzero(~covered), size)[rank]
    rest = [GramAccumulator(width, device) for _ in weightings]
    for part in blocks(len(missing), width):
        rows = np.array(features[missing[part]])
        for accumulator, weights in zip(rest, weightings, strict=True):
            accumulator.add(rows, None if weights is None else weights[missing[part]])
    for summed, accumulator in zip(gram, rest, strict=True):
        summed += accumulator.value()
    return gram
