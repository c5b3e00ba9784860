"""Spends the time of a benchmark: on the cheapest measurements first, as far as it goes.

The seconds that a candidate will take at a shape are predicted from those that it took before, for each entry of the
matrix that is not 0, those of dense and sparse matrices apart. Quick measurements come before slow ones, and the slow
ones are left out when time is short.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .case import Case

ROUNDS_SECONDS = 0.3
"""Seconds reserved for timing one candidate at one shape. Time left at the end buys more rounds."""
CHECK_CALLS = 5
"""Calls of the projection in a check."""
CHECK_SECONDS = 0.8
"""Seconds of a check, beside those of its calls."""
MARGIN = 1.3
"""Safety factor on the predicted time of later measurements: the largest shapes are slower per entry than predicted."""
PATIENCE = 4.0
"""A measurement is stopped after this multiple of its predicted time."""
LEAST_LIMIT = 3.0
"""No measurement is stopped before this many seconds, since a busy machine may stall."""


class Measurement(NamedTuple):
    """A candidate to be measured at a shape.

    Attributes:
        name: The candidate's name.
        case: The shape.
        is_check: Checks the candidate's results if True, else times its calls.
    """

    name: str
    case: Case
    is_check: bool = False


class Budget:
    """Predictions of what measurements cost, and the choice of those that there is time for."""

    def __init__(self, seconds: float, count: int) -> None:
        """Starts without knowing anything of the candidates.

        Args:
            seconds: Seconds for everything.
            count: Number of measurements.
        """
        self.rounds_seconds = min(ROUNDS_SECONDS, seconds / (3 * max(1, count)))
        self.quick_seconds = seconds / max(1, count)  # an equal share; measurements that take longer wait
        self._least_limit = max(seconds / 30, LEAST_LIMIT)
        # by candidate, dense or not: entries of the largest matrix so far, seconds for each
        self._rates: dict[tuple[str, bool], tuple[int, float]] = {}

    def learn(self, name: str, entries: int, seconds: float, *, dense: bool = True) -> None:
        """Notes the seconds that a candidate with a matrix of that many entries took to be made and to project once."""
        largest, rate = self._rates.get((name, dense), (0, 0.0))
        if entries >= largest:
            self._rates[name, dense] = entries, seconds / entries
        else:  # other costs weigh more with a smaller matrix
            self._rates[name, dense] = largest, min(rate, seconds / entries)

    def cost(self, measurement: Measurement) -> float:
        """Predicts the seconds of a measurement, rounds aside."""
        _, rate = self._rates.get((measurement.name, measurement.case.dense), (0, 0.0))
        once = rate * measurement.case.matrix_entries
        return CHECK_SECONDS + CHECK_CALLS * once if measurement.is_check else once

    def limit(self, measurement: Measurement, left: float) -> float:
        """Returns the seconds after which a measurement is stopped, where `left` seconds are left for all."""
        return min(max(PATIENCE * self.cost(measurement), self._least_limit), max(left, 0.0) + self._least_limit)

    def overran(self, measurement: Measurement, limit: float) -> None:
        """Notes that a measurement took longer than its limit."""
        once = max(limit - CHECK_SECONDS, 0.0) / CHECK_CALLS if measurement.is_check else limit
        entries = measurement.case.matrix_entries
        self._rates[measurement.name, measurement.case.dense] = entries, once / entries

    def affordable(self, measurements: Collection[Measurement], left: float) -> set[Measurement]:
        """Chooses the cheapest measurements, as many as fit into the seconds left."""
        chosen = set()
        for measurement in sorted(measurements, key=self.cost):
            left -= self.cost(measurement) + (0.0 if measurement.is_check else self.rounds_seconds)
            if left < 0:
                break
            chosen.add(measurement)
        return chosen

    def rounds_share(self, begun: Collection[Measurement], others: Collection[Measurement], left: float) -> float:
        """Divides the seconds left among the rounds of timings.

        Args:
            begun: Timings whose first call is done.
            others: Measurements that follow.
            left: Seconds left for all.

        Returns:
            Seconds for the rounds of each timing.
        """
        timings = len(begun) + sum(not measurement.is_check for measurement in others)
        spare = left - MARGIN * sum(map(self.cost, others))
        return max(self.rounds_seconds, spare / max(1, timings))
