"""What follows from the measurements: medians, rates, shares of the roofline, and what changed between two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .case import Case

NOISE = 0.05
"""A change below this is never called one, however little the samples spread."""


def case_of(entry: Mapping[str, Any]) -> Case:
    """The shape of an entry of `timings` or `checks`."""
    return Case(**entry["case"])


def floor_seconds(case: Case, ceilings: Mapping[str, Any]) -> float:
    """The least time that a shape takes on a machine (the roofline of Williams et al. 2009).

    It is the longer of the product's time at the rate of torch's product in the gradients' dtype, and of the time to
    read the gradients and to write the result once at the rate of a copy. The matrix costs nothing. A kernel that goes
    around the dtype's rate (float32 as bfloat16 terms, ±1 by look-up) can be faster than this.
    """
    moved = case.gradient_bytes + 4 * case.batch * case.proj_dim
    rate = ceilings["flop_per_second"][case.dtype]
    return float(max(case.flop / rate, moved / ceilings["copy_bytes_per_second"]))


def better(known: Mapping[str, Any] | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """The higher of each of two measurements of a machine's ceilings; other programs can only have lowered them."""
    if known is None:
        return dict(found)
    rates = {
        dtype: max(rate, found["flop_per_second"].get(dtype, 0.0)) for dtype, rate in known["flop_per_second"].items()
    }
    copy = max(known["copy_bytes_per_second"], found["copy_bytes_per_second"])
    return {"copy_bytes_per_second": copy, "flop_per_second": rates}


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = np.quantile(np.asarray(seconds, np.float64), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def summarize(entry: Mapping[str, Any], ceilings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rates of one timing.

    Args:
        entry: With `case`, `rounds` (lists of seconds) and `dense`: whether the matrix is; if not, there is no floor.
        ceilings: See `worker.ceilings`.

    Returns:
        `median`, `low` and `high` (quartiles), in seconds; `flop_per_second` (2 B D k a call);
        `gradient_bytes_per_second`; `samples_per_second`; `floor_seconds` and `of_floor`, its share of the median.
    """
    case = case_of(entry)
    median, low, high = spread([second for part in entry["rounds"] for second in part])
    floor = floor_seconds(case, ceilings) if ceilings and entry["dense"] else None
    return {
        "median": median,
        "low": low,
        "high": high,
        "flop_per_second": case.flop / median,
        "gradient_bytes_per_second": case.gradient_bytes / median,
        "samples_per_second": case.batch / median,
        "floor_seconds": floor,
        "of_floor": floor / median if floor else None,
    }


def measured(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The timings that have a figure."""
    return [entry for entry in results["timings"] if entry["status"] == "ok"]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What two runs measured both, and what changed beyond noise.

    A change is one if no sample's quartiles meet (those of the medians of the rounds, so that a slow stretch of the
    machine widens them), and the medians differ by more than 5 %.

    Args:
        before: Results of a run.
        after: Those of another.

    Returns:
        For each candidate and case of both: `candidate`, `case`, `before` and `after` (median seconds), `ratio`
        (before/after: above 1 is faster), `verdict` ("faster", "slower", "same" or "one sample": too few to tell).
    """
    others = {(entry["candidate"], case_of(entry)): entry for entry in measured(after)}
    rows = []
    for entry in measured(before):
        if (other := others.get((entry["candidate"], case_of(entry)))) is None:
            continue
        a, b = (spread([float(np.median(part)) for part in one["rounds"]]) for one in (entry, other))
        ratio = a[0] / b[0]
        if min(len(entry["rounds"]), len(other["rounds"])) < 2:
            verdict = "one sample"
        elif (a[1] <= b[2] and b[1] <= a[2]) or abs(np.log(ratio)) < np.log1p(NOISE):
            verdict = "same"
        else:
            verdict = "faster" if ratio > 1 else "slower"
        rows.append(
            {
                **{"candidate": entry["candidate"], "case": entry["case"], "verdict": verdict},
                **{"before": a[0], "after": b[0], "ratio": ratio},
            }
        )
    return rows
