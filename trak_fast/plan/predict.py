"""The prediction of `trak-fast plan`: time, memory and disk of a TRAK run, and the distortion by the projection.

Time is operations divided by rates, and memory the arrays that exist at once. Both are those of the driver
(traker.py and scoring/); rates.py has the rates. benchmarks/plan.py compares with real runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq

from ..bench.case import dtype_of
from ..bench.units import bytes_text, seconds_text
from ..projection.checks import SPARSE
from ..scoring import gram, scores
from .job import Job
from .rates import FLOP_PER_PARAMETER, Rates

SYNCS = 4
"""Waits for the disk for each batch: features, weights, digests, flags."""

ROW_BYTES = 2 + 4 + 1
"""Bytes beside the features of a row: its power of two, the digest of its sample, its flag."""


@dataclass(frozen=True)
class Seconds:
    """Time of each stage of a run, in seconds; `gradients` is None where nothing is known of them."""

    gradients: float | None
    projection: float
    store: float
    gram: float
    solve: float
    scores: float

    @property
    def total(self) -> float:
        """The sum of all stages that are known."""
        stages = (self.gradients, self.projection, self.store, self.gram, self.solve, self.scores)
        return sum(seconds or 0.0 for seconds in stages)

    def rows(self) -> dict[str, float | None]:
        """Returns the stages and the total by the names that a reader sees."""
        return {
            "gradients": self.gradients,
            "projection": self.projection,
            "store": self.store,
            "X'X": self.gram,
            "solve": self.solve,
            "scores": self.scores,
            "total": self.total,
        }


@dataclass(frozen=True)
class Memory:
    """Peak of memory in each stage of a run, in bytes, the model aside."""

    featurize: int
    gram: int
    solve: int
    scores: int

    @property
    def peak(self) -> int:
        """The highest of all stages."""
        return max(self.featurize, self.gram, self.solve, self.scores)

    def rows(self) -> dict[str, int]:
        """Returns the stages and the peak by the names that a reader sees."""
        return {
            "featurize": self.featurize,
            "X'X": self.gram,
            "solve": self.solve,
            "scores": self.scores,
            "peak": self.peak,
        }


@dataclass(frozen=True)
class Disk:
    """Size of each part of the store, in bytes."""

    training_features: int
    target_features: int
    gram_matrices: int
    scores: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.training_features + self.target_features + self.gram_matrices + self.scores

    def rows(self) -> dict[str, int]:
        """Returns the parts and the total by the names that a reader sees."""
        return {
            "training features": self.training_features,
            "target features": self.target_features,
            "Gram matrices": self.gram_matrices,
            "scores": self.scores,
            "total": self.total,
        }


@dataclass(frozen=True)
class Distortion:
    """Errors that the projection makes.

    Attributes:
        norm: Root mean square of the relative error of a squared norm.
        cosine: Root mean square of the error of a cosine.
        every_distance: The ε of `jl_epsilon`; None for "sjlt", which has no such bound with so few entries a column.
    """

    norm: float
    cosine: float
    every_distance: float | None


@dataclass(frozen=True)
class Prediction:
    """The costs of a job and the errors of its projection, with the rates that they come from."""

    seconds: Seconds
    memory: Memory
    disk: Disk
    distortion: Distortion
    rates: Rates


def jl_epsilon(samples: float, proj_dim: int) -> float | None:
    """Returns the ε such that all distances of n points keep within 1 ± ε (squared), for some P and so typically.

    Dasgupta and Gupta 2003, theorem 2.1: k ≥ 4 ln n/(ε²/2 − ε³/3). None where k is too small for any ε < 1.
    """
    if samples < 2:
        return 0.0

    def missing(epsilon: float) -> float:
        return float(4 * math.log(samples) / (epsilon**2 / 2 - epsilon**3 / 3) - proj_dim)

    return None if missing(1.0) > 0 else float(brentq(missing, 1e-9, 1.0))


def predict(job: Job, rates: Rates) -> Prediction:
    """Predicts a job's costs; without `tokens` and `gradient_seconds` the time of gradients is None."""
    k, n, m = job.proj_dim, job.samples, job.targets
    size = min(n, k)  # of the Gram matrix
    grams = 2 if n >= k else 1  # X'X and X'CX, as the automatic ridge takes for classification; or XX'
    return Prediction(
        seconds=_seconds(job, rates, size, grams),
        memory=_memory(job, size, grams),
        disk=_disk(job, size, grams),
        distortion=Distortion(
            norm=math.sqrt(2 / k),
            cosine=math.sqrt(1 / k),
            every_distance=None if job.proj_type == SPARSE else jl_epsilon(n + m, k),
        ),
        rates=rates,
    )


def _seconds(job: Job, rates: Rates, size: int, grams: int) -> Seconds:
    """Divides operations by rates.

    Args:
        job: The job.
        rates: The machine's rates.
        size: Rows of a Gram matrix.
        grams: Number of Gram matrices of a checkpoint.
    """
    k, n, m, c = job.proj_dim, job.samples, job.targets, job.checkpoints
    rows = c * (n + m) / job.processes
    gradients = None
    if job.gradient_seconds is not None:
        gradients = rows * job.gradient_seconds
    elif job.tokens is not None:
        flop_seconds = FLOP_PER_PARAMETER * job.tokens / rates.product
        gradients = rows * job.params * (rates.gradient or flop_seconds)
    return Seconds(
        gradients=gradients,
        projection=rows * 2 * job.params * job.column_entries / rates.projection,
        store=rows / job.batch * SYNCS * rates.sync,
        gram=grams * c * 2 * n * k * size / rates.float64 / job.processes,
        solve=c * (size**3 / 3 / rates.cholesky + 2 * size**2 * m / rates.float64)
        + (0 if n >= k else c * 2 * n * k * m / rates.float64),
        scores=(c * 2 * n * k * m / rates.float32 if n >= k else 0) / job.processes
        + 3 * 4 * n * m / rates.copy / job.processes,
    )


def _memory(job: Job, size: int, grams: int) -> Memory:
    """Adds up the arrays that exist at once; see `_seconds` for the arguments."""
    k, n, m, c = job.proj_dim, job.samples, job.targets, job.checkpoints
    square = 8 * size**2  # float64
    group = max(1, min(m, scores.SOLVED_BYTES // (4 * c * (k if n >= k else n))))  # targets at a time
    return Memory(
        # gradients, once: vmap over grad makes those of a layer in place; the rows of X that wait for a product, in
        # each sum, and those of one joined; the sums
        featurize=job.batch * job.params * dtype_of(job.dtype).itemsize
        + 4 * job.batch * k
        + (grams * square + (grams + 1) * 8 * k * min(n, min(1024, k) + job.batch) if n >= k else 0),
        # this process's own sums, what it saved of them, their total, and sums of rows that no saved sum has
        # (or XX', the present block of columns in float32 and float64, and the last one)
        gram=4 * grams * square if n >= k else square + min(5 * gram.BLOCK_BYTES // 2, 20 * n * k),
        # the factors of the checkpoints before; what is stored, its weighted sum, the same with the ridge, its factor,
        # and what LAPACK copies
        solve=(2 * (c - 1) + (6 if grams == 2 else 5)) * square,
        # matrices and factors; the right sides in float64, products with them, and their copies; blocks of features
        scores=2 * c * square
        + group * (16 * k + (4 * c * k if n >= k else 24 * n + 4 * c * n))
        + min(3 * scores.BLOCK_BYTES, 12 * n * max(k, m)),
    )


def _disk(job: Job, size: int, grams: int) -> Disk:
    """Adds up the files; see `_seconds` for the arguments."""
    k, n, m, c = job.proj_dim, job.samples, job.targets, job.checkpoints
    entry = 2 if job.half else 4
    return Disk(
        # and powers of two, digests and flags; weights
        training_features=c * n * (entry * k + ROW_BYTES + 4),
        target_features=c * m * (4 * k + ROW_BYTES),
        gram_matrices=grams * c * 8 * size**2,
        scores=4 * n * m,
    )


def text(job: Job, prediction: Prediction) -> str:
    """Sets a prediction as text."""
    seconds, rates, distortion = prediction.seconds, prediction.rates, prediction.distortion

    def line(name: str, value: str, note: str = "") -> str:
        return f"  {name:<20}{value:>12}  {note}".rstrip()

    notes = {"gradients": "", "total": ""}
    if seconds.gradients is None:
        notes = dict.fromkeys(notes, "without gradients: give --tokens or --gradient-seconds")
    elif job.gradient_seconds is None and rates.gradient is None:
        notes = dict.fromkeys(notes, f"at least: {FLOP_PER_PARAMETER} FLOP a parameter and token, at a product's rate")
    elif job.gradient_seconds is None:
        notes["gradients"] = "measured with " + ("the layer of an MLP" if job.tokens == 1 else "a transformer block")
    epsilon = distortion.every_distance
    sparse = job.proj_type == SPARSE
    missing = f"for {SPARSE}" if sparse else "below 100 %"
    kind = f"{job.proj_type}, {job.column_entries} entries a column" if sparse else job.proj_type
    lines = [
        f"{job.samples:,} training samples, {job.targets:,} targets, {job.checkpoints} checkpoints, "
        f"{job.params:,} parameters to k = {job.proj_dim:,}, {job.processes} × {job.device}",
        f"rates: {rates.source}; projection ({kind}) {rates.projection / 1e9:,.0f} GFLOP/s",
        "time",
        *(
            line(name, "–" if value is None else duration(value), notes.get(name, ""))
            for name, value in seconds.rows().items()
        ),
        "memory, the model and its activations aside",
        *(line(name, bytes_text(value)) for name, value in prediction.memory.rows().items()),
        "disk",
        *(line(name, bytes_text(value)) for name, value in prediction.disk.rows().items()),
        "what the projection distorts",
        line("squared norm", f"± {distortion.norm:.2%}", "root mean square, √(2/k)"),
        line("cosine", f"± {distortion.cosine:.4f}", "of unrelated gradients, 1/√k; up to √(2/k) of like ones"),
        line(
            "every distance",
            "–" if epsilon is None else f"± {epsilon:.1%}",
            "squared, of all pairs of samples and targets (Dasgupta and Gupta 2003)"
            + ("" if epsilon is not None else f": no bound {missing}"),
        ),
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Formats a time with the unit that suits it, up to days."""
    for factor, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return seconds_text(seconds) if seconds else "0 s"
