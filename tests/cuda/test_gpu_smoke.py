"""benchmarks/gpu_smoke.py on the CPU: its cases, the faults that it must find and name, and what it prints and writes.

Faults are functions of this file whose source becomes the module that a worker imports before its first case.
"""

import importlib
import inspect
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import warm

import trak_fast

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
HOPPER = ["sm90", "sm90_wide", "sm80", "sparse", "adjoint"]
LIMIT = 3.0


@pytest.fixture(scope="module")
def gpu_smoke() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("gpu_smoke")


@pytest.fixture(scope="module")
def matrices(gpu_smoke: ModuleType) -> dict[str, torch.Tensor]:
    """Columns 0 to 2177 of P for each kind."""
    return {kind: gpu_smoke.Matrix(kind, "cpu").columns(0, 2177, lambda: None) for kind in gpu_smoke.KINDS}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, restore_threads: None) -> None:
    """Computes small cases without threads, which would wait for each other where processors are busy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts workers from a Python that has imported torch already."""
    monkeypatch.setattr(sys, "executable", warm.python())


@pytest.fixture
def plant(gpu_smoke: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Has workers call a function before their first case."""

    def write(function: Callable) -> None:
        path = tmp_path / "planted_fault.py"
        path.write_text(f"from typing import Any\n\n{inspect.getsource(function)}\n{function.__name__}()\n")
        monkeypatch.setenv(gpu_smoke.PLANT_VARIABLE, str(path))

    return write


def plant_faults() -> None:
    """Replaces `project` by one that has a fault, another for each of some cases."""
    import itertools
    import os
    import time

    import trak_fast

    right, calls = trak_fast.project, itertools.count()

    def project(grads: Any, k: int, **options: Any) -> Any:
        place = options["proj_type"], str(grads.dtype).removeprefix("torch."), grads.shape[1], options["offset"]
        if place == ("rademacher", "bfloat16", 600, 0):
            grads = grads.clone()
            grads[:, [5, 6]] = grads[:, [6, 5]]
        if place == ("rademacher", "bfloat16", 600, 8):
            time.sleep(60)
        if place == ("rademacher", "float16", 600, 8):
            raise RuntimeError("an illegal instruction was encountered")
        if place == ("normal", "float16", 600, 77):
            print("these are the last words", flush=True)
            os._exit(3)
        y = right(grads, k, **options)
        if place == ("rademacher", "float16", 600, 0):
            y[:, 9] = y[:, 8]
        if place == ("normal", "bfloat16", 600, 0):
            y[1, 2] = float("nan")
        if place == ("normal", "float16", 600, 0):
            y[0, :7] += 1e-4 * next(calls)
        return y

    trak_fast.project = project


@pytest.mark.usefixtures("quick_workers")
def test_each_fault_is_named_and_other_cases_go_on(
    gpu_smoke: ModuleType,
    plant: Callable[[Callable], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(plant_faults)
    monkeypatch.setenv("OUT", str(tmp_path))
    options = ["--device", "cpu", "--kernels", "portable", "--limit", str(LIMIT), "--only", "B=3 direct"]
    assert gpu_smoke.main(options) == 2
    printed = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "smoke.json").read_text())
    found = {(row["kind"], row["dtype"], row["form"]): (row["verdict"], row["detail"]) for row in written}
    assert len(found) == len(written) == 16

    verdict, detail = found["rademacher", "bfloat16", "direct@0"]
    assert verdict == "wrong"
    assert detail.startswith("off by 0.")
    assert detail.endswith("of the norm in samples 0..2; from columns 0..18; columns 5->6, 6->5")
    assert f"portable rademacher bfloat16 B=3 direct@0: wrong: {detail}" in printed
    verdict, detail = found["rademacher", "float16", "direct@0"]
    assert verdict == "wrong"
    assert detail.endswith("samples 0..2; rows 9->8")
    verdict, detail = found["normal", "bfloat16", "direct@0"]
    assert verdict == "wrong"
    assert "off by nan of the norm in samples 1; " in detail
    assert found["normal", "float16", "direct@0"] == ("unrepeatable", "7 of 900 numbers differ between two calls")

    verdict, detail = found["rademacher", "bfloat16", "direct@8"]
    assert (verdict, detail.splitlines()[0]) == ("hung", "silent for 3 s")
    verdict, detail = found["rademacher", "float16", "direct@8"]
    assert (verdict, detail.splitlines()[0]) == ("crashed", "exit status 1")
    assert detail.endswith("RuntimeError: an illegal instruction was encountered")
    assert found["normal", "float16", "direct@77"] == ("crashed", "exit status 3\nthese are the last words")

    skipped = ("skipped", "2 cases of portable rademacher hung or crashed")
    for dtype, form in itertools.product(("bfloat16", "float16"), ("direct@72", "direct@77")):
        assert found["rademacher", dtype, form] == skipped
    for dtype, form in itertools.product(("bfloat16", "float16"), ("direct@8", "direct@72")):
        assert found["normal", dtype, form] == ("ok", "")
    assert found["normal", "bfloat16", "direct@77"] == ("ok", "")
    assert sum(skipped[1] in line for line in printed) == 1
    head, _, counts = printed[-1].partition(" s (")
    assert head.startswith("NOT ALL OK: 5 of 16 in ")
    assert counts == "3 wrong, 1 unrepeatable, 1 hung, 2 crashed, 4 skipped)"
    table = {tuple(line.split(maxsplit=3)[:3]): line.split(maxsplit=3)[3] for line in printed[-5:-1]}
    assert table["portable", "normal", "float16"] == "1 unrepeatable, 2 ok, 1 crashed"
    assert table["portable", "rademacher", "float16"] == "1 wrong, 1 crashed, 2 skipped"


@pytest.mark.usefixtures("quick_workers")
def test_all_is_right(
    gpu_smoke: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [row for row in gpu_smoke.PLAN if all(sum(gpu_smoke.FORMS[form].widths) < 10_000 for form in row[0])]
    monkeypatch.setattr(gpu_smoke, "PLAN", short)
    monkeypatch.setenv("OUT", str(tmp_path))
    options = ["--device", "cpu", "--kernels", "portable,sparse,adjoint", "--only", "B=3 "]
    assert gpu_smoke.main(options) == 0
    cases = [case for case in gpu_smoke.list_cases(["portable", "sparse", "adjoint"]) if case.B == 3]
    written = json.loads((tmp_path / "smoke.json").read_text())
    assert [tuple(row[field] for field in gpu_smoke.Case._fields) for row in written] == cases
    assert {row["verdict"] for row in written} == {"ok"}
    combinations = {(row["kernel"], row["kind"], row["dtype"], row["form"].split("@")[0]) for row in written}
    for kernel, kinds in {"portable": ["rademacher", "normal"], "sparse": ["sjlt"]}.items():
        assert combinations >= set(
            itertools.product([kernel], kinds, ["bfloat16", "float16"], ["direct", "packed", "slice"])
        )
    assert combinations >= set(
        itertools.product(["adjoint"], gpu_smoke.KINDS, ["bfloat16", "float16", "float32", "float64"], ["adjoint"])
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"ALL OK: {len(cases)} of {len(cases)} in ")


def plant_missing_library() -> None:
    raise ImportError("libcudart.so.13 is not there")


@pytest.mark.usefixtures("quick_workers")
def test_without_a_worker_it_says_so(
    gpu_smoke: ModuleType, plant: Callable[[Callable], None], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(plant_missing_library)
    assert gpu_smoke.main(["--device", "cpu"]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "no worker starts: crashed: exit status 1"
    assert "ImportError: libcudart.so.13 is not there" in printed
    assert printed[-1].startswith("NOT ALL OK: 0 of 0 in ")


def plant_sleep() -> None:
    import time

    import trak_fast

    def project(*_: Any, **__: Any) -> None:
        print("asleep", flush=True)
        time.sleep(60)

    trak_fast.project = project


def test_a_hung_worker_does_not_outlive_its_parent(gpu_smoke: ModuleType, plant: Callable[[Callable], None]) -> None:
    plant(plant_sleep)
    case = gpu_smoke.Case("portable", "normal", "float32", 1, "direct@0")
    parent = f"""if True:
        import subprocess, sys, time
        command = [sys.executable, {gpu_smoke.__file__!r}, "--worker", "--device", "cpu"]
        pipes = dict.fromkeys(["stdin", "stdout"], subprocess.PIPE)
        worker = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
        print({json.dumps([0, *case])!r}, file=worker.stdin, flush=True)
        print(worker.pid if "asleep\\n" in iter(worker.stdout.readline, "") else "the worker ended", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        state = Path(f"/proc/{int(process.stdout.readline())}/stat")
        assert state.exists()
        process.kill()
        process.wait()
    for _ in range(50):
        try:
            if state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    pytest.fail("the worker still runs")


def test_no_case_begins_after_the_time(gpu_smoke: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        kernels = ("sm80",)

        def __init__(self, *_: object) -> None:
            pass

        def check(self, number: int, case: object, limit: float) -> tuple[str, str]:
            time.sleep(0.2)
            return "ok", ""

        def stop(self) -> None:
            pass

    monkeypatch.setattr(gpu_smoke, "Worker", Fake)
    outcomes = gpu_smoke.check_cases(seconds=0.5, only="B=3 direct@0")
    assert [outcome.verdict for outcome in outcomes] == ["ok", "ok", "ok", "skipped"]
    assert outcomes[-1].detail == "no time left"
    assert gpu_smoke.summarize(outcomes, 0.6) == "NOT ALL OK: 3 of 4 in 1 s (1 skipped)"
    assert gpu_smoke.summarize(outcomes[:3], 41.2) == "ALL OK: 3 of 3 in 41 s"
    assert gpu_smoke.summarize([], 0).startswith("NOT ALL OK")


def test_cases_hit_each_compiled_kernel_in_each_form(gpu_smoke: ModuleType) -> None:
    cases = gpu_smoke.list_cases(HOPPER)
    assert len(set(cases)) == len(cases)
    assert 600 <= len(cases) <= 700
    tiles = {max(8, 1 << (B - 1).bit_length()) for B in gpu_smoke.WIDTHS}  # least power of two that holds B
    assert tiles == {8, 16, 32, 64, 128, 256}
    forms = ("direct@0", "packed@77", "direct@8", "direct@72", "direct@77", "long@512")
    for kernel, kind, dtype, B, form in itertools.product(
        ("sm90", "sm80"), ("rademacher", "normal"), ("bfloat16", "float16"), (3, 16, 32, 64, 128, 256), forms
    ):
        assert gpu_smoke.Case(kernel, kind, dtype, B, form) in cases
    wide = [case for case in cases if case.kernel == "sm90_wide"]
    assert {case.form for case in wide} >= {*forms, "slice@512", "odd_stride@0", "list@5", "segments@0"}
    assert {(case.kind, case.B) for case in wide} == {("rademacher", 256), ("rademacher", 300)}
    adjoint = {(case.kind, case.dtype, case.B) for case in cases if case.kernel == "adjoint"}
    dtypes = ("bfloat16", "float16", "float32", "float64")
    assert adjoint == set(itertools.product(("rademacher", "normal", "sjlt"), dtypes, (3, 40)))
    sparse = {(case.kind, case.dtype, case.B, case.form) for case in cases if case.kernel == "sparse"}
    assert sparse >= set(itertools.product(["sjlt"], ("bfloat16", "float16"), (3, 16, 32, 64, 128, 256), forms))
    sizes = [sum(gpu_smoke.FORMS[case.form].widths) for case in cases]
    assert max(sizes[:200]) < 3000
    assert sizes[-1] == max(sizes)


def test_forms_lie_in_memory_as_they_say(gpu_smoke: ModuleType) -> None:
    for form in gpu_smoke.FORMS.values():
        values = torch.arange(2.0 * sum(form.widths)).view(2, -1)
        tensors = gpu_smoke.lay_out(values, form)
        tensors = tensors if isinstance(tensors, list) else [tensors]
        assert torch.equal(torch.cat(tensors, dim=1), values)
        assert tuple(tensor.shape[1] for tensor in tensors) == form.widths
    direct = gpu_smoke.lay_out(torch.ones(2, 600), gpu_smoke.FORMS["direct@8"])
    assert direct.stride(0) % 8 == 0
    odd = gpu_smoke.lay_out(torch.ones(2, 1000), gpu_smoke.FORMS["odd_stride@0"])
    assert odd.stride(0) % 2 == 1
    beside = gpu_smoke.lay_out(torch.ones(3, 1000), gpu_smoke.FORMS["slice@512"])
    assert beside.storage_offset() == 3
    memory = beside.as_strided((3, 1008), (1008, 1), 0)
    assert memory.isnan().nonzero()[:, 1].tolist() == 3 * [0, 1, 2, *range(1003, 1008)]


def test_kernels_are_those_of_the_device_or_those_that_are_asked_for(gpu_smoke: ModuleType) -> None:
    info = {"instruction_sets": ["amx", "avx2", "portable"], "cuda_devices": [{"kernels": HOPPER[:3]}]}
    assert gpu_smoke.choose_kernels(info, "cuda", None) == HOPPER
    assert gpu_smoke.choose_kernels(info, "cpu", None) == ["amx", "portable", "sparse", "adjoint"]
    assert gpu_smoke.choose_kernels(info, "cuda", "sm80,adjoint") == ["sm80", "adjoint"]
    with pytest.raises(
        SystemExit, match="'sm42' is no kernel of this device, which has sm90, sm90_wide, sm80, sparse, adjoint"
    ):
        gpu_smoke.choose_kernels(info, "cuda", "sm80,sm42")
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_smoke.choose_kernels({**info, "cuda_devices": []}, "cuda", None)


def lose_columns(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return y - x[:, 2000:2008] @ P[:, 2000:2008].T


def read_columns_sixteen_too_far(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return y + x[:, 8:16] @ (P[:, 24:32] - P[:, 8:16]).T


def turn_a_sign(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return y - 2 * x[:, 7:8] @ P[:, 7:8].T


def shift_rows(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return torch.cat([y[:, :8], y[:, :8], y[:, 16:]], dim=1)


def exchange_samples(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return y[torch.tensor([0, 2, 1, *range(3, len(y))])]


def change_an_entry(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    y[:, 4] += 0.5 * x[:, 3]
    return y


def fail_where_all_is_full(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return y * 0.99 if x.count_nonzero() == x.numel() else y


def spoil_a_row(x: torch.Tensor, y: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    y[:, 299] = torch.nan
    return y


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lose_columns, "samples 0..15; from columns 1980..2045; columns 2000..2007->zero"),
        (read_columns_sixteen_too_far, "samples 0..15; from columns 0..65; columns 8..15->24..31"),
        (turn_a_sign, "samples 0..15; from columns 0..65; columns 7->-1*7"),
        (shift_rows, "samples 0..15; rows 8..15->0..7"),
        (exchange_samples, "of the norm in samples 1..2; columns 1->2, 2->1, 17->18, 18->17, 33->34, 34->33, 49->50, "),
        (change_an_entry, "from columns 0..65; entries of P that differ: 1, in columns 3 and rows 4"),
        (fail_where_all_is_full, "samples 0..15; one-hot gradients give the right columns 0..639"),
        (spoil_a_row, "off by nan of the norm in samples 0..15; rows 299->nan"),
    ],
)
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_a_wrong_result_is_explained_in_one_line(
    gpu_smoke: ModuleType,
    matrices: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., torch.Tensor],
    named: str,
    kind: str,
) -> None:
    right = trak_fast.project
    case = gpu_smoke.Case("portable", kind, "bfloat16", 16, "packed@77")
    P = matrices[kind][:, 77:]
    assert gpu_smoke.judge(case, P.T, lambda: None) == "ok"
    monkeypatch.setattr(trak_fast, "project", lambda x, k, **options: fault(x.float(), right(x, k, **options), P))
    verdict = gpu_smoke.judge(case, P.T, lambda: None)
    assert verdict.startswith("wrong: off by ")
    assert named in verdict
    assert "\n" not in verdict
    assert len(verdict) < 300


def test_the_adjoint_takes_rows(
    gpu_smoke: ModuleType, matrices: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trak_fast.project_adjoint
    case = gpu_smoke.Case("adjoint", "normal", "float32", 3, "adjoint@0")
    P = matrices["normal"][:, :1100]
    assert gpu_smoke.judge(case, P, lambda: None) == "ok"

    def exchange_rows(y: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        y = y.clone()
        y[:, [8, 9]] = y[:, [9, 8]]
        return right(y, *arguments, **options)

    monkeypatch.setattr(trak_fast, "project_adjoint", exchange_rows)
    assert gpu_smoke.judge(case, P, lambda: None).endswith("from rows 0..9; rows 8->9, 9->8")


def test_long_lists_are_cut(gpu_smoke: ModuleType) -> None:
    assert gpu_smoke.spans([0, 1, 2, 5, 7, 8]) == "0..2, 5, 7..8"
    assert gpu_smoke.spans(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, and 12 more"


def test_a_module_without_the_kernels_of_the_device(gpu_smoke: ModuleType) -> None:
    gpu_smoke.require_own_kernels((9, 0), ["sm90", "sm90_wide", "sm80"])
    gpu_smoke.require_own_kernels((8, 0), ["sm80"])
    with pytest.raises(SystemExit, match=r"Hopper .* only sm80"):
        gpu_smoke.require_own_kernels((9, 0), ["sm80"])
