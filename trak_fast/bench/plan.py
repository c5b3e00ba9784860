"""`trak-fast plan`: what a TRAK run will take in time, memory and disk, and what the projection will distort.

Time is operations divided by rates. The operations are those of the driver (traker.py, solver.py, scores.py); the rates
are measured on this machine in a few seconds, or taken from results of `trak-fast bench`.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy.optimize import brentq

from .. import files, projection, scores, solver
from .candidates import Case, dtype_of
from .figures import case_of, measured
from .page import bytes_text, seconds_text

CALIBRATION_SECONDS = 0.5
"""Of one projection, about, while rates are measured."""

SYNCS = 3
"""Waits for the disk for each batch: features, weights, flags."""

FLOP_PER_PARAMETER = 8
"""Of a token: 2 forward, 4 backward, and 2 forward again for the sample's weighting (Q in the paper)."""


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        params: Parameters that gradients are taken of, D.
        proj_dim: k.
        samples: Training samples, n.
        targets: m.
        checkpoints: C.
        batch: Samples whose gradients are there at a time, B.
        dtype: Of the gradients.
        proj_type: Kind of matrix.
        device: Where to run.
        half: Whether features are stored in float16.
        tokens: Tokens of a sample (for other models: positions that use each weight), to estimate its gradient's time.
        gradient_seconds: Of one sample's gradient, if it is known; takes the place of `tokens`.
        processes: That share the work, each on a machine or GPU like this.
    """

    params: int
    proj_dim: int
    samples: int
    targets: int = 1000
    checkpoints: int = 1
    batch: int = 32
    dtype: str = "float32"
    proj_type: str = "rademacher"
    device: str = "cpu"
    half: bool = False
    tokens: int | None = None
    gradient_seconds: float | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: Something is out of its range.
        """
        for name in ("params", "proj_dim", "samples", "checkpoints", "batch", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.targets < 0:
            raise ValueError(f"targets must be at least 0, not {self.targets}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")
        if self.gradient_seconds is not None and not self.gradient_seconds >= 0:
            raise ValueError(f"gradient_seconds must be at least 0, not {self.gradient_seconds}")

    @property
    def case(self) -> Case:
        """One call of the projection."""
        return Case(self.batch, self.params, self.proj_dim, self.dtype, self.proj_type, self.device)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        projection: FLOP of the projection, 2 B D k a call, at the job's B, k, dtype and kind.
        float64: FLOP of a product in float64: X'X and the solve.
        float32: The same in float32: scores, and gradients of float32 models.
        gradients: FLOP of a product in the gradients' dtype.
        cholesky: FLOP of a factorisation in float64, k³/3 each.
        copy: Bytes copied.
        source: Where they are from.
        sync: Seconds to have written data safely on disk, once; 0 where it is not known.
    """

    projection: float
    float64: float
    float32: float
    gradients: float
    cholesky: float
    copy: float
    source: str
    sync: float = 0.0


def calibrate(job: Job) -> Rates:
    """Measures rates on this machine, with the job's own B, k, dtype and kind; takes some seconds."""
    device, dtype = torch.device(job.device), dtype_of(job.dtype)
    columns = min(job.params, 1 << 12)
    while True:  # longer until it takes long enough; the time is in proportion to D
        grads = torch.randn(job.batch, columns, device=device).to(dtype)
        seconds = _seconds(lambda g=grads: projection.project(g, job.proj_dim, proj_type=job.proj_type), device)  # type: ignore[misc]
        if seconds > CALIBRATION_SECONDS / 4 or columns >= job.params or 2 * grads.numel() * 4 > 1 << 30:
            break
        columns = min(job.params, 2 * columns)
    side = min(2048, max(256, job.proj_dim))
    rates = {}
    for name in {"float64", "float32", job.dtype}:
        a = torch.randn(2048, side, device=device).to(dtype_of(name))
        rates[name] = 2 * 2048 * side**2 / _seconds(lambda a=a: a.mT @ a, device)  # type: ignore[misc]
    double = torch.randn(2048, side, device=device, dtype=torch.float64)
    spd = double.mT @ double + 2048 * torch.eye(side, device=device, dtype=torch.float64)
    cholesky = side**3 / 3 / _seconds(lambda: torch.linalg.cholesky_ex(spd), device)
    source = torch.ones(1 << 24, device=device)
    target = torch.empty_like(source)
    copy = source.numel() * 8 / _seconds(lambda: target.copy_(source), device)
    return Rates(
        2 * job.batch * columns * job.proj_dim / seconds,
        rates["float64"], rates["float32"], rates[job.dtype], cholesky, copy, "measured now", _sync_seconds(job),
    )  # fmt: skip


def _sync_seconds(job: Job) -> float:
    """Of writing a batch of features to a file in this folder and waiting until it is on the disk."""
    with tempfile.TemporaryFile(dir=".") as file:

        def write() -> None:
            os.pwrite(file.fileno(), bytes(4 * job.batch * job.proj_dim), 0)
            files.sync(file.fileno())

        return _seconds(write, torch.device("cpu"))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of five calls after one."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(5))


def from_results(job: Job, results: Mapping[str, Any]) -> Rates:
    """Rates from results of `trak-fast bench`.

    The projection's is that of our fastest kernel at the timing that is nearest to the job in B and k, of its dtype and
    kind and with the largest D.

    Raises:
        ValueError: There is no timing of ours for the job's device, dtype and kind.
    """
    ours = [
        entry
        for entry in measured(results)
        if entry["candidate"].startswith("trak_fast ")
        and all(entry["case"][name] == getattr(job, name) for name in ("device", "dtype", "proj_type"))
    ]
    if not ours or not results["ceilings"]:
        raise ValueError(f"the results hold no timing of trak_fast for {job.device}, {job.dtype}, {job.proj_type}")

    def distance(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        case = case_of(entry)
        away = abs(math.log(case.batch / job.batch)) + abs(math.log(case.proj_dim / job.proj_dim))
        return away, -case.grad_dim, entry["median"]

    nearest = min(ours, key=distance)
    rates = results["ceilings"]["flop_per_second"]
    return Rates(
        nearest["flop_per_second"], rates["float64"], rates["float32"], rates[job.dtype], rates["float64"] / 2,
        results["ceilings"]["copy_bytes_per_second"], f"{nearest['candidate']} of {results['started'][:10]}",
    )  # fmt: skip


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
        gradients = rows * FLOP_PER_PARAMETER * job.params * job.tokens / rates.gradients
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
    itemsize = dtype_of(job.dtype).itemsize
    memory = {
        # gradients exist twice while they are made (memory.sample_bytes); X'X of the rows so far
        "featurize": 2 * job.batch * job.params * itemsize + 4 * job.batch * k + (grams * 8 * k * k if n >= k else 0),
        # the matrix, the matrix with the ridge, its factor, blocks of rows
        "solve": 3 * 8 * size**2 + 2 * solver.BLOCK_BYTES,
        "scores": 2 * 8 * size**2 * c
        + min(scores.SOLVED_BYTES, 4 * c * m * (k if n >= k else n))
        + 3 * scores.BLOCK_BYTES,
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

    unknown = "not known: give --tokens or --gradient-seconds"
    lines = [
        f"{job.samples:,} training samples, {job.targets:,} targets, {job.checkpoints} checkpoints, "
        f"{job.params:,} parameters to k = {job.proj_dim:,}, {job.processes} × {job.device}",
        f"rates: {rates['source']}; projection {rates['projection'] / 1e9:,.0f} GFLOP/s",
        "time",
        *(
            line(name, "–" if value is None else duration(value), unknown if value is None else "")
            for name, value in seconds.items()
        ),
        "memory, the model aside",
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
