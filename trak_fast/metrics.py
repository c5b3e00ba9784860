"""How good scores are: the linear datamodeling score, counterfactuals, and finding mislabelled samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from tqdm.auto import tqdm


class LDS(NamedTuple):
    """Linear datamodeling scores.

    Attributes:
        mean: Over targets.
        per_target: (m,) float64, each in [−1, 1].
    """

    mean: float
    per_target: NDArray[np.float64]


def lds(scores: ArrayLike, masks: ArrayLike, outputs: ArrayLike) -> LDS:
    """The linear datamodeling score (Park et al., "TRAK", ICML 2023, definition 2.3).

    For each target, the Spearman rank correlation over subsets of the training set between the outputs that the
    scores predict, the sum of the scores of the samples in the subset, and the outputs of models that were really
    trained on the subset.

    Args:
        scores: (n, m), of n training samples for m targets.
        masks: (S, n) bool, the samples of each of S ≥ 2 subsets.
        outputs: (S, m), of the model (or the mean of several) trained on each subset, in the unit that was
            attributed: log p/(1 − p) for classification.

    Returns:
        The mean over targets and each target's correlation. It is 0 for a target with constant outputs or
        predictions, which say nothing about order.

    Raises:
        ValueError: Shapes do not fit, or a number is not finite.
        TypeError: `masks` is not boolean.
    """
    scores, outputs = _finite("scores", scores, 2), _finite("outputs", outputs, 2)
    masks = np.asarray(masks)
    if masks.dtype != np.bool_:
        raise TypeError(f"masks must be bool, not {masks.dtype}")
    subsets = len(outputs)
    if masks.shape != (subsets, scores.shape[0]) or scores.shape[1] != outputs.shape[1]:
        raise ValueError(
            f"scores (n, m), masks (S, n) and outputs (S, m) do not fit: {scores.shape}, {masks.shape}, {outputs.shape}"
        )
    if subsets < 2:
        raise ValueError(f"at least 2 subsets are needed, masks has {subsets}")
    predicted = _centered_ranks(masks.astype(np.float64) @ scores)
    real = _centered_ranks(outputs)
    norms = np.sqrt((predicted**2).sum(axis=0) * (real**2).sum(axis=0))
    # Spearman's correlation is Pearson's of the ranks, ties sharing their mean rank; 0/0 where all are tied
    per_target = np.divide((predicted * real).sum(axis=0), norms, out=np.zeros(len(norms)), where=norms > 0)
    return LDS(float(per_target.mean()), per_target)


class LDSInterval(NamedTuple):
    """How certain an LDS is.

    Attributes:
        low: Lower end of the bootstrap interval of the mean over targets.
        high: Upper end.
        chance_low: Lower end of the interval of what scores reach that say nothing about the outputs.
        chance_high: Upper end.
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
    """The bootstrap interval of the LDS, over subsets and targets together, and the interval of chance.

    Args:
        scores: As in `lds`.
        masks: As in `lds`.
        outputs: As in `lds`.
        resamples: Draws with replacement for the first interval, and permutations of the subsets for the second.
        confidence: Share of the draws inside each interval (percentiles).
        seed: Of the draws.

    Raises:
        ValueError: As in `lds`, or `resamples` or `confidence` is out of its range.
        TypeError: As in `lds`.
    """
    lds(scores, masks, outputs)  # checks them
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples must be at least 1 and confidence in (0, 1), not {resamples} and {confidence}")
    rng = np.random.default_rng(seed)
    real = np.asarray(outputs, np.float64)
    predicted = np.asarray(masks).astype(np.float64) @ np.asarray(scores, np.float64)
    subsets, m = real.shape
    one_hot = np.eye(subsets, dtype=bool)  # as masks they pick rows of `predicted`, which are sums of scores already
    bootstrap, chance = [], []
    for _ in tqdm(range(resamples), desc="resampling", disable=None):
        rows, columns = rng.integers(subsets, size=subsets), rng.integers(m, size=m)
        bootstrap.append(lds(predicted[:, columns], one_hot[rows], real[np.ix_(rows, columns)]).mean)
        chance.append(lds(predicted, one_hot, real[rng.permutation(subsets)]).mean)
    ends = [50 * (1 - confidence), 50 * (1 + confidence)]
    return LDSInterval(*np.percentile(bootstrap, ends).tolist(), *np.percentile(chance, ends).tolist())


class Counterfactuals(NamedTuple):
    """Outputs of models retrained without some samples.

    Attributes:
        without_top: (m,) each target's output without the training samples that score highest for it.
        without_random: (m,) its mean output without as many samples at random.
    """

    without_top: NDArray[np.float64]
    without_random: NDArray[np.float64]

    @property
    def fall(self) -> NDArray[np.float64]:
        """(m,) how much lower outputs are without the top samples than without random ones; higher is better."""
        return self.without_random - self.without_top


def counterfactuals(
    scores: ArrayLike,
    retrain: Callable[[NDArray[np.bool_]], NDArray[np.float64]],
    num_removed: int,
    *,
    random_sets: int = 10,
    seed: int = 0,
) -> Counterfactuals:
    """Retrains without the samples that score highest for each target, to see its output fall.

    It falls the more, the better scores know what the model's answer rests on. Models without random samples, as many,
    are the comparison, so that the loss of data as such does not count.

    Args:
        scores: (n, m), of n training samples for m targets.
        retrain: Maps masks (S, n) bool, with the same number of samples in each, to the outputs (S, m) of models
            trained on them: `trak_fast.retraining.retrained_outputs` with everything but the masks fixed, say.
        num_removed: Samples to leave out, in [1, n).
        random_sets: Random sets of samples to leave out.
        seed: Of the random sets.

    Raises:
        ValueError: A number is out of its range, or `retrain` returns another shape.
    """
    values = _finite("scores", scores, 2)
    n, m = values.shape
    if not 1 <= num_removed < n:
        raise ValueError(f"num_removed must be in [1, {n}), not {num_removed}")
    if random_sets < 1:
        raise ValueError(f"random_sets must be at least 1, not {random_sets}")
    rng = np.random.default_rng(seed)
    top = np.argsort(-values, axis=0, kind="stable")[:num_removed].T
    removed = np.concatenate([top, [rng.choice(n, num_removed, replace=False) for _ in range(random_sets)]])
    masks = np.ones((m + random_sets, n), bool)
    np.put_along_axis(masks, removed, False, axis=1)
    outputs = _finite("what retrain returns", retrain(masks), 2)
    if outputs.shape != (len(masks), m):
        raise ValueError(f"retrain must return outputs of shape {(len(masks), m)}, not {outputs.shape}")
    return Counterfactuals(outputs[:m].diagonal().copy(), outputs[m:].mean(axis=0))


class Detection(NamedTuple):
    """How well a ranking finds flagged samples.

    Attributes:
        recall: (n + 1,) float64; recall[b] is the share of the flagged samples among the b ranked highest.
        auc: Area under the ROC curve: the probability that a flagged sample ranks above one that is not.
        num_flagged: Flagged samples.
    """

    recall: NDArray[np.float64]
    auc: float
    num_flagged: int

    def precision(self, budget: int) -> float:
        """The share of flagged samples among the `budget` ≥ 1 ranked highest."""
        if not 1 <= budget < len(self.recall):
            raise ValueError(f"budget must be in [1, {len(self.recall) - 1}], not {budget}")
        return float(self.recall[budget]) * self.num_flagged / budget


def mislabel_detection(ranking: ArrayLike, flags: ArrayLike) -> Detection:
    """How well a ranking of the training samples, such as self-influence, finds the mislabelled ones.

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
    ranking, flags = _finite("ranking", ranking, 1), np.asarray(flags)
    if flags.dtype != np.bool_:
        raise TypeError(f"flags must be bool, not {flags.dtype}")
    if flags.shape != ranking.shape:
        raise ValueError(f"ranking and flags must have the same shape, not {ranking.shape} and {flags.shape}")
    flagged = int(flags.sum())
    others = len(flags) - flagged
    if not flagged or not others:
        raise ValueError(f"flags must have some samples and leave some out, not {flagged} of {len(flags)}")
    found = np.cumsum(flags[np.argsort(-ranking, kind="stable")])
    # Mann-Whitney: pairs that a flagged sample wins, from its ranks among all
    wins = rankdata(ranking)[flags].sum() - flagged * (flagged + 1) / 2
    return Detection(np.concatenate([[0], found]) / flagged, float(wins / (flagged * others)), flagged)


def _finite(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array


def _centered_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ranks: NDArray[np.float64] = rankdata(values, axis=0)
    return ranks - (len(values) + 1) / 2
