"""The way in which a folder of features gets more rows for training samples, without a torn state at any moment.

    save_dir/growth.json    train_set_size of a folder that has grown; finished: false until all its files have grown

manifest.json stays as it was written, since checkpoints and metrics are known by its digest. The folder has grown from
the moment on in which growth.json takes its place. All steps that follow can be repeated, and whoever opens the folder
after a kill does so before anything else.

Files grow in place: a copy would need the disk space of the features twice. Only done.npy, of a byte a row, is
replaced, and last: by its place on the disk, whoever has opened the rows before knows that they are others now.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .columns import require_space, stored_arrays
from .files import (
    DENIED,
    advising_on_denied,
    advising_on_full_disk,
    atomic_file,
    grow_array,
    read_array,
    read_json,
    sync_folder,
)
from .locks import WHOLE, BusyError, lock_file
from .rows import LOCK_FILE, Rows

GROWTH_FILE = "growth.json"


class Growth(NamedTuple):
    """The size to which a folder has grown.

    Attributes:
        train_set_size: Training samples, n.
        is_finished: False if some of its files may have fewer rows yet.
    """

    train_set_size: int
    is_finished: bool = True

    def save(self, folder: Path) -> None:
        """Replaces the file of a folder.

        Raises:
            OSError: The disk is full, for example.
        """
        content = {"train_set_size": self.train_set_size, "finished": self.is_finished}
        with atomic_file(folder / GROWTH_FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> Growth | None:
        """Reads the file of a folder; returns None if it has not grown.

        Raises:
            ValueError: The file is truncated or corrupt.
        """
        path = folder / GROWTH_FILE
        if not path.exists():
            return None
        content = read_json(path)
        size, finished = content.get("train_set_size"), content.get("finished")
        if not isinstance(size, int) or not isinstance(finished, bool):
            raise ValueError(f"{path} is corrupt: it must hold train_set_size and finished, not {content}")
        return Growth(size, finished)


def stored_size(folder: Path) -> int | None:
    """Returns the training samples that a folder has rows for; None if there is no such folder.

    Raises:
        ValueError: A file of it is truncated or corrupt.
    """
    if (growth := Growth.load(folder)) is not None:
        return growth.train_set_size
    manifest = folder / "manifest.json"
    size = read_json(manifest).get("train_set_size") if manifest.exists() else None
    return size if isinstance(size, int) else None


@contextmanager
def size_kept(folder: Path) -> Iterator[None]:
    """Keeps other processes from extending a folder during the block.

    Where this process may not write, or there are no locks, nothing is locked.

    Raises:
        RuntimeError: Another process is extending it.
    """
    try:
        locks = lock_file(folder / LOCK_FILE)
    except OSError as error:
        if error.errno not in DENIED:
            raise
        locks = None
    if locks is not None and not locks.acquire(WHOLE, 1, shared=True):
        raise BusyError(f"{folder} is being extended by another process; wait until it has ended")
    try:
        yield
    finally:
        if locks is not None:
            locks.release(WHOLE, 1)


def grow_folder(
    folder: Path,
    before: Growth,
    num_rows: int,
    checkpoints: Sequence[Path],
    scores: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    store_dtype: str,
) -> None:
    """Gives each checkpoint of a folder more training rows, while no other process uses them.

    Args:
        folder: The folder.
        before: Its size until now.
        num_rows: Training samples, n.
        checkpoints: The folders of its checkpoints.
        scores: The files of scores, which are removed, as the Gram matrices are.
        shapes: Shape of one training row of each column.
        store_dtype: The way in which the numbers of features are stored.

    Raises:
        ValueError: The folder has more rows, or a file is missing, truncated or corrupt.
        PermissionError: A part of the folder may not be written.
        OSError: The disk has too little space, for example.
    """
    if num_rows < before.train_set_size:
        raise ValueError(
            f"train_set_size must be at least {before.train_set_size}, which {folder} has, not {num_rows}; use another "
            "save_dir for fewer"
        )
    if before == Growth(num_rows):
        return
    if before.is_finished:
        # what cannot be done is an error before anything is changed
        for path in checkpoints:
            Rows(path / "train", before.train_set_size, shapes, store_dtype)
        names = stored_arrays(num_rows, shapes, store_dtype)
        files = [path / "train" / f"{name}.npy" for path in checkpoints for name in names]
        _require_writable([folder, *checkpoints, *files, *{path.parent for path in [*files, *scores]}])
        require_space(folder, (num_rows - before.train_set_size) * len(checkpoints), shapes, store_dtype)
    with advising_on_denied(folder):
        Growth(num_rows, is_finished=False).save(folder)
        for path in scores:
            path.unlink(missing_ok=True)
        for path in checkpoints:
            (path / "gram.npy").unlink(missing_ok=True)
            shutil.rmtree(path / "gram", ignore_errors=True)  # a sum that is left says which rows are in it
            sync_folder(path)
            grow_rows(path / "train", num_rows, shapes, store_dtype)
        for path in {path.parent for path in scores}:
            sync_folder(path)
        Growth(num_rows).save(folder)


def _require_writable(paths: Iterable[Path]) -> None:
    """Checks that this process may write files and folders.

    Raises:
        PermissionError: It may not write one of them.
    """
    for path in paths:
        with advising_on_denied(path):
            if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def grow_rows(path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]], store_dtype: str) -> None:
    """Gives a folder of rows more of them, none of which is done; it can be repeated after a kill at any moment.

    Args:
        path: The folder.
        num_rows: Rows of each column, at least as many as before.
        shapes: Shape of one row of each column.
        store_dtype: The way in which the numbers of features are stored.

    Raises:
        ValueError: A file is missing, truncated or corrupt.
        OSError: The disk is full, for example.
    """
    done = path / "done.npy"
    flags = read_array(done)
    if len(flags) == num_rows:
        return
    for name, array in stored_arrays(num_rows, shapes, store_dtype).items():
        file = path / f"{name}.npy"
        if file != done:
            with advising_on_full_disk(file):
                grow_array(file, array.shape, array.dtype)
    with atomic_file(done) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.concatenate([flags, np.zeros(num_rows - len(flags), np.bool_)]))
