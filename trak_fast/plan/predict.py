"""`trak-fast plan`: what a TRAK run will take in time, memory and disk, and what the projection will distort.

Time is operations divided by rates, and memory the arrays that are there at once. Both are those of the driver
(traker.py and scoring/); rates.py has the rates. benchmarks/plan.py compares with real runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from scipy.optimize import brentq

from ..bench.case import dtype_of
from ..bench.units import bytes_text, seconds_text
from ..scoring import gram, scores
from .job import Job
from .rates import FLOP_PER_PARAMETER, Rates

SYNCS = 3
"""Waits for the disk for each batch: features, weights, flags."""


def jl_epsilon(samples: float, proj_dim: int) -> float | None:
    """ε such that all distances of n points keep within 1 ± ε (squared), surely for some P and so typically.

    Dasgupta and Gupta 2003, theorem 2.1: k ≥ 4 ln n/(ε²/2 − ε³/3). None where k is too small for any ε < 1.
    """
    if samples < 2:
        return 0.0

    def missing(epsilon: float) -> float:
        return float(4 * math.log(samples) / (epsilon**2 / 2 - epsilon**3 / 3) - proj_dim)

    return None if missing(1.0) > 0 else float(brentq(missing, 1e-9, 1.0))


def predict(job: Job, rates: Rates) -> dict[str, Any]:
    """What a job takes.

    Returns:
        `seconds`: of each stage (`gradients` is None if neither `tokens` nor `gradient_seconds` is given) and `total`;
        `memory_bytes`: at the peak of each stage, the model aside, and `peak`; `disk_bytes`: of each part and `total`;
        `distortion`: root mean squares of the relative error of a squared norm and of the error of a cosine, and `all`,
        the ε of `jl_epsilon`.
    """
    k, n, m, c = job.proj_dim, job.samples, job.targets, job.checkpoints
    size = min(n, k)  # of the Gram matrix
    rows = c * (n + m) / job.processes
    gradients = None
    if job.gradient_seconds is not None:
        gradients = rows * job.gradient_seconds
    elif job.tokens is not None:
        flop_seconds = FLOP_PER_PARAMETER * job.tokens / rates.product
        gradients = rows * job.params * (rates.gradient or flop_seconds)
    grams = 2 if n >= k else 1  # X'X and X'CX, as the automatic ridge takes for classification; or XX'
    stages = {
        "gradients": gradients,
        "projection": rows * 2 * job.params * k / rates.projection,
        "store": rows / job.batch * SYNCS * rates.sync,
        "X'X": grams * c * 2 * n * k * size / rates.float64 / job.processes,
        "solve": c * (size**3 / 3 / rates.cholesky + 2 * size**2 * m / rates.float64)
        + (0 if n >= k else c * 2 * n * k * m / rates.float64),
        "scores": (c * 2 * n * k * m / rates.float32 if n >= k else 0) / job.processes
        + 3 * 4 * n * m / rates.copy / job.processes,
    }
    entry = 2 if job.half else 4
    disk = {
        "training features": c * n * (k * entry + 4 + 1 + (4 if job.half else 0)),  # and weights, flags, factors
        "target features": c * m * (4 * k + 1),
        "Gram matrices": grams * c * 8 * size**2,
        "scores": 4 * n * m,
    }
    square = 8 * size**2  # float64
    group = max(1, min(m, scores.SOLVED_BYTES // (4 * c * (k if n >= k else n))))  # targets at a time
    memory = {
        # gradients, once: vmap over grad makes those of a layer in place; the rows of X that wait for a product, in
        # each sum, and those of one joined; the sums
        "featurize": job.batch * job.params * dtype_of(job.dtype).itemsize
        + 4 * job.batch * k
        + (grams * square + (grams + 1) * 8 * k * min(n, min(1024, k) + job.batch) if n >= k else 0),
        # this process's own sums, what it saved of them, their total, and sums of rows that no saved sum has
        # (or XX', the present block of columns in float32 and float64, and the last one)
        "X'X": 4 * grams * square if n >= k else square + min(5 * gram.BLOCK_BYTES // 2, 20 * n * k),
        # the factors of the checkpoints before; what is stored, its weighted sum, the same with the ridge, its factor,
        # and what LAPACK copies
        "solve": (2 * (c - 1) + (6 if grams == 2 else 5)) * square,
        # matrices and factors; the right sides in float64, products with them, and their copies; blocks of features
        "scores": 2 * c * square
        + group * (16 * k + (4 * c * k if n >= k else 24 * n + 4 * c * n))
        + min(3 * scores.BLOCK_BYTES, 12 * n * max(k, m)),
    }
    return {
        "seconds": {**stages, "total": sum(seconds or 0.0 for seconds in stages.values())},
        "memory_bytes": {**memory, "peak": max(memory.values())},
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "distortion": {"norm": math.sqrt(2 / k), "cosine": math.sqrt(1 / k), "all": jl_epsilon(n + m, k)},
        "rates": {field.name: getattr(rates, field.name) for field in fields(rates)},
    }


def text(job: Job, plan: Mapping[str, Any]) -> str:
    """A plan for a reader."""
    seconds, distortion, rates = plan["seconds"], plan["distortion"], plan["rates"]

    def line(name: str, value: str, note: str = "") -> str:
        return f"  {name:<20}{value:>12}  {note}".rstrip()

    notes = {"gradients": "", "total": ""}
    if seconds["gradients"] is None:
        notes = dict.fromkeys(notes, "without gradients: give --tokens or --gradient-seconds")
    elif job.gradient_seconds is None and rates["gradient"] is None:
        notes = dict.fromkeys(notes, f"at least: {FLOP_PER_PARAMETER} FLOP a parameter and token, at a product's rate")
    elif job.gradient_seconds is None:
        notes["gradients"] = "measured with " + ("the layer of an MLP" if job.tokens == 1 else "a transformer block")
    lines = [
        f"{job.samples:,} training samples, {job.targets:,} targets, {job.checkpoints} checkpoints, "
        f"{job.params:,} parameters to k = {job.proj_dim:,}, {job.processes} × {job.device}",
        f"rates: {rates['source']}; projection {rates['projection'] / 1e9:,.0f} GFLOP/s",
        "time",
        *(
            line(name, "–" if value is None else duration(value), notes.get(name, ""))
            for name, value in seconds.items()
        ),
        "memory, the model and its activations aside",
        *(line(name, bytes_text(value)) for name, value in plan["memory_bytes"].items()),
        "disk",
        *(line(name, bytes_text(value)) for name, value in plan["disk_bytes"].items()),
        "what the projection distorts",
        line("squared norm", f"± {distortion['norm']:.2%}", "root mean square, √(2/k)"),
        line("cosine", f"± {distortion['cosine']:.4f}", "of unrelated gradients, 1/√k; up to √(2/k) of like ones"),
        line(
            "every distance",
            "–" if distortion["all"] is None else f"± {distortion['all']:.1%}",
            "squared, of all pairs of samples and targets (Dasgupta and Gupta 2003)"
            + ("" if distortion["all"] is not None else ": no bound below 100 %"),
        ),
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time with the unit that suits it, up to days."""
    for factor, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return seconds_text(seconds) if seconds else "0 s"
