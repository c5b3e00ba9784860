"""Metrics against SciPy's Spearman correlation and against counting."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trak_fast.metrics import counterfactuals, lds, lds_interval, mislabel_detection


def test_lds_is_the_rank_correlation_of_predicted_and_real_outputs() -> None:
    rng = np.random.default_rng(0)
    scores, masks = rng.standard_normal((30, 5)), rng.random((12, 30)) < 0.5
    outputs = np.round(rng.standard_normal((12, 5)), 1)  # rounded, so that there are ties
    result = lds(scores.astype(np.float32), masks, outputs)
    for target in range(5):
        predicted = [scores[mask, target].astype(np.float32).astype(np.float64).sum() for mask in masks]
        # a rank correlation is a ratio of sums of at most 12 half-integers: exact but for the last divisions
        assert result.per_target[target] == pytest.approx(spearmanr(predicted, outputs[:, target]).statistic, abs=1e-14)
    assert result.mean == pytest.approx(sum(result.per_target) / 5, abs=1e-15)


def test_lds_of_true_and_reversed_scores_is_1_and_minus_1() -> None:
    rng = np.random.default_rng(1)
    scores, masks = rng.standard_normal((20, 3)), rng.random((9, 20)) < 0.5
    outputs = np.exp(masks @ scores)  # any increasing function
    assert lds(scores, masks, outputs).per_target == pytest.approx(1, abs=1e-14)
    assert lds(-scores, masks, outputs).mean == pytest.approx(-1, abs=1e-14)


def test_lds_of_constant_targets_is_0_without_a_warning() -> None:
    rng = np.random.default_rng(2)
    scores, masks, outputs = rng.standard_normal((20, 3)), rng.random((9, 20)) < 0.5, rng.standard_normal((9, 3))
    scores[:, 0], outputs[:, 1] = 0, 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = lds(scores, masks, outputs)
    assert result.per_target[:2].tolist() == [0, 0]
    assert result.mean == pytest.approx(result.per_target[2] / 3)


SCORES = np.zeros((4, 2))
MASKS = np.zeros((3, 4), bool)
OUTPUTS = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("scores", "masks", "outputs", "error", "message"),
    [
        (SCORES, MASKS.astype(float), OUTPUTS, TypeError, "masks must be bool, not float64"),
        (SCORES, np.zeros((3, 5), bool), OUTPUTS, ValueError, r"\(S, m\), not \(4, 2\), \(3, 5\) and \(3, 2\)"),
        (SCORES, MASKS, OUTPUTS[:, :1], ValueError, r"must have the shapes .*, not .* and \(3, 1\)"),
        (SCORES, MASKS[:1], OUTPUTS[:1], ValueError, "masks must have at least 2 subsets, not 1"),
        (SCORES[:, 0], MASKS, OUTPUTS[:, :1], ValueError, r"scores must have 2 dimensions, not shape \(4,\)"),
        (SCORES + np.nan, MASKS, OUTPUTS, ValueError, "scores must be finite, not nan"),
        (SCORES, MASKS, OUTPUTS + np.inf, ValueError, "outputs must be finite, not inf"),
    ],
)
def test_lds_refuses_what_does_not_fit(
    scores: NDArray, masks: NDArray, outputs: NDArray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lds(scores, masks, outputs)


def test_detection_counts_what_a_reader_of_the_ranking_finds() -> None:
    rng = np.random.default_rng(3)
    ranking, flags = rng.integers(0, 8, 40).astype(float), rng.random(40) < 0.3
    result = mislabel_detection(ranking, flags)
    order = sorted(range(40), key=lambda i: (-ranking[i], i))
    for budget in range(41):
        found = sum(flags[i] for i in order[:budget])
        assert result.recall[budget] == pytest.approx(found / flags.sum(), abs=1e-15)
        if budget:
            assert result.precision(budget) == pytest.approx(found / budget, abs=1e-15)
    pairs = [(a > b) + (a == b) / 2 for a in ranking[flags] for b in ranking[~flags]]
    assert result.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)
    for budget in (0, 41):
        with pytest.raises(ValueError, match=r"budget must be in \[1, 40\]"):
            result.precision(budget)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([True, False], ValueError, r"same shape, not \(3,\) and \(2,\)"),
        ([1, 0, 0], TypeError, "flags must be bool"),
        ([True] * 3, ValueError, "not mark 3 of 3"),
        ([False] * 3, ValueError, "not mark 0 of 3"),
    ],
)
def test_detection_refuses_flags_that_do_not_fit(flags: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mislabel_detection([1.0, 2.0, 3.0], flags)


def test_intervals_of_a_perfect_and_of_a_useless_prediction() -> None:
    rng = np.random.default_rng(1)
    masks = rng.random((200, 50)) < 0.5
    scores = rng.standard_normal((50, 1))
    perfect = lds_interval(scores, masks, masks @ scores, seed=2)
    assert (perfect.low, perfect.high) == pytest.approx((1, 1))
    # without a relation, Spearman's correlation of 200 pairs has the standard deviation 1/sqrt(199) and is about
    # normal; a percentile of 500 draws of it then has the standard error sqrt(.025 · .975 / 500) / .0584 = 0.12 of that
    deviation = 199**-0.5
    chance = [perfect.chance_low, perfect.chance_high]
    np.testing.assert_allclose(chance, [-1.96 * deviation, 1.96 * deviation], atol=5 * 0.12 * deviation)
    useless = lds_interval(scores, masks, rng.standard_normal((200, 1)), seed=3)
    assert 3 * deviation < useless.high - useless.low < 5 * deviation  # 2 · 1.96 and its sampling error
    half = lds_interval(scores, masks, rng.standard_normal((200, 1)), confidence=0.5, seed=3)
    assert half.high - half.low < 0.6 * (useless.high - useless.low)  # 0.674 · 2 deviations
    with pytest.raises(ValueError, match="resamples must be at least 1, not 0"):
        lds_interval(scores, masks, masks @ scores, resamples=0)
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), not {confidence}"):
            lds_interval(scores, masks, masks @ scores, confidence=confidence)


def test_counterfactuals_leave_out_the_top_of_each_target() -> None:
    rng = np.random.default_rng(4)
    truth = rng.standard_normal((30, 5))
    seen = []

    def retrain(masks: NDArray) -> NDArray:
        seen.append(masks)
        return masks @ truth  # models whose outputs are sums over their samples

    result = counterfactuals(truth, retrain, 4, random_sets=3)
    assert len(seen) == 1
    assert seen[0].shape == (8, 30)
    assert (seen[0].sum(1) == 26).all()
    for target in range(5):
        kept = np.sort(truth[:, target])[:-4].sum()  # the four largest contributions are gone
        assert result.without_top[target] == pytest.approx(kept, abs=1e-12)
        random = [truth[mask, target].sum() for mask in seen[0][5:]]
        assert result.without_random[target] == pytest.approx(np.mean(random), abs=1e-12)
        assert result.fall[target] == pytest.approx(np.mean(random) - kept, abs=1e-12)
    assert (counterfactuals(-truth, retrain, 4).fall < 0).all()  # without the most harmful, outputs rise


def test_counterfactuals_refuse_what_does_not_fit() -> None:
    for num_removed in (0, 30):
        with pytest.raises(ValueError, match=rf"num_removed must be in \[1, 29\], not {num_removed}"):
            counterfactuals(np.zeros((30, 2)), lambda masks: masks[:, :2] * 1.0, num_removed)
    with pytest.raises(ValueError, match="random_sets must be at least 1, not 0"):
        counterfactuals(np.zeros((30, 2)), lambda masks: masks[:, :2] * 1.0, 1, random_sets=0)
    with pytest.raises(ValueError, match=r"outputs of shape \(12, 2\), not \(12, 3\)"):
        counterfactuals(np.zeros((30, 2)), lambda masks: masks[:, :3] * 1.0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lds(np.zeros((4, 0)), np.ones((3, 4), bool), np.zeros((3, 0))),
            "scores must be of at least 1 target, not 0",
        ),
        (lambda: lds_interval(np.zeros((4, 0)), np.ones((3, 4), bool), np.zeros((3, 0))), "at least 1 target, not 0"),
        (lambda: lds(np.zeros((0, 2)), np.ones((3, 0), bool), np.zeros((3, 2))), "at least 1 training samples, not 0"),
        (
            lambda: lds(np.zeros((4, 2)), np.ones((0, 4), bool), np.zeros((0, 2))),
            "masks must have at least 2 subsets, not 0",
        ),
        (lambda: counterfactuals(np.zeros((4, 0)), lambda masks: masks[:, :0] * 1.0, 1), "at least 1 target, not 0"),
        (lambda: counterfactuals(np.zeros((1, 2)), lambda masks: masks * 1.0, 1), "at least 2 training samples, not 1"),
        (lambda: counterfactuals(np.zeros((0, 2)), lambda masks: masks * 1.0, 1), "at least 2 training samples, not 0"),
        (
            lambda: mislabel_detection([], np.zeros(0, bool)),
            "flags must mark some samples and leave some out, not mark 0 of 0",
        ),
        (lambda: mislabel_detection([1.0, 2.0], np.zeros(2, bool)), "not mark 0 of 2"),
        (lambda: mislabel_detection([1.0], np.ones(1, bool)), "not mark 1 of 1"),
    ],
)
def test_means_of_nothing_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_complex_scores_are_refused() -> None:
    """NumPy would drop the imaginary parts with no more than a warning."""
    with pytest.raises(TypeError, match="scores must be real, not complex128"):
        lds(np.ones((4, 1)) * 1j, np.ones((3, 4), bool), np.zeros((3, 1)))


def test_one_sample_and_one_target_have_a_score() -> None:
    """A single sample that raises the output: it is higher in both subsets that have it."""
    masks = np.array([[True], [False], [True]])
    assert lds([[2.0]], masks, [[5.0], [1.0], [5.0]]).mean == pytest.approx(1)
    assert lds([[-2.0]], masks, [[5.0], [1.0], [5.0]]).mean == pytest.approx(-1)
