"""The benchmark's runs: order, failures, budget and resuming, with candidates whose behaviour is known."""

import dataclasses
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm

import trak_fast
from trak_fast import info
from trak_fast.bench import candidates, quality, runner, tables, worker
from trak_fast.bench.case import Case
from trak_fast.bench.results import Absent, Check, Omission, Results, Timing, load
from trak_fast.bench.settings import Settings, defaults
from trak_fast.cli import main

SETTINGS = Settings(
    device="cpu", batches=(4,), grad_dims=(64, 128), proj_dims=(16,), dtypes=("float32",), proj_types=("rademacher",),
    check_dims=(96,), check_proj_dim=48, full=False, only=("good", "other"), threads=1,
)  # fmt: skip


def run(path: Path, budget: float = 30.0, **changes: Any) -> Results:
    """Measures the candidates of bench_candidates.py, in processes that start at once."""
    settings = dataclasses.replace(SETTINGS, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm.python())
        return runner.Run(settings, path / "results.json", budget, "bench_candidates").run()


def statuses(entries: Sequence[Timing | Check | Omission]) -> dict[str, set[tuple[str, str | None]]]:
    found: dict[str, set[tuple[str, str | None]]] = {}
    for entry in entries:
        status = (entry.status, entry.error) if isinstance(entry, Omission) else ("ok", None)
        found.setdefault(entry.candidate, set()).add(status)
    return found


def test_failures_do_not_stop_the_rest(tmp_path: Path) -> None:
    only = ("good", "failing", "dying", "unable", "absent", "picky", "hanging")
    results = run(tmp_path, budget=8.0, only=only, grad_dims=(64,))
    assert set(results.present) == {"good", "failing", "dying", "picky", "hanging"}
    assert {name: facts for name, facts in results.candidates.items() if isinstance(facts, Absent)} == {
        "unable": Absent("failed", "ValueError: does not even import"),
        "absent": Absent("missing", "no_such_library is not installed: pip install no-such-package"),
    }
    assert set(results.candidates) == set(only)
    for entries in (results.timings, results.checks):
        assert statuses(entries) == {
            "good": {("ok", None)},
            "failing": {("failed", "RuntimeError: out of luck")},
            "dying": {("failed", "its process ended with status 3")},
            "picky": {("skipped", "it does not have dtype float32, but float64")},
        }
    assert results.left == {"hanging": 2}
    assert not results.finished
    text = tables.terminal(results)
    assert "failing, B = 4, D = 64, k = 16, float32, rademacher: RuntimeError: out of luck" in text
    assert "no time for some cases of hanging (2)" in text


def test_rounds_are_interleaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("BENCH_TEST_LOG", str(log))
    results = run(tmp_path, grad_dims=(64,), check_dims=())
    calls = log.read_text().split("make good 64\n")[1].splitlines()
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns == ["good", "other"] * (1 + runner.ROUNDS)
    assert len(results.measured) == 2
    for timing in results.measured:
        assert len(timing.rounds) == runner.ROUNDS
        assert all(1 <= len(part) <= runner.REPEATS for part in timing.rounds)
    other = next(timing for timing in results.measured if timing.candidate == "other")
    assert other.median >= 0.01  # what it sleeps


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    whole = runner.Run._check

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Run, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    before = load(tmp_path / "results.json")
    assert [(timing.candidate, timing.case.grad_dim) for timing in before.measured] == [("good", 128), ("other", 128)]
    monkeypatch.setattr(runner.Run, "_check", whole)
    monkeypatch.setenv("BENCH_TEST_LOG", str(log))
    results = run(tmp_path)
    kept, old = (  # all but what follows from this machine's ceilings, which are measured again
        [dataclasses.replace(timing, floor_seconds=None, of_floor=None) for timing in timings]
        for timings in (results.measured[:2], before.measured)
    )
    assert kept == old
    assert [timing.case.grad_dim for timing in results.measured] == [128, 128, 64, 64]
    assert len(results.checked) == 2
    assert results.finished
    assert "make good 128\n" not in log.read_text()
    assert results.started == before.started
    assert results.seconds > before.seconds


def test_a_finished_run_or_another_one_is_kept(tmp_path: Path) -> None:
    first = run(tmp_path, grad_dims=(64,), check_dims=(), only=("good",))
    assert first.finished
    second = run(tmp_path, grad_dims=(96,), check_dims=(), only=("good",))
    assert [timing.case.grad_dim for timing in second.measured] == [96]
    kept = sorted(tmp_path.glob("results-*.json"))
    assert [load(path) for path in kept] == [first]


def test_no_time_measures_nothing_and_says_so(tmp_path: Path) -> None:
    results = run(tmp_path, budget=1e-9)
    assert results.timings == results.checks == []
    assert results.left == {"good": 3, "other": 3}
    assert "no time for some cases of good (3), other (3)" in tables.terminal(results)


def test_checks_find_what_is_wrong(tmp_path: Path) -> None:
    results = run(tmp_path, grad_dims=(64,), only=("good", "paired", "moody"))
    found = {check.candidate: check.found for check in results.checked}
    assert found["good"].error < 1e-6
    assert found["good"].equal_columns == 0
    assert found["good"].repeatable
    assert found["good"].remade
    assert found["good"].column_dim == pytest.approx(48, rel=0.1)
    assert found["paired"].error == pytest.approx(1e-3, rel=0.01)
    assert found["paired"].equal_columns == 48
    assert found["paired"].column_dim == pytest.approx(95 / (1 + 94 / 48), rel=0.1)
    assert not found["moody"].repeatable


def test_the_sparse_kind_is_checked_against_the_reference() -> None:
    """Entry by entry, in rows of all blocks: another number of entries, or one wrong block, is an error."""
    case = Case(1, 3000, 256, "float32", "sjlt", "cpu")
    (ours, *_) = candidates.everything("cpu")
    right = quality.check(ours, case)
    assert right.matrix == "reference"
    assert right.error < 1e-6
    assert right.norm_distortion == pytest.approx((2 / 256) ** 0.5, rel=0.3)
    assert right.column_dim == pytest.approx(256, rel=0.1)
    assert right.equal_columns == 0

    def fewer(case: Case) -> candidates.Project:
        return lambda grads: trak_fast.project(grads, case.proj_dim, proj_type="sjlt", nonzeros=2) * 2**0.5

    def last_block_twice(case: Case) -> candidates.Project:
        def project(grads: torch.Tensor) -> torch.Tensor:
            y = trak_fast.project(grads, case.proj_dim, proj_type="sjlt")
            y[:, 192:] = y[:, 128:192]
            return y

        return project

    for wrong in (fewer, last_block_twice):
        assert quality.check(dataclasses.replace(ours, make=wrong), case).error > 0.1
    for name in ("torch, index_add_", "scikit-learn sparse"):
        (other,) = [candidate for candidate in candidates.everything("cpu") if candidate.name == name]
        found = quality.check(other, case)
        assert found.matrix == "identity"
        assert found.error < 1e-6
        assert found.norm_distortion == pytest.approx((2 / 256) ** 0.5, rel=0.3)


def test_one_thing_is_varied_at_a_time() -> None:
    settings = dataclasses.replace(
        SETTINGS, batches=(1, 2, 3), grad_dims=(10, 20, 30), proj_dims=(5,), proj_types=("normal", "rademacher")
    )
    base = ("float32", "normal", "cpu")
    assert settings.cases() == [
        Case(2, 20, 5, *base), Case(1, 20, 5, *base), Case(2, 10, 5, *base),
        Case(2, 20, 5, "float32", "rademacher", "cpu"),
        Case(3, 20, 5, *base), Case(2, 30, 5, *base),
    ]  # fmt: skip
    assert len(dataclasses.replace(settings, full=True).cases()) == 3 * 3 * 2
    assert [(case.grad_dim, case.proj_type) for case in settings.checks()] == [(96, "normal"), (96, "rademacher")]


def test_candidates_of_this_machine_project() -> None:
    """Those that are always there give what the matrix's kind promises: E ‖y‖² = k ‖g‖²."""
    there = {candidate.name: candidate for candidate in candidates.everything("cpu")}
    assert [name.removeprefix("trak_fast ") for name in there if name.startswith("trak_fast ")] == (
        info()["instruction_sets"]
    )
    grads = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    tried = set()
    for name, candidate in there.items():
        if candidate.module not in ("trak_fast", "torch", "sklearn"):
            continue
        for kind in candidate.proj_types:
            y = candidate.make(Case(8, 3000, 512, "float32", kind, "cpu"))(grads)
            grown = 1 if candidate.scaled else 4 if kind == "sjlt" else 512
            ratio = y.double().square().sum() / (grown * grads.double().square().sum())
            assert y.shape == (8, 512)
            assert float(ratio) == pytest.approx(1, abs=0.15)  # √(2/512/8) = 2 %
            tried.add((name, kind))
    assert {name for name, kind in tried if kind == "sjlt"} == {
        "torch, index_add_", "scikit-learn sparse", *(f"trak_fast {isa}" for isa in info()["instruction_sets"]),
    }  # fmt: skip
    assert ("scikit-learn Gaussian", "normal") in tried
    big = Case(8, 10**9, 4096, "float32", "normal", "cpu")
    assert there["torch, matrix in memory"].refusal(big, 2**34) == ("its matrix takes 15258.8 GiB, 16.0 are to be had")


def devices(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    """Makes it seem that there is a CUDA device with these kernels."""
    facts = {**info(), "cuda_devices": [{"name": "imagined", "kernels": list(kernels)}]}
    monkeypatch.setattr(candidates.projection, "info", lambda: facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_candidates_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, "sm90", "sm80")
    there = {candidate.name: candidate for candidate in candidates.everything("cuda")}
    ours = {name: dict(candidate.environment) for name, candidate in there.items() if candidate.ours}
    assert ours == {f"trak_fast {name}": {"TRAK_FAST_CUDA_KERNEL": name} for name in ("sm90", "sm80")}
    assert defaults().device == "cuda"
    case = Case(32, 1 << 20, 4096, "bfloat16", "rademacher", "cuda")
    free = 2**32  # the matrix has 2^33 bytes, a block of it 2^33 / 41
    refusals = {name: candidate.refusal(case, free) for name, candidate in there.items()}
    assert {name for name, reason in refusals.items() if reason is None} == {
        *ours, "torch, in chunks", "traker BasicProjector", "bergson",
    }  # fmt: skip
    sparse = dataclasses.replace(case, proj_type="sjlt")
    assert {name for name, candidate in there.items() if candidate.refusal(sparse, free) is None} == {
        *ours, "torch, index_add_", "sjlt", "dattri sjlt",
    }  # fmt: skip
    assert there["sjlt"].refusal(sparse, 2**25) == "its matrix takes 0.0 GiB, 0.0 are to be had"
    assert there["sjlt"].refusal(case, free) == "it does not have kind rademacher, but sjlt"
    uneven = dataclasses.replace(sparse, proj_dim=700)
    assert there["sjlt"].refusal(uneven, free) is None
    for name in ours:
        assert there[name].refusal(dataclasses.replace(case, proj_dim=700), free) is None
        assert str(there[name].refusal(uneven, free)).endswith(
            "not 700; near it with nonzeros=4: 512 and 1024; the dense kinds take any"
        )
    assert refusals["dattri"] == refusals["torch, matrix in memory"] == ("its matrix takes 8.0 GiB, 4.0 are to be had")
    assert refusals["fast_jl"] == "it does not have dtype bfloat16, but float32, float16"
    half = dataclasses.replace(case, dtype="float16")
    assert there["fast_jl"].refusal(half, free) is None
    assert there["fast_jl"].refusal(dataclasses.replace(half, proj_dim=700), free) == (
        "k = 700: it needs a multiple of 512"
    )
    assert there["traker CudaProjector"].missing() == "fast_jl is not installed: pip install traker fast_jl"


def test_a_gpu_without_a_kernel_is_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch)
    assert defaults().device == "cpu"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA device whose calls are noted and whose clock goes on by 3 ms between two events."""
    calls: list[str] = []

    class Event:
        clock = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.clock += 3.0
            self.at = Event.clock
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in (
        ("synchronize", None), ("empty_cache", None), ("reset_peak_memory_stats", None), ("memory_allocated", 1000),
        ("max_memory_allocated", 5000), ("get_device_properties", SimpleNamespace(L2_cache_size=0)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: calls.append(name) or value)
    return calls


def imagined(project: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> worker.Session:
    """A session on the device above, with tensors that are on the processor."""
    made = worker.gradients
    monkeypatch.setattr(worker, "gradients", lambda case: made(dataclasses.replace(case, device="cpu")))
    session = worker.Session(candidates.Candidate("it", "torch", lambda case: project), "cuda")
    session._flush = torch.zeros(8)
    return session


CUDA_CASE = Case(batch=4, grad_dim=8, proj_dim=8, dtype="float32", proj_type="normal", device="cuda")


def test_a_gpu_is_timed_by_events_and_its_memory_counted(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    session = imagined(lambda grads: gpu.append("project") or grads[:, :8], monkeypatch)
    first = session.prepare(CUDA_CASE)
    assert first.memory_bytes == 5000 - 1000 - 4 * 4 * 8
    assert gpu[-4:] == ["synchronize", "project", "synchronize", "max_memory_allocated"]
    gpu.clear()
    assert session.time(10.0, 2) == [pytest.approx(0.003)] * 2
    assert gpu == ["record", "project", "record", "wait"] * 2
    gpu.clear()
    session.release()
    assert gpu == ["synchronize", "empty_cache"]


def test_memory_is_given_back_after_a_failure(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the answer, and once nothing of what failed is left."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def fails(grads: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(10)
        alive.append(weakref.ref(large))
        raise MemoryError("too large")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpu.append(f"kept: {alive[-1]() is not None}"))
    answers: list[dict[str, Any]] = []
    request = json.dumps({"op": "prepare", "case": CUDA_CASE.asdict()})
    monkeypatch.setattr(worker, "PeakMemory", lambda device: None)
    alive.append(lambda: None)  # type: ignore[arg-type]
    worker.serve(imagined(fails, monkeypatch), [request], lambda content: answers.append({**content, "then": gpu[-1]}))
    assert answers == [{"error": "MemoryError: too large", "then": "kept: False"}]


def test_a_broken_gpu_ends_the_process(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request gets a new one."""

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(grads: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(torch.cuda, "synchronize", broken)
        raise RuntimeError("misaligned")

    answers: list[dict[str, Any]] = []
    request = json.dumps({"op": "prepare", "case": CUDA_CASE.asdict()})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker.serve(imagined(breaks, monkeypatch), [request, request], answers.append)
    assert answers == [{"error": "RuntimeError: misaligned"}]


def test_a_refused_run_writes_nothing_and_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("earlier")
    for budget, only, message in (
        (30.0, ("zzz", "good", "yyy"), r"only must be part of one of 'good', .* not 'zzz' or 'yyy'"),
        (0.0, ("good",), r"budget must be in \(0, 1e\+07\], not 0"),
    ):
        for folder in (tmp_path, tmp_path / "new"):
            with pytest.raises(ValueError, match=message):
                run(folder, budget, only=only)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = f"trak_fast {info()['instruction_sets'][0]}"
    options = ["--batches", "4", "--grad-dims", "2000", "--proj-dims", "64", "--dtypes", "float32", "--threads", "1"]
    options += ["--proj-types", "rademacher", "sjlt", "--check-dims", "700", "--check-proj-dim", "64", "--only", ours]
    assert main(["bench", "--output", str(tmp_path), *options]) == 0
    results = load(tmp_path / "results.json")
    assert results.finished
    assert [check.case.proj_type for check in results.checked] == ["rademacher", "sjlt"]
    for check in results.checked:
        assert check.found.matrix == "reference"
        assert check.found.error < 1e-5
        assert check.found.repeatable
        assert check.found.remade
        assert check.found.norm_distortion == pytest.approx((2 / 64) ** 0.5, rel=0.3)
    assert [timing.dense for timing in results.measured] == [True, False]
    assert all(timing.memory_bytes < 64 << 20 for timing in results.measured)
    output = capsys.readouterr().out
    for kind in ("rademacher", "sjlt"):
        assert f"B = 4, D = 2,000, k = 64, float32, {kind}" in output
    assert f"{ours} with sjlt takes " in output
    assert "<svg" not in output
    assert ours in (tmp_path / "index.html").read_text()
    assert main(["bench", "--compare", str(tmp_path / "results.json"), str(tmp_path / "results.json")]) == 0
    assert "2 of 2 timings are the same within noise" in capsys.readouterr().out
    assert main(["bench", "--compare", str(tmp_path / "results.json"), str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


IMPORT_THE_BENCH = """
import sys, torch
torch.cuda._lazy_init = None  # calling it now fails
from trak_fast.bench import candidates, page, runner, worker
from trak_fast.plan import predict
print(sorted({name.split(".")[0] for name in sys.modules} & {"trak", "dattri", "bergson", "matplotlib", "sjlt"}))
"""


def test_importing_the_bench_imports_nothing_that_it_measures() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_THE_BENCH], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
