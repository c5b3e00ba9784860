"""Measures of scores: the linear datamodeling score, counterfactuals, and the detection of mislabelled samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from tqdm.auto import tqdm

from .arguments import integer


class LDS(NamedTuple):
    """Linear datamodeling scores.

    Attributes:
        mean: The mean over targets.
        per_target: (m,) float64, each in [−1, 1].
    """

    mean: float
    per_target: NDArray[np.float64]


def lds(scores: ArrayLike, masks: ArrayLike, outputs: ArrayLike) -> LDS:
    """Computes the linear datamodeling score (Park et al., "TRAK", ICML 2023, definition 2.3).

    This is for each target the Spearman rank correlation, over subsets of the training set, between the outputs that
    the scores predict, which are the sums of the scores of the samples in the subset, and the outputs of models that
    were really trained on the subset.

    Args:
        scores: (n, m), the scores of n training samples for m targets.
        masks: (S, n) bool, the samples of each of S ≥ 2 subsets.
        outputs: (S, m), the outputs of the model (or the mean of several) trained on each subset, in the unit that was
            attributed: log p/(1 − p) for classification.

    Returns:
        The mean over targets and each target's correlation, which is 0 if the target's outputs or predictions are
        constant: they say nothing about order.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, or there are no training samples or targets.
        TypeError: `masks` is not boolean, or a number is complex.
    """
    scores = _finite("scores", scores, 2)
    outputs = _finite("outputs", outputs, 2)
    masks = np.asarray(masks)
    if masks.dtype != np.bool_:
        raise TypeError(f"masks must be bool, not {masks.dtype}")
    subsets = len(outputs)
    if masks.shape != (subsets, scores.shape[0]) or scores.shape[1] != outputs.shape[1]:
        raise ValueError(
            "scores, masks and outputs must have the shapes (n, m), (S, n) and (S, m), "
            f"not {scores.shape}, {masks.shape} and {outputs.shape}"
        )
    _require_some(scores)
    if subsets < 2:
        raise ValueError(f"masks must have at least 2 subsets, not {subsets}")
    per_target = _rank_correlations(masks.astype(np.float64) @ scores, outputs)
    return LDS(float(per_target.mean()), per_target)


class LDSInterval(NamedTuple):
    """The uncertainty of an LDS, and the LDS that chance reaches.

    Attributes:
        low: Lower end of the bootstrap interval of the mean over targets.
        high: Upper end of this interval.
        chance_low: Lower end of the interval of the means that scores reach which say nothing about the outputs.
        chance_high: Upper end of this interval.
    """

    low: float
    high: float
    chance_low: float
    chance_high: float


def lds_interval(
    scores: ArrayLike,
    masks: ArrayLike,
    outputs: ArrayLike,
    *,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> LDSInterval:
    """Estimates the bootstrap interval of the LDS, over subsets and targets together, and the interval of chance.

    Args:
        scores: As in `lds`.
        masks: As in `lds`.
        outputs: As in `lds`.
        resamples: Draws with replacement for the first interval, and permutations of the subsets for the second.
        confidence: Share of the draws inside each interval (percentiles), in (0, 1).
        seed: Seed of the draws, or their generator.

    Raises:
        ValueError: As in `lds`, or `resamples` or `confidence` is out of its range.
        TypeError: As in `lds`, or `resamples` is no integer.
    """
    lds(scores, masks, outputs)  # checks them
    resamples = integer("resamples", resamples, 1)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    rng = np.random.default_rng(seed)
    real = np.asarray(outputs, np.float64)
    predicted = np.asarray(masks).astype(np.float64) @ np.asarray(scores, np.float64)
    subsets, m = real.shape
    bootstrap, chance = [], []
    for _ in tqdm(range(resamples), desc="resampling", disable=None):
        rows = rng.integers(subsets, size=subsets)
        columns = rng.integers(m, size=m)
        draw = np.ix_(rows, columns)
        bootstrap.append(_rank_correlations(predicted[draw], real[draw]).mean())
        chance.append(_rank_correlations(predicted, real[rng.permutation(subsets)]).mean())
    ends = [50 * (1 - confidence), 50 * (1 + confidence)]
    low, high = np.percentile(bootstrap, ends).tolist()
    chance_low, chance_high = np.percentile(chance, ends).tolist()
    return LDSInterval(low, high, chance_low, chance_high)


class Counterfactuals(NamedTuple):
    """The outputs of models retrained without some samples.

    Attributes:
        without_top: (m,) each target's output without the training samples that score highest for it.
        without_random: (m,) each target's mean output without equally many random samples.
    """

    without_top: NDArray[np.float64]
    without_random: NDArray[np.float64]

    @property
    def fall(self) -> NDArray[np.float64]:
        """(m,) the outputs without random samples minus those without the top samples; higher is better."""
        return self.without_random - self.without_top


def counterfactuals(
    scores: ArrayLike,
    retrain: Callable[[NDArray[np.bool_]], NDArray[np.float64]],
    num_removed: int,
    *,
    random_sets: int = 10,
    seed: int = 0,
) -> Counterfactuals:
    """Retrains without the samples that score highest for each target, to see the target's output fall.

    The better the scores identify the samples that the output depends on, the more the output falls. It is compared
    with that of models without equally many random samples, so that the mere loss of data does not count.

    Args:
        scores: (n, m), the scores of n training samples for m targets.
        retrain: Maps masks (S, n) bool, with the same number of samples in each, to the outputs (S, m) of models
            trained on them, such as `trak_fast.retraining.retrained_outputs` with everything but the masks fixed.
        num_removed: Samples to leave out, in [1, n).
        random_sets: Random sets of samples to leave out.
        seed: Seed of the random sets.

    Raises:
        ValueError: A number is out of its range, `retrain` returns another shape, or there are fewer than 2 training
            samples or no targets.
        TypeError: `num_removed` or `random_sets` is no integer.
    """
    values = _finite("scores", scores, 2)
    n, m = values.shape
    _require_some(values, least=2)
    num_removed = integer("num_removed", num_removed, 1, n - 1)
    random_sets = integer("random_sets", random_sets, 1)
    rng = np.random.default_rng(seed)
    top = np.argsort(-values, axis=0, kind="stable")[:num_removed].T
    removed = np.concatenate([top, [rng.choice(n, num_removed, replace=False) for _ in range(random_sets)]])
    masks = np.ones((m + random_sets, n), bool)
    np.put_along_axis(masks, removed, False, axis=1)
    outputs = _finite("the outputs of retrain", retrain(masks), 2)
    if outputs.shape != (len(masks), m):
        raise ValueError(f"retrain must return outputs of shape {(len(masks), m)}, not {outputs.shape}")
    return Counterfactuals(outputs[:m].diagonal().copy(), outputs[m:].mean(axis=0))


class Detection(NamedTuple):
    """The success of a ranking in finding flagged samples.

    Attributes:
        recall: (n + 1,) float64; recall[b] is the share of the flagged samples among the b ranked highest.
        auc: Area under the ROC curve: the probability that a flagged sample ranks above one that is not.
        num_flagged: Flagged samples.
    """

    recall: NDArray[np.float64]
    auc: float
    num_flagged: int

    def precision(self, budget: int) -> float:
        """Returns the share of flagged samples among the `budget` ranked highest.

        Raises:
            ValueError: `budget` is not in [1, n].
            TypeError: `budget` is no integer.
        """
        budget = integer("budget", budget, 1, len(self.recall) - 1)
        return float(self.recall[budget]) * self.num_flagged / budget


def mislabel_detection(ranking: ArrayLike, flags: ArrayLike) -> Detection:
    """Measures the success of a ranking of the training samples, such as self-influence, in finding mislabelled ones.

    Args:
        ranking: (n,), higher for samples that should be looked at first.
        flags: (n,) bool, the samples that are mislabelled: at least one, and not all.

    Returns:
        Recall for every budget, the area under the ROC curve, and precision on demand. In the recall, equal ranks
        count in the order of the samples; in the area, half.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, or no or all samples are flagged.
        TypeError: `flags` is not boolean.
    """
    ranking = _finite("ranking", ranking, 1)
    flags = np.asarray(flags)
    if flags.dtype != np.bool_:
        raise TypeError(f"flags must be bool, not {flags.dtype}")
    if flags.shape != ranking.shape:
        raise ValueError(f"ranking and flags must have the same shape, not {ranking.shape} and {flags.shape}")
    flagged = int(flags.sum())
    others = len(flags) - flagged
    if not flagged or not others:
        raise ValueError(f"flags must mark some samples and leave some out, not mark {flagged} of {len(flags)}")
    found = np.cumsum(flags[np.argsort(-ranking, kind="stable")])
    # Mann and Whitney: the number of pairs that a flagged sample wins follows from the ranks among all samples
    wins = rankdata(ranking)[flags].sum() - flagged * (flagged + 1) / 2
    return Detection(np.concatenate([[0], found]) / flagged, float(wins / (flagged * others)), flagged)


def _require_some(scores: NDArray[np.float64], least: int = 1) -> None:
    """Refuses scores (n, m) of too few training samples or of no target, whose mean would be no number."""
    n, m = scores.shape
    if n < least:
        raise ValueError(f"scores must be of at least {least} training samples, not {n}")
    if m < 1:
        raise ValueError("scores must be of at least 1 target, not 0")


def _finite(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    """Checks the dimensions and numbers of an array, and returns it in float64."""
    given = np.asarray(values)
    if given.dtype.kind == "c":
        raise TypeError(f"{name} must be real, not {given.dtype}")
    array = np.asarray(given, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {array.shape}")
    if not (finite := np.isfinite(array)).all():
        raise ValueError(f"{name} must be finite, not {array[~finite][0]}")
    return array


def _rank_correlations(predicted: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes Spearman's correlation of each column of two arrays (S, m), which is 0 where all numbers are tied."""
    # it is Pearson's of the ranks, ties sharing their mean rank
    predicted = _centered_ranks(predicted)
    real = _centered_ranks(real)
    norms = np.sqrt((predicted**2).sum(axis=0) * (real**2).sum(axis=0))
    correlations: NDArray[np.float64] = np.divide(
        (predicted * real).sum(axis=0), norms, out=np.zeros(len(norms)), where=norms > 0
    )
    return correlations


def _centered_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks each column, ties sharing their mean rank, and subtracts the mean."""
    ranks: NDArray[np.float64] = rankdata(values, axis=0)
    return ranks - (len(values) + 1) / 2
