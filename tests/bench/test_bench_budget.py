"""What a benchmark spends its time on, with a clock of its own and candidates that take what they are said to take."""

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from trak_fast.bench import runner, settings
from trak_fast.bench.budget import Budget, Task
from trak_fast.bench.candidates import Candidate
from trak_fast.bench.case import Case
from trak_fast.bench.process import TookTooLong

SECONDS_PER_ENTRY = {"fast": 1e-11, "usual": 1e-9, "slow": 1e-8, "slower": 4e-8, "liar": 3e-7}
SETTINGS = dataclasses.replace(settings.defaults("cpu"), dtypes=("float32",), threads=1)


def unused(case: Case) -> Callable[[Tensor], Tensor]:
    raise AssertionError(case)


class Simulated:
    """A worker whose calls take what the table says; "liar" is quick at the shape that it is opened with."""

    now = 0.0

    def __init__(self, module: str, candidate: Candidate, settings: settings.Settings) -> None:
        self.name, self.alive, self.once = candidate.name, True, 0.0

    def ask(self, op: str, limit: float, **arguments: Any) -> dict[str, Any]:
        if op == "open":
            rate = 1e-9 if self.name == "liar" else SECONDS_PER_ENTRY[self.name]
            return {"version": "1", "entries": 10**6, "seconds": rate * 10**6}
        if op == "ceilings":
            return {"copy_bytes_per_second": 1e10, "flop_per_second": dict.fromkeys(("float32", "float64"), 1e11)}
        if op == "release":
            return {}
        if op == "time":
            self._spend(self.once, limit)
            return {"seconds": [self.once]}
        self.once = SECONDS_PER_ENTRY[self.name] * Case(**arguments).matrix_entries
        self._spend(self.once * (5 if op == "check" else 1) + 0.001, limit)
        return {"make_seconds": 0.0, "first_seconds": self.once, "memory_bytes": 0}

    def _spend(self, seconds: float, limit: float) -> None:
        Simulated.now += min(seconds, limit)
        if seconds > limit:
            self.alive = False
            raise TookTooLong(f"took longer than {limit:.0f} s")

    def close(self) -> None:
        pass


def simulated(monkeypatch: pytest.MonkeyPatch, path: Path, budget: float, *names: str) -> dict[str, Any]:
    """Results of a run, and what the clock says at its end as `now`."""
    module = types.ModuleType("simulated_candidates")
    candidates = [Candidate(name, "torch", unused) for name in names]
    module.everything = lambda device: candidates  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulated_candidates", module)
    monkeypatch.setattr(runner, "Worker", Simulated)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(monotonic=lambda: Simulated.now))
    Simulated.now = 0.0
    results = runner.Run(SETTINGS, path / "results.json", budget, "simulated_candidates").run()
    return {**results, "now": Simulated.now}


def measured(results: dict[str, Any], name: str, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in results[kind] if entry["candidate"] == name]


@pytest.mark.parametrize("budget", [20.0, 100.0])
@pytest.mark.parametrize("burden", [("slow", "slower"), ("liar", "slower"), ("liar",)])
def test_what_is_quick_is_never_left_out(
    budget: float, burden: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = simulated(monkeypatch, tmp_path, budget, *burden, "fast")
    assert len(measured(results, "fast", "timings")) == len(SETTINGS.cases())
    assert len(measured(results, "fast", "checks")) == len(SETTINGS.checks())
    assert all(len(entry["rounds"]) > 1 for entry in measured(results, "fast", "timings"))
    assert "slower" not in burden or results["left"]["slower"]
    assert results["now"] <= budget + max(3, budget / 30)


def test_the_slow_ones_get_what_is_left_the_cheapest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["slower", "slow", "usual", "fast"]
    results = simulated(monkeypatch, tmp_path, 60.0, *names)
    done = {Case(**entry["case"]) for entry in measured(results, "slower", "timings")}
    left = set(SETTINGS.cases()) - done
    assert done
    assert left
    assert max(case.matrix_entries for case in done) <= min(case.matrix_entries for case in left)
    assert set(results["left"]) <= {"slow", "slower"}
    assert results["now"] > 40
    order = [(Case(**entry["case"]), entry["candidate"]) for entry in results["timings"]]
    assert order == sorted(order, key=lambda pair: (SETTINGS.cases().index(pair[0]), names.index(pair[1])))


def test_everything_is_measured_where_time_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = simulated(monkeypatch, tmp_path, 400.0, "fast", "usual", "slow", "slower")
    assert results["finished"]
    assert results["now"] < 400
    cases = [Case(**entry["case"]) for entry in measured(results, "fast", "timings")]
    assert cases == SETTINGS.cases()


def test_what_took_too_long_gets_a_longer_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 s are needed, 0.07 predicted; the turns have 3, 12 and 48 s."""
    one = dataclasses.replace(SETTINGS, batches=(32,), grad_dims=(1 << 16,), proj_dims=(1024,), check_dims=())
    monkeypatch.setitem(globals(), "SETTINGS", dataclasses.replace(one, proj_types=("normal",)))
    results = simulated(monkeypatch, tmp_path, 60.0, "liar")
    assert results["finished"]
    assert results["now"] == pytest.approx(3 + 12 + 2 * SECONDS_PER_ENTRY["liar"] * (1 << 26), abs=0.01)  # and a round
    assert not simulated(monkeypatch, tmp_path, 15.0, "liar")["finished"]


def test_small_shapes_do_not_raise_predictions() -> None:
    budget, task = Budget(300.0, 10), Task("timings", Case(1, 10**6, 10**3, "float32", "normal", "cpu"), "a")
    for entries, seconds, predicted in (
        (10**6, 0.1, 100.0),
        (10**8, 5.0, 50.0),
        (10**7, 1.0, 50.0),
        (10**7, 0.4, 40.0),
    ):
        budget.learn("a", entries, seconds)
        assert budget.cost(task) == pytest.approx(predicted)
    budget.overran(task._replace(case=Case(1, 10, 10, "float32", "normal", "cpu")), 10.0)
    assert budget.cost(task) == pytest.approx(10.0 * 10**7)


def test_limits_end_with_the_budget() -> None:
    budget, task = Budget(300.0, 10), Task("timings", Case(1, 10**6, 10**3, "float32", "normal", "cpu"), "a")
    assert budget.limit(task, 300.0) == 10
    budget.learn("a", 10**9, 20.0)
    assert budget.limit(task, 300.0) == 80
    assert budget.limit(task, 30.0) == 40
    budget.overran(task, 80.0)
    assert budget.cost(task) == pytest.approx(80)
    check = task._replace(kind="checks")
    budget.overran(check, 80.0)
    assert budget.cost(check) == pytest.approx(80)
    assert budget.affordable([check, task], 40.0) == {task}
