"""Everything that needs a GPU, in one command of under nine minutes: build, tests, sanitizers, measurements.

    python benchmarks/gpu_check.py [--minutes 8.5] [--fast-jl fast_jl-0.1.3.tar.gz] [--dry-run]

For a bare machine without network: needs torch, pybind11, cmake, ninja and nvcc, and builds for the device's own
architecture. Writes JSON to $OUT or benchmarks/results/, also while it measures, and prints a short table last, with
each target as reached or not. Measurements stop when the time is up; the rows that the targets need come first. A
kernel that fails or hangs on small shapes is reported and left out; so is what is missing: pytest, compute-sanitizer,
fast_jl.

How times are taken: CUDA events around one call, the L2 cache flushed before each, two warm-up calls, the median of
the rest. Matrices are random. A matrix P that does not fit, or that no one would keep, is stood for by its first
columns: cuBLAS, torch and fast_jl then take time in proportion to the columns, which is in their favour.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS, CUBLAS, CHUNKED, FAST_JL = "trak_fast", "cublas", "torch_chunks", "fast_jl"
KERNELS = ["sm90", "sm90_wide", "sm80"]
SAVE_SECONDS = 5
ADJOINT = "adjoint"  # among the names of kernels on small shapes
FAST_JL_TRIAL = """
import fast_jl, torch
fast_jl.project_rademacher_8(torch.randn(8, 10000, device="cuda").half(), 512, 0, 100)
torch.cuda.synchronize()
"""


class Case(NamedTuple):
    kind: str
    dtype: str
    B: int
    k: int
    D: int
    kernel: str = ""  # TRAK_FAST_CUDA_KERNEL; "": the device's best


def priority_cases() -> Iterator[Case]:
    """What the targets are about, then variants, one column count at a time; what does not fit is left out later."""
    for B in (256, 128, 64, 32, 16, 8, 1):
        yield Case("rademacher", "bf16", B, 4096, 10**8)
    for dtype, B in itertools.product(("bf16", "fp32", "fp16"), (256, 64, 32, 16, 8)):
        yield Case("rademacher", dtype, B, 4096, 10**7)
    for B in (256, 32):
        yield Case("normal", "bf16", B, 4096, 10**7)
    yield Case("rademacher", "bf16", 8, 4096, 10**5)
    for B in (8, 1, 32):
        yield Case("rademacher", "bf16", B, 4096, 10**9)
    for kernel, B in itertools.product(KERNELS, (256, 128, 64, 16)):
        yield Case("rademacher", "bf16", B, 4096, 10**7, kernel)


def all_cases() -> list[Case]:
    grid = list(itertools.product((10**7, 10**6, 10**8), (4096, 512, 2048, 8192, 16384), (32, 256, 64, 8, 128, 16, 1)))
    rest = (
        Case(kind, dtype, B, k, D)
        for kind, dtype in itertools.product(("rademacher", "normal"), ("bf16", "fp32", "fp16"))
        for D, k, B in grid
    )
    return list(dict.fromkeys(itertools.chain(priority_cases(), rest)))


class Target(NamedTuple):
    what: str
    at_least: float
    measured: float | None  # None: a row that it needs was not measured

    @property
    def verdict(self) -> str:
        return (
            "not measured" if self.measured is None else "reached" if self.measured >= self.at_least else "NOT REACHED"
        )


class Results:
    """Milliseconds by method and case, and what else was found."""

    def __init__(self) -> None:
        self.ms: dict[tuple[str, Case], float] = {}
        self.extra_bytes: dict[Case, int] = {}
        self.launch_us: float | None = None
        self.copy_gb_per_s: float | None = None
        self.failures: list[str] = []  # of trak_fast
        self.missing: list[str] = []  # of what it is compared with

    def ratio(self, slower: tuple[str, Case], faster: tuple[str, Case]) -> float | None:
        """How many times as fast the second is, None if one is missing."""
        if slower not in self.ms or faster not in self.ms:
            return None
        return self.ms[slower] / self.ms[faster]

    def widest(self, kind: str, dtype: str, B: int) -> Case:
        """The case of k = 4096 with most columns, of those measured."""
        cases = [Case(kind, dtype, B, 4096, D) for D in (10**8, 10**7, 10**6)]
        return next((case for case in cases if (OURS, case) in self.ms), cases[0])

    def targets(self) -> list[Target]:
        found = []
        for B, least in ((256, 0.85), (128, 0.85), (64, 0.8), (32, 3.0), (16, 5.0), (8, 6.0)):
            case = self.widest("rademacher", "bf16", B)
            found.append(
                Target(f"rate / cuBLAS with P resident, B = {B}", least, self.ratio((CUBLAS, case), (OURS, case)))
            )
        for B, least in ((256, 0.5), (64, 0.5), (32, 0.5), (16, 0.8), (8, 0.8)):
            bf16, fp32 = (Case("rademacher", dtype, B, 4096, 10**7) for dtype in ("bf16", "fp32"))
            found.append(Target(f"fp32 'high' / bf16, B = {B}", least, self.ratio((OURS, bf16), (OURS, fp32))))
        for B, least in ((256, 0.5), (32, 0.25)):
            rademacher, normal = (Case(kind, "bf16", B, 4096, 10**7) for kind in ("rademacher", "normal"))
            found.append(Target(f"normal / rademacher, B = {B}", least, self.ratio((OURS, rademacher), (OURS, normal))))
        fp16 = Case("rademacher", "fp16", 32, 4096, 10**7)
        found.append(Target("rate / fast_jl, B = 32", 10, self.ratio((FAST_JL, fp16), (OURS, fp16))))
        found.append(
            Target("30 µs / launch overhead at D = 10^5", 1, None if self.launch_us is None else 30 / self.launch_us)
        )
        margins = [memory_bound(case) / max(extra, 1) for case, extra in self.extra_bytes.items()]
        found.append(Target("memory bound / extra memory", 1, min(margins, default=None)))
        return found

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"method": method, **case._asdict(), "ms": ms, "tflops": tflops(case, ms)}
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


def memory_bound(case: Case) -> int:
    """64 MiB and the partial sums of 8 splits; fp32 has two panel rows a sample, and tiles have eight at least."""
    return 64 * 2**20 + 8 * case.k * max(case.B * (2 if case.dtype == "fp32" else 1), 8) * 4


def tflops(case: Case, ms: float) -> float:
    return 2 * case.B * case.k * case.D / ms / 1e9


def table(results: Results) -> str:
    lines = [f"{'':40}{'ms':>10}{'TFLOP/s':>9}{'GB/s in':>9}  speed against"]
    for case in dict.fromkeys(priority_cases()):
        ms = results.ms.get((OURS, case))
        if ms is None:
            continue
        gigabytes = case.B * case.D * ELEMENT_BYTES[case.dtype] / ms / 1e6
        others = [(other, results.ratio((other, case), (OURS, case))) for other in (CUBLAS, CHUNKED, FAST_JL)]
        against = ", ".join(f"{other} {ratio:.2f}" for other, ratio in others if ratio is not None)
        name = f"{case.kind[:4]} {case.dtype} B={case.B} k={case.k} D=1e{len(str(case.D)) - 1} {case.kernel}"
        lines.append(f"{name:40}{ms:10.3f}{tflops(case, ms):9.1f}{gigabytes:9.1f}  {against}")
    lines.append("")
    for target in results.targets():
        measured = "" if target.measured is None else f"{target.measured:.2f}"
        lines.append(f"{target.what:44}{measured:>8} (at least {target.at_least:g})  {target.verdict}")
    return "\n".join(lines)


class Clock:
    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Gpu:
    """Measures on the current CUDA device; best: the kernel that cases take which name none."""

    def __init__(self, best: str = "", with_fast_jl: bool = False) -> None:
        self.best, self.with_fast_jl = best, with_fast_jl
        self.project = importlib.import_module("trak_fast").project
        properties = torch.cuda.get_device_properties(0)
        self.memory = properties.total_memory
        self.multiprocessors = properties.multi_processor_count
        self.flush = torch.empty(
            4 * max(getattr(properties, "L2_cache_size", 0), 32 << 20), dtype=torch.uint8, device="cuda"
        )
        self.pool = torch.empty(0)
        self.rates: dict[tuple[object, ...], float] = {}  # ms a column of the peers

    def gradients(self, case: Case) -> torch.Tensor:
        """Random (B, D), cut from one pool of its dtype."""
        if self.pool.dtype != DTYPES[case.dtype] or self.pool.numel() < case.B * case.D:
            self.pool = torch.empty(0)
            torch.cuda.empty_cache()
            self.pool = torch.empty(case.B * case.D, dtype=DTYPES[case.dtype], device="cuda")
            for part in self.pool.split(1 << 28):
                part.normal_()
        return self.pool[: case.B * case.D].view(case.B, case.D)

    def median_ms(self, call: Callable[[], object], seconds: float = 0.4) -> float:
        for _ in range(2):
            call()
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 3 or (len(times) < 30 and time.monotonic() - begin < seconds):
            self.flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return statistics.median(times)

    def fits(self, case: Case) -> bool:
        return case.B * case.D * ELEMENT_BYTES[case.dtype] < 0.7 * self.memory

    def works(self) -> bool:
        """Whether the device still answers: after a kernel's error, every call fails."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def ours(self, case: Case, results: Results) -> None:
        grads = self.gradients(case)
        os.environ["TRAK_FAST_CUDA_KERNEL"] = case.kernel or self.best
        options = {"proj_type": case.kind, "precision": "high" if case.dtype == "fp32" else None}
        self.project(grads, case.k, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = self.project(grads, case.k, **options)
        torch.cuda.synchronize()
        results.extra_bytes[case] = torch.cuda.max_memory_allocated() - before - y.numel() * 4
        results.ms[OURS, case] = self.median_ms(lambda: self.project(grads, case.k, **options))

    def peers(self, case: Case, results: Results) -> None:
        """In 16-bit floats: what a user would pick instead of fp32 for speed, too."""
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

    def cublas_ms(self, case: Case, dtype: torch.dtype, columns: int) -> float:
        """The better of P as (k, D) and as (D, k)."""
        grads = torch.randn(case.B, columns, device="cuda", dtype=dtype)
        P = torch.randint(0, 2, (columns * case.k,), device="cuda", dtype=torch.int8).mul_(2).sub_(1).to(dtype)
        as_rows, as_columns = P.view(case.k, columns).T, P.view(columns, case.k)
        return min(self.median_ms(lambda: grads @ as_rows), self.median_ms(lambda: grads @ as_columns))

    def chunks_ms(self, case: Case, dtype: torch.dtype, columns: int) -> float:
        """P made by torch's generator, some columns at a time."""
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
        fast_jl = importlib.import_module("fast_jl")
        width = max(w for w in (8, 16, 32) if case.B % w == 0)
        project = getattr(fast_jl, f"project_rademacher_{width}")
        grads = torch.randn(case.B, columns, device="cuda", dtype=dtype)
        return self.median_ms(lambda: project(grads, case.k, 0, self.multiprocessors))

    def launch_us(self) -> float:
        """Wall clock of a call on a small gradient, over many calls in a row."""
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
        source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median_ms(lambda: target.copy_(source)) / 1e6


class Imagined:
    """Stands in for a GPU in a dry run: times from a model, so that everything around them can be tried anywhere."""

    def fits(self, case: Case) -> bool:
        return case.B * case.D * ELEMENT_BYTES[case.dtype] < 100e9

    def works(self) -> bool:
        return True

    def ours(self, case: Case, results: Results) -> None:
        results.ms[OURS, case] = 0.01 + 2 * max(case.B, 16) * case.k * case.D / 600e9
        results.extra_bytes[case] = 32 << 20

    def peers(self, case: Case, results: Results) -> None:
        results.ms[CUBLAS, case] = max(2 * case.B * case.k * case.D / 650e9, 2 * case.k * case.D / 4e9)
        results.ms[CHUNKED, case] = 10 * results.ms[CUBLAS, case]

    def launch_us(self) -> float:
        return 20.0

    def copy_gb_per_s(self) -> float:
        return 4000.0


def expected_seconds(case: Case) -> float:
    """An upper bound of what a case takes: seven calls at a modest rate, and the peers."""
    return 7 * 2 * max(case.B, 32) * case.k * case.D / 200e12 + 3


def measure(
    gpu: Gpu | Imagined,
    cases: Iterable[Case],
    clock: Clock,
    kernels: list[str],
    results: Results,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Fills in results, case by case; what fails is noted and left out."""
    try:
        results.launch_us = gpu.launch_us()
        results.copy_gb_per_s = gpu.copy_gb_per_s()
    except RuntimeError as error:
        results.failures.append(f"small calls and copies: {error}")
        return
    left_out, saved = 0, time.monotonic()
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
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    if left_out:
        print(f"time is up: {left_out} rows are left out", flush=True)


def run(command: list[str], seconds: float, **environment: str) -> tuple[str, str]:
    """Whether a command passed within a time, and the end of its output. Its children end with it."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=ROOT,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    seconds = max(1, seconds)
    try:
        output, _ = process.communicate(timeout=seconds)
        verdict = "passed" if process.returncode == 0 else f"FAILED ({process.returncode})"
    except subprocess.TimeoutExpired:
        verdict = f"not finished in {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if verdict.startswith("not finished"):
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired as stuck:  # a process may outlive SIGKILL while a GPU hangs
            output = (stuck.stdout or b"").decode(errors="replace") if isinstance(stuck.stdout, bytes) else ""
    return verdict, output[-3000:]


def build(architecture: str, clock: Clock) -> tuple[str, str]:
    """As users do, by pip; where that is not possible (no setuptools, a read-only environment), by CMake alone."""
    settings = {"TRAK_FAST_CUDA": "ON", "TRAK_FAST_CUDA_ARCHITECTURES": architecture}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--disable-pip-version-check"]
    verdict, output = run([*command, "--no-build-isolation", "--no-deps", "-e", "."], 240, **settings)
    if verdict == "passed" or verdict.startswith("not finished"):
        return verdict, output
    print(f"pip install: {verdict}, so CMake builds\n{output[-1000:]}", flush=True)
    folder = str(ROOT / "build" / (sys.implementation.cache_tag or "python"))  # setup.py's
    (Path(folder) / "CMakeCache.txt").unlink(missing_ok=True)
    variables = {**settings, "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(ROOT / "trak_fast")}
    variables["Python_EXECUTABLE"] = sys.executable
    if (nvcc := find_tool("nvcc")) is not None:
        variables["CMAKE_CUDA_COMPILER"] = nvcc
    _, pybind11 = run([sys.executable, "-m", "pybind11", "--cmakedir"], 30)
    variables["pybind11_DIR"] = pybind11.strip()
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", folder, *(f"-D{k}={v}" for k, v in variables.items())]
    if shutil.which("cmake") is None:
        return "FAILED: cmake is not there", output
    verdict, output = run(configure, 60)
    return run(["cmake", "--build", folder], min(200, clock.left - 60)) if verdict == "passed" else (verdict, output)


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc, or in the usual folders."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(home) / "bin" for home in homes if home]
    found = (shutil.which(str(folder / name)) for folder in folders)
    return shutil.which(name) or next((tool for tool in found if tool), None)


def small_shapes(kernels: list[str]) -> None:
    """Each kernel against the processor on shapes that are small enough for compute-sanitizer.

    Inputs come from the processor and results go there, so that nearly all kernels that run are the project's.
    """
    trak_fast = importlib.import_module("trak_fast")
    adjoint, kernels = ADJOINT in kernels, [kernel for kernel in kernels if kernel != ADJOINT]

    def check(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, what: object) -> None:
        error = (y.cpu() - expected).abs().amax(dim=1) / x.float().norm(dim=1)
        assert error.max() < 1e-3, f"{what}: off by {error.max():.2g} of the norm"  # a lost column: some 2e-2

    torch.manual_seed(0)
    for kernel, kind, B, dtype in itertools.product(
        kernels, ("rademacher", "normal"), (3, 20, 140), (torch.bfloat16, torch.float32)
    ):
        os.environ["TRAK_FAST_CUDA_KERNEL"] = kernel
        x = torch.randn(B, 2100).to(dtype)
        y = trak_fast.project(x.cuda(), 300, proj_type=kind, offset=77)
        check(y, trak_fast.project(x, 300, proj_type=kind, offset=77), x, (kernel, kind, B, dtype))
    for kind, B in itertools.product(("rademacher", "normal"), (3, 20) if adjoint else ()):
        x = torch.randn(B, 300)
        y = trak_fast.project_adjoint(x.cuda(), 1100, proj_type=kind)
        check(y, trak_fast.project_adjoint(x, 1100, proj_type=kind), x, ("adjoint", kind, B))
    print("done")


class Checks:
    """What passed and what did not, printed as it is found."""

    def __init__(self) -> None:
        self.verdicts: dict[str, str] = {}

    def note(self, name: str, verdict: str, output: str) -> None:
        self.verdicts[name] = verdict
        print(f"{name}: {verdict}", flush=True)
        if not verdict.startswith("passed"):
            print(output, flush=True)

    @property
    def failed(self) -> bool:
        """Whether something went wrong; what is missing or had no time is not wrong."""
        return any(verdict.startswith(("FAILED", "not finished")) for verdict in self.verdicts.values())


def try_kernels(checks: Checks, clock: Clock, kernels: list[str]) -> list[str]:
    """The kernels that are right on small shapes: others would hang or spoil all that follows."""
    works = []
    for kernel in [*kernels, ADJOINT]:
        verdict, output = run([sys.executable, __file__, "--small", kernel], min(60, clock.left - 20))
        checks.note(f"{kernel} on small shapes", verdict, output)
        if verdict == "passed":
            works.append(kernel)
    return works


def check_correctness(checks: Checks, clock: Clock, minutes_for_measuring: float, kernels: list[str]) -> None:
    """Runs the gpu tests and the sanitizers while enough time is left to measure. kernels: as for small_shapes."""
    spare = clock.left - 60 * minutes_for_measuring
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        checks.note("gpu tests", f"{' and '.join(missing)} not there", "")
    elif spare < 10:
        checks.note("gpu tests", "no time left", "")
    else:
        # Warnings of another torch version are no errors here.
        pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "-m", "gpu", "-o", "filterwarnings="]
        pytest += ["--continue-on-collection-errors", "-p", "no:cacheprovider", *tests]
        broken = [name for name in (*KERNELS, ADJOINT) if name not in kernels]
        pytest += ["-k", " and ".join(f"not {name}" for name in broken)] if broken else []
        verdict, output = run(pytest, 0.6 * spare, TRAK_FAST_CUDA_KERNEL=kernels[0])
        summary = output.strip().splitlines()[-1] if output.strip() else ""
        if verdict == "passed":  # also when all were skipped, which the summary shows
            verdict = f"passed: {summary}" if " passed" in summary else f"FAILED: {summary}"
        checks.note("gpu tests", verdict, output)
    tool = find_tool("compute-sanitizer")
    for checker in ("memcheck", "racecheck", "synccheck", "initcheck"):
        spare = clock.left - 60 * minutes_for_measuring
        if tool is None:
            checks.note(checker, "compute-sanitizer is not there", "")
        elif spare < 10:
            checks.note(checker, "no time left", "")
        else:
            command = [tool, "--tool", checker, "--error-exitcode", "9", sys.executable, __file__, "--small", *kernels]
            verdict, output = run(command, min(60, spare), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            if verdict != "passed" and "Device not supported" in output:
                verdict = "compute-sanitizer does not support this device"
            checks.note(checker, verdict, output)


def prepare(
    options: argparse.Namespace, checks: Checks, results: Results, clock: Clock
) -> tuple[Gpu, list[str]] | None:
    """Builds and checks; the device to measure on and the kernels that work there, None if there are none."""
    major, minor = torch.cuda.get_device_capability(0)
    verdict, output = build("90a" if (major, minor) == (9, 0) else f"{major}{minor}", clock)
    checks.note("build", verdict, output)
    if verdict != "passed":
        return None
    print(f"{clock.left:.0f} s left", flush=True)
    try:
        devices = importlib.import_module("trak_fast").info()["cuda_devices"]
    except ImportError as error:
        checks.note("import", f"FAILED: {error}", "")
        return None
    if not devices:
        checks.note("devices", "FAILED: trak_fast finds none; is the driver older than nvcc?", "")
        return None
    works = try_kernels(checks, clock, devices[0]["kernels"])
    kernels = [kernel for kernel in works if kernel != ADJOINT]
    if not kernels:
        return None
    if not options.skip_checks:
        check_correctness(checks, clock, options.measure_minutes, works)
    if options.fast_jl:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
        seconds = min(150, clock.left - 120)
        verdict, output = run([*command, options.fast_jl], seconds, TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
        print(f"building fast_jl: {verdict}\n{'' if verdict == 'passed' else output}", flush=True)
    verdict, output = run([sys.executable, "-c", FAST_JL_TRIAL], 30)
    if verdict != "passed":
        last = output.strip().splitlines()[-1:] or [""]
        results.missing.append(f"fast_jl: {verdict} {last[0]}")
    importlib.invalidate_caches()
    return Gpu(kernels[0], with_fast_jl=verdict == "passed"), kernels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds, tests and measures trak_fast on this machine's GPU.")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything (default 8.5)")
    parser.add_argument("--measure-minutes", type=float, default=4, help="of these, kept for measuring (default 4)")
    parser.add_argument("--fast-jl", help="fast_jl's sdist, to build and to compare with")
    parser.add_argument("--skip-checks", action="store_true", help="build, try small shapes and measure, nothing else")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: imagined times, everything else as always")
    parser.add_argument("--small", nargs="+", metavar="KERNEL", help="only run small shapes with these kernels")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    if options.small:
        small_shapes(options.small)
        return 0
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device (--dry-run does without)")
    clock, checks, results = Clock(options.minutes), Checks(), Results()
    device = "imagined" if options.dry_run else torch.cuda.get_device_name(0)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat()
    results_folder = Path(tempfile.gettempdir()) if options.dry_run else ROOT / "benchmarks" / "results"
    folder = Path(os.environ.get("OUT") or results_folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in device).lower()
    path = folder / f"{date[:10]}-{name}.json"

    def save() -> None:
        head = {"date": date, "torch": torch.__version__, "device": device, "checks": checks.verdicts}
        path.write_text(json.dumps({**head, **results.as_json()}, indent=1))

    def finish() -> None:
        save()
        print(f"\nwritten to {path}\n{device}, torch {torch.__version__}")
        if results.copy_gb_per_s is not None and results.launch_us is not None:
            print(
                f"copy {results.copy_gb_per_s:.0f} GB/s (read and written), launch overhead {results.launch_us:.1f} µs"
            )
        for check, verdict in checks.verdicts.items():
            print(f"{check}: {verdict}")
        for line in [*(f"FAILED: {x}" for x in results.failures[:8]), *(f"missing: {x}" for x in results.missing[:8])]:
            print(line)
        print(table(results), flush=True)

    def give_up() -> None:
        results.failures.append("the device hangs, or a row took far longer than expected")
        finish()
        os._exit(3)

    # What the device is asked for cannot be interrupted, but the report can be written beside it.
    watchdog = threading.Timer(max(1.0, clock.left) + 15, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        prepared: tuple[Gpu | Imagined, list[str]] | None = (Imagined(), KERNELS)
        if not options.dry_run:
            prepared = prepare(options, checks, results, clock)
        if prepared is not None:
            measure(prepared[0], all_cases(), clock, prepared[1], results, save)
    finally:
        watchdog.cancel()
        finish()
    return 2 if checks.failed or results.failures or prepared is None else 0


if __name__ == "__main__":
    sys.exit(main())
