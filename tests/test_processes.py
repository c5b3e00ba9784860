"""Several processes at one experiment, folders that may only be read, and experiments that are deleted."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from attribution import CHECKPOINTS, TARGETS, TRAIN, M, N, build, data, run
from torch import nn

from trak_fast.bench import results
from trak_fast.bench.runner import Run
from trak_fast.bench.settings import defaults
from trak_fast.retraining import Recipe, random_subsets, retrained_outputs
from trak_fast.scoring.top_scores import TopScores
from trak_fast.traker import TRAKer

PROGRAMS = Path(__file__).parent / "programs"


class Finalizing:
    """A process that computes scores and pauses.

    Attributes:
        pid: Its number.
    """

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self._child = child
        assert child.stdout is not None
        self.pid = int(child.stdout.readline())

    def scores(self) -> np.ndarray:
        """Ends the pause, and returns the scores that the process got."""
        out, err = self._child.communicate("\n")
        assert self._child.returncode == 0, err
        return np.frombuffer(bytes.fromhex(out), np.float32).reshape(N, M)


@contextmanager
def finalizing(folder: Path, pause: str) -> Iterator[Finalizing]:
    """Starts a process that pauses before or after it writes scores."""
    command = [warm.python(), str(PROGRAMS / "finalize_with_a_pause.py"), str(folder), pause]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            yield Finalizing(child)
        finally:
            child.kill()


def score_again(traker: TRAKer, seed: int) -> None:
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, num_targets=M)
        traker.score(data(M, seed), num_samples=M)


@pytest.mark.parametrize("pauses", [("after", "after"), ("after", "before")])
def test_two_processes_at_one_experiment_both_get_and_leave_right_scores(
    tmp_path: Path, pauses: tuple[str, str]
) -> None:
    """The second begins when the first has filled its file and not published it yet."""
    expected = np.array(run(build(tmp_path)))
    file = tmp_path / "scores" / "test.npy"
    with finalizing(tmp_path, pauses[0]) as first, finalizing(tmp_path, pauses[1]) as second:
        for process in (first, second):
            np.testing.assert_array_equal(process.scores(), expected)
            np.testing.assert_array_equal(np.load(file), expected)
    assert [path.name for path in file.parent.iterdir()] == ["test.npy"]


def test_targets_are_not_replaced_while_another_process_computes_with_them(tmp_path: Path) -> None:
    traker = build(tmp_path)
    expected = np.array(run(traker))
    with finalizing(tmp_path, "before") as other:
        complaint = rf"(rows 0 to 3|all rows) of {tmp_path}/.* are being read by another process \(pid {other.pid}\)"
        with pytest.raises(RuntimeError, match=complaint):
            score_again(traker, 9)
        with pytest.raises(RuntimeError, match=complaint):
            build(tmp_path).delete_experiment("test")
        with pytest.raises(RuntimeError, match=complaint):
            build(tmp_path, load_from_save_dir=False).load_checkpoint(CHECKPOINTS[1], 0)
        np.testing.assert_array_equal(other.scores(), expected)
    np.testing.assert_array_equal(build(tmp_path).finalize_scores("test"), expected)
    score_again(traker, 9)
    again = traker.finalize_scores("test")
    assert not np.allclose(again, expected)
    score_again(traker, 99)  # the targets that `run` takes
    np.testing.assert_allclose(traker.finalize_scores("test"), expected, rtol=1e-5, atol=1e-6)


def test_scores_are_not_computed_while_another_process_replaces_targets(tmp_path: Path) -> None:
    traker = build(tmp_path)
    run(traker)
    traker.start_scoring_checkpoint("test", CHECKPOINTS[1], 1, num_targets=M)
    traker.score([x[1:3] for x in TARGETS], inds=[1, 2])
    command = [warm.python(), str(PROGRAMS / "finalize_with_a_pause.py"), str(tmp_path), "never"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaint = f"rows 1 to 2 of {tmp_path}/checkpoint_1/targets/test are being written by another process"
    assert f"{complaint} (pid {os.getpid()}); wait until it has ended" in done.stderr
    traker.finalize_scores("test")  # gives up what this process held
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_a_deleted_checkpoint_is_not_written_by_whoever_had_it_open(tmp_path: Path) -> None:
    """Features of the one weights would be mixed with those of the other."""
    traker = build(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize([x[:5] for x in TRAIN], num_samples=5)
    again = build(tmp_path, load_from_save_dir=False)
    again.load_checkpoint(CHECKPOINTS[1], 0)
    with pytest.raises(
        RuntimeError, match="checkpoint_0/train was deleted, or has grown, since it was opened; load the"
    ):
        traker.featurize([x[5:] for x in TRAIN], num_samples=7)
    again.featurize(TRAIN, num_samples=N)
    traker.load_checkpoint(CHECKPOINTS[0], 1)  # must not save its sum into the new checkpoint
    again.finalize_features([0])
    x = np.asarray(again.store.train(0).features, np.float64)
    np.testing.assert_allclose(again.store.gram(0)[0], x.T @ x, rtol=1e-9, atol=1e-9 * (x * x).sum())
    fresh = build(tmp_path / "fresh")
    fresh.load_checkpoint(CHECKPOINTS[1], 0)
    fresh.featurize(TRAIN, num_samples=N)
    np.testing.assert_array_equal(x, fresh.store.train(0).features)


def test_an_experiment_is_deleted_whole_and_no_other(tmp_path: Path) -> None:
    traker = build(tmp_path)
    expected = np.array(run(traker))
    traker.top_scores("test", 2)
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("other", state, model_id, num_targets=M)
        traker.score(data(M, 9), num_samples=M)
    other = np.array(traker.finalize_scores("other"))
    with pytest.raises(ValueError, match=r"has 4 targets for model_id 0, not 3; use another exp_name, or delete"):
        traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=3)
    with pytest.raises(ValueError, match=r"exp_name must be an experiment of .*, one of 'other', 'test', not 'tests'"):
        traker.delete_experiment("tests")
    with pytest.raises(TypeError, match="exp_name must be a string, not int"):
        traker.delete_experiment(5)  # type: ignore[arg-type]
    traker.delete_experiment("test")
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert not [name for name in left if "test" in name or "/." in name]
    with pytest.raises(ValueError, match="'test' has no targets"):
        traker.finalize_scores("test")
    np.testing.assert_array_equal(traker.finalize_scores("other"), other)
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, num_targets=3)
        traker.score([x[:3] for x in TARGETS], num_samples=3)
    traker.top_scores("test", 2)
    np.testing.assert_allclose(traker.finalize_scores("test"), expected[:, :3], rtol=1e-5, atol=1e-6)


def test_a_folder_that_may_only_be_read_gives_the_same_results(tmp_path: Path) -> None:
    command = [warm.python(), str(PROGRAMS / "read_only_folder.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    traker = build(tmp_path)
    scores = np.array(run(traker))
    np.testing.assert_array_equal(np.float32(found["scores"]), scores)
    np.testing.assert_array_equal(found["indices"], (-scores).argsort(0, kind="stable")[:3].T)
    np.testing.assert_array_equal(np.float32(found["top"]), -np.sort(-scores, 0)[:3].T)
    np.testing.assert_array_equal(np.float32(found["influence"]), traker.self_influence())
    folder = found["folder"]
    opened, computed, refused = found["warned"]
    assert computed == [
        f"{folder}/scores/test.{ending} may not be written: these scores are returned, but not saved"
        for ending in ("highest.npz", "npy")
    ]
    assert opened == refused == []
    for message in found["refusals"]:
        assert f"'{folder}" in message
        assert "use a writable copy of save_dir" in message
    assert found["unchanged"]


def test_paths_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    traker = build(Path("~/results"))
    assert traker.store.path == tmp_path / "results"
    top = TopScores(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
    top.save(Path("~/top.npz"))
    assert TopScores.load(tmp_path / "top.npz").scores == TopScores.load("~/top.npz").scores == 1
    data_, masks = [torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64)], random_subsets(8, 1, seed=0)
    retrained_outputs(
        lambda: nn.Linear(2, 2), data_, masks, lambda models: models["bias"], Recipe(1, 2), 0, save_dir="~/retrained"
    )
    assert len(list((tmp_path / "retrained").iterdir())) == 1
    benchmark = Run(dataclasses.replace(defaults("cpu"), only=("trak_fast",)), Path("~/bench/results.json"), 1.0)
    assert benchmark.path == tmp_path / "bench" / "results.json"
    assert results.load(Path("~/bench/results.json")) == results.load(benchmark.path)
