"""TRAK in several runs, which are killed, repeated, or spread over processes."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from attribution import CHECKPOINTS, TARGETS, TRAIN, M, N, build, by_hand, data, from_gradients, projected, run
from numpy.typing import NDArray
from torch import Tensor

from trak_fast.features.streaming import GradientProjector
from trak_fast.gradients import FunctionalGradientComputer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are killed before each call that changes the disk, and in the middle of each write."""
    torch.save(CHECKPOINTS[0], tmp_path / "state.pt")
    command = [warm.python(), str(Path(__file__).parent / "programs" / "killed_at_each_moment.py"), str(tmp_path)]
    moments = int(subprocess.run(command, check=True, timeout=240, stdout=subprocess.PIPE).stdout)
    assert moments > 40
    computed: list[int] = []

    whole = GradientProjector.features

    def features(projector: GradientProjector, samples: Any, model_id: int) -> Tensor:
        computed.append(len(samples[0]))
        return whole(projector, samples, model_id)

    monkeypatch.setattr(GradientProjector, "features", features)

    def finish(save_dir: Path) -> tuple[bytes, bytes, NDArray[np.float64], int, int]:
        traker = build(save_dir)
        done = int(traker.store.train(0).done.sum()) if traker.store.model_ids() else 0
        computed.clear()
        traker.load_checkpoint(CHECKPOINTS[0], model_id=0)
        for start in range(0, N, 5):
            batch = [x[start : start + 5] for x in TRAIN]
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        train = save_dir / "checkpoint_0" / "train"
        return (
            (train / "features.npy").read_bytes(),
            (train / "weights.npy").read_bytes(),
            traker.store.gram(0),
            done,
            sum(computed),
        )

    *expected, gram, _, _ = finish(tmp_path / "whole")
    progress = []
    for moment in range(1, moments + 1):
        *result, resumed, done, count = finish(tmp_path / str(moment))
        assert result == expected, moment
        np.testing.assert_allclose(resumed, gram, rtol=1e-12, atol=1e-12 * np.abs(gram).max())
        assert done + count == N
        progress.append(done)
    assert progress == sorted(progress)  # no finished batch is lost
    assert set(progress) >= {0, 5, 10, 12}  # and others only where the writing of flags was cut in two


def test_runs_killed_at_random_moments_end_with_the_same_scores() -> None:
    """The benchmark does this a hundred times; here are a few of them."""
    command = [warm.python(), str(Path(__file__).parents[1] / "benchmarks" / "kills.py"), "--kills", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 kills")


def test_of_a_batch_that_is_done_in_part_only_the_rest_is_computed(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(FunctionalGradientComputer):
        def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
            seen.append(batch[0])
            return super().compute_per_sample_grad(batch)

    traker = build(tmp_path, gradient_computer=Watching)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize([x[[7, 2, 9]] for x in TRAIN], inds=torch.tensor([[7], [2], [9]]))
    traker.featurize(TRAIN, num_samples=N)
    traker.featurize(TRAIN, inds=np.arange(N))
    assert len(seen) == 2
    assert (seen[1] == TRAIN[0][[0, 1, 3, 4, 5, 6, 8, 10, 11]]).all()
    expected, bound = projected(by_hand(CHECKPOINTS[0], TRAIN)[0], 8, 0)
    assert (np.abs(traker.store.train(0).features - expected) <= bound).all()


def test_a_failed_batch_can_be_given_again(tmp_path: Path) -> None:
    broken = [TRAIN[0].clone(), TRAIN[1]]
    broken[0][6] = torch.nan
    traker = build(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize([x[:5] for x in TRAIN], num_samples=5)
    with pytest.raises(ValueError, match=r"features of samples \[6\] are not finite"):
        traker.featurize([x[5:] for x in broken], num_samples=7)
    traker.featurize([x[5:] for x in TRAIN], num_samples=7)
    expected, bound = projected(by_hand(CHECKPOINTS[0], TRAIN)[0], 8, 0)
    assert (np.abs(traker.store.train(0).features - expected) <= bound).all()


def test_an_experiment_can_be_repeated_with_other_targets(tmp_path: Path) -> None:
    traker = build(tmp_path)
    before = run(traker)
    other = data(M, 9)
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, num_targets=M)
        traker.score(other, num_samples=M)
    after = traker.finalize_scores("test")
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("other", state, model_id, num_targets=M)
        traker.score(other, num_samples=M)
    assert (after == traker.finalize_scores("other")).all()
    assert not np.allclose(before, after)


def test_another_process_can_finish_what_one_began(tmp_path: Path) -> None:
    expected = run(build(tmp_path / "one"))
    for model_id, state in enumerate(CHECKPOINTS):
        traker = build(tmp_path / "many")
        traker.load_checkpoint(state, model_id)
        for start in range(0, N, 5):
            batch = [x[start : start + 5] for x in TRAIN]
            traker.featurize(batch, num_samples=len(batch[0]))
    build(tmp_path / "many").finalize_features()
    for model_id, state in enumerate(CHECKPOINTS):
        for inds in ([3, 0], [1, 2]):
            traker = build(tmp_path / "many")
            traker.start_scoring_checkpoint("test", state, model_id, num_targets=M)
            traker.score([x[inds] for x in TARGETS], inds=inds)
    assert (build(tmp_path / "many").finalize_scores("test") == expected).all()


def test_without_load_from_save_dir_each_checkpoint_starts_again_once(tmp_path: Path) -> None:
    run(build(tmp_path))
    traker = build(tmp_path, load_from_save_dir=False)
    traker.load_checkpoint(CHECKPOINTS[1], 0)  # other weights than those stored
    assert not traker.store.train(0).done.any()
    traker.featurize([x[:7] for x in TRAIN], num_samples=7)
    traker.load_checkpoint(CHECKPOINTS[1], 0)
    assert traker.store.train(0).done.sum() == 7
    traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()  # of checkpoint 0 only
    np.testing.assert_array_equal(traker.self_influence(), traker.self_influence([0]))
    again = build(tmp_path)
    again.load_checkpoint(CHECKPOINTS[0], 0, _allow_featurizing_already_registered=True)
    assert not again.store.train(0).done.any()


def test_lambda_reg_can_change_without_featurizing_again(tmp_path: Path) -> None:
    run(build(tmp_path))
    scores = build(tmp_path, lambda_reg=0.3).finalize_scores("test")
    from_gradients(8, 0.3).check(scores)
