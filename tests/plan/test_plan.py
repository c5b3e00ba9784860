"""Predictions against closed forms, against what a store really takes, and against scikit-learn's bound."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.random_projection import johnson_lindenstrauss_min_dim

import trak_fast
from trak_fast.bench.case import Case
from trak_fast.bench.figures import summarize
from trak_fast.bench.results import Ceilings, FirstCall, Results, Timing, begin, save
from trak_fast.bench.settings import defaults
from trak_fast.cli import main
from trak_fast.plan import predict as plan
from trak_fast.plan import rates
from trak_fast.plan.job import LIMITS, Job

RATES = rates.Rates(1e12, 1e10, 1e11, 2e11, 5e9, 1e10, "by hand", 0.002)


def test_time_by_hand() -> None:
    job = Job(params=10**6, proj_dim=1000, samples=10**5, targets=100, checkpoints=3, tokens=50)
    seconds = plan.predict(job, RATES).seconds.rows()
    assert seconds == {
        "gradients": pytest.approx(3 * 100_100 * 8 * 1e6 * 50 / 2e11),
        "projection": pytest.approx(3 * 100_100 * 2 * 1e6 * 1e3 / 1e12),
        "store": pytest.approx(3 * 100_100 / 32 * 4 * 0.002),
        "X'X": pytest.approx(2 * 3 * 2 * 1e5 * 1e6 / 1e10),  # and X'CX
        "solve": pytest.approx(3 * (1e9 / 3 / 5e9 + 2 * 1e6 * 100 / 1e10)),
        "scores": pytest.approx(3 * 2 * 1e5 * 1e3 * 100 / 1e11 + 3 * 4 * 1e5 * 100 / 1e10),
        "total": pytest.approx(sum(value for name, value in seconds.items() if name != "total")),
    }


@pytest.mark.parametrize("nonzeros", [None, 2])
def test_the_sparse_kind_costs_its_entries(nonzeros: int | None) -> None:
    job = Job(params=10**6, proj_dim=1024, samples=10**5, targets=100, proj_type="sjlt", nonzeros=nonzeros)
    found = plan.predict(job, RATES)
    assert found.seconds.projection == pytest.approx(100_100 * 2 * 1e6 * (nonzeros or 4) / 1e12)
    assert found.distortion == plan.Distortion(math.sqrt(2 / 1024), math.sqrt(1 / 1024), None)
    dense = plan.predict(Job(params=10**6, proj_dim=1024, samples=10**5, targets=100), RATES)
    assert dataclasses.replace(found.seconds, projection=0) == dataclasses.replace(dense.seconds, projection=0)
    assert (found.memory, found.disk) == (dense.memory, dense.disk)
    text = plan.text(job, found)
    assert f"projection sjlt, nonzeros = {nonzeros or 4}, {5e11 / (nonzeros or 4):.2e} entries/s" in text
    assert "it is proved for dense matrices alone" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_dim": 1000, "proj_type": "sjlt"}, "not 1000; near it with nonzeros=4: 512 and 1024"),
        ({"proj_dim": 1024, "proj_type": "sjlt", "nonzeros": 3}, "nonzeros must be one of 1, 2, 4, 8, not 3"),
        ({"proj_dim": 1024, "nonzeros": 4}, "nonzeros belongs to proj_type='sjlt'"),
    ],
)
def test_sparse_jobs_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Job(params=1000, samples=100, **options)


def test_fewer_samples_than_dimensions() -> None:
    """The Gram matrix is n × n then, and scores come from the solve."""
    job = Job(params=1000, proj_dim=4000, samples=500, targets=10)
    found = plan.predict(job, RATES)
    assert found.seconds.gradients is None
    assert found.seconds.gram == pytest.approx(2 * 500 * 500 * 4000 / 1e10)
    assert found.seconds.solve == pytest.approx(500**3 / 3 / 5e9 + 2 * 500**2 * 10 / 1e10 + 2 * 500 * 4000 * 10 / 1e10)
    assert found.disk.gram_matrices == 8 * 500 * 500


def test_processes_share_the_samples() -> None:
    options: dict[str, Any] = {"params": 1000, "proj_dim": 64, "samples": 1000, "gradient_seconds": 0.5}
    one, four = (plan.predict(Job(**options, processes=p), RATES).seconds.rows() for p in (1, 4))
    assert one["gradients"] == 0.5 * 2000
    for stage in ("gradients", "projection", "X'X", "scores"):
        assert four[stage] == pytest.approx(one[stage] / 4)
    assert four["solve"] == one["solve"]


def test_the_largest_and_the_smallest_job_are_predicted() -> None:
    largest = {name: high for name, (_, high) in LIMITS.items()}
    smallest = {name: low for name, (low, _) in LIMITS.items()}
    for job in (Job(**largest), Job(**largest, gradient_seconds=1e9), Job(**smallest), Job(**smallest, half=True)):
        found = plan.predict(job, RATES)
        assert all(0 <= seconds < math.inf for seconds in found.seconds.rows().values())
        assert plan.text(job, found).count("\n") > 20


def test_memory_by_hand() -> None:
    found = plan.predict(Job(10**6, 1000, 10**5, batch=16, dtype="bfloat16"), RATES).memory.rows()
    sums, waiting = 2 * 8 * 1000**2, 3 * 8 * 1000 * (1000 + 16)
    assert found["featurize"] == 16 * 10**6 * 2 + 4 * 16 * 1000 + sums + waiting
    assert found["X'X"] == 4 * sums
    assert found["solve"] == 6 * 8 * 1000**2
    assert found["scores"] == 2 * 8 * 1000**2 + 1000 * (16 * 1000 + 4 * 1000) + 3 * (32 << 20)
    assert found["peak"] == max(value for name, value in found.items() if name != "peak")


def test_memory_of_fewer_samples_than_dimensions() -> None:
    found = plan.predict(Job(100, 4000, 500, targets=10, checkpoints=3, batch=16), RATES).memory.rows()
    assert found["featurize"] == 16 * 100 * 4 + 4 * 16 * 4000
    assert found["X'X"] == 8 * 500**2 + 20 * 500 * 4000
    assert found["solve"] == (2 * 2 + 5) * 8 * 500**2
    assert found["scores"] == 3 * 2 * 8 * 500**2 + 10 * (16 * 4000 + 24 * 500 + 4 * 3 * 500) + 12 * 500 * 4000


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_timed_with_a_model_of_that_size(
    dtype: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has the job's tokens and batch, and its time is divided by its own parameters."""
    seen: list[list[torch.Tensor]] = []
    compute = rates.FunctionalGradientComputer.compute_per_sample_grad

    def spied(self: Any, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append([batch[0], *compute(self, batch).values()])
        return dict(enumerate(seen[-1]))

    monkeypatch.setattr(rates.FunctionalGradientComputer, "compute_per_sample_grad", spied)
    monkeypatch.setattr(rates, "_seconds", lambda call, device: call() or 6.0)
    job = Job(600_000, 64, 100, batch=3, dtype=dtype, tokens=tokens)
    rate = rates.gradient_rate(job)
    inputs, *grads = seen[0]
    width = 671 if tokens == 1 else 128  # √(0.75 · 600,000); 12 · 128² · 128/64 is the nearest
    assert inputs.shape == ((3, width) if tokens == 1 else (3, tokens, width))
    assert {grad.dtype for grad in grads} == {getattr(torch, dtype)}
    assert all(bool((grad != 0).any()) for grad in grads)
    assert rate == pytest.approx(6.0 / 3 / sum(grad[0].numel() for grad in grads))


def test_long_sequences_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device: 6.0)
    job = Job(600_000, 64, 100, batch=64, tokens=10**6)
    size = sum(parameter.numel() for parameter in rates.stand_in(job.params, job.tokens)[0].parameters())
    tokens = rates.GRADIENT_FLOP["cpu"] // (8 * size)
    assert rates.gradient_rate(job) == pytest.approx(6.0 / 1 / size * 10**6 / tokens)


def test_measured_gradients_take_the_place_of_operations() -> None:
    job = Job(1000, 64, 100, targets=0, tokens=7)
    known = dataclasses.replace(RATES, gradient=1e-6)
    assert plan.predict(job, known).seconds.gradients == pytest.approx(100 * 1000 * 1e-6)
    assert "measured with a transformer block" in plan.text(job, plan.predict(job, known))
    assert "at least: 8 FLOP" in plan.text(job, plan.predict(job, RATES))
    given = dataclasses.replace(job, gradient_seconds=2.0)
    assert plan.predict(given, known).seconds.gradients == 200
    assert "measured with" not in plan.text(given, plan.predict(given, known))


@pytest.mark.parametrize(("samples", "proj_dim"), [(100, 1000), (10**6, 8192), (30, 512)])
def test_distortion_is_the_known_bound(samples: int, proj_dim: int) -> None:
    epsilon = plan.jl_epsilon(samples, proj_dim)
    assert epsilon is not None
    assert abs(int(johnson_lindenstrauss_min_dim(samples, eps=epsilon)) - proj_dim) <= 1
    found = plan.predict(Job(10, proj_dim, samples, targets=0), RATES).distortion
    assert found == plan.Distortion(math.sqrt(2 / proj_dim), math.sqrt(1 / proj_dim), epsilon)


def test_no_bound_for_few_dimensions() -> None:
    assert plan.jl_epsilon(10**6, 100) is None
    job = Job(10, 100, 10**6)
    assert "no bound below 100 %" in plan.text(job, plan.predict(job, RATES))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("samples", [400, 40])  # more and fewer than k
def test_disk_is_what_a_run_takes(half: bool, samples: int, tmp_path: Path) -> None:
    k, targets = 64, 30
    model = torch.nn.Linear(20, 5)
    traker = trak_fast.TRAKer(
        model, "image_classification", samples, tmp_path, proj_dim=k, use_half_precision=half, logging_level=40
    )
    train, tests = ([torch.randn(count, 20), torch.zeros(count, dtype=torch.long)] for count in (samples, targets))
    for model_id in range(2):
        traker.load_checkpoint(model.state_dict(), model_id=model_id)
        traker.featurize(train, num_samples=samples)
    traker.finalize_features()
    for model_id in range(2):
        traker.start_scoring_checkpoint("e", model.state_dict(), model_id=model_id, num_targets=targets)
        traker.score(tests, num_samples=targets)
    traker.finalize_scores("e")
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.np*"))
    job = Job(105, k, samples, targets=targets, checkpoints=2, half=half)
    predicted = plan.predict(job, RATES).disk.total
    headers = sum(128 for _ in tmp_path.rglob("*.np*"))
    assert taken - headers == predicted


CEILINGS = Ceilings(7e9, {"float32": 1e11, "bfloat16": 2e11, "float16": 1e9, "float64": 5e10})


def timing(name: str, batch: int, grad_dim: int, proj_dim: int, seconds: float, proj_type: str = "normal") -> Timing:
    case = Case(batch, grad_dim, proj_dim, "float32", proj_type, "cpu")
    return summarize(name, case, FirstCall(0.0, seconds, None), [[seconds]], CEILINGS)


def results() -> Results:
    found = begin(defaults("cpu"))
    found.started = "2026-01-02T03:04:05"
    found.ceilings = CEILINGS
    found.timings = [
        timing("trak_fast slow", 32, 1000, 512, 2.0),
        timing("trak_fast fast", 32, 1000, 512, 1.0),
        timing("trak_fast fast", 32, 500, 512, 0.1),
        timing("trak_fast fast", 256, 1000, 4096, 0.01),
        timing("torch", 32, 1000, 512, 0.001),
        timing("trak_fast fast", 32, 1000, 512, 0.002, "sjlt"),
        timing("torch, index_add_", 32, 1000, 512, 0.0001, "sjlt"),
    ]
    return found


def test_rates_from_results_are_the_nearest() -> None:
    found = rates.from_results(Job(10**6, 600, 1000, proj_type="normal"), results())
    assert found.projection == pytest.approx(2 * 32 * 1000 * 512 / 1.0)
    assert (found.float64, found.float32, found.product, found.copy) == (5e10, 1e11, 1e11, 7e9)
    assert found.source == "trak_fast fast of 2026-01-02"
    far = rates.from_results(Job(10**6, 8192, 1000, batch=128, proj_type="normal"), results())
    assert far.projection == pytest.approx(2 * 256 * 1000 * 4096 / 0.01)
    sparse = Job(10**6, 512, 1000, targets=0, proj_type="sjlt", nonzeros=8)
    assert rates.from_results(sparse, results()).projection == pytest.approx(2 * 32 * 1000 * 4 / 0.002)
    seconds = plan.predict(sparse, rates.from_results(sparse, results())).seconds
    assert seconds.projection == pytest.approx(1000 / 32 * 1000 * 2 * 0.002)  # calls, columns, entries
    with pytest.raises(ValueError, match="no timing of trak_fast for cpu, float32, rademacher"):
        rates.from_results(Job(10**6, 8192, 1000), results())


@pytest.mark.parametrize(
    ("copy", "products", "message"),
    [
        (7e9, {"float32": 1e11}, "no rate of a product in float64"),
        (7e9, {"float32": 1e11, "float64": 0.0}, "float64 must be above 0, not 0"),
        (math.nan, {"float32": 1e11, "float64": 1e10}, "copy must be above 0, not nan"),
    ],
)
def test_results_without_a_rate_are_refused(copy: float, products: dict[str, float], message: str) -> None:
    broken = results()
    broken.ceilings = Ceilings(copy, products)
    with pytest.raises(ValueError, match=message):
        rates.from_results(Job(10**6, 600, 1000, proj_type="normal"), broken)


def test_a_job_that_cannot_be_measured_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rates.projection, "project", lambda *_, **__: pytest.fail("ran"))
    assert main(["plan", "--params", "1e9", "--proj-dim", "2e9", "--samples", "9", "--batch", "1e9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "trak-fast: error: this machine has too little memory: "
        "one projection of B = 1,000,000,000 gradients to k = 2,000,000,000 takes "
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(("proj_type", "nonzeros"), [("rademacher", None), ("sjlt", 2)])
def test_calibration_measures_every_rate(proj_type: str, nonzeros: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    project = trak_fast.project

    def spied(grads: torch.Tensor, proj_dim: int, **options: Any) -> torch.Tensor:
        asked.append((proj_dim, options))
        return project(grads, proj_dim, **options)

    monkeypatch.setattr(rates.projection, "project", spied)
    job = Job(3000, 64, 100, batch=4, dtype="bfloat16", proj_type=proj_type, nonzeros=nonzeros)
    found = rates.calibrate(job)
    assert asked[0] == (64, {"proj_type": proj_type, "nonzeros": nonzeros})
    monkeypatch.setattr(rates, "_seconds", lambda call, device: 0.5)
    assert rates.calibrate(job).projection == 2 * 4 * 3000 * (nonzeros or 64) / 0.5
    names = {field.name for field in dataclasses.fields(rates.Rates)} - {"source", "sync", "gradient"}
    assert all(1e5 < getattr(found, name) < 1e18 for name in names)
    assert 0 < found.sync < 60


def test_calibration_leaves_out_what_a_call_takes_whatever_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 10 ms and a microsecond a column: the rate is that of the columns."""
    calls: list[int] = []

    def timed(call: Callable[[], object], device: torch.device) -> float:
        calls.clear()
        call()
        return 0.01 + 1e-6 * calls[0] if calls else 1.0

    def project(grads: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(grads.shape[1])
        return grads

    monkeypatch.setattr(rates.projection, "project", project)
    monkeypatch.setattr(rates, "_seconds", timed)
    for kind, k, entries in [("sjlt", 2**18, 4), ("rademacher", 64, 64)]:
        found = rates.calibrate(Job(10**7, k, 100, batch=4, proj_type=kind))
        assert found.projection == pytest.approx(2 * 4 * entries / 1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "results.json", results())
    options = ["plan", "--params", "1.3e9", "--proj-dim", "8192", "--samples", "1e6", "--proj-type", "normal"]
    options += ["--device", "cpu", "--bench", str(tmp_path / "results.json")]
    assert main(options) == 0
    output = capsys.readouterr().out
    assert "1,000,000 training samples, 1,000 targets, 1 checkpoints, 1,300,000,000 parameters to k = 8,192" in output
    assert "give --tokens or --gradient-seconds" in output
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {part: list(content) for part, content in found.items()} == {
        "seconds": ["gradients", "projection", "store", "X'X", "solve", "scores", "total"],
        "memory_bytes": ["featurize", "X'X", "solve", "scores", "peak"],
        "disk_bytes": ["training features", "target features", "Gram matrices", "scores", "total"],
        "distortion": ["norm", "cosine", "all"],
        "rates": [field.name for field in dataclasses.fields(rates.Rates)],
    }
    assert found["seconds"]["gradients"] is None
    assert found["seconds"]["projection"] == pytest.approx(
        1_001_000 * 2 * 1.3e9 * 8192 / (2 * 256 * 1000 * 4096 / 0.01)
    )
    assert main([*options[:-1], str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
