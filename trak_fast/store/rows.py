"""Arrays on disk that are filled row by row, in any order, by any number of processes.

A row's flag is set after its values are on disk, so what a flag says is there is there, whenever a process was killed
or a disk became full. Writing goes through pwrite and not through a memory map: there, running out of space is an
error that can be reported, in a map it kills the process; and only the pages that were written are flushed.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import advising_on_full_disk, create_array, open_array, sync, write_at
from .locks import LockFile, lock_file

MAX_CLAIMS = 1024
"""Separate ranges of rows that a process keeps locked; a kernel's list of locks is searched from end to end."""


def consecutive_ranges(inds: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) of consecutive numbers that sorted `inds` are made of."""
    cuts = np.flatnonzero(np.diff(inds) != 1) + 1
    for part in np.split(inds, cuts):
        if len(part):
            yield int(part[0]), int(part[-1]) + 1


class HalfMatrix:
    """A float32 matrix stored as float16 with a power of two for each row, so that no row's range is too large.

    Behaves like a read-only array of float32 in what the solver needs: shape, rows, columns of the transpose.
    """

    dtype, stored_dtype = np.dtype(np.float32), np.dtype(np.float16)

    def __init__(self, values: NDArray[np.float16], scales: NDArray[np.float32], transposed: bool = False) -> None:
        self.values, self.scales, self.transposed = values, scales, transposed
        self.shape = values.shape[::-1] if transposed else values.shape
        self.ndim = 2

    def __len__(self) -> int:
        return len(self.values.T) if self.transposed else len(self.values)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        result: NDArray[np.float32]
        if self.transposed:
            result = (self.values[:, index].astype(np.float32) * self.scales[:, None]).T
        else:
            result = self.values[index].astype(np.float32) * self.scales[index][..., None]
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype or np.float32)

    @property
    def T(self) -> HalfMatrix:
        """The transpose, without a copy."""
        return HalfMatrix(self.values, self.scales, not self.transposed)


def to_halves(values: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """float16 values and powers of two whose product is `values` to 11 bits.

    The largest of a row comes to lie in [2^14, 2^15): elements down to 2^-28 of it keep all 11 bits.
    """
    largest = np.abs(values).max(axis=1, initial=0)
    exponents = np.where(largest == 0, 0, np.maximum(np.frexp(largest)[1] - 15, -126))  # 2^-126 is still normal
    halves = np.ldexp(values, -exponents[:, None]).astype(np.float16)
    return halves, np.ldexp(np.float32(1), exponents).astype(np.float32)


class Rows:
    """Columns of equal length in one folder, read as float32, with a flag for each row that is written.

    Attributes:
        shapes: Shape of one row of each column.
        columns: Each column, (rows, *shape) float32: a read-only memory map, or a `HalfMatrix`, which behaves like one.
        done: (rows,) bool, a read-only memory map.
    """

    def __init__(
        self, path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]], half: tuple[str, ...] = ()
    ) -> None:
        """Opens the columns that `create` made.

        Args:
            path: The folder.
            num_rows: Rows.
            shapes: Shape of one row of each column.
            half: Columns of vectors that are stored in float16.

        Raises:
            ValueError: A file is missing, truncated, corrupt, or has another shape.
        """
        self.path = path
        self.shapes = dict(shapes)
        self.half = half
        self.files = {name: open_array(path / f"{name}.npy", *kind) for name, kind in _kinds(num_rows, shapes, half)}
        self.done = self.files["done"]
        self.columns: dict[str, Any] = {
            name: HalfMatrix(self.files[name], self.files[f"{name}_scale"]) if name in half else self.files[name]
            for name in shapes
        }
        self._claims, self._claimed_to = 0, -1

    @property
    def features(self) -> NDArray[np.float32]:
        """The column of projected gradients, (rows, k)."""
        features: NDArray[np.float32] = self.columns["features"]
        return features

    @property
    def weights(self) -> NDArray[np.float32]:
        """The column of weightings Q, (rows,); training rows have it, those of targets do not."""
        weights: NDArray[np.float32] = self.columns["weights"]
        return weights

    @staticmethod
    def create(path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]], half: tuple[str, ...] = ()) -> None:
        """Makes a folder of columns without any row done.

        Raises:
            OSError: The disk has too little space.
        """
        path.mkdir(exist_ok=True)
        kinds = list(_kinds(num_rows, shapes, half))
        needed = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for _, (shape, dtype) in kinds)
        if (free := shutil.disk_usage(path).free) < needed:
            raise OSError(errno.ENOSPC, f"features need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free", str(path))
        for name, (shape, dtype) in kinds:
            file = path / f"{name}.npy"
            with advising_on_full_disk(file):
                create_array(file, shape, dtype)

    def write(self, inds: NDArray[np.integer], **values: NDArray[np.float32] | Tensor) -> dict[str, NDArray[Any]]:
        """Writes rows `inds` of every column; their flags are down meanwhile.

        Returns:
            The values as they are read again, float32.

        Raises:
            OSError: The disk is full, for example. The rows' flags stay down.
        """
        order = np.argsort(inds, kind="stable")
        inds = np.asarray(inds)[order]
        if not len(inds):
            return {name: np.empty((0, *column.shape[1:]), np.float32) for name, column in self.columns.items()}
        if self.done[inds].any():
            self._put("done", inds, np.zeros(len(inds), np.bool_))
        stored = {}
        for name, column in self.columns.items():
            array = np.broadcast_to(np.asarray(values[name], np.float32), (len(inds), *column.shape[1:]))[order]
            if name in self.half:
                halves, scales = to_halves(array)
                self._put(name, inds, halves)
                self._put(f"{name}_scale", inds, scales)
                array = halves.astype(np.float32) * scales[:, None]
            else:
                self._put(name, inds, array)
            stored[name] = np.empty_like(array)
            stored[name][order] = array
        self._put("done", inds, np.ones(len(inds), np.bool_))
        return stored

    def _put(self, name: str, inds: NDArray[np.integer], array: NDArray[Any]) -> None:
        """Writes sorted rows of a file, and flushes them."""
        path, target = self.path / f"{name}.npy", self.files[name]
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
        """Rows [start, stop) of a column, float32: a copy by read(2), which leaves nothing mapped."""
        if name not in self.half:
            return self._read(name, rows)
        scales = self._read(f"{name}_scale", rows)
        return self._read(name, rows).float().mul_(scales[:, None])

    def _read(self, name: str, rows: slice) -> Tensor:
        path, target = self.path / f"{name}.npy", self.files[name]
        array = np.empty((rows.stop - rows.start, *target.shape[1:]), target.dtype)
        view, size = array.data.cast("B"), array.nbytes // max(1, len(array))
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = target.offset + rows.start * size
            while view:
                if not (count := os.preadv(handle, [view], offset)):
                    raise ValueError(f"{path} is truncated")
                view, offset = view[count:], offset + count
        finally:
            os.close(handle)
        return torch.from_numpy(array)

    @functools.cached_property
    def locks(self) -> LockFile:
        """Where processes lock the rows that they write."""
        return lock_file(self.path / "writers.lock")

    def claim(self, inds: NDArray[np.integer]) -> None:
        """Keeps other processes from writing rows `inds`, until `release` or the end of the process.

        Raises:
            RuntimeError: Another process that is alive has claimed one of them.
        """
        if self._claims > MAX_CLAIMS:
            self.release()
        for start, stop in consecutive_ranges(np.sort(inds)):
            if not self.locks.acquire(start, stop - start):
                raise RuntimeError(self._claimed_by_another(start, stop))
            self._claims += start != self._claimed_to
            self._claimed_to = stop

    def _claimed_by_another(self, start: int, stop: int) -> str:
        held = self.locks.holder(start, stop - start)
        first, last, process = start, stop - 1, ""
        if held is not None:
            first, last = max(start, held[0]), min(last, held[0] + held[1] - 1)
            process = f" (pid {held[2]})" if held[2] > 0 else ""
        return (
            f"rows {first} to {last} of {self.path} are being written by another process{process}; "
            "give each process rows of its own, or wait until it has ended"
        )

    def release(self) -> None:
        """Gives up all rows that this process has claimed."""
        if self._claims:
            self.locks.release(0, len(self.done))
        self._claims, self._claimed_to = 0, -1

    def require_all(self, what: str) -> None:
        """Checks that every row is written.

        Raises:
            RuntimeError: Some are not; the message counts them as `what` and numbers the first.
        """
        if len(missing := np.flatnonzero(~self.done)):
            numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise RuntimeError(f"{len(missing)} of {len(self.done)} {what}: {numbers}")


def _kinds(
    num_rows: int, shapes: Mapping[str, tuple[int, ...]], half: tuple[str, ...]
) -> Iterator[tuple[str, tuple[tuple[int, ...], type[np.generic]]]]:
    """Names, shapes and dtypes of the files."""
    for name, shape in shapes.items():
        yield name, ((num_rows, *shape), np.float16 if name in half else np.float32)
        if name in half:
            yield f"{name}_scale", ((num_rows,), np.float32)
    yield "done", ((num_rows,), np.bool_)
