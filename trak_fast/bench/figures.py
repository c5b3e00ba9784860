"""Figures computed from the measurements: medians, rates, shares of the roofline, and changes between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .case import Case
from .results import Ceilings, FirstCall, Results, Timing

NOISE = 0.05
"""Relative change of a median that is never called one, however little the samples spread."""


def floor_seconds(case: Case, ceilings: Ceilings) -> float:
    """Computes the least time that a shape takes on a machine (the roofline of Williams et al. 2009).

    It is the longer of the product's time at the rate of torch's product in the gradients' dtype, and of the time to
    read the gradients and to write the result once at the rate of a copy. The matrix costs nothing. A kernel that goes
    around the dtype's rate (float32 as bfloat16 terms, ±1 by look-up) can be faster than this.
    """
    moved = case.gradient_bytes + 4 * case.batch * case.proj_dim
    rate = ceilings.flop_per_second[case.dtype]
    return float(max(case.flop / rate, moved / ceilings.copy_bytes_per_second))


def better(known: Ceilings | None, found: Ceilings) -> Ceilings:
    """Takes the higher of each of two measurements of the ceilings: other programs can only have lowered them."""
    if known is None:
        return found
    return Ceilings(
        copy_bytes_per_second=max(known.copy_bytes_per_second, found.copy_bytes_per_second),
        flop_per_second={
            dtype: max(rate, found.flop_per_second.get(dtype, 0.0)) for dtype, rate in known.flop_per_second.items()
        },
    )


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Computes the median and the lower and upper quartile."""
    low, middle, high = np.quantile(np.asarray(seconds, np.float64), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def summarize(
    candidate: str, case: Case, first: FirstCall, rounds: list[list[float]], ceilings: Ceilings | None
) -> Timing:
    """Makes a timing of what was measured.

    Args:
        candidate: The candidate's name.
        case: The shape.
        first: Its first call.
        rounds: Seconds of the calls of each round; none for a candidate that was too slow for rounds, whose first call
            counts then.
        ceilings: The machine's best rates, or None.
    """
    warm = bool(rounds)
    rounds = rounds or [[first.first_seconds]]
    median, low, high = spread([second for part in rounds for second in part])
    timing = Timing(
        candidate=candidate,
        case=case,
        dense=case.dense,
        make_seconds=first.make_seconds,
        first_seconds=first.first_seconds,
        memory_bytes=first.memory_bytes,
        rounds=rounds,
        warm=warm,
        median=median,
        low=low,
        high=high,
        flop_per_second=case.flop / median,
        gradient_bytes_per_second=case.gradient_bytes / median,
        samples_per_second=case.batch / median,
        floor_seconds=None,
        of_floor=None,
    )
    return timing if ceilings is None else with_floor(timing, ceilings)


def with_floor(timing: Timing, ceilings: Ceilings) -> Timing:
    """Compares a timing with the machine's ceilings."""
    floor = floor_seconds(timing.case, ceilings)
    return replace(timing, floor_seconds=floor, of_floor=floor / timing.median)


@dataclass(frozen=True)
class Change:
    """A candidate at a case in two runs.

    Attributes:
        candidate: The candidate's name.
        case: The shape.
        verdict: "faster", "slower", "same", or "one sample": too few to tell.
        before: Median seconds in the first run.
        after: Median seconds in the second run.
        ratio: before/after; above 1 is faster.
    """

    candidate: str
    case: Case
    verdict: str
    before: float
    after: float
    ratio: float


def compare(before: Results, after: Results) -> list[Change]:
    """Compares all that two runs both measured.

    A change is one if the quartiles of the two do not meet (those of the medians of the rounds, so that a slow stretch
    of the machine widens them), and the medians differ by more than 5 %.
    """
    others = {(timing.candidate, timing.case): timing for timing in after.measured}
    changes = []
    for timing in before.measured:
        other = others.get((timing.candidate, timing.case))
        if other is None:
            continue
        old, old_low, old_high = spread([float(np.median(part)) for part in timing.rounds])
        new, new_low, new_high = spread([float(np.median(part)) for part in other.rounds])
        ratio = old / new
        if min(len(timing.rounds), len(other.rounds)) < 2:
            verdict = "one sample"
        elif (old_low <= new_high and new_low <= old_high) or abs(np.log(ratio)) < np.log1p(NOISE):
            verdict = "same"
        else:
            verdict = "faster" if ratio > 1 else "slower"
        changes.append(Change(timing.candidate, timing.case, verdict, before=old, after=new, ratio=ratio))
    return changes
