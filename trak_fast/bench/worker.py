"""Measures one candidate, in a process of its own: requests come as lines of JSON, and answers go back so.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import quality
from .candidates import Candidate, Project, gradients
from .case import Case


class Session:
    """What a candidate has on its hands."""

    def __init__(self, candidate: Candidate, device: str) -> None:
        self.candidate, self.device = candidate, device
        self.project: Project | None = None
        self.grads: Tensor | None = None
        self._flush: Tensor | None = None

    def open(self) -> dict[str, Any]:
        """Imports the library and runs it on something small.

        Returns:
            The library's version, the number of the matrix's entries, and the least seconds of three times after one.
        """
        size = 500_000 if self.device == "cuda" else 5000  # launches alone would predict nothing
        case = Case(8, size, 512, self.candidate.dtypes[0], self.candidate.kinds[0], self.device)
        grads, times = gradients(case), []
        for _ in range(4):
            start = time.perf_counter()
            self.candidate.make(case)(grads)
            self._wait()
            times.append(time.perf_counter() - start)
        return {"version": version(self.candidate), "entries": case.matrix_entries, "seconds": min(times[1:])}

    def prepare(self, **shape: Any) -> dict[str, Any]:
        """Makes the gradients and the projection, and projects once.

        Returns:
            seconds of making and of the first call, and bytes of memory above the gradients and the result.
        """
        self.release()
        case = Case(**shape)
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
        return {
            "make_seconds": made - start,
            "first_seconds": done - made,
            "memory_bytes": None if peak is None else max(0, peak - size),
        }

    def time(self, seconds: float, repeats: int) -> dict[str, Any]:
        """Seconds of calls, one after the other with caches flushed, until a time or a number is reached."""
        assert self.project is not None
        assert self.grads is not None
        times: list[float] = []
        start = time.perf_counter()
        while not times or (len(times) < repeats and time.perf_counter() - start < seconds):
            self.flush()
            times.append(self._once(lambda: self.project(self.grads)))  # type: ignore[misc,arg-type]
        return {"seconds": times}

    def check(self, **shape: Any) -> dict[str, Any]:
        """Accuracy, distortion and repeatability; see `quality.check`."""
        self.release()
        return quality.check(self.candidate, Case(**shape))

    def ceilings(self) -> dict[str, Any]:
        """What this machine does at best; see `ceilings`."""
        try:
            return ceilings(self.device, self._once)
        finally:
            self.release()

    def release(self) -> dict[str, Any]:
        """Frees all that `prepare` made, for the other processes too.

        Raises:
            RuntimeError: The CUDA device does not answer this process any more; only a new one can go on.
        """
        self.project = self.grads = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return {}

    def flush(self) -> None:
        """Empties the caches of what the last call left there.

        On a GPU it goes on while the next call is launched, so that the host's part of a call is not measured.
        """
        if self._flush is None:
            size = max(2 * cache_bytes(self.device), (1 << 28) if self.device == "cuda" else 0)  # at 3 TB/s 0.2 ms
            self._flush = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._flush.add_(1)

    def _once(self, call: Callable[[], object]) -> float:
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
        if self.device == "cuda":
            torch.cuda.synchronize()


def version(candidate: Candidate) -> str:
    """A library's version, as its package or else its module says."""
    for package in (*candidate.package.split(), candidate.module):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return str(getattr(importlib.import_module(candidate.module), "__version__", "?"))


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory."""
    if device == "cuda":
        return max(32 << 20, int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)))
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0) if text[-1] in "KM" else int(text))
    return min(max(sizes) or 32 << 20, 512 << 20)


class PeakMemory:
    """The highest memory use from here on, above that of now."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what is taken next
        self.before = _status("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back

    def bytes(self) -> int | None:
        """The difference; None where the system doesn't tell."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        peak = _status("VmHWM")
        return peak - self.before if peak and self.before else None


def _status(field: str) -> int:
    try:
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return 0


def ceilings(device: str, once: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """Copy bandwidth, and the rate of torch's product for each dtype.

    Returns:
        `copy_bytes_per_second`: read and written, of 256 MiB (1 GiB on a GPU); `flop_per_second`: by dtype, of a
        square product, the best of several sizes.
    """
    size = (1 << 30) if device == "cuda" else (1 << 28)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    copy = _quick(lambda: target.copy_(source), once)
    rates = {}
    for name in ("float32", "bfloat16", "float16", "float64"):
        rates[name], side = 0.0, 256
        while side <= 8192:  # larger ones as long as they are quick
            a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
            seconds = _quick(lambda a=a, b=b: a @ b, once)  # type: ignore[misc]
            rates[name] = max(rates[name], 2 * side**3 / seconds)
            if side >= 512 and seconds > (0.002 if device == "cuda" else 0.02):
                break
            side *= 2
    return {"copy_bytes_per_second": 2 * size / copy, "flop_per_second": rates}


def _quick(call: Callable[[], object], once: Callable[[Callable[[], object]], float]) -> float:
    """The lower quartile of a call's seconds: what is possible, rather than what is usual, without a clock's slips."""
    once(call)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - start < 0.15):
        times.append(once(call))
    return statistics.quantiles(times, n=4)[0]


def serve(session: Session, requests: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers requests until there are no more: {"op": a method of Session, ...its arguments}."""
    for line in requests:
        request = json.loads(line)
        try:
            content = {"result": getattr(session, request.pop("op"))(**request)}
        except Exception as error:  # of a library that we know nothing of
            content = {"error": f"{type(error).__name__}: {error}".strip()}
        try:
            if "error" in content:
                session.release()  # here, as an exception holds on to what its functions made
        finally:
            answer(content)


def main() -> None:
    """The process."""
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
