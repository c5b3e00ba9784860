"""The rates of a machine for `trak-fast plan`: measured in a few seconds, or from results of a benchmark."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import projection
from ..arguments import real
from ..bench.case import dtype_of
from ..bench.results import Results, Timing
from ..features import memory
from ..gradients.functional import FunctionalGradientComputer
from ..store import files
from ..tasks.registry import resolve_task
from .job import Job

FLOP_PER_PARAMETER = 8
"""FLOP of a token for each parameter: 2 forward, 4 backward, and 2 forward again for the sample's weighting (Q in the
paper)."""

CALIBRATION_SECONDS = 0.5
"""Seconds that one projection takes, about, while rates are measured."""
CALIBRATION_BYTES = 1 << 30
"""Bytes of the gradients that are projected meanwhile, at most, in float32."""
GRADIENT_BYTES = 1 << 30
"""Bytes of the gradients of a stand-in, at most."""
GRADIENT_FLOP = {"cpu": 40_000_000_000, "cuda": 10_000_000_000_000}
"""FLOP of one call of a stand-in, about at most."""


@dataclass(frozen=True)
class Rates:
    """Rates of a machine, all above 0 but `sync`.

    Attributes:
        projection: FLOP a second of the projection, 2 B D k a call ("sjlt": 2 B D nonzeros), at the job's B, k, dtype
            and kind of matrix.
        float64: FLOP a second of a product in float64: X'X and the solve.
        float32: FLOP a second of a product in float32: scores.
        product: FLOP a second of a product in the gradients' dtype.
        cholesky: FLOP a second of a factorisation in float64, k³/3 each.
        copy: Bytes copied a second.
        source: Says where the rates are from.
        sync: Seconds to have written data safely on disk, once; 0 where they are not known.
        gradient: Seconds of one sample's gradient and weighting for each parameter, of a model like the job's; None
            where they are not known.
    """

    projection: float
    float64: float
    float32: float
    product: float
    cholesky: float
    copy: float
    source: str
    sync: float = 0.0
    gradient: float | None = None

    def __post_init__(self) -> None:
        """Checks the rates that times are divided by.

        Raises:
            ValueError: One is not above 0.
        """
        for name in ("projection", "float64", "float32", "product", "cholesky", "copy"):
            real(name, getattr(self, name), 0.0, above=True)


def calibrate(job: Job) -> Rates:
    """Measures rates on this machine, with the job's own B, k, dtype, kind of matrix and tokens; takes some seconds.

    Raises:
        MemoryError: The job's B and k are too large for this machine.
        OSError: No file can be written in this folder, whose disk is to be timed.
    """
    device = torch.device(job.device)
    dtype = dtype_of(job.dtype)
    # the sparse kind adds to all k results for each k / nonzeros columns, or part of them
    columns = min(job.params, max(1 << 12, 4 * (job.proj_dim // job.column_entries)))
    _check_memory(job, columns)
    while True:  # longer until it takes long enough; the time is in proportion to D
        grads = torch.randn(job.batch, columns, device=device).to(dtype)
        project = partial(projection.project, proj_dim=job.proj_dim, proj_type=job.proj_type, nonzeros=job.nonzeros)
        seconds = _seconds(partial(project, grads), device)
        large = 2 * grads.numel() * 4 > CALIBRATION_BYTES
        if seconds > CALIBRATION_SECONDS / 4 or columns >= job.params or large:
            break
        columns = min(job.params, 2 * columns)
    if columns < job.params:  # what a call takes for its results, whatever D is, counts for nothing in the long run
        first = grads[:, : columns // 4].contiguous()
        seconds = max(seconds - _seconds(partial(project, first), device), seconds / 4) / 0.75
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
        projection=2 * job.batch * columns * job.column_entries / seconds,
        float64=rates["float64"],
        float32=rates["float32"],
        product=rates[job.dtype],
        cholesky=cholesky,
        copy=copy,
        source="measured now",
        sync=_sync_seconds(job),
        gradient=gradient_rate(job) if job.tokens and job.gradient_seconds is None else None,
    )


def _check_memory(job: Job, columns: int) -> None:
    """Checks that gradients (B, columns), in float32 and the job's dtype, and projected ones (B, k) fit into memory.

    Raises:
        MemoryError: They do not.
    """
    needed = job.batch * (columns * (4 + dtype_of(job.dtype).itemsize) + 4 * job.proj_dim)
    free = memory.free_bytes(torch.device(job.device))
    if needed > free:
        raise MemoryError(
            f"one projection of B = {job.batch:,} gradients to k = {job.proj_dim:,} takes {needed / 2**30:,.1f} GiB, "
            f"{free / 2**30:,.1f} are free"
        )


def gradient_rate(job: Job) -> float:
    """Measures the seconds of a sample's gradient and weighting for each parameter, of a stand-in for the job's model.

    Operations over a product's rate would be far off where tokens are few: gradients of samples are then written to
    memory more slowly than they are computed. The stand-in is smaller than the model, but its layers are about as wide,
    and it has the model's tokens and the job's batch, unless these take too long.
    """
    device = torch.device(job.device)
    dtype = dtype_of(job.dtype)
    assert job.tokens is not None
    model, width = stand_in(job.params, job.tokens)
    model = model.to(device, dtype).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    most = GRADIENT_FLOP[device.type] // (FLOP_PER_PARAMETER * size)  # tokens at a time
    batch = max(1, min(job.batch, GRADIENT_BYTES // (size * dtype.itemsize), most // job.tokens))
    tokens = min(job.tokens, max(64, most // batch))
    computer = FunctionalGradientComputer(model, resolve_task("image_classification"))
    inputs = torch.randn(batch, width) if job.tokens == 1 else torch.randn(batch, tokens, width)
    samples = [inputs.to(device, dtype), torch.zeros(batch, dtype=torch.long, device=device)]

    def gradients() -> None:
        computer.compute_per_sample_grad(samples)
        computer.compute_loss_grad(samples)

    return _seconds(gradients, device) / batch / size * job.tokens / tokens


def stand_in(params: int, tokens: int) -> tuple[nn.Module, int]:
    """Makes a model with layers about as wide as those of a usual one of that size; returns it and its width.

    With tokens, a block of a transformer as deep as 1/64 of its width, as the usual ones are, so that its parameters
    are 12 width² · width/64. Without, the largest layer of an MLP, with 3/4 of the parameters: a layer whose gradients
    exceed the 32 MiB that malloc keeps for the next batch takes 3 times as long.
    """
    if tokens == 1:
        width = max(64, min(4096, round((0.75 * params) ** 0.5)))
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)), width
    width = max(64, min(2048, 64 * round((64 * params / 12) ** (1 / 3) / 64)))
    return nn.Sequential(_Block(width), nn.Linear(width, 10)), width


class _Block(nn.Module):
    """Attention and an MLP, each with its norm and a residual sum; then the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.in_ = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Takes (B, tokens, width) to (B, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, 64)).transpose(-3, -2) for part in self.in_(self.norm_1(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))
        return x.mean(-2)


def _sync_seconds(job: Job) -> float:
    """Times writing a batch of features to a file in this folder and waiting until it is on the disk.

    Raises:
        OSError: The file cannot be written.
    """
    with tempfile.TemporaryFile(dir=".") as file:

        def write() -> None:
            os.pwrite(file.fileno(), bytes(4 * job.batch * job.proj_dim), 0)
            files.sync(file.fileno())

        return _seconds(write, torch.device("cpu"))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns the median seconds of five calls after one."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(5))


def from_results(job: Job, results: Results) -> Rates:
    """Takes rates from results of `trak-fast bench`.

    The projection's is that of our fastest kernel at the timing that is nearest to the job in B and k, of its dtype and
    kind of matrix and with the largest D.

    Raises:
        ValueError: There is no timing of ours for the job's device, dtype and kind of matrix, or a rate is not above 0.
    """
    wanted = (job.device, job.dtype, job.proj_type)
    ours = [
        timing
        for timing in results.measured
        if timing.candidate.startswith("trak_fast ")
        and (timing.case.device, timing.case.dtype, timing.case.proj_type) == wanted
    ]
    if not ours or results.ceilings is None:
        raise ValueError(f"the results hold no timing of trak_fast for {', '.join(wanted)}")

    def distance(timing: Timing) -> tuple[float, float, float]:
        batch = abs(math.log(timing.case.batch / job.batch))
        proj_dim = abs(math.log(timing.case.proj_dim / job.proj_dim))
        return batch + proj_dim, -timing.case.grad_dim, timing.median

    nearest = min(ours, key=distance)
    rates = results.ceilings.flop_per_second
    if missing := {"float64", "float32", job.dtype} - rates.keys():
        raise ValueError(f"the results hold no rate of a product in {', '.join(sorted(missing))}")
    return Rates(
        projection=nearest.flop_per_second,
        float64=rates["float64"],
        float32=rates["float32"],
        product=rates[job.dtype],
        cholesky=rates["float64"] / 2,
        copy=results.ceilings.copy_bytes_per_second,
        source=f"{nearest.candidate} of {results.started[:10]}",
    )
