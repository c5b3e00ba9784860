"""Goes through the grid: one process for each candidate, rounds that are interleaved, a time budget, and resuming.

Results are a JSON object that is written after every case, so nothing that was measured is lost. Within a case all
candidates take their turns, again and again, so that a machine that slows down hurts all alike. Those that are slow at
a case (budget.py) have to wait until everything quick was measured in every case, and get what time is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..arguments import real
from ..features import memory
from ..store.files import atomic_file
from .budget import PATIENCE, Budget, Task
from .case import Case
from .environment import environment
from .figures import better, case_of, measured, summarize
from .process import TookTooLong, Worker, WorkerError
from .results import FORMAT, _now, _plain, load
from .settings import Settings

CANDIDATES = "trak_fast.bench.candidates"
ROUNDS = 7

REPEATS = 5
"""Calls of a candidate in a round, at most."""

OPEN_SECONDS = 120.0
"""For a library to be imported in, whatever the budget."""


MOST_SECONDS = 1e7
"""Seconds of the longest budget."""


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

        Raises:
            TypeError: `budget` is no number.
            ValueError: `budget` is out of range, or no candidate has a name that the settings ask for.
            OSError: The results cannot be written.
        """
        self.settings = settings
        self.path = path
        self.budget = real("budget", budget, 0.0, MOST_SECONDS, above=True)
        self.module = module
        self.candidates = {candidate.name: candidate for candidate in import_module(module).everything(settings.device)}
        self._wanted = chosen(self.candidates, settings.only)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._workers: dict[str, Worker] = {}
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
        self._start = self._deadline = time.monotonic()
        self._save()

    def run(self) -> dict[str, Any]:
        """Measures until all is done or the budget is used up.

        Returns:
            What the file holds.
        """
        try:
            self._look_around()
            total = self._set_out()
            self._deadline = time.monotonic() + self.budget
            in_turn = zip_longest(
                [("timings", case) for case in self.settings.cases()],
                [("checks", case) for case in self.settings.checks()],
            )
            turns = [turn for pair in in_turn for turn in pair if turn]
            with tqdm(total=total, initial=total - len(self._todo), desc="bench", disable=None) as bar:
                slowest = self._spending.quick_seconds
                while self._chosen():
                    for kind, case in turns:
                        chosen = self._chosen()
                        tasks = [task for task in self._todo if task in chosen and task[:2] == (kind, case)]
                        if tasks := [task for task in tasks if self._spending.cost(task) <= slowest]:
                            bar.set_postfix_str(f"{'time' if kind == 'timings' else 'check'} {describe(case)}")
                            (self._time if kind == "timings" else self._check)(tasks)
                            self._save()
                            bar.update(total - len(self._todo) - bar.n)
                    slowest = math.inf
            self._measure_ceilings()
            self.results["left"] = dict(Counter(task.name for task in self._todo))
            self.results["finished"] = not self.results["left"]
        finally:
            for worker in self._workers.values():
                worker.close()
            self._save()
        return self.results

    def _chosen(self) -> set[Task]:
        """What there is time for."""
        return self._spending.affordable(self._todo, self._left())

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
        cases = {case: i for i, case in enumerate([*self.settings.cases(), *self.settings.checks()])}
        names = {name: i for i, name in enumerate(self.candidates)}
        for kind in ("timings", "checks"):  # in the order of the grid, whatever had to wait
            self.results[kind].sort(key=lambda entry: (cases[case_of(entry)], names.get(entry["candidate"], 0)))
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.results, indent=1) + "\n")

    def _names(self) -> list[str]:
        """Candidates that are there and run."""
        return [name for name, facts in self.results["candidates"].items() if facts["status"] == "found"]

    def _look_around(self) -> None:
        """Which candidates there are, and what the machine does at best."""
        known: dict[str, dict[str, Any]] = {}
        opening = []
        for name in self._wanted:
            candidate = self.candidates[name]
            if self.settings.device not in candidate.devices:
                known[name] = {"status": "missing", "error": f"runs on {', '.join(candidate.devices)} only"}
            elif (reason := candidate.missing()) is not None:
                known[name] = {"status": "missing", "error": reason}
            else:
                known[name] = {}  # keeps the order
                self._workers[name] = Worker(self.module, candidate, self.settings)  # all begin to import now
                opening.append(name)
        for name in tqdm(opening, desc="looking for projections", leave=False, disable=None):
            try:
                known[name] = {"status": "found", **self._workers[name].ask("open", OPEN_SECONDS)}
            except WorkerError as error:
                known[name] = {"status": "failed", "error": str(error)}
        self.results["candidates"] = known
        self._measure_ceilings()
        self._save()

    def _set_out(self) -> int:
        """Lists what has no entry yet, gives one to what is not for a candidate, and returns how many there will be."""
        kinds = {"timings": self.settings.cases(), "checks": self.settings.checks()}
        tasks = [Task(kind, case, name) for kind in kinds for case in kinds[kind] for name in self._names()]
        done = {Task(kind, case_of(e), e["candidate"]) for kind in kinds for e in self.results[kind]}
        self._todo = dict.fromkeys(task for task in tasks if task not in done)
        # two keep a matrix at the same time, and all have gradients
        free = memory.free_bytes(torch.device(self.settings.device)) // 3
        for task in list(self._todo):
            if (reason := self.candidates[task.name].refusal(task.case, free)) is not None:
                self._enter(task, status="skipped", error=reason)
        self._spending = Budget(self.budget, len(self._todo))
        for name in self._names():
            facts = self.results["candidates"][name]
            self._spending.learn(name, facts["entries"], facts["seconds"])
        for entry in measured(self.results):
            self._learn(entry)
        return len(tasks)

    def _learn(self, entry: Mapping[str, Any]) -> None:
        """Takes note of what a first call took, where the matrix is most of it."""
        if (case := case_of(entry)).batch <= 32:
            seconds = entry["make_seconds"] + entry["first_seconds"]
            self._spending.learn(entry["candidate"], case.matrix_entries, seconds)

    def _measure_ceilings(self) -> None:
        """Measures what the machine does at best, at the start and at the end: the better counts for everything."""
        if self._names():
            found = self._worker(self._names()[0]).ask("ceilings", OPEN_SECONDS)
            self.results["ceilings"] = better(self.results["ceilings"], found)
            for entry in self.results["timings"]:
                if entry["status"] == "ok":
                    entry.update(summarize(entry, self.results["ceilings"]))

    def _worker(self, name: str) -> Worker:
        """A candidate's process, a new one with everything imported if the last is gone."""
        worker = self._workers[name]
        if not worker.alive:
            worker.close()
            start = time.monotonic()
            worker = self._workers[name] = Worker(self.module, self.candidates[name], self.settings)
            worker.ask("open", OPEN_SECONDS)
            self._deadline += time.monotonic() - start  # imports do not count
        return worker

    def _ask(self, op: str, task: Task) -> dict[str, Any] | None:
        """The answer to a task's request, or None; what failed is entered, what took too long may get another turn."""
        limit = self._spending.limit(task, self._left())
        try:
            return self._worker(task.name).ask(op, limit, **task.case.asdict())
        except TookTooLong:
            self._spending.overran(task, limit)
        except WorkerError as error:
            self._enter(task, status="failed", error=str(error))
        return None

    def _enter(self, task: Task, **content: Any) -> None:
        """Adds an entry to the results."""
        self.results[task.kind].append({"candidate": task.name, "case": task.case.asdict(), **content})
        del self._todo[task]

    def _time(self, tasks: Sequence[Task]) -> None:
        """Times candidates at a shape, in rounds of all of them."""
        entries: dict[Task, dict[str, Any]] = {}
        for task in tasks:
            if (first := self._ask("prepare", task)) is not None:
                entries[task] = {"dense": self.candidates[task.name].dense, **first, "rounds": []}
        share = self._spending.rounds_share(entries, self._chosen().difference(tasks), self._left())
        spent = dict.fromkeys(entries, 0.0)
        for _ in range(ROUNDS):
            for task in [task for task in entries if spent[task] + entries[task]["first_seconds"] <= share]:
                start, limit = time.monotonic(), 30.0 + PATIENCE * entries[task]["first_seconds"]
                try:
                    answer = self._workers[task.name].ask("time", limit, seconds=share / (2 * ROUNDS), repeats=REPEATS)
                except WorkerError as error:
                    del entries[task]
                    self._enter(task, status="failed", error=str(error))
                else:
                    spent[task] += time.monotonic() - start
                    entries[task]["rounds"].append(answer["seconds"])
        for task, found in entries.items():
            with contextlib.suppress(WorkerError):
                self._workers[task.name].ask("release", 20.0)
            found["warm"] = bool(found["rounds"])
            found["rounds"] = found["rounds"] or [[found["first_seconds"]]]  # a slow one: its only call
            self._enter(task, status="ok", error=None, **found)
            entry = self.results["timings"][-1]
            entry.update(summarize(entry, self.results["ceilings"]))
            self._learn(entry)

    def _check(self, tasks: Sequence[Task]) -> None:
        """Accuracy, distortion and repeatability at a shape, one candidate after the other."""
        for task in tasks:
            start = time.monotonic()
            if (found := self._ask("check", task)) is not None:
                self._enter(task, status="ok", error=None, seconds=round(time.monotonic() - start, 3), found=found)


def chosen(names: Collection[str], parts: Sequence[str]) -> list[str]:
    """Returns the names that have one of the parts in them, upper or lower case; all where there are no parts.

    Raises:
        ValueError: No name has.
    """
    found = [name for name in names if not parts or any(part.lower() in name.lower() for part in parts)]
    if not found:
        raise ValueError(
            f"only must be part of one of {', '.join(map(repr, names))}, not {' or '.join(map(repr, parts))}"
        )
    return found


def describe(case: Case) -> str:
    """A case in a few words."""
    return f"B={case.batch} D={case.grad_dim} k={case.proj_dim} {case.dtype} {case.proj_type}"
