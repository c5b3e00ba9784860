"""Rows know their samples: nothing of another order, another loop or another task mixes with what is stored."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from attribution import CHECKPOINTS, SEED, TARGETS, TRAIN, M, N, build, data, network, run
from torch import Tensor, nn

from trak_fast import FunctionTask, TRAKer
from trak_fast.recorder import Repeats
from trak_fast.scoring.gram import GramAccumulator

ORDER = [3, 1, 2, 0, *range(4, N)]


def featurize(traker: TRAKer, batch: list[Tensor], size: int = 4) -> None:
    for start in range(0, len(batch[0]), size):
        part = [x[start : start + size] for x in batch]
        traker.featurize(part, num_samples=len(part[0]))


def opened(folder: Path, model_id: int = 0, **options: object) -> TRAKer:
    traker = build(folder, **options)
    traker.load_checkpoint(CHECKPOINTS[model_id], model_id)
    return traker


def test_another_order_is_refused_by_the_first_samples_that_differ(tmp_path: Path) -> None:
    featurize(opened(tmp_path), [x[:8] for x in TRAIN])
    before = np.array(opened(tmp_path).store.train(0).features)
    with pytest.raises(ValueError, match=r"2 samples are not those .* were stored from: 0, 3\. .*shuffle=False\?"):
        featurize(opened(tmp_path), [x[ORDER] for x in TRAIN])
    store = opened(tmp_path).store
    assert np.array_equal(store.train(0).features, before)
    assert store.train(0).done.sum() == 8
    featurize(opened(tmp_path), TRAIN)
    assert store.train(0).done.all()


def test_checkpoints_have_the_same_samples(tmp_path: Path) -> None:
    featurize(opened(tmp_path), TRAIN)
    with pytest.raises(ValueError, match=r"2 samples are not those that the same rows of .*checkpoint_0"):
        featurize(opened(tmp_path, 1), [x[ORDER] for x in TRAIN])
    other = opened(tmp_path, 1, check_samples=False)  # as augmented samples need
    featurize(other, [x[ORDER] for x in TRAIN])
    assert other.store.train(1).done.all()


def test_two_checkpoints_that_were_made_apart_are_compared_before_scores(tmp_path: Path) -> None:
    for model_id, order in enumerate((list(range(N)), ORDER)):
        featurize(opened(tmp_path, model_id, check_samples=False), [x[order] for x in TRAIN])
    traker = build(tmp_path)
    traker.finalize_features()
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, M)
        traker.score(TARGETS, num_samples=M)
    with pytest.raises(
        ValueError, match=r"2 training samples are other ones for model_id 1 than for model_id 0: 0, 3;"
    ):
        traker.finalize_scores("test")


def test_a_loop_that_is_run_again_needs_the_checkpoint_loaded_again(tmp_path: Path) -> None:
    expected = opened(tmp_path / "expected")
    featurize(expected, TRAIN)
    for size in (1, 2, 4):
        traker = opened(tmp_path / str(size))
        featurize(traker, [x[:6] for x in TRAIN], size)
        told = (
            "given before, from row 0 on: .* call load_checkpoint first|to run a loop again, load the checkpoint again"
        )
        with pytest.raises((RuntimeError, ValueError), match=told):
            featurize(traker, TRAIN, size)
        assert traker.store.train(0).done.tolist() == [True] * 6 + [False] * 6  # nothing wrong is kept
        with pytest.raises(RuntimeError, match="call load_checkpoint first"):
            featurize(traker, TRAIN, size)
        with pytest.raises(RuntimeError, match="call load_checkpoint first"):  # and with samples that come later
            traker.featurize([x[6:8] for x in TRAIN], num_samples=2)
        traker.load_checkpoint(CHECKPOINTS[0], 0)
        featurize(traker, TRAIN, size)
        assert np.array_equal(traker.store.train(0).features, expected.store.train(0).features)


def test_targets_of_a_loop_that_is_run_again_are_refused(tmp_path: Path) -> None:
    traker = build(tmp_path)
    run(traker)
    traker.start_scoring_checkpoint("again", CHECKPOINTS[0], 0, num_targets=M)
    traker.score([x[:2] for x in TARGETS], num_samples=2)
    with pytest.raises(RuntimeError, match=r"given before, from row 0 on: .* call start_scoring_checkpoint first"):
        traker.score([x[:2] for x in TARGETS], num_samples=2)


def test_a_wrong_number_of_samples_moves_no_row(tmp_path: Path) -> None:
    """A sample that equals the first one came just before."""
    twice = [x[[0, 1, 2, 0, *range(4, N)]] for x in TRAIN]
    expected = opened(tmp_path / "expected")
    featurize(expected, twice, 1)
    traker = opened(tmp_path / "wrong")
    featurize(traker, [x[:4] for x in twice], 1)
    with pytest.raises(ValueError, match="num_samples says 3"):
        traker.featurize([x[4:6] for x in twice], num_samples=3)
    featurize(traker, [x[4:] for x in twice], 1)
    assert np.array_equal(traker.store.train(0).digests, expected.store.train(0).digests)


def test_samples_that_are_in_the_set_twice_are_no_repetition() -> None:
    repeats = Repeats()
    assert repeats.add(0, [1, 2, 3]) is None
    assert repeats.add(3, [1, 3, 2]) is None
    assert repeats.add(6, [1]) is None  # samples that equal the first may be second copies of them
    assert repeats.add(7, [2]) is None
    assert repeats.add(8, [3]) is None
    assert repeats.add(9, [1, 3]) is None
    assert repeats.add(11, [2]) == 5  # all six again
    same = Repeats()
    assert same.add(0, [5, 5]) is None
    assert same.add(2, [5, 5]) is None  # all alike: nothing can be told


def test_small_sets_of_few_values_are_no_repetition() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        repeats = Repeats()
        found += any(repeats.add(i, [int(rng.integers(16))]) is not None for i in range(200))
    assert found <= 6  # 1/256 for a repetition of two, and less for more


def test_a_loop_run_again_near_the_end_leaves_no_wrong_row(tmp_path: Path) -> None:
    traker = opened(tmp_path)
    featurize(traker, [x[:10] for x in TRAIN], 1)
    with pytest.raises(ValueError, match=r"samples 12 to 12 are not all in \[0, 12\); num_samples goes on"):
        featurize(traker, TRAIN, 1)
    assert traker.store.train(0).done.tolist() == [True] * 10 + [False] * 2


def test_targets_of_two_sets_do_not_mix(tmp_path: Path) -> None:
    traker = build(tmp_path)
    run(traker)
    other = data(M, 9)
    traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=M)
    traker.score([x[2:] for x in other], inds=[2, 3])
    with pytest.raises(RuntimeError, match=r"2 of 4 targets .* are not scored for model_id 0: 0, 1"):
        traker.finalize_scores("test")
    traker.score([x[:2] for x in other], inds=[0, 1])
    with pytest.raises(ValueError, match=r"4 targets of exp_name 'test' are other ones for model_id 1 than"):
        traker.finalize_scores("test")
    traker.start_scoring_checkpoint("test", CHECKPOINTS[1], 1, num_targets=M)
    traker.score(other, num_samples=M)
    repeated = np.array(traker.finalize_scores("test"))
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("fresh", state, model_id, num_targets=M)
        traker.score(other, num_samples=M)
    assert np.array_equal(repeated, traker.finalize_scores("fresh"))


def from_scratch(folder: Path) -> TRAKer:
    """Featurizes all samples, undisturbed."""
    traker = opened(folder)
    featurize(traker, TRAIN)
    traker.finalize_features()
    return traker


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_an_interruption_while_summing_adds_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    expected = from_scratch(tmp_path / "expected").store.gram(0)
    traker = opened(tmp_path / "interrupted")
    featurize(traker, [x[:4] for x in TRAIN])

    def interrupted(self: GramAccumulator) -> None:
        block = torch.cat(self._waiting)
        self._sum.addmm_(block.mT, block)  # and before the rows are off the list
        raise error

    monkeypatch.setattr(GramAccumulator, "_flush", interrupted)
    with pytest.raises(error):
        traker._recorder.save_sum()
    monkeypatch.undo()
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    featurize(traker, TRAIN)
    traker.finalize_features()
    np.testing.assert_allclose(traker.store.gram(0), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_rows_that_were_taken_back_are_summed_as_they_are_in_the_end(tmp_path: Path) -> None:
    expected = from_scratch(tmp_path / "expected").store.gram(0)
    traker = opened(tmp_path / "repeated")
    featurize(traker, [x[:6] for x in TRAIN], 1)
    with pytest.raises(RuntimeError, match="given before"):
        featurize(traker, TRAIN, 1)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    featurize(traker, TRAIN, 1)
    traker.finalize_features()
    np.testing.assert_allclose(traker.store.gram(0), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_a_ridge_that_is_changed_between_batches_and_back_has_no_effect(tmp_path: Path) -> None:
    expected = from_scratch(tmp_path / "expected").store.gram(0)
    traker = opened(tmp_path / "changed")
    for start, ridge in ((0, None), (4, 0.5), (8, None)):
        traker.lambda_reg = ridge
        traker.featurize([x[start : start + 4] for x in TRAIN], num_samples=4)
    traker.finalize_features()
    np.testing.assert_allclose(traker.store.gram(0), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_targets_of_a_batch_that_failed_do_not_stay(tmp_path: Path) -> None:
    traker = build(tmp_path)
    run(traker)
    other = data(M, 9)
    traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=M)
    broken = [other[0].clone(), other[1]]
    broken[0][:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        traker.score([x[:2] for x in broken], inds=[0, 1])
    traker.score([x[2:] for x in other], inds=[2, 3])
    with pytest.raises(RuntimeError, match=r"2 of 4 targets .* are not scored for model_id 0: 0, 1"):
        traker.finalize_scores("test", [0])


def test_scores_in_the_middle_of_a_loop_do_not_disturb_it(tmp_path: Path) -> None:
    traker = build(tmp_path, check_samples=False)
    run(traker)
    traker.load_checkpoint(CHECKPOINTS[0], 7)
    featurize(traker, [x[:4] for x in TRAIN])
    traker.finalize_scores("test", [0, 1])
    featurize(traker, [x[4:] for x in TRAIN])
    assert np.array_equal(traker.store.train(7).digests, traker.store.train(0).digests)


def test_a_folder_without_a_row_may_be_deleted(tmp_path: Path) -> None:
    """The first run of a task that has a mistake fails before it stores anything."""

    def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x[None])[0]

    traker = TRAKer(network(), wrong, N, tmp_path, proj_dim=8, projector_seed=SEED)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    with pytest.raises(ValueError, match="must return a tensor of one element"):
        featurize(traker, TRAIN)
    with pytest.raises(ValueError, match="no row has been written there yet: delete the folder"):
        build(tmp_path)


def test_a_checkpoint_of_another_folder_is_refused(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        traker = build(tmp_path / name, projector_seed=seed)
        traker.load_checkpoint(CHECKPOINTS[0], 0)
    shutil.rmtree(tmp_path / "one" / "checkpoint_0")
    shutil.copytree(tmp_path / "two" / "checkpoint_0", tmp_path / "one" / "checkpoint_0")
    with pytest.raises(ValueError, match=r"checkpoint_0 was made in another folder, with another manifest\.json"):
        build(tmp_path / "one", projector_seed=1).load_checkpoint(CHECKPOINTS[0], 0)


def test_two_checkpoints_of_the_same_weights_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    traker = opened(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[1], 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    traker.load_checkpoint(CHECKPOINTS[0], 2)
    assert "model_id 2 has the very weights of model_id 0" in caplog.text


def linear(slope: float) -> FunctionTask:
    """Makes tasks whose descriptions are equal: what they hold is hidden in an object of some class."""

    class Hidden:
        __slots__ = ("slope",)

    hidden = Hidden()
    hidden.slope = slope

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return hidden.slope * model(x[None])[0].gather(0, y[None])

    return FunctionTask(output)


def with_task(folder: Path, task: FunctionTask) -> TRAKer:
    traker = TRAKer(network(), task, N, folder, proj_dim=8, projector_seed=SEED)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    return traker


def test_a_task_that_cannot_be_described_is_known_by_its_outputs(tmp_path: Path) -> None:
    first = with_task(tmp_path, linear(1.0))
    featurize(first, [x[:8] for x in TRAIN])
    with pytest.raises(
        ValueError, match=r"computes something else than when features were stored in .*checkpoint_0: f"
    ):
        featurize(with_task(tmp_path, linear(1.5)), TRAIN)
    again = with_task(tmp_path, linear(1.0))
    featurize(again, TRAIN)
    again.finalize_features()
    other = TRAKer(network(), linear(1.5), N, tmp_path, proj_dim=8, projector_seed=SEED)
    other.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, M)
    with pytest.raises(ValueError, match="computes something else"):
        other.score(TARGETS, num_samples=M)


def test_a_model_whose_weights_have_changed_is_refused(tmp_path: Path) -> None:
    shared = network()
    first, second = (
        TRAKer(shared, "image_classification", N, tmp_path / name, proj_dim=8, projector_seed=SEED) for name in "ab"
    )
    first.load_checkpoint(CHECKPOINTS[0], 0)
    featurize(first, [x[:4] for x in TRAIN])
    second.load_checkpoint(CHECKPOINTS[1], 1)
    with pytest.raises(RuntimeError, match="weights have changed since its checkpoint was loaded: load it again"):
        featurize(first, [x[4:] for x in TRAIN])
    featurize(second, TRAIN)
    first.load_checkpoint(CHECKPOINTS[0], 0)
    featurize(first, TRAIN)
    alone = opened(tmp_path / "alone")
    featurize(alone, TRAIN)
    assert np.array_equal(first.store.train(0).features, alone.store.train(0).features)


def test_gradients_that_are_all_zero_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"head": nn.Linear(12, 3), "unused": nn.Linear(2, 2)}).double()
    task = FunctionTask(lambda model, x, y: model.get_submodule("head")(x)[y])
    wrapped = nn.Module()
    wrapped.head, wrapped.unused = model["head"], model["unused"]
    wrapped.forward = lambda x: wrapped.head(x)  # type: ignore[method-assign]
    for names, told in ((["unused.*"], 1), (["head.*"], 0)):
        caplog.clear()
        task = FunctionTask(lambda model, x, y: model(x[None])[0].gather(0, y[None]))
        traker = TRAKer(wrapped, task, N, tmp_path / names[0][:4], proj_dim=4, grad_wrt=names)
        traker.load_checkpoint(wrapped.state_dict(), 0)
        with caplog.at_level(logging.WARNING):
            featurize(traker, TRAIN)
        assert caplog.text.count("are exactly 0: does the output depend on the parameters") == told


def test_the_number_of_samples_in_a_batch_does_not_matter(tmp_path: Path) -> None:
    """A run may be resumed with other batches."""
    whole = opened(tmp_path / "whole")
    featurize(whole, TRAIN, N)
    parts = opened(tmp_path / "parts")
    featurize(parts, [x[:5] for x in TRAIN], 1)
    featurize(opened(tmp_path / "parts"), TRAIN, 7)
    assert np.array_equal(whole.store.train(0).digests, parts.store.train(0).digests)
    torch.testing.assert_close(
        torch.tensor(np.array(whole.store.train(0).features)), torch.tensor(np.array(parts.store.train(0).features))
    )
