"""Measures the rows of gpu_check.py, in order of importance; judges the targets, and writes the table.

A time is the median of several calls after two warm-up calls, each measured by CUDA events after the L2 cache was
flushed. Matrices are random. If P does not fit, or is so large that no one would keep it, cuBLAS, torch and fast_jl are
timed with its first columns, and their times are scaled to all columns, which is in their favour. The sparse kind is
measured against a copy of its gradients within the device's memory, which reads as much and writes it again.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Methods, by their names in results.
OURS = "trak_fast"
CUBLAS = "cublas"
CHUNKED = "torch_chunks"
FAST_JL = "fast_jl"
COPY = "copy"

KERNELS = ["sm90", "sm90_wide", "sm80"]


class Case(NamedTuple):
    """A projection to measure."""

    kind: str
    dtype: str
    B: int
    k: int
    D: int
    kernel: str = ""  # TRAK_FAST_CUDA_KERNEL; "": the device's best
    nonzeros: int = 0  # of "sjlt"


def priority_cases() -> Iterator[Case]:
    """Yields the cases that the targets are about, then variants, one D at a time so that some of each fit in time."""
    for B in (256, 128, 64, 32, 16, 8, 1):
        yield Case("rademacher", "bf16", B, 4096, 10**8)
    for dtype, B in itertools.product(("bf16", "fp32", "fp16"), (256, 64, 32, 16, 8)):
        yield Case("rademacher", dtype, B, 4096, 10**7)
    sizes = ((4, 32, 10**8), (1, 32, 10**8), (4, 8, 10**8), (4, 256, 10**7), (4, 32, 10**7))
    for (c, B, D), dtype in itertools.product(sizes, ("fp32", "bf16")):
        yield Case("sjlt", dtype, B, 4096, D, nonzeros=c)
    for B in (256, 32):
        yield Case("normal", "bf16", B, 4096, 10**7)
    for B in (8, 32):
        yield Case("rademacher", "bf16", B, 4096, 10**5)
    for B in (8, 1, 32):
        yield Case("rademacher", "bf16", B, 4096, 10**9)
    for kernel, B in itertools.product(KERNELS, (256, 128, 64, 16, 8)):
        yield Case("rademacher", "bf16", B, 4096, 10**7, kernel)


def all_cases() -> list[Case]:
    """Lists all cases, the most important ones first."""
    grid = list(itertools.product((10**7, 10**6, 10**8), (4096, 512, 2048, 8192, 16384), (32, 256, 64, 8, 128, 16, 1)))
    rest = (
        Case(kind, dtype, B, k, D)
        for kind, dtype in itertools.product(("rademacher", "normal"), ("bf16", "fp32", "fp16"))
        for D, k, B in grid
    )
    sparse = (
        Case("sjlt", dtype, B, 4096, D, nonzeros=c)
        for D, dtype, c, B in itertools.product((10**7, 10**8), ("fp32", "bf16"), (4, 1), (32, 256, 8))
    )
    return list(dict.fromkeys(itertools.chain(priority_cases(), sparse, rest)))


class Target(NamedTuple):
    """A figure that should be reached."""

    what: str
    at_least: float
    measured: float | None  # None: a row that it needs was not measured
    reason: str = ""  # the reason why no more is asked for

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return (
            "not measured" if self.measured is None else "reached" if self.measured >= self.at_least else "NOT REACHED"
        )


class Results:
    """The times by method and case, in milliseconds, and all other figures."""

    def __init__(self) -> None:
        self.ms: dict[tuple[str, Case], float] = {}
        self.extra_bytes: dict[Case, int] = {}
        self.timed_columns: dict[tuple[str, Case], int] = {}  # columns that a peer was timed with before scaling to D
        self.launch_us: float | None = None
        self.copy_gb_per_s: float | None = None
        self.failures: list[str] = []  # failures of trak_fast
        self.missing: list[str] = []  # peers that could not be measured

    def ratio(self, slower: tuple[str, Case], faster: tuple[str, Case]) -> float | None:
        """Returns how many times as fast the second is, or None if one is missing."""
        if slower not in self.ms or faster not in self.ms:
            return None
        return self.ms[slower] / self.ms[faster]

    def widest(self, kind: str, dtype: str, B: int) -> Case:
        """Returns the measured case of k = 4096 with the most columns."""
        cases = [Case(kind, dtype, B, 4096, D) for D in (10**8, 10**7, 10**6)]
        return next((case for case in cases if (OURS, case) in self.ms), cases[0])

    def targets(self) -> list[Target]:
        """Compares the times with the targets."""
        found = []
        for B, least in ((256, 0.85), (128, 0.85), (64, 0.8), (32, 3.0), (16, 5.0), (8, 6.0)):
            case = self.widest("rademacher", "bf16", B)
            found.append(
                Target(f"rate / cuBLAS with P resident, B = {B}", least, self.ratio((CUBLAS, case), (OURS, case)))
            )
        # These were predicted for an H100 by counting instructions, before the kernels ran on one.
        for B, predicted in ((256, 720), (128, 720), (64, 710), (32, 680), (16, 410), (8, 210)):
            case = self.widest("rademacher", "bf16", B)
            measured = tflops(case, self.ms[OURS, case]) if (OURS, case) in self.ms else None
            found.append(Target(f"TFLOP/s as predicted, B = {B}", predicted, measured))
        for B, least in ((256, 0.4), (64, 0.4), (32, 0.5), (16, 0.65), (8, 0.75)):
            bf16, fp32 = (Case("rademacher", dtype, B, 4096, 10**7) for dtype in ("bf16", "fp32"))
            ratio = self.ratio((OURS, bf16), (OURS, fp32))
            reason = "two panel rows a sample, and packing"
            found.append(Target(f"fp32 'high' / bf16, B = {B}", least, ratio, reason))
        for B, least in ((256, 0.5), (32, 0.16)):
            rademacher, normal = (Case(kind, "bf16", B, 4096, 10**7) for kind in ("rademacher", "normal"))
            ratio = self.ratio((OURS, rademacher), (OURS, normal))
            reason = "bank conflicts of the table: 113 cycles a fragment, however few rows it serves"
            found.append(Target(f"normal / rademacher, B = {B}", least, ratio, reason))
        # Predicted for an H100, too: in a copy's time its memory could read twice. bf16 at c = 4 is limited by issue.
        for dtype, c, predicted in (("fp32", 4, 2.0), ("fp32", 1, 2.0), ("bf16", 4, 1.8), ("bf16", 1, 2.0)):
            cases = (Case("sjlt", dtype, 32, 4096, D, nonzeros=c) for D in (10**8, 10**7))
            ratio = next((r for case in cases if (r := self.ratio((COPY, case), (OURS, case))) is not None), None)
            found.append(Target(f"copy / sjlt as predicted, {dtype}, c = {c}", predicted, ratio))
        fp16 = Case("rademacher", "fp16", 32, 4096, 10**7)
        found.append(Target("rate / fast_jl, B = 32", 10, self.ratio((FAST_JL, fp16), (OURS, fp16))))
        found.append(
            Target("30 µs / launch overhead at D = 10^5", 1, None if self.launch_us is None else 30 / self.launch_us)
        )
        margins = [memory_bound(case) / max(extra, 1) for case, extra in self.extra_bytes.items()]
        found.append(Target("memory bound / extra memory", 1, min(margins, default=None)))
        return found

    def as_json(self) -> dict[str, Any]:
        """Returns all results as a dictionary for JSON."""
        rows = [
            {
                "method": method,
                **case._asdict(),
                "ms": ms,
                "tflops": tflops(case, ms),
                "timed_columns": self.timed_columns.get((method, case), case.D),
            }
            for (method, case), ms in self.ms.items()
        ]
        memory = [{**case._asdict(), "extra_bytes": extra} for case, extra in self.extra_bytes.items()]
        targets = [{**target._asdict(), "verdict": target.verdict} for target in self.targets()]
        return {
            "rows": rows,
            "memory": memory,
            "launch_us": self.launch_us,
            "copy_gb_per_s": self.copy_gb_per_s,
            "targets": targets,
            "failures": self.failures,
            "missing": self.missing,
        }


def check_size(y: torch.Tensor, case: Case) -> None:
    """Checks the size of a timed result: its squares are D on average (sjlt: c D / k) for D standard normal gradients.

    Raises:
        RuntimeError: A sample's mean square differs from D by more than chance explains for k numbers.
    """
    density = case.nonzeros / case.k if case.kind == "sjlt" else 1
    found = y.double().square().mean(dim=1) / (case.D * density)
    if not bool(((found - 1).abs() < 8 * (2 / case.k) ** 0.5 + 0.02).all()):
        raise RuntimeError(f"the result is wrong: mean squares are {found.min():.3g} to {found.max():.3g} of D")


def memory_bound(case: Case) -> int:
    """Returns the allowed extra memory in bytes: 64 MiB and the partial sums of 8 splits.

    fp32 has two panel rows a sample, and a tile has eight rows at least.
    """
    return 64 * 2**20 + 8 * case.k * max(case.B * (2 if case.dtype == "fp32" else 1), 8) * 4


def tflops(case: Case, ms: float) -> float:
    """Returns the speed in TFLOP/s."""
    return 2 * case.B * case.k * case.D / ms / 1e9


def table(results: Results) -> str:
    """Writes the table of the important rows and the verdicts of the targets."""
    lines = [f"{'':40}{'ms':>10}{'TFLOP/s':>9}{'GB/s in':>9}  speed against"]
    for case in dict.fromkeys(priority_cases()):
        ms = results.ms.get((OURS, case))
        if ms is None:
            continue
        gigabytes = case.B * case.D * ELEMENT_BYTES[case.dtype] / ms / 1e6
        others = [(other, results.ratio((other, case), (OURS, case))) for other in (CUBLAS, CHUNKED, FAST_JL, COPY)]
        against = ", ".join(f"{other} {ratio:.2f}" for other, ratio in others if ratio is not None)
        name = f"{case.kind[:4]} {case.dtype} B={case.B} k={case.k} D=1e{len(str(case.D)) - 1} {case.kernel}"
        name += f"c={case.nonzeros}" if case.nonzeros else ""
        lines.append(f"{name:40}{ms:10.3f}{tflops(case, ms):9.1f}{gigabytes:9.1f}  {against}")
    lines.append("")
    for target in results.targets():
        measured = "" if target.measured is None else f"{target.measured:.2f}"
        reason = f" ({target.reason})" if target.reason else ""
        lines.append(f"{target.what:44}{measured:>8} (at least {target.at_least:g}{reason})  {target.verdict}")
    return "\n".join(lines)


def event_ms(call: Callable[[], object], flush: torch.Tensor | None = None) -> float:
    """Times a call by CUDA events, in milliseconds; `flush`, if given, is written before, to empty the L2 cache."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


class Clock:
    """A time limit."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()


class Gpu:
    """The current CUDA device, to measure on.

    Attributes:
        best: The kernel for cases that name no kernel.
        with_fast_jl: True if fast_jl is measured too.
    """

    def __init__(self, best: str = "", with_fast_jl: bool = False) -> None:
        self.best = best
        self.with_fast_jl = with_fast_jl
        self.project = importlib.import_module("trak_fast").project
        properties = torch.cuda.get_device_properties(0)
        self.memory = properties.total_memory
        self.multiprocessors = properties.multi_processor_count
        self.flush = torch.empty(
            4 * max(getattr(properties, "L2_cache_size", 0), 32 << 20), dtype=torch.uint8, device="cuda"
        )
        self.pool = torch.empty(0)
        self.rates: dict[tuple[object, ...], float] = {}  # milliseconds that a peer takes for a column

    def gradients(self, case: Case) -> torch.Tensor:
        """Returns random gradients (B, D), cut from one pool of their dtype."""
        if self.pool.dtype != DTYPES[case.dtype] or self.pool.numel() < case.B * case.D:
            self.pool = torch.empty(0)
            torch.cuda.empty_cache()
            self.pool = torch.empty(case.B * case.D, dtype=DTYPES[case.dtype], device="cuda")
            for part in self.pool.split(1 << 28):
                part.normal_()
        return self.pool[: case.B * case.D].view(case.B, case.D)

    def median_ms(self, call: Callable[[], object], seconds: float = 0.4) -> float:
        """Times calls for some seconds, 3 to 30 of them, and returns the median in milliseconds."""
        for _ in range(2):
            call()
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 3 or (len(times) < 30 and time.monotonic() - begin < seconds):
            times.append(event_ms(call, self.flush))
        return statistics.median(times)

    def fits(self, case: Case) -> bool:
        """Tells whether the gradients of a case fit into the device's memory."""
        return case.B * case.D * ELEMENT_BYTES[case.dtype] < 0.7 * self.memory

    def works(self) -> bool:
        """Tells whether the device still answers: after a kernel's error, every call fails."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def ours(self, case: Case, results: Results) -> None:
        """Measures time and extra memory of trak_fast."""
        grads = self.gradients(case)
        os.environ["TRAK_FAST_CUDA_KERNEL"] = case.kernel or self.best
        options = {"proj_type": case.kind, "precision": "high" if case.dtype == "fp32" else None}
        if case.nonzeros:
            options = {"proj_type": case.kind, "nonzeros": case.nonzeros}
        self.project(grads, case.k, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = self.project(grads, case.k, **options)
        torch.cuda.synchronize()
        results.extra_bytes[case] = torch.cuda.max_memory_allocated() - before - y.numel() * 4
        check_size(y, case)
        results.ms[OURS, case] = self.median_ms(lambda: self.project(grads, case.k, **options))

    def peers(self, case: Case, results: Results) -> None:
        """Measures the peers in 16-bit floats, also for fp32: a user would pick these for speed. For sjlt: a copy."""
        if case.kind == "sjlt":
            columns = min(case.D, int(4e9 / (ELEMENT_BYTES[case.dtype] * case.B)))
            key: tuple[object, ...] = (COPY, case.dtype, case.B, columns)
            if key not in self.rates:
                source = self.gradients(case._replace(D=columns))
                target = torch.empty_like(source)
                self.rates[key] = self.median_ms(lambda: target.copy_(source)) / columns
            results.ms[COPY, case] = self.rates[key] * case.D
            results.timed_columns[COPY, case] = columns
            return
        dtype = torch.float16 if case.dtype == "fp16" else torch.bfloat16
        columns = min(case.D, int(8e9 / (2 * case.k)) // 512 * 512, int(4e9 / (2 * case.B)) // 512 * 512)
        methods = [(CUBLAS, self.cublas_ms, columns), (CHUNKED, self.chunks_ms, min(columns, 1 << 16))]
        if self.with_fast_jl and case[:2] == ("rademacher", "fp16") and case.B % 8 == 0 and case.k % 512 == 0:
            methods.append((FAST_JL, self.fast_jl_ms, min(case.D, 10**6)))
        for method, measure, taken in methods:
            key = (method, dtype, case.kind if method == CHUNKED else "", case.B, case.k, taken)
            if key not in self.rates:
                try:
                    self.rates[key] = measure(case, dtype, taken) / taken
                except (RuntimeError, AttributeError, TypeError) as error:
                    results.missing.append(f"{method}, B={case.B} k={case.k}: {str(error).splitlines()[0][:200]}")
                    self.rates[key] = float("nan")  # not tried again
            if self.rates[key] > 0:
                results.ms[method, case] = self.rates[key] * case.D
                results.timed_columns[method, case] = taken

    def cublas_ms(self, case: Case, dtype: torch.dtype, columns: int) -> float:
        """Times cuBLAS with P as (k, D) and as (D, k), and returns the better time."""
        grads = torch.randn(case.B, columns, device="cuda", dtype=dtype)
        P = torch.randint(0, 2, (columns * case.k,), device="cuda", dtype=torch.int8).mul_(2).sub_(1).to(dtype)
        as_rows = P.view(case.k, columns).T
        as_columns = P.view(columns, case.k)
        return min(self.median_ms(lambda: grads @ as_rows), self.median_ms(lambda: grads @ as_columns))

    def chunks_ms(self, case: Case, dtype: torch.dtype, columns: int) -> float:
        """Times products with P as torch's generator makes it, some columns at a time."""
        chunk = min(columns, 1 << 13)
        grads = torch.randn(case.B, columns, device="cuda", dtype=dtype)
        P = torch.empty(chunk, case.k, device="cuda", dtype=dtype)

        def run() -> torch.Tensor:
            y = torch.zeros(case.B, case.k, device="cuda")
            for part in grads.split(chunk, dim=1):
                made = P.normal_() if case.kind == "normal" else P.bernoulli_(0.5).mul_(2).sub_(1)
                y += part @ made[: part.shape[1]]
            return y

        return self.median_ms(run)

    def fast_jl_ms(self, case: Case, dtype: torch.dtype, columns: int) -> float:
        """Times fast_jl's function for the largest batch that divides B."""
        fast_jl = importlib.import_module("fast_jl")
        width = max(w for w in (8, 16, 32) if case.B % w == 0)
        project = getattr(fast_jl, f"project_rademacher_{width}")
        grads = torch.randn(case.B, columns, device="cuda", dtype=dtype)
        return self.median_ms(lambda: project(grads, case.k, 0, self.multiprocessors))

    def quick_times(self, kernels: Iterable[str]) -> Iterator[str]:
        """Yields a line for each kernel, kind and batch size: the best of three calls, bf16, D = 2^22, k = 4096."""
        k = 4096
        D = 1 << 22
        for kernel, kind, B in itertools.product(kernels, ("rademacher", "normal"), (8, 16, 32, 64, 128, 256)):
            os.environ["TRAK_FAST_CUDA_KERNEL"] = kernel
            grads = self.gradients(Case(kind, "bf16", B, k, D))
            call = functools.partial(self.project, grads, k, proj_type=kind)
            ms = min([event_ms(call) for _ in range(4)][1:])
            yield f"{kernel:10} {kind:10} B={B:3} {ms:9.3f} ms {2 * B * k * D / ms / 1e9:6.0f} TFLOP/s"

    def launch_us(self) -> float:
        """Measures the wall-clock time of a call on a small gradient over many calls in a row, in microseconds."""
        os.environ["TRAK_FAST_CUDA_KERNEL"] = self.best
        grads = torch.randn(8, 10**5, device="cuda").bfloat16()
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(100):
                self.project(grads, 512)
            times.append((time.perf_counter() - begin) / 100)  # handed over, not finished
            torch.cuda.synchronize()
        return statistics.median(times) * 1e6

    def copy_gb_per_s(self) -> float:
        """Measures the speed of a copy within the device's memory, bytes read and written."""
        source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median_ms(lambda: target.copy_(source)) / 1e6


class Imagined:
    """A stand-in for a GPU in a dry run: its times come from a model, so that all else can be tried anywhere."""

    def quick_times(self, kernels: Iterable[str]) -> Iterator[str]:
        return (f"{kernel}: imagined" for kernel in kernels)

    def fits(self, case: Case) -> bool:
        return case.B * case.D * ELEMENT_BYTES[case.dtype] < 100e9

    def works(self) -> bool:
        return True

    def ours(self, case: Case, results: Results) -> None:
        if case.kind == "sjlt":
            results.ms[OURS, case] = 0.01 + case.B * case.D * ELEMENT_BYTES[case.dtype] / 2.8e9
        else:
            results.ms[OURS, case] = 0.01 + 2 * max(case.B, 16) * case.k * case.D / 600e9
        results.extra_bytes[case] = 32 << 20

    def peers(self, case: Case, results: Results) -> None:
        if case.kind == "sjlt":
            results.ms[COPY, case] = 2 * case.B * case.D * ELEMENT_BYTES[case.dtype] / 3e9
            return
        results.ms[CUBLAS, case] = max(2 * case.B * case.k * case.D / 650e9, 2 * case.k * case.D / 4e9)
        results.ms[CHUNKED, case] = 10 * results.ms[CUBLAS, case]

    def launch_us(self) -> float:
        return 20.0

    def copy_gb_per_s(self) -> float:
        return 4000.0


def expected_seconds(case: Case) -> float:
    """Returns an upper bound of the time of a case: seven calls at a modest rate, and the peers."""
    if case.kind == "sjlt":
        return 3
    return 7 * 2 * max(case.B, 32) * case.k * case.D / 200e12 + 1


def measure(
    gpu: Gpu | Imagined,
    cases: Iterable[Case],
    clock: Clock,
    kernels: list[str],
    results: Results,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measures case by case as long as there is time; a case that fails is noted and left out.

    Args:
        gpu: The device.
        cases: The cases, the most important ones first.
        clock: The time limit.
        kernels: The kernels that are right; cases of others are left out.
        results: Takes the figures.
        save: Called after each case.
    """
    try:
        results.launch_us = gpu.launch_us()
        results.copy_gb_per_s = gpu.copy_gb_per_s()
    except RuntimeError as error:
        results.failures.append(f"small calls and copies: {error}")
        return
    left_out = 0
    for case in cases:
        if clock.left < 10 + expected_seconds(case):
            left_out += 1
            continue
        if not gpu.fits(case) or (case.kernel and case.kernel not in kernels):
            continue
        try:
            gpu.ours(case, results)
            gpu.peers(case, results)
        except RuntimeError as error:  # out of memory included
            results.failures.append(f"{case}: {str(error).splitlines()[0][:200]}")
            print(results.failures[-1], flush=True)
            if not gpu.works():
                results.failures.append("the device no longer answers: the other rows are left out")
                break
        else:
            print(f"{case}: {results.ms[OURS, case]:.3f} ms", flush=True)
        save()
    if left_out:
        print(f"time is up: {left_out} rows are left out", flush=True)
