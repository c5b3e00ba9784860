"""Goes through the grid: one process for each candidate, rounds that are interleaved, a time budget, and resuming.

Results are a JSON object that is written after every case, so nothing that was measured is lost. Within a case all
candidates take their turns, again and again, so that a machine that slows down hurts all alike.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import memory
from ..files import replacing
from .candidates import Case
from .environment import environment
from .figures import better, summarize
from .process import TookTooLong, Worker, WorkerError
from .settings import Settings

FORMAT = 1
CANDIDATES = "trak_fast.bench.candidates"
ROUNDS = 7
REPEATS = 5
"""Calls of a candidate in a round, at most."""
OPEN_SECONDS = 120.0
"""For a library to be imported in, whatever the budget."""


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


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
