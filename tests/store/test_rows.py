"""Rows on disk: half precision, full disks, and several processes at once."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from trak_fast.store import rows as rows_module
from trak_fast.store.rows import (
    Rows,
    ScaledMatrix,
    claimed_for_deletion,
    consecutive_ranges,
    from_mantissas,
    to_mantissas,
)

N, K = 10, 3
SHAPES: dict[str, tuple[int, ...]] = {"features": (K,), "weights": ()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Rows.create(tmp_path / "rows", N, SHAPES)
    return tmp_path / "rows"


def values(inds: NDArray[np.integer]) -> dict[str, NDArray[np.float32]]:
    """Makes numbers that are different in each row."""
    return {
        "features": (10 * inds[:, None] + np.arange(K)).astype(np.float32),
        "weights": (0.5 + inds).astype(np.float32),
    }


def check(rows: Rows, done: list[int]) -> None:
    assert np.flatnonzero(rows.done).tolist() == done
    for name, column in values(np.array(done, int)).items():
        np.testing.assert_array_equal(rows.columns[name][done], column)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_halves_keep_11_bits_of_whatever_is_not_tiny_beside_its_row(array: NDArray[np.float32]) -> None:
    back = from_mantissas(*to_mantissas(array, np.float16)).astype(np.float64)
    assert np.isfinite(back).all()
    largest = np.abs(array).max(1, keepdims=True)
    # below 2^-28 of the largest, float16 has fixed steps of 2^-24 in 2^15
    assert (np.abs(back - array) <= np.maximum(2.0**-11 * np.abs(array), 2.0**-38 * largest)).all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, (3, 5), elements=st.floats(-(2.0**230), 2.0**230)))
def test_floats_keep_24_bits_of_whatever_is_not_tiny_beside_its_row(array: NDArray[np.float64]) -> None:
    back = from_mantissas(*to_mantissas(array, np.float32)).astype(np.float64)
    largest = np.abs(array).max(1, keepdims=True)
    # below 2^-126 of a mantissa in [2^-64, 2^64], float32 has fixed steps; below 2^-1022 float64 has
    assert (np.abs(back - array) <= np.maximum(2.0**-24 * np.abs(array), 2.0**-85 * largest)).all()


def test_rows_that_float32_computes_with_are_stored_bit_for_bit() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    rows[:, 0] = [2.0**64, 2.0**-64, 2.0**-60, 1, 0]
    rows[1, 1:] = 2.0**-149
    rows[4] = 0
    mantissas, exponents = to_mantissas(rows.astype(np.float64), np.float32)
    assert not exponents.any()
    assert mantissas.tobytes() == from_mantissas(mantissas, exponents).tobytes() == rows.tobytes()
    assert from_mantissas(mantissas, exponents) is mantissas
    assert to_mantissas(rows * np.float32(4), np.float32)[1].tolist() == [67, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("widest", [9, 60])
def test_scaled_matrices_behave_like_the_array_that_they_stand_for(dtype: type, widest: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 4)) * np.geomspace(10.0**-widest, 10.0**widest, 6)[:, None]
    scaled = ScaledMatrix(*to_mantissas(rows, dtype))
    array = np.array(scaled)
    assert array.dtype == (np.float32 if widest == 9 else np.float64)
    assert scaled.dtype == dtype
    np.testing.assert_allclose(array, rows, rtol=np.finfo(dtype).eps)
    assert (len(scaled), scaled.shape, scaled.T.shape, len(scaled.T)) == (6, (6, 4), (4, 6), 4)
    for index in (slice(1, 4), slice(None), np.array([3, 0]), 2, np.array([True, False] * 3)):
        np.testing.assert_array_equal(scaled[index], array[index])
    for index in (slice(1, 3), slice(None), np.array([3, 0])):
        np.testing.assert_array_equal(scaled.T[index], array.T[index])
    np.testing.assert_array_equal(np.asarray(scaled.T.T, np.float64), array)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0, 1.0], [1.0, 1e-40, 1e60, 0.0]])
def test_what_is_written_is_read_by_all_ways(tmp_path: Path, half: bool, scales: list[float]) -> None:
    Rows.create(tmp_path / "rows", N, SHAPES, "float16" if half else "float32")
    rows = Rows(tmp_path / "rows", N, SHAPES, "float16" if half else "float32")
    inds = np.array([7, 2, 3, 9])
    given = {"features": torch.randn(4, K) * 1e6 * torch.tensor(scales).double()[:, None], "weights": torch.rand(4)}
    stored = rows.write(inds, **given)
    reopened = Rows(tmp_path / "rows", N, SHAPES, "float16" if half else "float32")
    np.testing.assert_array_equal(reopened.features[inds], stored["features"])
    assert isinstance(reopened.features, np.memmap) == (not half and scales[0] == scales[3])
    for name, value in stored.items():
        np.testing.assert_array_equal(reopened.columns[name][inds], value)
        np.testing.assert_array_equal(reopened.read(name, slice(2, 8)), reopened.columns[name][2:8])
        np.testing.assert_allclose(value, given[name], rtol=2.0**-11 if half and name == "features" else 2.0**-24)
    assert reopened.done.tolist() == [i in inds for i in range(N)]
    assert rows.write(np.zeros(0, int), features=torch.zeros(0, K), weights=torch.zeros(0))["features"].shape == (0, K)


def test_consecutive_ranges_cover_sorted_numbers() -> None:
    assert list(consecutive_ranges(np.array([0, 1, 2, 5, 7, 8]))) == [(0, 3), (5, 6), (7, 9)]
    assert list(consecutive_ranges(np.array([4]))) == [(4, 5)]
    assert list(consecutive_ranges(np.zeros(0, int))) == []


def test_only_what_is_written_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write touches the batch's ranges alone, and a system that takes few bytes at a time gets the rest later."""
    ranges = []
    pwrite = os.pwrite

    def few(handle: int, data: memoryview, offset: int) -> int:
        ranges.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, offset, min(len(data), 5)))
        return pwrite(handle, data[:5], offset)

    monkeypatch.setattr(os, "pwrite", few)
    rows = Rows(folder, N, SHAPES)
    inds = np.array([8, 3, 2])
    rows.write(inds, **values(inds))
    check(Rows(folder, N, SHAPES), [2, 3, 8])
    for name, size in (("features", 4 * K), ("weights", 4), ("done", 1)):
        header = (folder / f"{name}.npy").stat().st_size - N * size
        touched = {
            byte for file, start, count in ranges if file == f"{name}.npy" for byte in range(start, start + count)
        }
        wanted = {header + i * size + byte for i in inds for byte in range(size)}
        assert touched == wanted


@pytest.mark.parametrize("column", ["features.npy", "weights.npy", "done.npy"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_that_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, column: str, number: int
) -> None:
    rows = Rows(folder, N, SHAPES)
    rows.write(np.arange(4), **values(np.arange(4)))
    pwrite = os.pwrite

    def full(handle: int, data: memoryview, offset: int) -> int:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == column:
            if len(data) == 1:
                raise OSError(number, os.strerror(number))
            return pwrite(handle, data[:1], offset)  # then nothing more
        return pwrite(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="everything stored before is safe: make room") as caught:
            rows.write(np.array([6]), **values(np.array([6])))
        assert caught.value.errno == number
        assert str(caught.value.filename).endswith(column)
    check(Rows(folder, N, SHAPES), [0, 1, 2, 3])
    rows.write(np.array([6]), **values(np.array([6])))
    check(Rows(folder, N, SHAPES), [0, 1, 2, 3, 6])


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_rows import N, SHAPES, values
from trak_fast.store.rows import Rows
rows = Rows(Path(sys.argv[2]), N, SHAPES)
"""


@contextmanager
def process(folder: Path, script: str, python: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a script with a `python`: the usual one, if its number matters or it is killed, or else the warm one."""
    command = [python, "-c", SCRIPT + script, str(Path(__file__).parent), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


CLAIMING = "rows.claim(np.arange(3, 7)); print('ready', flush=True); sys.stdin.readline()"


def test_rows_that_another_process_writes_are_refused_by_number(folder: Path) -> None:
    rows = Rows(folder, N, SHAPES)
    with process(folder, CLAIMING, sys.executable) as other:
        rows.claim(np.array([7, 0, 1, 2]))  # next to them is fine
        for inds, words in (([5, 6, 7], "rows 5 to 6"), ([9, 3], "rows 3 to 3"), (list(range(N)), "rows 3 to 6")):
            with pytest.raises(RuntimeError, match=rf"{words} of .* another process \(pid {other.pid}\)"):
                rows.claim(np.array(inds))
        other.kill()
        other.wait()
        rows.claim(np.arange(N))  # a process that was killed holds nothing


def test_rows_that_are_read_can_be_read_but_not_claimed_by_others(folder: Path) -> None:
    rows = Rows(folder, N, SHAPES)
    reading = "context = rows.unchanged(); context.__enter__(); print('ready', flush=True); sys.stdin.readline()"
    with process(folder, reading, sys.executable) as other:
        with rows.unchanged(), rows.kept():
            pass
        for attempt in (lambda: rows.claim(np.arange(2, 4)), lambda: deleted(folder)):
            with pytest.raises(RuntimeError, match=rf"of .* are being read by another process \(pid {other.pid}\)"):
                attempt()
        other.kill()
        other.wait()
        rows.claim(np.arange(N))
        with rows.unchanged():  # this process may write
            rows.claim(np.arange(N))


def test_rows_that_are_kept_can_be_claimed_but_not_deleted_by_others(folder: Path) -> None:
    rows = Rows(folder, N, SHAPES)
    keeping = "context = rows.kept(); context.__enter__(); print('ready', flush=True); sys.stdin.readline()"
    with process(folder, keeping, sys.executable) as other:
        rows.claim(np.arange(2, 4))
        with pytest.raises(RuntimeError, match=rf"all rows of .* are being read by another process \(pid {other.pid}"):
            deleted(folder)
    deleted(folder)
    with process(folder, CLAIMING, sys.executable) as other:
        with rows.kept():
            pass
        message = rf"rows 3 to 6 of .* are being written by another process \(pid {other.pid}\); wait until"
        for attempt in (lambda: rows.unchanged().__enter__(), lambda: deleted(folder)):
            with pytest.raises(RuntimeError, match=message):
                attempt()


def deleted(folder: Path) -> None:
    with claimed_for_deletion(folder):
        pass


def test_claims_end_with_release_and_never_hinder_their_own_process(folder: Path) -> None:
    rows, again = Rows(folder, N, SHAPES), Rows(folder, N, SHAPES)
    rows.claim(np.arange(N))
    again.claim(np.arange(N))
    script = "print('ready', flush=True); sys.stdin.readline(); rows.claim(np.arange(3)); print('mine')"
    with process(folder, script, warm.python()) as other:
        rows.release()
        assert other.communicate("\n")[0] == "mine\n"


def test_scattered_claims_do_not_pile_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_CLAIMS", 2)
    rows = Rows(folder, N, SHAPES)
    for start in range(0, 6, 2):
        rows.claim(np.arange(start, start + 2))  # one range that grows
    assert rows._claims == 1
    for i in (9, 7, 2, 5):
        rows.claim(np.array([i]))
    assert rows._claims <= 3


def test_processes_that_write_disjoint_rows_at_once(folder: Path) -> None:
    count = 3
    script = "print('ready', flush=True); mine = int(sys.stdin.readline())\n" + (
        f"for i in range(mine, N, {count}): inds = np.array([i]); rows.claim(inds); rows.write(inds, **values(inds))"
    )
    with ExitStack() as stack:
        children = [stack.enter_context(process(folder, script, warm.python())) for _ in range(count)]
        for i, child in enumerate(children):
            assert child.stdin is not None
            child.stdin.write(f"{i}\n")
            child.stdin.flush()
        assert [child.wait() for child in children] == [0] * count
    check(Rows(folder, N, SHAPES), list(range(N)))
