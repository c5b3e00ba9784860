"""Arrays on disk that are filled row by row, in any order, by any number of processes.

A row's flag is set after its values are on disk, so a row whose flag is set is there, whenever a process was killed or
a disk became full. Rows are written by pwrite and not through a memory map: a full disk is an error that can be
reported, while in a map it kills the process; and only the pages that were written are flushed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..scales import exponents_of
from .columns import EXPONENTS, FEATURES, SCALES, require_space, stored_arrays
from .encodings import CODED, decode, encode
from .files import advising_on_denied, advising_on_full_disk, create_array, open_array, sync, write_at
from .locks import WHOLE, BusyError, LockFile, lock_file
from .samples import first_of

LOCK_FILE = "writers.lock"
"""The file in a folder of rows in which they are locked."""

MAX_ROWS = 2**48
"""Rows of a folder at most: later bytes of its lock file stand for something else."""

MAX_CLAIMS = 1024
"""Separate ranges of rows that a process may keep locked: a kernel searches its list of locks from end to end."""


def consecutive_ranges(inds: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Yields the ranges [start, stop) of consecutive numbers that sorted `inds` are made of."""
    cuts = np.flatnonzero(np.diff(inds) != 1) + 1
    for part in np.split(inds, cuts):
        if len(part):
            yield int(part[0]), int(part[-1]) + 1


class ScaledMatrix:
    """A matrix stored as float16 or float32 mantissas with a power of two for each row, so that no row is too large.

    It behaves like a read-only array as far as the solver needs: shape, rows, columns of the transpose. Its numbers are
    float32, or float64 where the power of two of one of the rows that are read is beyond float32.
    """

    def __init__(self, mantissas: NDArray[Any], exponents: NDArray[np.int16], transposed: bool = False) -> None:
        """Takes the stored arrays.

        Args:
            mantissas: (rows, k) float16 or float32.
            exponents: (rows,) the power of two that each row is multiplied by.
            transposed: If True, the matrix is the transpose, (k, rows).
        """
        self.mantissas = mantissas
        self.exponents = exponents
        self.transposed = transposed
        self.dtype = mantissas.dtype  # whose precision the numbers have
        self.shape: tuple[int, ...] = mantissas.shape[::-1] if transposed else mantissas.shape
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        if self.transposed:
            columns: NDArray[Any] = from_mantissas(self.mantissas[:, index], self.exponents).T
            return columns
        return from_mantissas(self.mantissas[index], np.asarray(self.exponents[index]))

    def take_columns(self, rows: NDArray[np.intp], columns: slice) -> NDArray[Any]:
        """Reads columns [start, stop) of some rows, (rows, columns), and no others."""
        return from_mantissas(self.mantissas[:, columns][rows], np.asarray(self.exponents[rows]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    @property
    def T(self) -> ScaledMatrix:
        """The transpose, which shares the stored arrays."""
        return ScaledMatrix(self.mantissas, self.exponents, not self.transposed)


class CodedMatrix:
    """A matrix stored in few bits a number, with a factor and a power of two for each row (encodings.py).

    It behaves like a read-only array as far as the solver needs, as `ScaledMatrix` does.
    """

    dtype = np.dtype(np.float16)  # numbers are at most so precise

    def __init__(
        self,
        items: NDArray[Any],
        scales: NDArray[np.float32],
        exponents: NDArray[np.int16],
        store_dtype: str,
        width: int,
        transposed: bool = False,
    ) -> None:
        """Takes the stored arrays.

        Args:
            items: (rows, ...) the stored items.
            scales: (rows, 2) factor and squared norm of each row, without its power of two.
            exponents: (rows,) the power of two that each row is multiplied by.
            store_dtype: "int8" or "1bit".
            width: Numbers of a row, k.
            transposed: If True, the matrix is the transpose, (k, rows).
        """
        self.items = items
        self.scales = scales
        self.exponents = exponents
        self.store_dtype = store_dtype
        self.width = width
        self.transposed = transposed
        own = (len(items), width)
        self.shape: tuple[int, ...] = own[::-1] if transposed else own
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        if self.transposed:
            columns: NDArray[Any] = self._decoded(slice(None), index).T
            return columns
        if isinstance(index, (int, np.integer)):
            row: NDArray[Any] = self._decoded(slice(index, index + 1 or None), slice(None))[0]
            return row
        return self._decoded(index, slice(None))

    def take_columns(self, rows: NDArray[np.intp], columns: slice) -> NDArray[Any]:
        """Reads columns [start, stop) of some rows, (rows, columns)."""
        return self._decoded(rows, columns)

    def _decoded(self, rows: Any, columns: slice) -> NDArray[Any]:
        decoded = decode(np.asarray(self.items[rows]), self.scales[rows], self.store_dtype, columns, self.width)
        return from_mantissas(decoded, np.asarray(self.exponents[rows]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    @property
    def squared_norms(self) -> NDArray[np.float64]:
        """The squared norms of the rows before they were encoded, (rows,)."""
        return self.squared_norms_of(slice(None))

    def squared_norms_of(self, rows: Any) -> NDArray[np.float64]:
        """Returns the squared norms of some rows before they were encoded, and reads no others."""
        return np.ldexp(np.asarray(self.scales[rows, 1], np.float64), 2 * np.asarray(self.exponents[rows], np.int32))

    @property
    def T(self) -> CodedMatrix:
        """The transpose, which shares the stored arrays."""
        return CodedMatrix(self.items, self.scales, self.exponents, self.store_dtype, self.width, not self.transposed)


def to_mantissas(values: NDArray[Any], dtype: type[np.generic]) -> tuple[NDArray[Any], NDArray[np.int16]]:
    """Splits a matrix into mantissas and a power of two for each row, whose product is the matrix to their precision.

    The largest element of a row comes to lie in [2^14, 2^15) as float16: elements down to 2^-28 of it keep all 11 bits.
    As float32, rows stay as they are if their largest element is in [2^-64, 2^64]; that of others comes to [½, 1).

    Args:
        values: (rows, k) float32 or float64.
        dtype: float16 or float32.

    Returns:
        (rows, k) in that dtype, and (rows,) int16.
    """
    largest = np.abs(values).max(axis=1, initial=0)
    if dtype == np.float16:
        exponents = np.where(largest == 0, 0, exponents_of(largest) - 15).astype(np.int16)
    else:
        exponents = exponents_of(largest, 2.0**-64, 2.0**64)
    if exponents.any():
        values = np.ldexp(values, -exponents[:, None])
    return values.astype(dtype), exponents


def from_mantissas(mantissas: NDArray[Any], exponents: NDArray[np.int16]) -> NDArray[Any]:
    """Returns the rows that `to_mantissas` split: float32, or float64 if the largest of one is not in 2^-64 to 2^64."""
    half = mantissas.dtype == np.float16
    if not np.any(exponents):
        return mantissas.astype(np.float32) if half else mantissas
    result: NDArray[Any]
    if half and ((exponents >= -78) & (exponents <= 49)).all():
        result = mantissas.astype(np.float32) * np.ldexp(np.float32(1), exponents)[..., None]
    else:
        result = np.ldexp(mantissas.astype(np.float64), exponents[..., None])
    return result


class Rows:
    """Columns of equal length in one folder, with a flag for each row that is written.

    They are read as float32; rows of the column "features" may have any scale, and are read as float64 if they must be.

    Beside each row lies a digest of the sample that it was computed from (samples.py).

    Attributes:
        shapes: Shape of one row of each column.
        columns: Each column, (rows, *shape): a read-only memory map, or a `ScaledMatrix`, which behaves like one.
        done: (rows,) bool, a read-only memory map.
        digests: (rows,) uint32, a read-only memory map.
    """

    def __init__(
        self, path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]], store_dtype: str = "float32"
    ) -> None:
        """Opens the columns that `create` made.

        Args:
            path: The folder.
            num_rows: Rows of each column.
            shapes: Shape of one row of each column.
            store_dtype: The way in which the numbers of features are stored (`encodings.STORE_DTYPES`).

        Raises:
            ValueError: A file is missing, truncated, corrupt, or has another shape.
        """
        self.path = path
        self._identity = _identity(path)
        self.shapes = dict(shapes)
        self.store_dtype = store_dtype
        self.files = {
            name: open_array(path / f"{name}.npy", array.shape, array.dtype)
            for name, array in stored_arrays(num_rows, shapes, store_dtype).items()
        }
        self.done = self.files["done"]
        self.digests = self.files["digests"]
        self.columns: dict[str, Any] = {name: self.files[name] for name in shapes}
        if FEATURES in shapes:
            self.columns[FEATURES] = self._feature_matrix(shapes[FEATURES])
        self._claims = 0  # ranges that this object has locked
        self._claimed_to = -1  # end of the last of them

    def _feature_matrix(self, shape: tuple[int, ...]) -> ScaledMatrix | CodedMatrix:
        """Returns the stored features as a matrix."""
        if self.store_dtype in CODED:
            return CodedMatrix(
                self.files[FEATURES], self.files[SCALES], self.files[EXPONENTS], self.store_dtype, shape[0]
            )
        return ScaledMatrix(self.files[FEATURES], self.files[EXPONENTS])

    @property
    def features(self) -> NDArray[Any]:
        """The column of projected gradients, (rows, k): as stored if they are float32 without powers of two."""
        plain = self.files[FEATURES].dtype == np.float32 and not self.files[EXPONENTS].any()
        features: NDArray[Any] = self.files[FEATURES] if plain else self.columns[FEATURES]
        return features

    @property
    def weights(self) -> NDArray[np.float32]:
        """The column of weightings Q, (rows,); training rows have it, those of targets do not."""
        weights: NDArray[np.float32] = self.columns["weights"]
        return weights

    @staticmethod
    def create(path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]], store_dtype: str = "float32") -> None:
        """Makes a folder of columns without any row done.

        Raises:
            OSError: The disk has too little space.
        """
        path.mkdir(exist_ok=True)
        require_space(path, num_rows, shapes, store_dtype)
        for name, array in stored_arrays(num_rows, shapes, store_dtype).items():
            file = path / f"{name}.npy"
            with advising_on_full_disk(file):
                create_array(file, array.shape, array.dtype)

    def write(
        self,
        inds: NDArray[np.integer],
        digests: NDArray[np.uint32] | int = 0,
        **values: NDArray[Any] | Tensor,
    ) -> dict[str, NDArray[Any]]:
        """Writes some rows of every column; their flags are down meanwhile.

        Args:
            inds: (B,) the rows' numbers, each once.
            digests: (B,) the digests of their samples.
            **values: For each column, (B, *shape), or an array that broadcasts to it.

        Returns:
            For each column, (B, *shape) float32 or float64: the values as they will be read.

        Raises:
            OSError: The disk is full, for example. The rows' flags stay down.
            ValueError: A column's values have another shape. The rows' flags stay down.
        """
        order = np.argsort(inds, kind="stable")
        inds = np.asarray(inds)[order]
        if not len(inds):
            return {name: np.empty((0, *column.shape[1:]), np.float32) for name, column in self.columns.items()}
        if self.done[inds].any():
            self._put("done", inds, np.zeros(len(inds), np.bool_))
        stored = {}
        for name, column in self.columns.items():
            array = np.asarray(values[name])
            if name != FEATURES or array.dtype != np.float64:
                array = array.astype(np.float32)
            array = np.broadcast_to(array, (len(inds), *column.shape[1:]))[order]
            if name == FEATURES:
                array = self._write_features(inds, array)
            else:
                self._put(name, inds, array)
            stored[name] = np.empty_like(array)
            stored[name][order] = array
        self._put("digests", inds, np.broadcast_to(np.asarray(digests, np.uint32), (len(inds),))[order])
        self._put("done", inds, np.ones(len(inds), np.bool_))
        return stored

    def _write_features(self, inds: NDArray[np.integer], values: NDArray[Any]) -> NDArray[Any]:
        """Writes rows of features (B, k); returns them as they will be read."""
        if self.store_dtype in CODED:
            exponents = exponents_of(np.abs(values).max(axis=1, initial=0), 2.0**-40, 2.0**40)  # squares fit float32
            mantissas = np.ldexp(values, -exponents[:, None]) if exponents.any() else values
            items, scales = encode(mantissas, self.store_dtype)
            self._put(FEATURES, inds, items)
            self._put(SCALES, inds, scales)
            mantissas = decode(items, scales, self.store_dtype, slice(None), values.shape[1])
        else:
            mantissas, exponents = to_mantissas(values, self.files[FEATURES].dtype.type)
            self._put(FEATURES, inds, mantissas)
        if exponents.any() or self.files[EXPONENTS][inds].any():  # else they are on disk already
            self._put(EXPONENTS, inds, exponents)
        return from_mantissas(mantissas, exponents)

    def undo(self, inds: NDArray[np.integer]) -> None:
        """Takes the flags of some rows down: they count as never written."""
        if len(inds):
            self._put("done", np.sort(inds), np.zeros(len(inds), np.bool_))

    def other_samples(self, inds: NDArray[np.integer], digests: NDArray[np.uint32]) -> NDArray[np.integer]:
        """Returns those of the rows `inds` that are written, but belong to samples with other digests."""
        other: NDArray[np.integer] = inds[self.done[inds] & (self.digests[inds] != digests)]
        return other

    def _put(self, name: str, inds: NDArray[np.integer], array: NDArray[Any]) -> None:
        """Writes sorted rows of a file, and flushes them."""
        path = self.path / f"{name}.npy"
        target = self.files[name]
        data = np.ascontiguousarray(array, target.dtype).data.cast("B")
        size = len(data) // max(1, len(inds))
        with advising_on_full_disk(path):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                position = 0
                for start, stop in consecutive_ranges(inds):
                    count = (stop - start) * size
                    write_at(handle, data[position : position + count], target.offset + start * size)
                    position += count
                sync(handle)
            finally:
                os.close(handle)

    def read(self, name: str, rows: slice) -> Tensor:
        """Reads rows [start, stop) of a column, float32, as a copy by read(2), which leaves nothing mapped.

        Features are float64 if the largest of one of the rows is not 0 and not within 2^-64 to 2^64.
        """
        values = self._read(name, rows)
        if name == FEATURES:
            if self.store_dtype in CODED:
                values = decode(values, self._read(SCALES, rows), self.store_dtype, slice(None), self.shapes[name][0])
            values = from_mantissas(values, self._read(EXPONENTS, rows))
        return torch.from_numpy(values)

    def _read(self, name: str, rows: slice) -> NDArray[Any]:
        """Reads rows [start, stop) of a file, in its dtype."""
        path = self.path / f"{name}.npy"
        target = self.files[name]
        array = np.empty((rows.stop - rows.start, *target.shape[1:]), target.dtype)
        view = array.data.cast("B")
        size = array.nbytes // max(1, len(array))
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = target.offset + rows.start * size
            while view:
                if not (count := os.preadv(handle, [view], offset)):
                    raise ValueError(f"{path} is truncated")
                view = view[count:]
                offset += count
        finally:
            os.close(handle)
        return array

    @functools.cached_property
    def locks(self) -> LockFile:
        """The file in which processes lock the rows that they write.

        Raises:
            PermissionError: The folder may be read but not written.
            RuntimeError: Another process has deleted the folder.
        """
        self._require_in_place()
        with advising_on_denied(self.path):
            return lock_file(self.path / LOCK_FILE)

    def claim(self, inds: NDArray[np.integer]) -> None:
        """Keeps other processes from writing and reading rows `inds`, until `release` or the end of the process.

        Raises:
            RuntimeError: Another process that is alive has claimed one of them, reads them, or has deleted them.
            PermissionError: The folder may be read but not written.
        """
        if self._claims > MAX_CLAIMS:
            self.release()
        for start, stop in consecutive_ranges(np.sort(inds)):
            _lock(self.locks, self.path, start, stop - start)
            self._claims += start != self._claimed_to
            self._claimed_to = stop
        self._require_in_place()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Keeps other processes from writing any row, or deleting them all, during the block.

        Others may read. Where this process may not write, or there are no locks, nothing is locked.

        Raises:
            RuntimeError: Another process that is alive has claimed a row.
        """
        with self._sharing(0, len(self.done)):
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps other processes from deleting the rows during the block; `unchanged` does more.

        Raises:
            RuntimeError: Another process is deleting them.
        """
        with self._sharing(WHOLE, 1):
            yield

    @contextmanager
    def _sharing(self, start: int, length: int) -> Iterator[None]:
        """Shares a lock during the block."""
        try:
            locks = self.locks
        except PermissionError:
            locks = None
        if locks is not None:
            _lock(locks, self.path, start, length, shared=True)
        try:
            self._require_in_place()
            yield
        finally:
            if locks is not None:
                locks.release(start, length)

    def _require_in_place(self) -> None:
        """Checks that the opened files still have their names, under which others look for them."""
        if _identity(self.path) != self._identity:
            raise RuntimeError(
                f"{self.path} was deleted, or has grown, since it was opened; load the checkpoint, or start scoring "
                "it, again"
            )

    def release(self) -> None:
        """Gives up all rows that this process has claimed."""
        if self._claims:
            self.locks.release(0, len(self.done))
        self._claims = 0
        self._claimed_to = -1

    def require_all(self, complaint: str) -> None:
        """Checks that every row is written.

        Args:
            complaint: The words of the message between the number of missing rows and the list of the first of them,
                such as "samples are not featurized".

        Raises:
            RuntimeError: Some rows are not written.
        """
        if len(missing := np.flatnonzero(~self.done)):
            raise RuntimeError(f"{len(missing)} of {len(self.done)} {complaint}: {first_of(missing)}")


def require_same_samples(rows: Mapping[int, Rows], things: str) -> None:
    """Checks that the rows of all checkpoints belong to the same samples.

    Args:
        rows: The rows of each checkpoint, by model_id.
        things: A word for the samples, for the message.

    Raises:
        ValueError: They do not.
    """
    first, *others = rows
    for other in others:
        if len(differing := np.flatnonzero(rows[first].digests != rows[other].digests)):
            raise ValueError(
                f"{len(differing)} {things} are other ones for model_id {other} than for model_id {first}: "
                f"{first_of(differing)}; "
                "give the same samples, in the same order, at each checkpoint"
            )


@contextmanager
def claimed_for_deletion(path: Path) -> Iterator[None]:
    """Keeps other processes from using any row of `path` during the block, in which it may be deleted, or grow.

    Raises:
        RuntimeError: Another process that is alive reads or has claimed rows of it.
        PermissionError: The folder may be read but not written.
    """
    with advising_on_denied(path):
        locks = lock_file(path / LOCK_FILE)
    _lock(locks, path, 0, WHOLE + 1)
    try:
        yield
    finally:
        locks.release(0, WHOLE + 1)


def _lock(locks: LockFile, path: Path, start: int, length: int, shared: bool = False) -> None:
    """Locks bytes of the lock file of the folder `path`.

    Raises:
        BusyError: Another process has locked one of them; the message names rows, folder and process.
    """
    if locks.acquire(start, length, shared):
        return
    rows, process, reads = "rows", "", False
    if (held := locks.holder(start, length, shared)) is not None:
        end = min(held.start + held.length, start + length) if held.length else start + length
        rows = "all rows" if end > MAX_ROWS else f"rows {max(start, held.start)} to {end - 1}"
        process = f" (pid {held.process})" if held.process else ""
        reads = held.shared
    alike = not (reads or shared or start + length > MAX_ROWS)
    raise BusyError(
        f"{rows} of {path} are being {'read' if reads else 'written'} by another process{process}; "
        + ("give each process rows of its own, or " if alike else "")
        + "wait until it has ended"
    )


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns numbers that tell a folder of rows from one that replaced it, as long as that is mapped."""
    try:
        status = (path / "done.npy").stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
