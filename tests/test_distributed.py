"""The same script under torchrun with 1, 2 and 4 ranks, against one process; and ranks that die or fail."""

import functools
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import warm
from attribution import CHECKPOINTS, TRAIN, M, N, build, data, run
from hypothesis import given
from hypothesis import strategies as st

from trak_fast.distributed import Ranks, share
from trak_fast.scoring.top_scores import TopScores
from trak_fast.store.folder import Store

PROGRAMS = Path(__file__).parent / "programs"


def torchrun(ranks: int, folder: Path, proj_dim: int = 8, mode: str = "whole") -> subprocess.CompletedProcess[str]:
    return launch(ranks, "ranks.py", folder, proj_dim, mode)


def launch(ranks: int, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs one of the programs in tests/programs under torchrun."""
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, str(PROGRAMS / program), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def alone(folder: Path, proj_dim: int = 8) -> None:
    """Runs the same in this process."""
    traker = build(folder, proj_dim=proj_dim)
    run(traker)
    np.save(folder / "influence_0.npy", traker.self_influence())


def close(folder: Path, expected: Path) -> None:
    """Checks that both folders hold the same up to rounding in float32."""
    for model_id in range(len(CHECKPOINTS)):
        for name in ("train/features.npy", "train/weights.npy", "targets/test/features.npy", "gram.npy"):
            ours, theirs = (np.load(path / f"checkpoint_{model_id}" / name) for path in (folder, expected))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
        assert not (folder / f"checkpoint_{model_id}" / "gram").exists()
    ours, theirs = (np.load(path / "scores" / "test.npy") for path in (folder, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    whole = np.load(expected / "influence_0.npy")
    for path in folder.glob("influence_*.npy"):
        np.testing.assert_allclose(np.load(path), whole, rtol=1e-4, atol=1e-4 * whole.max())
    top = TopScores.load(folder / "scores" / "test.highest.npz")
    assert top.indices.shape == (M, 3)
    np.testing.assert_array_equal(top.scores, np.sort(ours, 0)[::-1][:3].T)
    np.testing.assert_array_equal(np.take_along_axis(ours, top.indices.T, 0).T, top.scores)


@pytest.mark.parametrize(("ranks", "proj_dim"), [(1, 8), (2, 8), (4, 8), (2, 20)])
def test_any_number_of_ranks_gives_the_same(tmp_path: Path, ranks: int, proj_dim: int) -> None:
    alone(tmp_path / "alone", proj_dim)
    done = torchrun(ranks, tmp_path / "shared", proj_dim)
    assert done.returncode == 0, done.stderr
    close(tmp_path / "shared", tmp_path / "alone")
    numbers = sorted([*map(int, line.split()[1:])] for line in done.stdout.splitlines() if line.startswith("rows"))
    assert [line[0] for line in numbers] == list(range(ranks))
    for column, total in ((1, N), (3, M)):  # each row has one rank
        ends = [0, *(line[column + 1] for line in numbers)]
        assert [line[column] for line in numbers] == ends[:-1]
        assert ends[-1] == total


def test_a_rank_that_dies_leaves_what_it_stored(tmp_path: Path) -> None:
    done = torchrun(2, tmp_path / "shared", mode="die")
    assert done.returncode != 0
    stored = Store.__new__(Store)  # looks without a manifest
    stored.path, stored.num_rows, stored.width, stored.store_dtype = tmp_path / "shared", N, 8, "float32"
    finished = stored.train(0).done
    assert finished[6:10].all()  # the dead rank's second batch
    assert not finished[10:].any()
    assert not stored.is_finalized(0)
    again = torchrun(2, tmp_path / "shared")
    assert again.returncode == 0, again.stderr
    alone(tmp_path / "alone")
    close(tmp_path / "shared", tmp_path / "alone")


def test_what_one_rank_lacks_is_an_error_on_all(tmp_path: Path) -> None:
    done = torchrun(2, tmp_path / "shared", mode="skip")
    assert done.returncode != 0
    message = (
        "2 of 12 training samples of model_id 0 are not featurized; under torchrun, each rank is given all batches"
    )
    assert done.stderr.count(f"RuntimeError: {message}") >= 1
    assert not (tmp_path / "shared" / "checkpoint_0" / "gram.npy").exists()


def test_ranks_can_score_delete_and_featurize_again(tmp_path: Path) -> None:
    """Each rank holds locks on its own rows, and the first one deletes those of all."""
    done = launch(2, "ranks_again.py", tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    traker = build(tmp_path / "alone")
    expected = {"first": np.array(run(traker))}
    for name, targets in (("again", data(M, 9)), ("fewer", data(3, 9))):
        for model_id, state in enumerate(CHECKPOINTS):
            traker.start_scoring_checkpoint(name, state, model_id, num_targets=len(targets[0]))
            traker.score(targets, num_samples=len(targets[0]))
        expected[name] = np.array(traker.finalize_scores(name))
    traker.load_checkpoint(CHECKPOINTS[1], 0, _allow_featurizing_already_registered=True)
    traker.featurize(TRAIN, num_samples=N)
    x = np.float64(traker.store.train(0).features)
    for start in (0, N // 2):
        with np.load(tmp_path / "shared" / f"rank_{start}.npz") as found:
            for name, scores in expected.items():
                np.testing.assert_allclose(found[name], scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
            np.testing.assert_allclose(found["gram"][0], x.T @ x, rtol=1e-5, atol=1e-6 * (x * x).sum())


@pytest.mark.parametrize(("ranks", "n"), [(2, 1), (3, 2)])
def test_more_ranks_than_samples(tmp_path: Path, ranks: int, n: int) -> None:
    done = launch(ranks, "few_samples.py", tmp_path, n)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        with np.load(tmp_path / f"rank_{rank}.npz") as found:
            x = np.float64(found["features"])
            inner = x @ np.linalg.inv(x.T @ x + 0.3 * 131 * np.eye(4)) @ x.T
            expected = found["weights"][:, None] * inner
            close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
            close(found["scores"], expected[:, :1])
            close(found["influence"], np.diagonal(expected))
            order = np.argsort(-expected[:, 0], kind="stable")
            np.testing.assert_array_equal(found["indices"], order[None])
            close(found["top"], expected[order, :1].T)
            close(found["low"], [[expected[:, 0].min()]])


def test_a_rank_that_waits_long_for_the_others_says_so_and_goes_on(tmp_path: Path) -> None:
    done = launch(2, "late_rank.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("still waiting for the other processes of torch.distributed") == 1
    assert "TRAKer(..., distributed=False) works alone" in done.stderr


@given(st.integers(0, 100), st.integers(1, 30))
def test_shares_cover_all_rows_once_and_evenly(total: int, size: int) -> None:
    parts = [share(total, rank, size) for rank in range(size)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
    assert {part.stop - part.start for part in parts} <= {total // size, -(-total // size)}


def test_one_process_is_a_group_of_its_own() -> None:
    for choice in (None, False):
        ranks = Ranks(choice)
        assert (ranks.rank, ranks.size, ranks.rows(7), ranks.gather("x")) == (0, 1, slice(0, 7), ["x"])
    with pytest.raises(RuntimeError, match=r"distributed=True, but torch\.distributed is not initialised"):
        Ranks(True)
    with pytest.raises(KeyError), ranks.together():
        raise KeyError
