"""X'X summed while featurizing: what is on disk after an interruption gives the same sum."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trak_fast.scoring import partial_grams
from trak_fast.scoring.gram import GramAccumulator
from trak_fast.scoring.partial_grams import PartialGram, load, total
from trak_fast.store.rows import Rows

N, K = 30, 4
CPU = torch.device("cpu")
X = (np.random.default_rng(0).standard_normal((N, K)) * 1e6).astype(np.float32)  # whose squares float16 cannot hold
C = np.random.default_rng(2).uniform(0, 0.25, N)  # curvatures
EXPECTED = np.stack([X.T.astype(np.float64) @ X, (X.T * C) @ X.astype(np.float64)])


@pytest.fixture
def train(tmp_path: Path) -> Rows:
    Rows.create(tmp_path / "train", N, {"features": (K,)})
    rows = Rows(tmp_path / "train", N, {"features": (K,)})
    rows.write(np.arange(N), features=X)
    return rows


def partial(train: Rows) -> PartialGram:
    return PartialGram(train.path.parent / "gram", N, K, CPU, train.locks, weighted=True)


def summed(train: Rows, monkeypatch: pytest.MonkeyPatch) -> tuple[NDArray[np.float64], int]:
    """The total, and how many rows were read for it."""
    read = []

    class Counting(GramAccumulator):
        def add(self, features: Any, weights: Any = None) -> None:
            if weights is None:
                read.append(len(features))
            super().add(features, weights)

    with monkeypatch.context() as patch:
        patch.setattr(partial_grams, "GramAccumulator", Counting)
        return total(train.path.parent / "gram", train, CPU, curvature=C).numpy(), sum(read)


def check(result: tuple[NDArray[np.float64], int], read: int) -> None:
    np.testing.assert_allclose(result[0], EXPECTED, rtol=1e-13, atol=1e-13 * np.abs(EXPECTED).max())
    assert result[1] == read


def test_rows_that_are_summed_are_not_read_again(train: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = partial(train)
    for inds in np.array_split(np.random.default_rng(1).permutation(N), 4):
        ours.add(inds, X[inds], C[inds])
        ours.add(inds[:2], X[inds[:2]], C[inds[:2]])  # a second time counts once
    np.testing.assert_allclose(ours.value(), EXPECTED, rtol=1e-13, atol=1e-13 * np.abs(EXPECTED).max())
    ours.close()
    check(summed(train, monkeypatch), 0)


def test_rows_since_the_last_save_are_read_again(train: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = partial(train)
    ours.add(np.arange(20), X[:20], C[:20])
    ours.save()
    ours.add(np.arange(20, 25), X[20:25], C[20:25])
    check(summed(train, monkeypatch), 10)
    monkeypatch.setattr(partial_grams, "SAVE_SECONDS", 0)
    ours.add(np.arange(25, 27), X[25:27], C[25:27])
    check(summed(train, monkeypatch), 3)
    ours.close()


def test_a_process_goes_on_from_what_the_one_before_it_left(train: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    for inds in np.array_split(np.arange(N), 5):
        ours = partial(train)
        ours.add(inds, X[inds], C[inds])
        ours.close()
    assert [path.name for path in (train.path.parent / "gram").iterdir()] == ["0.npz"]
    check(summed(train, monkeypatch), 0)


ADDING = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, test_partial_grams
from pathlib import Path
from trak_fast.store.rows import Rows
ours = test_partial_grams.partial(Rows(Path(sys.argv[2]), test_partial_grams.N, {"features": (test_partial_grams.K,)}))
ours.add(np.arange(10, 20), test_partial_grams.X[10:20], test_partial_grams.C[10:20])
ours.save()
print(ours.slot, flush=True)
sys.stdin.readline()
"""


def test_processes_at_a_time_have_a_sum_each(train: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = partial(train), partial(train)
    first.add(np.arange(5), X[:5], C[:5])
    second.add(np.arange(5, 10), X[5:10], C[5:10])
    second.close()
    command = [sys.executable, "-c", ADDING, str(Path(__file__).parent), str(train.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"  # the second slot, which is free again, with what is in it
        third = partial(train)
        third.add(np.arange(20, 28), X[20:28], C[20:28])
        other.kill()
    fourth = partial(train)  # the killed process's slot
    fourth.add(np.arange(28, 30), X[28:30], C[28:30])
    assert (first.slot, second.slot, third.slot, fourth.slot) == (0, 1, 2, 1)
    for ours in (first, third, fourth):
        ours.close()
    assert sorted(path.name for path in (train.path.parent / "gram").iterdir()) == ["0.npz", "1.npz", "2.npz"]
    check(summed(train, monkeypatch), 0)


@pytest.mark.parametrize("damage", ["truncated", "text", "kind", "shape"])
def test_sums_of_no_use_are_made_again(
    train: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    ours = partial(train)
    ours.add(np.arange(N), X, C)
    ours.close()
    contents: dict[str, Any] = {"gram": EXPECTED, "rows": np.packbits(np.ones(N, bool))}
    match damage:
        case "truncated":
            ours.path.write_bytes(ours.path.read_bytes()[:-40])
        case "text":
            ours.path.write_text("nonsense")
        case "kind":
            np.savez(ours.path, **{**contents, "gram": EXPECTED.astype(np.float32)})
        case "shape":
            np.savez(ours.path, **{**contents, "rows": np.packbits(np.ones(N - 9, bool))})
    with caplog.at_level(logging.WARNING, "trak_fast"):
        check(summed(train, monkeypatch), N)
    assert "its rows are read again" in caplog.text


def test_rows_in_two_sums_count_once(train: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes leave them on a file system without locks."""
    first, second = partial(train), partial(train)
    first.add(np.arange(20), X[:20], C[:20])
    second.add(np.arange(15, N), X[15:], C[15:])
    first.close()
    second.close()
    check(summed(train, monkeypatch), 10)


def test_what_a_kill_left_is_removed(train: Rows) -> None:
    partial(train).close()
    left = train.path.parent / "gram" / ".0.npz.0123"
    left.write_text("half of it")
    ours = partial(train)
    assert not left.exists()
    ours.close()
    assert load(ours.path, N, (2, K, K)) is None  # nothing was added


def test_the_summands_of_several_processes_add_up(train: Rows) -> None:
    parts = [partial(train) for _ in range(3)]
    for i, ours in enumerate(parts):
        ours.add(np.arange(6 * i, 6 * i + 6), X[6 * i : 6 * i + 6], C[6 * i : 6 * i + 6])
    for ours in parts:
        ours.close()
    for size in (1, 2, 4):
        result = sum(total(train.path.parent / "gram", train, CPU, rank, size, C) for rank in range(size))
        np.testing.assert_allclose(result, EXPECTED, rtol=1e-13, atol=1e-13 * np.abs(EXPECTED).max())


def test_without_curvature_there_is_one_matrix(train: Rows) -> None:
    folder = train.path.parent / "gram"
    ours = PartialGram(folder, N, K, CPU, train.locks)
    ours.add(np.arange(20), X[:20])
    ours.close()
    for result in (total(folder, train, CPU), total(folder, train, CPU, curvature=C)[:1]):  # of use, and of no use
        np.testing.assert_allclose(result, EXPECTED[:1], rtol=1e-13, atol=1e-13 * np.abs(EXPECTED).max())
