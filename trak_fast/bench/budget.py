"""What a benchmark's time is spent on: the cheapest measurements first, as far as it goes.

What a candidate will take at a shape is predicted from what it took before, for each entry of the matrix. What is quick
is measured before what is slow, and the slow ones go without when time is short.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .case import Case

ROUNDS_SECONDS = 0.3
"""Of a candidate's rounds at a shape, for which time is kept; what is over at the end goes to rounds too."""
CHECK_CALLS = 5
CHECK_SECONDS = 0.8
"""Of looking at results, beside the calls."""
MARGIN = 1.3
"""Times as long as predicted that what follows may take before rounds have cost it its place: the largest shapes take
longer for each entry than those that predictions come from."""
PATIENCE = 4.0
"""Times as long as predicted that something may take, but in any case:"""
LEAST_LIMIT = 3.0
"""Seconds, as a busy machine may be slow for a moment."""


class Task(NamedTuple):
    """One candidate at one shape: an entry of the results' `timings` or `checks`, as `kind` says."""

    kind: str
    case: Case
    name: str


class Budget:
    """Predicts and chooses."""

    def __init__(self, seconds: float, tasks: int) -> None:
        """Starts without knowing anything of the candidates.

        Args:
            seconds: For everything.
            tasks: How many there are.
        """
        self.rounds_seconds = min(ROUNDS_SECONDS, seconds / (3 * max(1, tasks)))
        self.quick_seconds = seconds / max(1, tasks)  # an equal share; what takes longer waits
        self._least_limit = max(seconds / 30, LEAST_LIMIT)
        self._rates: dict[str, tuple[int, float]] = {}  # entries of the largest matrix so far, seconds for each

    def learn(self, name: str, entries: int, seconds: float) -> None:
        """Takes note of what a candidate with a matrix of that many entries took to be made and to project once."""
        largest, rate = self._rates.get(name, (0, 0.0))
        if entries >= largest:
            self._rates[name] = entries, seconds / entries
        else:  # what else it takes weighs more there
            self._rates[name] = largest, min(rate, seconds / entries)

    def cost(self, task: Task) -> float:
        """Seconds that a task takes, rounds aside."""
        _, rate = self._rates.get(task.name, (0, 0.0))
        once = rate * task.case.matrix_entries
        return once if task.kind == "timings" else CHECK_SECONDS + CHECK_CALLS * once

    def limit(self, task: Task, left: float) -> float:
        """Seconds after which a task is given up; `left` are those left for all."""
        return min(max(PATIENCE * self.cost(task), self._least_limit), max(left, 0.0) + self._least_limit)

    def overran(self, task: Task, limit: float) -> None:
        """Takes note of what took longer than its limit."""
        calls, other = (1, 0.0) if task.kind == "timings" else (CHECK_CALLS, CHECK_SECONDS)
        entries = task.case.matrix_entries
        self._rates[task.name] = entries, max(limit - other, 0.0) / calls / entries

    def affordable(self, tasks: Collection[Task], left: float) -> set[Task]:
        """Those tasks, the cheapest first, that take no more than the seconds left."""
        chosen = set()
        for task in sorted(tasks, key=self.cost):
            left -= self.cost(task) + (self.rounds_seconds if task.kind == "timings" else 0.0)
            if left < 0:
                break
            chosen.add(task)
        return chosen

    def rounds_share(self, begun: Collection[Task], others: Collection[Task], left: float) -> float:
        """Seconds for the rounds of each timing, of those begun and of others that follow, out of the seconds left."""
        timings = len(begun) + sum(task.kind == "timings" for task in others)
        spare = left - MARGIN * sum(map(self.cost, others))
        return max(self.rounds_seconds, spare / max(1, timings))
