"""Failures of other TRAK drivers and stores, and of real machines: full disks, double starts, little memory."""

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from attribution import CHECKPOINTS, SEED, TRAIN, M, N, build, data, network, run
from scipy.stats import spearmanr
from torch import nn

from trak_fast import TRAKer
from trak_fast.store.files import write_at

PROGRAMS = Path(__file__).parent / "programs"


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs one of the programs in tests/programs."""
    command = [warm.python(), str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def wide(folder: Path, scale: float = 1.0, **options: Any) -> tuple[TRAKer, np.ndarray]:
    """Scores 40 targets on 300 samples with a network whose gradients are large or small."""
    torch.manual_seed(0)
    model = network()
    model.load_state_dict(CHECKPOINTS[0])

    def f(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scale * model(x[None])[0].gather(0, y)

    traker = TRAKer(model, f, 300, folder, proj_dim=64, projector_seed=SEED, **options)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(data(300, 3), num_samples=300)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, num_targets=40)
    traker.score(data(40, 4), num_samples=40)
    return traker, np.array(traker.finalize_scores("test"))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_half_precision_changes_no_ranking(tmp_path: Path, scale: float) -> None:
    """At these scales float16 features would be zero, or they and X'X would overflow."""
    whole, expected = wide(tmp_path / "float32", scale)
    half, scores = wide(tmp_path / "float16", scale, use_half_precision=True)
    assert np.isfinite(scores).all()
    for target in range(40):
        assert spearmanr(scores[:, target], expected[:, target]).statistic > 0.9999
    first, other = (np.argsort(-x, axis=0)[:10] for x in (scores, expected))
    assert np.mean([len(set(a) & set(b)) for a, b in zip(first.T, other.T, strict=True)]) > 9.9
    sizes = [(path / "checkpoint_0/train/features.npy").stat().st_size for path in (whole.store.path, half.store.path)]
    assert sizes[0] - 2 * sizes[1] < 200


def test_half_precision_works_where_there_are_fewer_samples_than_features(tmp_path: Path) -> None:
    expected = run(build(tmp_path / "float32", proj_dim=20))
    scores = run(build(tmp_path / "float16", proj_dim=20, use_half_precision=True))
    np.testing.assert_allclose(scores, expected, rtol=0.01, atol=1e-3 * np.abs(expected).max())


def test_another_precision_or_architecture_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(ValueError, match="dtype: stored 'float32', given 'float16'"):
        build(tmp_path, use_half_precision=True)
    other = network()
    other[2] = nn.ReLU()
    with pytest.raises(ValueError, match=r"modules\[3\]: stored '2 Tanh', given '2 ReLU'"):
        TRAKer(other, "image_classification", N, tmp_path, proj_dim=8, projector_seed=SEED)


def test_of_processes_that_make_a_folder_at_once_all_others_see_what_the_first_wrote(tmp_path: Path) -> None:
    warm.python()
    moment = time.time() + 4
    command = [warm.python(), str(PROGRAMS / "open_a_folder.py"), str(tmp_path)]
    children = [
        subprocess.Popen([*command, str(seed), str(moment)], stdout=subprocess.PIPE, text=True) for seed in (1, 2, 1, 2)
    ]
    lines = [child.communicate()[0].split() for child in children]
    opened = {line[1] for line in lines if line[0] == "opened"}
    assert len(opened) == 1
    assert all(line[0] == "opened" if line[1] in opened else line == ["refused", line[1], "True"] for line in lines)
    build(tmp_path, projector_seed=int(opened.pop()))


def test_a_second_process_with_the_same_samples_is_told(tmp_path: Path) -> None:
    traker = build(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize([x[7:10] for x in TRAIN], inds=[7, 8, 9])
    done = python("featurize_the_rest.py", tmp_path)
    assert done.returncode == 1
    assert f"rows 7 to 7 of {tmp_path}/checkpoint_0/train are being written by another process (pid {os.getpid()})" in (
        done.stderr
    )
    traker.load_checkpoint(CHECKPOINTS[1], 1)  # gives up what it held
    assert python("featurize_the_rest.py", tmp_path).returncode == 0
    again = build(tmp_path)
    assert np.flatnonzero(again.store.train(0).done).tolist() == list(range(4, 12))


def resumes(folder: Path, tmp_path: Path, done: int) -> None:
    """Checks that the stored rows are whole, and that the scores come out as if nothing had happened."""
    assert build(folder).store.train(0).done.sum() == done
    assert np.allclose(run(build(folder), 2), run(build(tmp_path / "alone"), 2), rtol=1e-4, atol=1e-6)


def test_a_file_that_may_not_grow_is_an_error_and_the_run_resumes(tmp_path: Path) -> None:
    limit = 128 + 7 * 4 * 8 + 5  # a header and 7 rows of 8 numbers, and some of the next
    done = python("featurize_with_limited_files.py", tmp_path / "limited", limit)
    assert done.returncode == 1
    assert "File too large; everything stored before is safe: make room and run the same again" in done.stderr
    resumes(tmp_path / "limited", tmp_path, 6)


def test_a_full_disk_is_an_error_and_the_run_resumes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        traker = build(disk / "run", proj_dim=0)  # rows of 524 bytes, so that they begin new pages
        traker.load_checkpoint(CHECKPOINTS[0], 0)
        traker.featurize([x[:2] for x in TRAIN], num_samples=2)
        other = os.open(disk / "other", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space left"):
            write_at(other, memoryview(bytes(1 << 20)), 0)
        os.close(other)
        with pytest.raises(OSError, match="everything stored before is safe: make room and run the same again"):
            traker.featurize([x[2:] for x in TRAIN], num_samples=N - 2)
        assert traker.store.train(0).done.tolist() == [True] * 2 + [False] * (N - 2)
        (disk / "other").unlink()
        scores = run(build(disk / "run", proj_dim=0))
        np.testing.assert_allclose(scores, run(build(tmp_path / "alone", proj_dim=0)), rtol=1e-3, atol=1e-6)
        del traker, scores
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_scores_of_many_samples_are_never_in_memory_at_once(tmp_path: Path) -> None:
    done = python("memory_of_scores.py", tmp_path)
    assert done.returncode == 0, done.stderr
    top, whole = map(float, done.stdout.split())
    # all scores are 400 MB; a block is 32 MiB, of which there are a few
    assert top < 200
    assert whole < 200


def test_scores_before_the_features_are_final_are_an_error_and_no_number(tmp_path: Path) -> None:
    traker = build(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    with pytest.raises(RuntimeError, match=r"model_ids \[0\] are not finalized; call finalize_features first"):
        traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=M)
    for compute in (lambda: traker.finalize_scores("test"), lambda: traker.top_scores("test", 2)):
        with pytest.raises(ValueError, match="'test' has no targets for model_id 0"):
            compute()


def test_top_scores_are_saved_with_the_others(tmp_path: Path) -> None:
    traker = build(tmp_path)
    scores = run(traker)
    top, low = traker.top_scores("test", 3), traker.top_scores("test", 2, largest=False)
    assert (top.indices == np.argsort(-scores, 0)[:3].T).all()
    assert (low.indices == np.argsort(scores, 0)[:2].T).all()
    assert (top.scores == np.take_along_axis(scores, top.indices.T, 0).T).all()
    names = {path.name for path in (tmp_path / "scores").iterdir()}
    assert names == {"test.npy", "test.highest.npz", "test.lowest.npz"}
    assert traker.top_scores("test", 100).indices.shape == (M, N)
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\*\*48\], not 0"):
        traker.top_scores("test", 0)


def test_a_limit_on_open_files_is_not_reached(tmp_path: Path) -> None:
    """Many checkpoints in one run leave few files open."""
    before = len(os.listdir("/proc/self/fd"))
    traker = build(tmp_path)
    for model_id in range(30):
        traker.load_checkpoint(CHECKPOINTS[0], model_id)
        traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 10
