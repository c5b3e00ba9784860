"""Tests the parts of benchmarks/gpu_check.py that need no GPU: its rows, its targets, its table and its files."""

import importlib
import importlib.machinery
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("gpu_check")


@pytest.fixture
def gpu_measure(gpu_check: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_measure")


def test_dry_run(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main(["--dry-run", "--minutes", "1"]) == 0
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    for field, values in {
        "kind": {"rademacher", "normal", "sjlt"},
        "nonzeros": {0, 1, 4},
        "dtype": {"bf16", "fp16", "fp32"},
        "B": {1, 8, 16, 32, 64, 128, 256},
        "k": {512, 2048, 4096, 8192, 16384},
        "D": {10**5, 10**6, 10**7, 10**8, 10**9},
        "kernel": {"", "sm90", "sm90_wide", "sm80"},
    }.items():
        assert {row[field] for row in report["rows"]} == values
    row = report["rows"][0]
    assert row["tflops"] == pytest.approx(2 * row["B"] * row["k"] * row["D"] / (row["ms"] * 1e-3) / 1e12)
    printed = capsys.readouterr().out
    assert str(path) in printed
    table = printed[printed.index("written to") :]
    assert len(table) < 8000  # what a remote runner shows of an output's end
    assert all(target["what"] in table for target in report["targets"])


def test_targets(gpu_measure: ModuleType) -> None:
    Case, ours, cublas = gpu_measure.Case, gpu_measure.OURS, gpu_measure.CUBLAS
    results = gpu_measure.Results()
    assert {target.verdict for target in results.targets()} == {"not measured"}
    large = {B: Case("rademacher", "bf16", B, 4096, 10**8) for B in (128, 16)}
    results.ms = {(ours, large[128]): 100.0, (cublas, large[128]): 85.0, (ours, large[16]): 10.0}
    results.ms[cublas, large[16]] = 49.0
    fp32, bf16 = (Case("rademacher", dtype, 16, 4096, 10**7) for dtype in ("fp32", "bf16"))
    results.ms |= {(ours, fp32): 1.25, (ours, bf16): 1.0}
    fp16 = Case("rademacher", "fp16", 32, 4096, 10**7)
    results.ms |= {(ours, fp16): 1.0, (gpu_measure.FAST_JL, fp16): 9.9}
    sparse = {c: Case("sjlt", "fp32", 32, 4096, 10**7, nonzeros=c) for c in (1, 4)}
    results.ms |= {(gpu_measure.COPY, case): 4.0 for case in sparse.values()}
    results.ms |= {(ours, sparse[1]): 2.0, (ours, sparse[4]): 3.0}
    results.launch_us = 29.0
    results.extra_bytes = {bf16: 60 * 2**20, fp32: 67 * 2**20}
    verdicts = {target.what: target.verdict for target in results.targets()}
    assert verdicts["rate / cuBLAS with P resident, B = 128"] == "reached"
    assert verdicts["rate / cuBLAS with P resident, B = 16"] == "NOT REACHED"
    assert verdicts["rate / cuBLAS with P resident, B = 64"] == "not measured"
    assert verdicts["fp32 'high' / bf16, B = 16"] == "reached"
    assert verdicts["rate / fast_jl, B = 32"] == "NOT REACHED"
    assert verdicts["copy / sjlt as predicted, fp32, c = 1"] == "reached"
    assert verdicts["copy / sjlt as predicted, fp32, c = 4"] == "NOT REACHED"
    assert verdicts["copy / sjlt as predicted, bf16, c = 4"] == "not measured"
    assert verdicts["30 µs / launch overhead at D = 10^5"] == "reached"
    assert verdicts["memory bound / extra memory"] == "reached"  # 64 MiB and 2 MiB; 4 MiB for two terms
    results.extra_bytes[bf16] = 67 * 2**20
    assert results.targets()[-1].verdict == "NOT REACHED"


def test_rows_come_in_order_of_importance_and_once(gpu_measure: ModuleType) -> None:
    cases = gpu_measure.all_cases()
    assert len(set(cases)) == len(cases)
    first = list(dict.fromkeys(gpu_measure.priority_cases()))
    assert cases[: len(first)] == first


def test_time_is_kept(gpu_measure: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu_measure.Results()
    gpu_measure.measure(gpu_measure.Imagined(), gpu_measure.all_cases(), gpu_measure.Clock(0), [], results)
    assert results.ms == {}
    assert "time is up" in capsys.readouterr().out


@pytest.mark.parametrize("alive", [True, False])
def test_rows_that_fail_are_noted(gpu_measure: ModuleType, alive: bool) -> None:
    class Faulty(gpu_measure.Imagined):  # type: ignore[misc, name-defined]
        def ours(self, case: Any, results: Any) -> None:
            if case.B == 16:
                raise RuntimeError("out of memory\nand more")
            super().ours(case, results)

        def works(self) -> bool:
            return alive

    cases = [gpu_measure.Case("rademacher", "bf16", B, 4096, 10**6) for B in (8, 16, 32)]
    results, saved = gpu_measure.Results(), []
    gpu_measure.measure(Faulty(), cases, gpu_measure.Clock(1), [], results, lambda: saved.append(len(results.ms)))
    assert [case.B for method, case in results.ms if method == gpu_measure.OURS] == [8, 32][: 1 + alive]
    assert "B=16" in results.failures[0]
    assert results.failures[0].endswith("out of memory")
    assert len(results.failures) == 2 - alive
    assert saved == ([3, 3, 6] if alive else [3])  # rows of ours and of two peers, after each case


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--dry-run" in capsys.readouterr().err


def test_commands_that_fail_or_take_too_long(gpu_check: ModuleType) -> None:
    assert gpu_check.run([sys.executable, "-c", "print(7)"], 60) == ("passed", "7\n")
    verdict, output = gpu_check.run([sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], 60)
    assert (verdict, output) == ("FAILED (3)", "why\n")
    code = "import time; print('begun', flush=True); time.sleep(60)"
    verdict, output = gpu_check.run([sys.executable, "-c", code], 2)
    assert verdict == "not finished in 2 s"
    assert "begun" in output


def test_children_of_a_command_end_with_it(gpu_check: ModuleType) -> None:
    """As nvcc would under pip, and a hung kernel's process under compute-sanitizer."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    verdict, output = gpu_check.run([sys.executable, "-c", code], 3)
    assert verdict.startswith("not finished")
    for _ in range(50):
        try:
            state = Path(f"/proc/{int(output)}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_a_missing_tool_is_no_failure(gpu_check: ModuleType) -> None:
    checks = gpu_check.Checks()
    checks.note("memcheck", "compute-sanitizer is not there", "")
    checks.note("gpu tests", "passed: 3 passed in 1 s", "")
    assert not checks.failed
    checks.note("racecheck", "FAILED (9)", "a hazard")
    assert checks.failed


def test_a_prebuilt_module_is_copied(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    folder, root = tmp_path / "prebuilt", tmp_path / "project"
    (root / "trak_fast").mkdir(parents=True)
    folder.mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", root)
    (folder / "_C.cpython-27-other.so").write_text("")
    verdict, output = gpu_check.use_prebuilt(folder)
    assert verdict.startswith("FAILED")
    assert "_C.cpython-27-other.so" in output
    (folder / f"_C{suffix}").write_text("module")
    assert gpu_check.use_prebuilt(folder) == ("passed", "")
    assert (root / "trak_fast" / f"_C{suffix}").read_text() == "module"


def test_kernels_that_are_wrong_are_left_out(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this processor: instruction sets stand in for kernels."""
    gpu_smoke = importlib.import_module("gpu_smoke")
    check_cases = gpu_smoke.check_cases
    best, other = "portable", "sm90"

    def check_some(device: str, **options: Any) -> Any:
        outcomes = check_cases("cpu", kernels=best, only="B=3 direct@0", **options)
        assert outcomes
        wrong = [outcome._replace(case=outcome.case._replace(kernel=other)) for outcome in outcomes]
        late = [outcome._replace(case=outcome.case._replace(kernel="sm80")) for outcome in outcomes]
        return [*outcomes, wrong[0]._replace(verdict="wrong"), *wrong[1:], late[0], late[1]._replace(verdict="skipped")]

    monkeypatch.setattr(gpu_smoke, "check_cases", check_some)
    info = {"cuda_devices": [{"kernels": [best, other, "sm80"]}]}
    monkeypatch.setattr(importlib.import_module("trak_fast"), "info", lambda: info)
    checks = gpu_check.Checks()
    assert gpu_check.smoke(checks, 60) == [best, "sm80"]
    assert checks.failed
    printed = capsys.readouterr().out
    assert f"{best} against float64: passed" in printed
    assert "sm90 against float64: FAILED" in printed
    assert "sm80 against float64: not finished: 1 of" in printed


def test_a_timed_result_that_cannot_be_right(gpu_measure: ModuleType) -> None:
    case = gpu_measure.Case("rademacher", "bf16", 4, 2048, 10**6)
    right = torch.randn(4, 2048) * 1000
    gpu_measure.check_size(right, case)
    for wrong in (right * 1.2, right.index_fill(1, torch.arange(600), 0), right.index_fill(0, torch.tensor(2), 0)):
        with pytest.raises(RuntimeError, match="of D"):
            gpu_measure.check_size(wrong, case)
    right[3, 7] = float("nan")
    with pytest.raises(RuntimeError, match="of D"):
        gpu_measure.check_size(right, case)
