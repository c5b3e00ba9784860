"""What a machine does in a second, for `trak-fast plan`: measured in a few seconds, or from results of a benchmark."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import projection
from ..bench.case import dtype_of
from ..bench.figures import case_of, measured
from ..gradients.functional import FunctionalGradientComputer
from ..store import files
from ..tasks.registry import resolve_task
from .job import Job

FLOP_PER_PARAMETER = 8
"""Of a token: 2 forward, 4 backward, and 2 forward again for the sample's weighting (Q in the paper)."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        projection: FLOP of the projection, 2 B D k a call, at the job's B, k, dtype and kind.
        float64: FLOP of a product in float64: X'X and the solve.
        float32: The same in float32: scores.
        product: The same in the gradients' dtype.
        cholesky: FLOP of a factorisation in float64, k³/3 each.
        copy: Bytes copied.
        source: Where they are from.
        sync: Seconds to have written data safely on disk, once; 0 where it is not known.
        gradient: Seconds of one sample's gradient and weighting for each parameter, of a model like the job's; None
            where it is not known.
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


CALIBRATION_SECONDS = 0.5
"""Of one projection, about, while rates are measured."""

GRADIENT_BYTES = 1 << 30
"""Of the gradients of a stand-in, at most."""

GRADIENT_FLOP = {"cpu": 40_000_000_000, "cuda": 10_000_000_000_000}
"""Of one call of a stand-in, about at most."""


def calibrate(job: Job) -> Rates:
    """Measures rates on this machine, with the job's own B, k, dtype, kind and tokens; takes some seconds."""
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
        gradient_rate(job) if job.tokens and job.gradient_seconds is None else None,
    )  # fmt: skip


def gradient_rate(job: Job) -> float:
    """Seconds of a sample's gradient and weighting for each parameter, of a stand-in for the job's model.

    Operations over a product's rate would be far off where tokens are few: gradients of samples are then written to
    memory more slowly than they are computed. The stand-in is smaller than the model, but its layers are about as wide,
    and it has the model's tokens and the job's batch, unless these take too long.
    """
    device, dtype = torch.device(job.device), dtype_of(job.dtype)
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
    """A model with layers about as wide as those of a usual one of that size, and its width.

    With tokens, a block of a transformer as deep as 1/64 of its width, as the usual ones are, so that its parameters
    are 12 width² · width/64. Without, the largest layer of an MLP, with 3/4 of the parameters: whether the gradients of
    a layer are more than the 32 MiB that malloc keeps for the next batch makes a difference of 3 times.
    """
    if tokens == 1:
        width = max(64, min(4096, round((0.75 * params) ** 0.5)))
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)), width
    width = max(64, min(2048, 64 * round((64 * params / 12) ** (1 / 3) / 64)))
    return nn.Sequential(_Block(width), nn.Linear(width, 10)), width


class _Block(nn.Module):
    """Attention and an MLP, each with its norm and around it a sum; then the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to (B, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, 64)).transpose(-3, -2) for part in self.in_(self.norm_1(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))
        return x.mean(-2)


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
