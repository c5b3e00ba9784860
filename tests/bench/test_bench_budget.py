"""The time that a benchmark spends, with a clock of its own and candidates that take the seconds they are said to."""

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from trak_fast.bench import runner, settings
from trak_fast.bench.budget import Budget, Measurement
from trak_fast.bench.candidates import Candidate
from trak_fast.bench.case import DENSE_TYPES, Case
from trak_fast.bench.process import TookTooLong
from trak_fast.bench.results import Ceilings, FirstCall, Present, Quality, Results, Timing

SECONDS_PER_ENTRY = {"fast": 1e-11, "usual": 1e-9, "slow": 1e-8, "slower": 4e-8, "liar": 3e-7}
SETTINGS = dataclasses.replace(settings.defaults("cpu"), dtypes=("float32",), proj_types=DENSE_TYPES, threads=1)


def unused(case: Case) -> Callable[[Tensor], Tensor]:
    raise AssertionError(case)


class Simulated:
    """A worker whose calls take what the table says; "liar" is quick at the shape that it is opened with."""

    now = 0.0

    def __init__(self, module: str, candidate: Candidate, settings: settings.Settings) -> None:
        self.name, self.alive, self.once = candidate.name, True, 0.0

    def open(self, limit: float) -> Present:
        rate = 1e-9 if self.name == "liar" else SECONDS_PER_ENTRY[self.name]
        return Present("1", 10**6, rate * 10**6)

    def ceilings(self, limit: float) -> Ceilings:
        return Ceilings(1e10, dict.fromkeys(("float32", "float64"), 1e11))

    def prepare(self, case: Case, limit: float) -> FirstCall:
        self.once = SECONDS_PER_ENTRY[self.name] * case.matrix_entries
        self._spend(self.once + 0.001, limit)
        return FirstCall(0.0, self.once, 0)

    def time(self, seconds: float, repeats: int, limit: float) -> list[float]:
        self._spend(self.once, limit)
        return [self.once]

    def check(self, case: Case, limit: float) -> Quality:
        self._spend(5 * SECONDS_PER_ENTRY[self.name] * case.matrix_entries + 0.001, limit)
        return Quality(True, True, 0.0, "identity", None, None, 0.0, 0.0, 1.0)

    def release(self, limit: float) -> None:
        pass

    def _spend(self, seconds: float, limit: float) -> None:
        Simulated.now += min(seconds, limit)
        if seconds > limit:
            self.alive = False
            raise TookTooLong(f"took longer than {limit:.0f} s")

    def close(self) -> None:
        pass


def simulated(monkeypatch: pytest.MonkeyPatch, path: Path, budget: float, *names: str) -> Results:
    """Results of a run, at whose end `Simulated.now` is the clock."""
    module = types.ModuleType("simulated_candidates")
    candidates = [Candidate(name, "torch", unused) for name in names]
    module.everything = lambda device: candidates  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulated_candidates", module)
    monkeypatch.setattr(runner, "Worker", Simulated)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(monotonic=lambda: Simulated.now))
    Simulated.now = 0.0
    return runner.Run(SETTINGS, path / "results.json", budget, "simulated_candidates").run()


def timings_of(results: Results, name: str) -> list[Timing]:
    return [timing for timing in results.measured if timing.candidate == name]


@pytest.mark.parametrize("budget", [20.0, 100.0])
@pytest.mark.parametrize("burden", [("slow", "slower"), ("liar", "slower"), ("liar",)])
def test_what_is_quick_is_never_left_out(
    budget: float, burden: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = simulated(monkeypatch, tmp_path, budget, *burden, "fast")
    assert len(timings_of(results, "fast")) == len(SETTINGS.cases())
    assert sum(check.candidate == "fast" for check in results.checked) == len(SETTINGS.checks())
    assert all(len(timing.rounds) > 1 for timing in timings_of(results, "fast"))
    assert "slower" not in burden or results.left["slower"]
    assert Simulated.now <= budget + max(3, budget / 30)


def test_the_slow_ones_get_what_is_left_the_cheapest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["slower", "slow", "usual", "fast"]
    results = simulated(monkeypatch, tmp_path, 60.0, *names)
    done = {timing.case for timing in timings_of(results, "slower")}
    left = set(SETTINGS.cases()) - done
    assert done
    assert left
    assert max(case.matrix_entries for case in done) <= min(case.matrix_entries for case in left)
    assert set(results.left) <= {"slow", "slower"}
    assert Simulated.now > 40
    order = [(entry.case, entry.candidate) for entry in results.timings]
    assert order == sorted(order, key=lambda pair: (SETTINGS.cases().index(pair[0]), names.index(pair[1])))


def test_everything_is_measured_where_time_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = simulated(monkeypatch, tmp_path, 400.0, "fast", "usual", "slow", "slower")
    assert results.finished
    assert Simulated.now < 400
    assert [timing.case for timing in timings_of(results, "fast")] == SETTINGS.cases()


def test_what_took_too_long_gets_a_longer_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 s are needed, 0.07 predicted; the turns have 3, 12 and 48 s."""
    one = dataclasses.replace(SETTINGS, batches=(32,), grad_dims=(1 << 16,), proj_dims=(1024,), check_dims=())
    monkeypatch.setitem(globals(), "SETTINGS", dataclasses.replace(one, proj_types=("normal",)))
    results = simulated(monkeypatch, tmp_path, 60.0, "liar")
    assert results.finished
    assert Simulated.now == pytest.approx(3 + 12 + 2 * SECONDS_PER_ENTRY["liar"] * (1 << 26), abs=0.01)  # and a round
    assert not simulated(monkeypatch, tmp_path, 15.0, "liar").finished


def test_small_shapes_do_not_raise_predictions() -> None:
    budget, measurement = Budget(300.0, 10), Measurement("a", Case(1, 10**6, 10**3, "float32", "normal", "cpu"))
    for entries, seconds, predicted in (
        (10**6, 0.1, 100.0),
        (10**8, 5.0, 50.0),
        (10**7, 1.0, 50.0),
        (10**7, 0.4, 40.0),
    ):
        budget.learn("a", entries, seconds)
        assert budget.cost(measurement) == pytest.approx(predicted)
    budget.overran(measurement._replace(case=Case(1, 10, 10, "float32", "normal", "cpu")), 10.0)
    assert budget.cost(measurement) == pytest.approx(10.0 * 10**7)


def test_sparse_matrices_say_nothing_about_dense_ones() -> None:
    """A sparse kind takes no k times as many seconds for a dense one, nor the other way round."""
    budget, case = Budget(300.0, 10), Case(1, 10**6, 10**3, "float32", "normal", "cpu")
    dense = Measurement("a", case)
    sparse = Measurement("a", dataclasses.replace(case, proj_type="sjlt"))
    budget.learn("a", 10**8, 5.0)
    assert (budget.cost(dense), budget.cost(sparse)) == (pytest.approx(50), 0)
    budget.learn("a", 10**6, 2.0, dense=False)
    assert (budget.cost(dense), budget.cost(sparse)) == (pytest.approx(50), pytest.approx(8))
    budget.overran(sparse, 30.0)
    assert (budget.cost(dense), budget.cost(sparse)) == (pytest.approx(50), pytest.approx(30))


def test_limits_end_with_the_budget() -> None:
    budget, measurement = Budget(300.0, 10), Measurement("a", Case(1, 10**6, 10**3, "float32", "normal", "cpu"))
    assert budget.limit(measurement, 300.0) == 10
    budget.learn("a", 10**9, 20.0)
    assert budget.limit(measurement, 300.0) == 80
    assert budget.limit(measurement, 30.0) == 40
    budget.overran(measurement, 80.0)
    assert budget.cost(measurement) == pytest.approx(80)
    check = measurement._replace(is_check=True)
    budget.overran(check, 80.0)
    assert budget.cost(check) == pytest.approx(80)
    assert budget.affordable([check, measurement], 40.0) == {measurement}
