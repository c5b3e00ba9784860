"""Goes through the grid: one process for each candidate, rounds that are interleaved, a time budget, and resuming.

Results are written after every case, so nothing that was measured is lost. Within a case all candidates take their
turns, again and again, so that a machine that slows down hurts all alike. Candidates that are slow at a case
(budget.py) wait until everything quick was measured in every case, and get the time that is left.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from ..arguments import real
from ..features import memory
from .budget import PATIENCE, Budget, Measurement
from .case import DENSE_TYPES, Case
from .environment import environment
from .figures import better, summarize, with_floor
from .process import TookTooLong, Worker, WorkerError
from .results import Absent, Check, FirstCall, Omission, Present, Results, Timing, begin, load, save
from .settings import Settings
from .tables import case_text

CANDIDATES = "trak_fast.bench.candidates"
ROUNDS = 7
"""Rounds of a case."""
REPEATS = 5
"""Calls of a candidate in a round, at most."""
OPEN_SECONDS = 120.0
"""Seconds in which a library must be imported, whatever the budget."""
ROUND_SECONDS = 30.0
"""Seconds that a round may take beyond `PATIENCE` times the first call before it is given up."""
RELEASE_SECONDS = 20.0
"""Seconds in which a process must free its memory."""
MOST_SECONDS = 1e7
"""Seconds of the longest budget."""
LARGEST_BATCH = 32
"""Gradients of the largest call whose seconds tell something of the matrix; more of them cost more than it does."""

Answer = TypeVar("Answer")


class Run:
    """A benchmark, which goes on where an interrupted one ended."""

    def __init__(self, settings: Settings, path: Path, budget: float, module: str = CANDIDATES) -> None:
        """Opens or begins the results.

        Args:
            settings: The grid to measure.
            path: The JSON file. A run goes on with the file that an unfinished run with the same settings on the same
                machine left; any other one is kept under a name with its date.
            budget: Seconds after which no measurement begins, once all libraries are imported.
            module: The module whose `everything` lists the candidates.

        Raises:
            TypeError: `budget` is no number.
            ValueError: `budget` is out of range, or no candidate has a name that the settings ask for.
            OSError: The results cannot be written.
        """
        self.settings = settings
        self.path = path = path.expanduser()
        self.budget = real("budget", budget, 0.0, MOST_SECONDS, above=True)
        self.module = module
        self.candidates = {candidate.name: candidate for candidate in import_module(module).everything(settings.device)}
        self._wanted = chosen(self.candidates, settings.only)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results = self._resumed() or begin(settings)
        self.resumed = bool(self.results.timings or self.results.checks)
        self._workers: dict[str, Worker] = {}
        self._todo: dict[Measurement, None] = {}  # in the order of the grid
        self._spending = Budget(self.budget, 0)
        self._spent_before = self.results.seconds
        self._start = self._deadline = time.monotonic()
        self._save()

    def run(self) -> Results:
        """Measures until all is done or the budget is used up.

        Returns:
            The contents of the file.

        Raises:
            WorkerError: The machine's best rates cannot be measured.
            OSError: The results cannot be written.
        """
        try:
            self._open_candidates()
            total = self._list_measurements()
            self._deadline = time.monotonic() + self.budget
            with tqdm(total=total, initial=total - len(self._todo), desc="bench", disable=None) as bar:
                slowest = self._spending.quick_seconds
                while self._affordable():
                    for case, is_check in self._turns():
                        if measurements := self._due(case, is_check, slowest):
                            bar.set_postfix_str(f"{'check' if is_check else 'time'} {case_text(case)}")
                            if is_check:
                                self._check(measurements)
                            else:
                                self._time(measurements)
                            self._save()
                            bar.update(total - len(self._todo) - bar.n)
                    slowest = math.inf
            self._measure_ceilings()
            self.results.left = dict(Counter(measurement.name for measurement in self._todo))
            self.results.finished = not self.results.left
        finally:
            for worker in self._workers.values():
                worker.close()
            self._save()
        return self.results

    def _turns(self) -> list[tuple[Case, bool]]:
        """Orders the grid: a case to time, a case to check, and so on."""
        turns: list[tuple[Case, bool]] = []
        for timed, checked in zip_longest(self.settings.cases(), self.settings.checks()):
            turns += [(timed, False)] if timed else []
            turns += [(checked, True)] if checked else []
        return turns

    def _due(self, case: Case, is_check: bool, slowest: float) -> list[Measurement]:
        """Lists the measurements of a case that there is time for and that take no more than `slowest` seconds."""
        affordable = self._affordable()
        return [
            measurement
            for measurement in self._todo
            if measurement in affordable
            and (measurement.case, measurement.is_check) == (case, is_check)
            and self._spending.cost(measurement) <= slowest
        ]

    def _affordable(self) -> set[Measurement]:
        """Chooses the measurements that there is time for."""
        return self._spending.affordable(self._todo, self._left())

    def _left(self) -> float:
        """Returns the seconds until the deadline."""
        return self._deadline - time.monotonic()

    def _resumed(self) -> Results | None:
        """Loads the results of an interrupted run of the same; puts those of a finished or another run aside."""
        if not self.path.exists():
            return None
        started = "unreadable"
        with contextlib.suppress(ValueError):
            results = load(self.path)
            same = results.settings == self.settings and results.environment == environment(self.settings.device)
            if same and not results.finished:
                return results
            started = results.started
        stamp = re.sub(r"[^0-9T]", "-", started)[:19]
        self.path.replace(self.path.with_name(f"{self.path.stem}-{stamp}{self.path.suffix}"))
        return None

    def _save(self) -> None:
        """Writes the results, in the order of the grid, whatever had to wait."""
        self.results.seconds = round(self._spent_before + time.monotonic() - self._start, 1)
        cases = {case: i for i, case in enumerate([*self.settings.cases(), *self.settings.checks()])}
        names = {name: i for i, name in enumerate(self.candidates)}

        def place(entry: Timing | Check | Omission) -> tuple[int, int]:
            return cases[entry.case], names.get(entry.candidate, 0)

        self.results.timings.sort(key=place)
        self.results.checks.sort(key=place)
        save(self.path, self.results)

    def _open_candidates(self) -> None:
        """Finds out which candidates run here, and measures the machine's best rates."""
        absent: dict[str, Absent] = {}
        for name in self._wanted:
            candidate = self.candidates[name]
            if self.settings.device not in candidate.devices:
                absent[name] = Absent("missing", f"runs on {', '.join(candidate.devices)} only")
            elif (reason := candidate.missing()) is not None:
                absent[name] = Absent("missing", reason)
            else:
                self._workers[name] = Worker(self.module, candidate, self.settings)  # all begin to import now
        opened: dict[str, Present | Absent] = {}
        for name, worker in tqdm(self._workers.items(), desc="looking for projections", leave=False, disable=None):
            try:
                opened[name] = worker.open(OPEN_SECONDS)
            except WorkerError as error:
                opened[name] = Absent("failed", str(error))
        self.results.candidates = {name: absent.get(name) or opened[name] for name in self._wanted}
        self._measure_ceilings()
        self._save()

    def _list_measurements(self) -> int:
        """Lists the measurements that have no entry yet, and enters those that are not for their candidate.

        Returns:
            The number of measurements of the whole grid.
        """
        measurements = [
            Measurement(name, case, is_check)
            for is_check, cases in ((False, self.settings.cases()), (True, self.settings.checks()))
            for case in cases
            for name in self.results.present
        ]
        done = {Measurement(entry.candidate, entry.case, False) for entry in self.results.timings}
        done |= {Measurement(entry.candidate, entry.case, True) for entry in self.results.checks}
        self._todo = dict.fromkeys(measurement for measurement in measurements if measurement not in done)
        # two keep a matrix at the same time, and all have gradients
        free = memory.free_bytes(torch.device(self.settings.device)) // 3
        for measurement in list(self._todo):
            reason = self.candidates[measurement.name].refusal(measurement.case, free)
            if reason is not None:
                self._omit(measurement, "skipped", reason)
        self._spending = Budget(self.budget, len(self._todo))
        for name, facts in self.results.present.items():
            dense = self.candidates[name].proj_types[0] in DENSE_TYPES  # the kind that it was tried with
            self._spending.learn(name, facts.entries, facts.seconds, dense=dense)
        for timing in self.results.measured:
            self._learn(timing)
        return len(measurements)

    def _learn(self, timing: Timing) -> None:
        """Notes the seconds of a first call, if the matrix is most of them."""
        if timing.case.batch <= LARGEST_BATCH:
            seconds = timing.make_seconds + timing.first_seconds
            case = timing.case
            self._spending.learn(timing.candidate, case.matrix_entries, seconds, dense=case.dense)

    def _measure_ceilings(self) -> None:
        """Measures the machine's best rates, at the start and at the end: the better count for everything."""
        for name in list(self.results.present)[:1]:
            ceilings = better(self.results.ceilings, self._worker(name).ceilings(OPEN_SECONDS))
            self.results.ceilings = ceilings
            self.results.timings = [
                with_floor(entry, ceilings) if isinstance(entry, Timing) else entry for entry in self.results.timings
            ]

    def _worker(self, name: str) -> Worker:
        """Returns a candidate's process: a new one with everything imported if the last is gone."""
        worker = self._workers[name]
        if not worker.alive:
            worker.close()
            start = time.monotonic()
            worker = self._workers[name] = Worker(self.module, self.candidates[name], self.settings)
            worker.open(OPEN_SECONDS)
            self._deadline += time.monotonic() - start  # imports do not count
        return worker

    def _ask(self, measurement: Measurement, request: Callable[[Worker, Case, float], Answer]) -> Answer | None:
        """Sends a measurement's request to its worker.

        Returns:
            The answer, or None: a measurement that failed is entered, one that took too long may get another turn.
        """
        limit = self._spending.limit(measurement, self._left())
        try:
            return request(self._worker(measurement.name), measurement.case, limit)
        except TookTooLong:
            self._spending.overran(measurement, limit)
        except WorkerError as error:
            self._omit(measurement, "failed", str(error))
        return None

    def _record(self, measurement: Measurement, entry: Timing | Check | Omission) -> None:
        """Adds an entry to the results."""
        entries: list[Timing | Omission] | list[Check | Omission]
        entries = self.results.checks if measurement.is_check else self.results.timings
        entries.append(entry)  # type: ignore[arg-type]
        del self._todo[measurement]

    def _omit(self, measurement: Measurement, status: str, error: str) -> None:
        """Adds the reason why a measurement has no figures to the results."""
        self._record(measurement, Omission(measurement.name, measurement.case, status, error))

    def _time(self, measurements: Sequence[Measurement]) -> None:
        """Times candidates at a shape, in rounds of all of them."""
        first: dict[Measurement, FirstCall] = {}
        for measurement in measurements:
            if (answer := self._ask(measurement, Worker.prepare)) is not None:
                first[measurement] = answer
        share = self._spending.rounds_share(first, self._affordable().difference(measurements), self._left())
        rounds: dict[Measurement, list[list[float]]] = {measurement: [] for measurement in first}
        spent = dict.fromkeys(first, 0.0)
        for _ in range(ROUNDS):
            for measurement in list(rounds):
                first_seconds = first[measurement].first_seconds
                if spent[measurement] + first_seconds > share:
                    continue
                start = time.monotonic()
                limit = ROUND_SECONDS + PATIENCE * first_seconds
                try:
                    seconds = self._workers[measurement.name].time(share / (2 * ROUNDS), REPEATS, limit)
                except WorkerError as error:
                    del rounds[measurement]
                    self._omit(measurement, "failed", str(error))
                else:
                    spent[measurement] += time.monotonic() - start
                    rounds[measurement].append(seconds)
        for measurement, seconds_of_rounds in rounds.items():
            with contextlib.suppress(WorkerError):
                self._workers[measurement.name].release(RELEASE_SECONDS)
            timing = summarize(
                measurement.name,
                measurement.case,
                first[measurement],
                seconds_of_rounds,
                self.results.ceilings,
            )
            self._record(measurement, timing)
            self._learn(timing)

    def _check(self, measurements: Sequence[Measurement]) -> None:
        """Checks accuracy, distortion and repeatability at a shape, one candidate after the other."""
        for measurement in measurements:
            start = time.monotonic()
            if (found := self._ask(measurement, Worker.check)) is not None:
                seconds = round(time.monotonic() - start, 3)
                self._record(measurement, Check(measurement.name, measurement.case, seconds, found))


def chosen(names: Collection[str], parts: Sequence[str]) -> list[str]:
    """Chooses the names that have one of the parts in them, upper or lower case; all where there are no parts.

    Raises:
        ValueError: A part is in no name.
    """
    if unknown := [part for part in parts if not any(part.lower() in name.lower() for name in names)]:
        known = ", ".join(map(repr, names))
        raise ValueError(f"only must be part of one of {known}, not {' or '.join(map(repr, unknown))}")
    return [name for name in names if not parts or any(part.lower() in name.lower() for part in parts)]
