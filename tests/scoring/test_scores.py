"""Streamed scores and extreme scores against the whole matrix in float64."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trak_fast import save_table
from trak_fast.scoring import scores
from trak_fast.scoring import top_scores as top_scores_module
from trak_fast.scoring.gram import gram_matrix
from trak_fast.scoring.scores import Checkpoint, ScoreFile, ScoreMatrix
from trak_fast.scoring.solver import Solver
from trak_fast.scoring.top_scores import TopScores, merge_top_scores, top_scores
from trak_fast.store.rows import Rows

M, RIDGE = 6, 2.0


def matrix(folder: Path, n: int, k: int, checkpoints: int = 2, half: bool = False) -> tuple[ScoreMatrix, NDArray]:
    """Scores of random features, and the same by an explicit inverse."""
    rng = np.random.default_rng(0)
    weights, parts, expected = rng.random(n), [], np.zeros((n, M))
    for i in range(checkpoints):
        path, shapes, kept = folder / str(i), {"features": (k,)}, "float16" if half else "float32"
        Rows.create(path, n, shapes, kept)
        rows = Rows(path, n, shapes, kept)
        rows.write(np.arange(n), features=rng.standard_normal((n, k)).astype(np.float32))
        targets = rng.standard_normal((M, k)).astype(np.float32)
        x = np.asarray(rows.features, np.float64)
        expected += x @ np.linalg.inv(x.T @ x + RIDGE * np.eye(k)) @ targets.T
        gram = gram_matrix(rows.features, torch.device("cpu"))
        parts.append(Checkpoint(Solver(rows.features, gram, RIDGE), rows, targets))
    return ScoreMatrix(parts, torch.from_numpy(weights)), expected * weights[:, None]


@pytest.fixture(params=[1 << 28, 300], ids=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(scores, "SOLVED_BYTES", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("n", "k"), [(40, 7), (9, 20)])
@pytest.mark.parametrize("half", [False, True])
def test_a_file_of_all_scores(tmp_path: Path, n: int, k: int, half: bool) -> None:
    streamed, expected = matrix(tmp_path, n, k, half=half)
    file = ScoreFile(tmp_path / "x.npy", streamed.shape)
    file.begin()
    for rows in (slice(n // 3, n), slice(0, n // 3)):
        file.fill(streamed, rows)
    assert not (tmp_path / "x.npy").exists()
    file.publish()
    result = np.load(tmp_path / "x.npy")
    assert result.dtype == np.float32
    # float32 sums of k terms with two checkpoints
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.npy"]


def test_a_file_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    streamed, expected = matrix(tmp_path, 12, 4)
    child = os.fork()
    if child == 0:
        ScoreFile(tmp_path / "x.npy", streamed.shape).begin()
        os._exit(0)  # without `discard`
    os.waitpid(child, 0)
    assert [path for path in tmp_path.iterdir() if path.is_file()]
    file = ScoreFile(tmp_path / "x.npy", streamed.shape)
    file.begin()
    file.fill(streamed, slice(0, 12))
    file.publish()
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=1e-4, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.npy"]


def test_files_that_are_filled_at_once_do_not_meet(tmp_path: Path) -> None:
    """The first is published while the second, made later, is still empty."""
    streamed, expected = matrix(tmp_path, 12, 4)
    first, second = (ScoreFile(tmp_path / "x.npy", streamed.shape) for _ in range(2))
    first.begin()
    first.fill(streamed, slice(0, 12))
    second.begin()
    mapped = first.open()
    first.publish()
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=1e-4, atol=1e-6)
    second.fill(streamed, slice(0, 12))
    second.publish()
    second.discard()
    for scores_ in (np.load(tmp_path / "x.npy"), mapped):
        np.testing.assert_allclose(scores_, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("n", "k"), [(40, 7), (9, 20)])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("count", [1, 4, 100])
def test_top_scores_are_those_of_the_whole_matrix(tmp_path: Path, n: int, k: int, largest: bool, count: int) -> None:
    streamed, _ = matrix(tmp_path, n, k)
    file = ScoreFile(tmp_path / "x.npy", streamed.shape)
    file.begin()
    file.fill(streamed, slice(0, n))
    file.publish()
    whole = np.load(tmp_path / "x.npy")
    order = np.argsort(-whole if largest else whole, axis=0, kind="stable")[:count]
    found = top_scores(streamed, slice(0, n), count, largest)
    np.testing.assert_array_equal(found.indices, order.T)
    np.testing.assert_array_equal(found.scores, np.take_along_axis(whole, order, 0).T)
    parts = [top_scores(streamed, rows, count, largest) for rows in (slice(0, 0), slice(0, 3), slice(3, n))]
    assert parts[0].indices.shape == (M, 0)
    merged = merge_top_scores(parts, min(count, n))
    np.testing.assert_array_equal(merged.indices, found.indices)
    # the same up to rounding: a product's last bit depends on the block that it is in
    np.testing.assert_allclose(merged.scores, found.scores, rtol=1e-4, atol=1e-6)


def test_a_table_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("missing/x.csv", "~/x.csv"):
        with pytest.raises(FileNotFoundError, match=rf"make the folder first: '{path}'"):
            save_table(path, np.eye(2))
    (tmp_path / "home").mkdir()
    save_table("~/x.csv", np.eye(2))
    assert (tmp_path / "home" / "x.csv").read_text().splitlines()[1] == "0,0,1"


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99)
)
def test_ties_go_to_the_first_whatever_the_blocks(
    n: int, m: int, count: int, size: int, levels: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(levels, size=(n, m)).astype(np.float32)
    count = min(count, n)
    best = top_scores_module._Best(count, m)
    for start in range(0, n, size):
        best.add(slice(start, min(start + size, n)), torch.from_numpy(values[start : start + size]))
    expected = np.argsort(-values, axis=0, kind="stable")[:count].T
    np.testing.assert_array_equal(best.rows.reshape(m, count), expected)


def read_table(path: Path) -> list[tuple[int, int, np.float32]]:
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["target", "train_index", "score"]
    return [(int(target), int(index), np.float32(score)) for target, index, score in lines]


def test_tables_hold_the_same_numbers(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    save_table(tmp_path / "all.csv", array)
    rows = read_table(tmp_path / "all.csv")
    assert [row[0] for row in rows] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(array[index, target] == score for target, index, score in rows)
    for target in range(3):
        own = [score for t, _, score in rows if t == target]
        assert own == sorted(own, reverse=True)
    save_table(tmp_path / "one.csv", array[:, 1])
    assert read_table(tmp_path / "one.csv") == [(0, *row[1:]) for row in rows[5:10]]
    top = TopScores(np.array([[3, 1], [0, 4]]), np.array([[2.5, 1 / 3], [9e-9, -1]], np.float32))
    save_table(tmp_path / "top.csv", top)
    assert read_table(tmp_path / "top.csv") == [
        (0, 3, np.float32(2.5)), (0, 1, np.float32(1 / 3)), (1, 0, np.float32(9e-9)), (1, 4, np.float32(-1)),
    ]  # fmt: skip


def test_top_scores_are_saved_and_read(tmp_path: Path) -> None:
    top = TopScores(np.array([[3, 1]]), np.array([[-2.5, 0.5]], np.float32), largest=False)
    top.save(tmp_path / "x.npz")
    again = TopScores.load(tmp_path / "x.npz")
    assert (again.indices == top.indices).all()
    assert (again.scores == top.scores).all()
    assert again.largest is False
