"""Goes through the grid: one process for each candidate, rounds that are interleaved, a time budget, and resuming.

Results are a JSON object that is written after every case, so nothing that was measured is lost. Within a case all
candidates take their turns, again and again, so that a machine that slows down hurts all alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import memory, projection
from ..checks import kind_of
from ..files import replacing
from .candidates import Candidate, Case, dtype_of
from .figures import better, summarize

FORMAT = 1
CANDIDATES = "trak_fast.bench.candidates"
ROUNDS = 7
REPEATS = 5
"""Calls of a candidate in a round, at most."""
OPEN_SECONDS = 120.0
"""For a library to be imported in, whatever the budget."""


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        device: "cpu" or "cuda".
        batches: B to measure.
        grad_dims: D to measure.
        proj_dims: k to measure.
        dtypes: Of gradients to measure.
        proj_types: Kinds to measure.
        check_dims: D at which accuracy, distortion and repeatability are looked at.
        check_proj_dim: k for these.
        full: Whether to measure every combination; otherwise one thing is varied at a time, from the middle one of
            each (the first one for dtypes and kinds).
        only: Parts of names of candidates; empty: all.
        threads: Of the processor.
    """

    device: str
    batches: tuple[int, ...]
    grad_dims: tuple[int, ...]
    proj_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    proj_types: tuple[str, ...]
    check_dims: tuple[int, ...]
    check_proj_dim: int
    full: bool
    only: tuple[str, ...]
    threads: int

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A setting is out of its range.
        """
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {self.device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device")
        for name in ("batches", "grad_dims", "proj_dims", "check_dims"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be at least 1, not {min(getattr(self, name))}")
        for name in ("batches", "grad_dims", "proj_dims", "dtypes", "proj_types"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if min(self.check_proj_dim, self.threads) < 1:
            raise ValueError("check_proj_dim and threads must be at least 1")
        for kind in self.proj_types:
            kind_of(kind)
        for dtype in self.dtypes:
            if dtype not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"dtypes has {dtype}, allowed are float32, bfloat16, float16")
            dtype_of(dtype)

    def cases(self) -> list[Case]:
        """What to time, what matters most first."""
        axes = (self.batches, self.grad_dims, self.proj_dims, self.dtypes, self.proj_types)
        middle = [sorted(values)[len(values) // 2] for values in axes[:3]]
        base = [*middle, self.dtypes[0], self.proj_types[0]]
        points: dict[tuple[Any, ...], int] = {tuple(base): 0}
        for axis, values in enumerate(axes):
            for step, value in enumerate(values):
                points.setdefault(tuple([*base[:axis], value, *base[axis + 1 :]]), 1 + step)
        ordered = sorted(points, key=lambda point: points[point])  # an early end leaves something of each axis
        if self.full:
            for b in self.batches:
                for d in self.grad_dims:
                    for k in self.proj_dims:
                        ordered += [(b, d, k, dtype, kind) for dtype in self.dtypes for kind in self.proj_types]
        return [Case(*point, self.device) for point in dict.fromkeys(ordered)]  # type: ignore[arg-type, call-arg]

    def checks(self) -> list[Case]:
        """What to look closer at: every size and kind with the first dtype, the smallest size with the others."""
        return [
            Case(1, grad_dim, self.check_proj_dim, dtype, kind, self.device)
            for dtype in self.dtypes
            for kind in self.proj_types
            for grad_dim in (self.check_dims if dtype == self.dtypes[0] else sorted(self.check_dims)[:1])
        ]


def defaults(device: str | None = None) -> Settings:
    """What a run without arguments measures: in two to three minutes on two cores, or more on a GPU.

    Args:
        device: By default a CUDA device where there is one that trak_fast was built for.
    """
    if device is None:
        device = "cuda" if projection.info()["cuda_devices"] else "cpu"
    gpu = device == "cuda"
    return Settings(
        device=device,
        batches=(1, 8, 32, 128, 512) if gpu else (1, 8, 32, 64, 256),
        grad_dims=(1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
        if gpu
        else (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20),
        proj_dims=(1024, 4096, 16384) if gpu else (256, 1024, 4096),
        dtypes=("bfloat16", "float16", "float32") if gpu else ("float32", "bfloat16"),
        proj_types=("rademacher", "normal"),
        check_dims=(650, 7850, 50000),
        check_proj_dim=4096 if gpu else 512,
        full=False,
        only=(),
        threads=torch.get_num_threads(),
    )


class WorkerError(RuntimeError):
    """A measurement failed, or its process did."""


class TookTooLong(WorkerError):
    """There was no answer in time."""


class Worker:
    """The process of one candidate."""

    def __init__(self, module: str, candidate: Candidate, settings: Settings) -> None:
        environment = {**os.environ, **candidate.environment, "PYTHONUNBUFFERED": "1"}
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(settings.threads)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        command = [sys.executable, "-W", "ignore", "-m", "trak_fast.bench.worker"]
        self.process = subprocess.Popen(
            [*command, module, settings.device, candidate.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def ask(self, op: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: It failed or ended.
            TookTooLong: It took longer than `limit` seconds; it is ended then.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(self._ended()) from None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            raise TookTooLong(f"took longer than {limit:.0f} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    @property
    def alive(self) -> bool:
        """Whether the process is still there."""
        return self.process.poll() is None

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {self.process.poll()}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._errors.close()


class Run:
    """A benchmark, from wherever an interrupted one ended."""

    def __init__(self, settings: Settings, path: Path, budget: float, module: str = CANDIDATES) -> None:
        """Opens or begins the results.

        Args:
            settings: What to measure.
            path: The JSON file. One that an unfinished run with the same settings on the same machine left is gone on
                with; any other one is kept under a name with its date.
            budget: Seconds after which nothing new is begun, once all libraries are imported.
            module: Where candidates come from.
        """
        self.settings, self.path, self.budget, self.module = settings, path, budget, module
        self.candidates = {candidate.name: candidate for candidate in import_module(module).everything(settings.device)}
        self._workers: dict[str, Worker] = {}
        self._slowness: dict[str, float] = {}
        self.results = self._resumed() or {
            "format": FORMAT,
            "started": _now(),
            "finished": False,
            "left": {},
            "seconds": 0.0,
            "settings": _plain(asdict(settings)),
            "environment": environment(settings.device),
            "ceilings": None,
            "candidates": {},
            "timings": [],
            "checks": [],
        }
        self.resumed = bool(self.results["timings"] or self.results["checks"])
        self._spent_before = self.results["seconds"]
        self._start = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Measures until all is done or the budget is used up.

        Returns:
            What the file holds.
        """
        try:
            self._look_around()
            self._deadline = time.monotonic() + self.budget
            names = self._names()
            cases, checks = self.settings.cases(), self.settings.checks()
            total = len(cases) + len(checks)
            with tqdm(total=total, desc="bench", unit="case", disable=None) as bar:
                in_turn = zip_longest([(case, False) for case in cases], [(case, True) for case in checks])
                for i, (case, is_check) in enumerate(turn for pair in in_turn for turn in pair if turn):
                    left = self._left()
                    part = left / max(1, total - i)
                    bar.set_postfix_str(f"{'check' if is_check else 'time'} {describe(case)}", refresh=True)
                    if left > 0:
                        (self._check if is_check else self._time)(case, names, part)
                        self._save()
                    bar.update()
            self._measure_ceilings()
            self.results["left"] = self._unmeasured(names)
            self.results["finished"] = not self.results["left"]
        finally:
            for worker in self._workers.values():
                worker.close()
            self._save()
        return self.results

    def _unmeasured(self, names: Sequence[str]) -> dict[str, int]:
        """How many cases of each candidate the time was too short for."""
        left = {}
        for name in names:
            done = [e for kind in ("timings", "checks") for e in self.results[kind] if e["candidate"] == name]
            if count := len(self.settings.cases()) + len(self.settings.checks()) - len(done):
                left[name] = count
        return left

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _resumed(self) -> dict[str, Any] | None:
        """What an interrupted run left, if this is the same; what a finished or another one left is put aside."""
        if not self.path.exists():
            return None
        try:
            results = load(self.path)
        except ValueError:
            results = {}
        same = results.get("settings") == _plain(asdict(self.settings)) and results["environment"] == environment(
            self.settings.device
        )
        if same and not results["finished"]:
            return results
        stamp = re.sub(r"[^0-9T]", "-", results.get("started", "unreadable"))[:19]
        self.path.replace(self.path.with_name(f"{self.path.stem}-{stamp}{self.path.suffix}"))
        return None

    def _save(self) -> None:
        self.results["seconds"] = round(self._spent_before + time.monotonic() - self._start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.results, indent=1) + "\n")

    def _names(self) -> list[str]:
        """Candidates that are there and run."""
        return [name for name, facts in self.results["candidates"].items() if facts["status"] == "found"]

    def _look_around(self) -> None:
        """Which candidates there are, and what the machine does at best."""
        known = self.results["candidates"]
        wanted = [
            name
            for name in self.candidates
            if not self.settings.only or any(part.lower() in name.lower() for part in self.settings.only)
        ]
        if not wanted:
            raise ValueError(
                f"no candidate's name has {' or '.join(self.settings.only)} in it: {list(self.candidates)}"
            )
        opening = []
        for name in wanted:
            if name in known:
                continue
            candidate = self.candidates[name]
            if self.settings.device not in candidate.devices:
                known[name] = {"status": "missing", "error": f"runs on {', '.join(candidate.devices)} only"}
            elif (reason := candidate.missing()) is not None:
                known[name] = {"status": "missing", "error": reason}
            else:
                self._worker(name)  # all of them begin to import now
                opening.append(name)
        for name in tqdm(opening, desc="looking for projections", leave=False, disable=None):
            try:
                known[name] = {"status": "found", **self._worker(name).ask("open", OPEN_SECONDS)}
            except WorkerError as error:
                known[name] = {"status": "failed", "error": str(error)}
        self.results["candidates"] = {name: known[name] for name in wanted}
        self._measure_ceilings()
        self._save()

    def _measure_ceilings(self) -> None:
        """Measures what the machine does at best, at the start and at the end: the better counts for everything."""
        if self._names():
            found = self._worker(self._names()[0]).ask("ceilings", OPEN_SECONDS)
            self.results["ceilings"] = better(self.results["ceilings"], found)
            for entry in self.results["timings"]:
                if entry["status"] == "ok":
                    entry.update(summarize(entry, self.results["ceilings"]))

    def _worker(self, name: str) -> Worker:
        """A candidate's process, a new one if the last is gone."""
        worker = self._workers.get(name)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            worker = self._workers[name] = Worker(self.module, self.candidates[name], self.settings)
        return worker

    def _todo(self, kind: str, case: Case, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Candidates without an entry for a case, each with the start of one; those that can't do it get theirs."""
        done = {entry["candidate"] for entry in self.results[kind] if entry["case"] == case.asdict()}
        free = memory.free_bytes(torch.device(case.device)) // 3
        for name in names:
            if name in done:
                continue
            entry: dict[str, Any] = {"candidate": name, "case": case.asdict()}
            if (reason := self.candidates[name].refusal(case, free)) is not None:
                self.results[kind].append({**entry, "status": "skipped", "error": reason})
            else:
                yield name, entry

    def _limit(self, part: float) -> float:
        """Seconds that one candidate may take for a call, when there are `part` for a case."""
        return max(part / 2, self.budget / 30)

    def _too_slow(self, name: str, entries: float, limit: float) -> bool:
        """Whether what a candidate took before says that it needs more time than there is for this."""
        return self._slowness.get(name, 0.0) * entries > limit

    def _time(self, case: Case, names: Sequence[str], part: float) -> None:
        """Times a case, in rounds of all candidates."""
        begun = time.monotonic()
        entries: dict[str, dict[str, Any]] = {}
        spent: dict[str, float] = {}
        matrix = case.grad_dim * case.proj_dim
        for name, entry in self._todo("timings", case, names):
            if self._too_slow(name, matrix, self._limit(part)):
                continue  # left for a run with more time
            try:
                first = self._worker(name).ask("prepare", self._limit(part), **case.asdict())
            except TookTooLong:
                self._slowness[name] = self._limit(part) / matrix
                continue
            except WorkerError as error:
                self._failed("timings", entry, error)
                continue
            spent[name] = first["first_seconds"]
            if case.batch <= 32:  # what it needs for the matrix alone
                self._slowness[name] = (first["make_seconds"] + first["first_seconds"]) / matrix
            dense = self.candidates[name].dense
            entries[name] = {**entry, "status": "ok", "error": None, "dense": dense, **first, "rounds": []}
        left = part - (time.monotonic() - begun)
        allowance = max(left, part / 10) / max(1, len(entries))
        for _ in range(ROUNDS):
            for name in [name for name in entries if spent[name] < allowance]:
                start = time.monotonic()
                try:
                    answer = self._worker(name).ask(
                        "time", max(30.0, 4 * self._limit(part)), seconds=allowance / (2 * ROUNDS), repeats=REPEATS
                    )
                except WorkerError as error:
                    self._failed("timings", {key: entries.pop(name)[key] for key in ("candidate", "case")}, error)
                    continue
                spent[name] += time.monotonic() - start
                entries[name]["rounds"].append(answer["seconds"])
        for name, entry in entries.items():
            with contextlib.suppress(WorkerError):
                self._worker(name).ask("release", 20.0)
            entry["warm"] = bool(entry["rounds"])
            entry["rounds"] = entry["rounds"] or [[entry["first_seconds"]]]  # a slow one: its only call
            self.results["timings"].append({**entry, **summarize(entry, self.results["ceilings"])})

    def _check(self, case: Case, names: Sequence[str], part: float) -> None:
        """Accuracy, distortion and repeatability at a shape, one candidate after the other."""
        for name, entry in self._todo("checks", case, names):
            calls = 5  # at least
            if self._too_slow(name, case.grad_dim * case.proj_dim * calls, self._limit(part)):
                continue
            try:
                answer = self._worker(name).ask("check", 2 * self._limit(part), **case.asdict())
            except TookTooLong:
                continue
            except WorkerError as error:
                self._failed("checks", entry, error)
            else:
                self.results["checks"].append({**entry, "status": "ok", "error": None, "found": answer})

    def _failed(self, kind: str, entry: Mapping[str, Any], error: WorkerError) -> None:
        self.results[kind].append({**entry, "status": "failed", "error": str(error)})


def describe(case: Case) -> str:
    """A case in a few words."""
    return f"B={case.batch} D={case.grad_dim} k={case.proj_dim} {case.dtype} {case.proj_type}"


def load(path: Path) -> dict[str, Any]:
    """Results of a run.

    Raises:
        ValueError: The file holds none.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "timings" not in results:
        raise ValueError(f"{path} holds no results of trak-fast bench (format {FORMAT})")
    return results


def environment(device: str) -> dict[str, Any]:
    """All about the machine and its software that figures may depend on."""
    facts: dict[str, Any] = {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "trak_fast": projection.info(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "build": torch.__config__.show()},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("TRAK_FAST_", "OMP_", "MKL_", "KMP_", "TORCH_", "CUDA_", "NVIDIA_", "PYTORCH_"))
        },
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
