"""Measures one candidate in a process of its own, which reads requests and writes answers as lines of JSON.

`python -m trak_fast.bench.worker MODULE DEVICE NAME` looks the candidate up in MODULE's `everything(DEVICE)`. A process
stays alive between requests, so that the runner can go round all candidates again and again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import quality
from .candidates import Candidate, Project, gradients
from .case import Case
from .results import Ceilings, FirstCall, Present, Quality


class Session:
    """State of one worker: its candidate, the current gradients and the projection being timed.

    Each public method but `flush` answers a request of its name.
    """

    def __init__(self, candidate: Candidate, device: str) -> None:
        self.candidate = candidate
        self.device = device
        self.project: Project | None = None
        self.grads: Tensor | None = None
        self._flush: Tensor | None = None

    def open(self) -> Present:
        """Imports the library and runs it on something small: the least seconds of three times after one count."""
        size = 500_000 if self.device == "cuda" else 5000  # launches alone would predict nothing
        case = Case(8, size, 512, self.candidate.dtypes[0], self.candidate.proj_types[0], self.device)
        grads = gradients(case)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            self.candidate.make(case)(grads)
            self._wait()
            times.append(time.perf_counter() - start)
        return Present(version=version(self.candidate), entries=case.matrix_entries, seconds=min(times[1:]))

    def prepare(self, case: Case) -> FirstCall:
        """Makes the gradients and the projection, and projects once."""
        self.release()
        self.grads = gradients(case)
        memory = PeakMemory(self.device)
        start = time.perf_counter()
        self.project = self.candidate.make(case)
        self._wait()
        made = time.perf_counter()
        result = self.project(self.grads)
        self._wait()
        done = time.perf_counter()
        peak = memory.bytes()
        size = result.numel() * result.element_size()
        return FirstCall(
            make_seconds=made - start,
            first_seconds=done - made,
            memory_bytes=None if peak is None else max(0, peak - size),
        )

    def time(self, seconds: float, repeats: int) -> list[float]:
        """Times calls, one after the other with caches flushed, until either limit is reached.

        Args:
            seconds: Seconds after which no call begins.
            repeats: Number of calls at most.

        Returns:
            Seconds of each call, at least one.
        """
        assert self.project is not None
        assert self.grads is not None
        times: list[float] = []
        start = time.perf_counter()
        while not times or (len(times) < repeats and time.perf_counter() - start < seconds):
            self.flush()
            times.append(self._once(lambda: self.project(self.grads)))  # type: ignore[misc,arg-type]
        return times

    def check(self, case: Case) -> Quality:
        """Checks accuracy, distortion and repeatability; see `quality.check`."""
        self.release()
        return quality.check(self.candidate, case)

    def ceilings(self) -> Ceilings:
        """Measures this machine's best rates; see `ceilings`."""
        try:
            return ceilings(self.device, self._once)
        finally:
            self.release()

    def release(self) -> None:
        """Frees all that `prepare` made, for the other processes too.

        Raises:
            RuntimeError: The CUDA device does not answer this process any more; only a new one can go on.
        """
        self.project = self.grads = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def flush(self) -> None:
        """Empties the caches of the last call's data.

        On a GPU this goes on while the next call is launched, so that the host's part of a call is not measured.
        """
        if self._flush is None:
            size = max(2 * cache_bytes(self.device), (1 << 28) if self.device == "cuda" else 0)  # at 3 TB/s 0.2 ms
            self._flush = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._flush.add_(1)

    def _once(self, call: Callable[[], object]) -> float:
        """Times one call in seconds."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _wait(self) -> None:
        """Waits until a GPU has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def version(candidate: Candidate) -> str:
    """Looks up a library's version, in its package or else its module."""
    for package in (*candidate.package.split(), candidate.module):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return str(getattr(importlib.import_module(candidate.module), "__version__", "?"))


def cache_bytes(device: str) -> int:
    """Returns the size of the last cache before memory."""
    if device == "cuda":
        return max(32 << 20, torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0) if text[-1] in "KM" else int(text))
    return min(max(sizes) or 32 << 20, 512 << 20)


class PeakMemory:
    """The highest memory use of this process, above that at the start."""

    def __init__(self, device: str) -> None:
        """Starts to watch memory of "cpu" or "cuda"."""
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide the next use
        self.before = _status("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back

    def bytes(self) -> int | None:
        """Returns the highest use so far, above that at the start; None where the system does not tell."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        peak = _status("VmHWM")
        return peak - self.before if peak and self.before else None


def _status(field: str) -> int:
    """Reads a size in bytes from the system's facts about this process; 0 where there are none."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return 0


def ceilings(device: str, timed: Callable[[Callable[[], object]], float]) -> Ceilings:
    """Measures the bandwidth of a copy, and the rate of torch's product for each dtype.

    The copy is of 256 MiB (1 GiB on a GPU); products are of square matrices, and the best of several sizes counts.

    Args:
        device: "cpu" or "cuda".
        timed: Returns the seconds of one call.
    """
    size = (1 << 30) if device == "cuda" else (1 << 28)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    copy = _quick(lambda: target.copy_(source), timed)
    rates = {}
    for name in ("float32", "bfloat16", "float16", "float64"):
        rates[name] = 0.0
        side = 256
        while side <= 8192:  # larger ones as long as they are quick
            a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
            seconds = _quick(lambda a=a, b=b: a @ b, timed)  # type: ignore[misc]
            rates[name] = max(rates[name], 2 * side**3 / seconds)
            if side >= 512 and seconds > (0.002 if device == "cuda" else 0.02):
                break
            side *= 2
    return Ceilings(copy_bytes_per_second=2 * size / copy, flop_per_second=rates)


def _quick(call: Callable[[], object], timed: Callable[[Callable[[], object]], float]) -> float:
    """Returns the lower quartile of a call's seconds: the possible rather than the usual, without a clock's slips."""
    timed(call)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - start < 0.15):
        times.append(timed(call))
    return statistics.quantiles(times, n=4)[0]


def serve(session: Session, requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers requests until there are no more.

    Args:
        session: The candidate's state.
        requests: Lines of JSON: {"op": a method of Session, ...its arguments}.
        answer: Sends {"result": the method's} or {"error": text}.
    """
    for line in requests:
        request = json.loads(line)
        if "case" in request:
            request["case"] = Case(**request["case"])
        try:
            result = getattr(session, request.pop("op"))(**request)
            content = {
                "result": asdict(result) if isinstance(result, (Ceilings, FirstCall, Present, Quality)) else result
            }
        except Exception as error:  # any, as a library that we do not know may raise it
            content = {"error": f"{type(error).__name__}: {error}".strip()}
        try:
            if "error" in content:
                session.release()  # here, as an exception holds on to objects of the functions that it left
        finally:
            answer(content)


def main() -> None:
    """Runs the process."""
    module, device, name = sys.argv[1:]
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout

    def answer(content: dict[str, Any]) -> None:
        channel.write(json.dumps(content) + "\n")
        channel.flush()

    everything = importlib.import_module(module).everything
    candidate = next(candidate for candidate in everything(device) if candidate.name == name)
    serve(Session(candidate, device), sys.stdin, answer)


if __name__ == "__main__":
    main()
