"""Folders that get more training samples later, against folders that have them all from the start."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from attribution import CHECKPOINTS, EPS, M
from extended import ALL, NEW, OLD, contents, featurize, opened, run, score
from language_models import B, Language, texts

from trak_fast.store import growth
from trak_fast.store.folder import Store
from trak_fast.store.growth import Growth, stored_size
from trak_fast.traker import TRAKer

PROGRAMS = Path(__file__).parent / "programs"


@contextmanager
def process(program: str, *arguments: object) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Starts a program that prints its number when it has got somewhere, and then waits for a line."""
    pipe = subprocess.PIPE
    command = [warm.python(), str(PROGRAMS / program), *map(str, arguments)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None
        yield int(child.stdout.readline()), child
        child.kill()


@pytest.mark.parametrize(
    ("proj_dim", "store_dtype", "lambda_reg"),
    [
        (8, "float32", "auto"),  # X'X of both, XX' of the first and X'X of all, XX' of both
        (16, "float32", "auto"),
        (32, "float32", "auto"),
        (8, "float32", 0.3),
        (16, "float32", 0.3),
        (32, "float32", 0.3),
        (8, "float16", "auto"),
        (16, "int8", 0.3),
        (32, "int8", math.inf),
        (16, "1bit", math.inf),
        (8, "float32", math.inf),
    ],
)
def test_a_folder_that_has_grown_equals_one_of_that_size(
    tmp_path: Path, proj_dim: int, store_dtype: str, lambda_reg: float | str
) -> None:
    options: dict[str, Any] = {"proj_dim": proj_dim, "store_dtype": store_dtype, "lambda_reg": lambda_reg}
    whole = run(tmp_path / "whole", NEW, **options)
    traker = run(tmp_path / "grown", OLD, **options)
    before = [np.array(traker.store.train(i).features[:]) for i in (0, 1)]
    traker.extend(NEW)
    assert traker.train_set_size == NEW
    assert traker.rows() == range(NEW)
    assert traker.scores is None
    for model_id in (0, 1):
        train = traker.store.train(model_id)
        np.testing.assert_array_equal(train.done, np.arange(NEW) < OLD)
        np.testing.assert_array_equal(np.asarray(train.features[:])[:OLD], before[model_id])
        assert not traker.store.is_finalized(model_id)
    assert not list((tmp_path / "grown" / "scores").iterdir())
    with pytest.raises(RuntimeError, match=r"model_ids \[0, 1\] are not finalized"):
        traker.finalize_scores("test")
    with pytest.raises(RuntimeError, match="8 of 20 training samples of model_id 0 are not featurized"):
        traker.finalize_features()
    featurize(traker, OLD, NEW)
    traker.finalize_features()
    scores, expected = np.array(traker.finalize_scores("test")), np.array(whole.scores)
    # X'X may be summed in another order in float64; what is left is the rounding of its solution to float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=(proj_dim + 4) * EPS * np.abs(expected).max())
    for largest in (True, False):
        top = traker.top_scores("test", 3, largest=largest)
        order = (-scores if largest else scores).argsort(0, kind="stable")[:3].T
        np.testing.assert_array_equal(top.indices, order)
    influence, expected = traker.self_influence(), whole.self_influence()
    np.testing.assert_allclose(influence, expected, rtol=0, atol=(proj_dim + 4) * EPS * np.abs(expected).max())
    for model_id in (0, 1):
        for part in ("train", "targets/test"):
            found = contents(traker.store.checkpoint(model_id) / part)
            assert found == contents(whole.store.checkpoint(model_id) / part)
        grams = [t.store.gram(model_id) for t in (traker, whole)]
        np.testing.assert_allclose(grams[0], grams[1], rtol=0, atol=NEW * 2.0**-52 * np.abs(grams[1]).max())
    again = opened(tmp_path / "grown", NEW, **options)
    np.testing.assert_array_equal(again.finalize_scores("test"), scores)


def test_a_folder_grows_again_and_takes_new_checkpoints_and_targets(tmp_path: Path) -> None:
    traker = opened(tmp_path / "grown", 10)
    featurize(traker, 0, 5, model_ids=(0,))  # the others are missing
    traker.extend(OLD)
    traker.extend(OLD)
    featurize(traker, 5, OLD, model_ids=(0,))
    traker.finalize_features()
    traker.extend(NEW)
    featurize(traker, OLD, NEW, model_ids=(0,))
    featurize(traker, 0, NEW, model_ids=(1,))
    traker.finalize_features()
    expected = np.array(run(tmp_path / "whole", NEW).scores)
    np.testing.assert_allclose(score(traker), expected, rtol=0, atol=12 * EPS * np.abs(expected).max())
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    with pytest.raises(ValueError, match="samples are not those that the same rows of"):  # digests have stayed
        traker.featurize([x[1:2] for x in ALL], inds=[0])


def test_a_folder_without_checkpoints_grows(tmp_path: Path) -> None:
    assert stored_size(tmp_path) is None
    traker = opened(tmp_path, OLD)
    assert stored_size(tmp_path) == OLD
    traker.extend(NEW)
    assert stored_size(tmp_path) == NEW
    featurize(opened(tmp_path, NEW), 0, NEW)
    assert opened(tmp_path, NEW).store.train(1).done.all()


def test_the_metric_of_a_checkpoint_stays(tmp_path: Path) -> None:
    batch = texts()
    half = B // 2
    features = []
    for size in (half, B):
        torch.manual_seed(5)
        model = Language(tied=False)
        state = copy.deepcopy(model.state_dict())
        traker = TRAKer(model, "causal_lm", size, tmp_path / str(size), metric="kfac", proj_dim=64)
        traker.load_checkpoint(state, 0)
        traker.fit_metric([x[:half] for x in batch])
        traker.featurize([x[:half] for x in batch], inds=range(half))
        metric = traker.store.metric_file(0).read_bytes()
        traker.extend(B)
        traker.load_checkpoint(state, 0)
        traker.featurize([x[half:] for x in batch], inds=range(half, B))
        assert traker.store.metric_file(0).read_bytes() == metric
        features.append(np.array(traker.store.train(0).features))
    np.testing.assert_array_equal(features[0], features[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_moment_leaves_the_old_folder_or_one_that_grows_when_it_is_opened(
    tmp_path: Path,
) -> None:
    traker = run(tmp_path / "before", OLD, model_ids=(0,))
    featurize(traker, 0, 5, model_ids=(1, 1))  # the second one has the sum of X'X saved
    command = [warm.python(), str(PROGRAMS / "killed_while_extending.py"), str(tmp_path)]
    moments = int(subprocess.run(command, check=True, timeout=240, stdout=subprocess.PIPE).stdout)
    assert moments > 40
    before, after = contents(tmp_path / "before"), contents(tmp_path / str(moments + 1))
    grown = []
    for moment in range(1, moments + 1):
        folder = tmp_path / str(moment)
        grown.append((folder / "growth.json").exists())
        if grown[-1]:
            with pytest.raises(ValueError, match=r"train_set_size must be 20, not 12; the folder has grown"):
                opened(folder, OLD)
            opened(folder, NEW)
            assert contents(folder) == after
        else:
            with pytest.raises(ValueError, match=r"TRAKer\(\.\.\., train_set_size=12\)\.extend\(20\) adds rows"):
                opened(folder, NEW)
            opened(folder, OLD).extend(OLD)
            assert {name: data for name, data in contents(folder).items() if "/." not in f"/{name}"} == before
            opened(folder, OLD).extend(NEW)
            assert contents(folder) == after
    assert grown == sorted(grown)
    assert 3 <= sum(grown) < moments
    names = {"test.npy", "test.highest.npz", "test.lowest.npz"}
    gone = {"checkpoint_0/gram.npy", "checkpoint_1/gram/0.npz", *(f"scores/{name}" for name in names)}
    assert set(before) - set(after) == gone
    assert set(after) - set(before) == {"growth.json"}


def test_a_call_that_fails_halfway_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traker = run(tmp_path / "grown", OLD)
    run(tmp_path / "other", OLD).extend(NEW)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="make room and run the same again"):
            traker.extend(NEW)
    assert traker.train_set_size == OLD
    for call in (lambda: traker.load_checkpoint(CHECKPOINTS[0], 0), traker.self_influence):
        with pytest.raises((ValueError, RuntimeError)):
            call()
    half = Store.__new__(Store)  # opened by no TRAKer
    half.path, half.num_rows = traker.store.path, NEW
    with pytest.raises(RuntimeError, match=r"is half extended; TRAKer\(\.\.\.\) finishes it"):
        half.train(0)
    traker.extend(NEW)
    assert contents(tmp_path / "grown") == contents(tmp_path / "other")


def test_what_is_in_the_way_of_growing_is_an_error_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traker = run(tmp_path, OLD)
    before = contents(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    needed = 2 * (NEW - OLD) * (4 * 8 + 2 + 4 + 4 + 1)  # features, their powers of two, weights, digests, flags
    with monkeypatch.context() as patch:
        patch.setattr(growth.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(OSError, match="are free"):
            traker.extend(NEW)
        assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(growth.os, "access", lambda path, *_, **__: path.name != "checkpoint_1")
        with pytest.raises(PermissionError, match="make this part of save_dir writable") as caught:
            traker.extend(NEW)
        assert caught.value.filename == str(tmp_path / "checkpoint_1")
    file = tmp_path / "checkpoint_1" / "train" / "digests.npy"
    file.write_bytes(before["checkpoint_1/train/digests.npy"][:-1])
    with pytest.raises(ValueError, match=r"digests\.npy, it is missing, truncated or corrupt"):
        traker.extend(NEW)
    file.write_bytes(before["checkpoint_1/train/digests.npy"])
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(growth.shutil, "disk_usage", lambda _: usage._replace(free=needed))
        traker.extend(NEW)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (OLD - 1, ValueError, r"train_set_size must be in \[12, 2\*\*48\], not 11"),
        (-1, ValueError, "train_set_size must be in"),
        (12.5, TypeError, "train_set_size must be an integer"),
        ("20", TypeError, "train_set_size must be an integer"),
    ],
)
def test_sizes_that_are_refused(tmp_path: Path, size: Any, error: type[Exception], message: str) -> None:
    traker = run(tmp_path, OLD)
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        traker.extend(size)
    traker.extend(OLD)
    assert contents(tmp_path) == before


def test_a_folder_that_has_grown_says_so_to_whoever_knows_its_old_size(tmp_path: Path) -> None:
    other, traker = run(tmp_path, OLD), opened(tmp_path, OLD)
    other.load_checkpoint(CHECKPOINTS[0], 0)
    traker.extend(NEW)
    with pytest.raises(RuntimeError, match="checkpoint_0/train was deleted, or has grown, since it was opened"):
        other.featurize([x[:5] for x in ALL], inds=range(5))
    complaint = r"train_set_size must be 20, not 12; the folder has grown"
    for model_id in (0, 7):  # a checkpoint that is new is not made with fewer rows
        with pytest.raises(ValueError, match=complaint):
            other.load_checkpoint(CHECKPOINTS[0], model_id)
    assert traker.store.model_ids() == [0, 1]
    for call in (lambda: other.finalize_scores("test"), other.self_influence, lambda: opened(tmp_path, OLD)):
        with pytest.raises((ValueError, RuntimeError), match=f"{complaint}|are not finalized"):
            call()
    with pytest.raises(ValueError, match=r"train_set_size must be at least 20, which .* has, not 15; use another"):
        other.extend(15)
    with pytest.raises(ValueError, match="seed: stored 5, given 6"):
        opened(tmp_path, OLD, projector_seed=6)
    with pytest.raises(ValueError, match=r"TRAKer\(\.\.\., train_set_size=20\)\.extend\(25\) adds rows to the folder"):
        opened(tmp_path, 25)
    other.extend(NEW)
    assert other.train_set_size == NEW


@pytest.mark.parametrize("content", ["", "[1]", '{"train_set_size": "20", "finished": true}', '{"train_set_size": 20}'])
def test_a_damaged_size_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    run(tmp_path, OLD).extend(NEW)
    (tmp_path / "growth.json").write_text(content)
    with pytest.raises(ValueError, match=r"growth\.json"):
        opened(tmp_path, NEW)


@pytest.mark.parametrize("state", ["claimed", "idle"])
def test_a_folder_does_not_grow_while_another_process_writes(tmp_path: Path, state: str) -> None:
    traker = opened(tmp_path, OLD)
    featurize(traker, 0, 0)
    with process("holds_rows.py", tmp_path, state) as (number, other):
        if state == "claimed":
            before = contents(tmp_path)
            complaint = rf"rows 0 to 4 of .*checkpoint_0/train are being written by another process \(pid {number}\)"
            with pytest.raises(RuntimeError, match=complaint):
                traker.extend(NEW)
            assert contents(tmp_path) == before
            assert traker.train_set_size == OLD
            assert other.communicate("\n") == ("", "")
            traker.extend(NEW)
            np.testing.assert_array_equal(traker.store.train(0).done, np.arange(NEW) < OLD)
        else:
            traker.extend(NEW)
            out, _ = other.communicate("\n")
            assert out.startswith("train_set_size must be 20, not 12; the folder has grown")
            assert not traker.store.train(0).done.any()


def test_a_folder_does_not_grow_while_another_process_computes_scores(tmp_path: Path) -> None:
    traker = run(tmp_path, OLD)
    expected = np.array(traker.scores)
    with process("finalize_with_a_pause.py", tmp_path, "before") as (number, other):
        complaint = rf"checkpoint_0/.* are being read by another process \(pid {number}\)"
        with pytest.raises(RuntimeError, match=complaint):
            traker.extend(NEW)
        out, _ = other.communicate("\n")
        np.testing.assert_array_equal(np.frombuffer(bytes.fromhex(out), np.float32).reshape(OLD, M), expected)
    traker.extend(NEW)


def test_no_checkpoint_is_made_while_another_process_extends_the_folder(tmp_path: Path) -> None:
    traker = opened(tmp_path, OLD)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom trak_fast.store.rows import claimed_for_deletion\n"
        "with claimed_for_deletion(Path(sys.argv[1])):\n    print(os.getpid(), flush=True)\n    sys.stdin.readline()\n"
    )
    (tmp_path / "program.py").write_text(script)
    with process(str(tmp_path / "program.py"), tmp_path) as (_, other):
        with pytest.raises(RuntimeError, match="is being extended by another process; wait until it has ended"):
            traker.load_checkpoint(CHECKPOINTS[0], 0)
        with pytest.raises(RuntimeError, match="by another process"):
            traker.extend(NEW)
        other.communicate("\n")
    traker.load_checkpoint(CHECKPOINTS[0], 0)


@pytest.mark.parametrize("size", [OLD, NEW])
def test_ranks_extend_a_folder_or_finish_that(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "grown"
    if size == NEW:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        traker = run(folder, OLD)
        with monkeypatch.context() as patch:
            patch.setattr(growth, "grow_rows", fail)
            with pytest.raises(KeyboardInterrupt):
                traker.extend(NEW)
        assert Growth.load(folder) == Growth(NEW, is_finished=False)
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(PROGRAMS / "ranks_extend.py"), str(folder), str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "growth.json").read_text()) == {"train_set_size": NEW, "finished": True}
    whole = run(tmp_path / "whole", NEW)
    scores, expected = np.load(folder / "scores" / "test.npy"), np.array(whole.scores)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())  # batches are cut
    influence = whole.self_influence()
    for start in (0, NEW // 2):
        with np.load(folder / f"rank_{start}.npz") as found:
            np.testing.assert_allclose(found["influence"], influence, rtol=1e-4, atol=1e-4 * influence.max())
            np.testing.assert_array_equal(found["indices"], (-scores).argsort(0, kind="stable")[:3].T)
