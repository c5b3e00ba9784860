"""Builds, checks and measures all that needs a GPU, in one command of under nine minutes.

    python benchmarks/gpu_check.py [--minutes 8.5] [--prebuilt FOLDER] [--variants FOLDER ...] [--dry-run]

It is made for a bare machine without network. It needs torch, and, unless the module is prebuilt (see prebuild.py),
pybind11, cmake, ninja and nvcc. Its steps, in order: every kernel against float64 (gpu_smoke.py), quick times, the gpu
tests, the measurements with their targets (gpu_measure.py says how times are taken), variants of the module against it
(gpu_variants.py), Nsight Compute, compute-sanitizer. Kernels that are wrong or hang are named and left out of later
steps. Missing tools (pytest, ncu, compute-sanitizer, fast_jl) are named, and their steps left out.

`--minutes` bounds all steps together. JSON goes to $OUT or benchmarks/results/ after each row. The last lines that are
printed are the table: right or wrong, and each target as reached or not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from gpu_measure import KERNELS, Clock, Gpu, Imagined, Results, all_cases, measure, table
from gpu_smoke import ADJOINT, NO_TILES, ROWS, SPARSE
from prebuild import find_module

ROOT = Path(__file__).resolve().parents[1]
SAVE_SECONDS = 1.0
"""Seconds between two writings of the results; a kill loses at most what was measured in that time."""
FAST_JL_TRIAL = """
import torch, fast_jl
fast_jl.project_rademacher_8(torch.randn(8, 10000, device="cuda").half(), 512, 0, 100)
torch.cuda.synchronize()
"""


def run(command: list[str], seconds: float, log: str = "", **environment: str) -> tuple[str, str]:
    """Runs a command for some seconds at most, and ends its children with it.

    Args:
        command: The program and its arguments.
        seconds: The time limit.
        log: A file in $OUT that the whole output is added to; "": none.
        **environment: Further environment variables.

    Returns:
        The verdict, which is "passed" or begins with "FAILED" or "not finished", and the end of the output.
    """
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=ROOT,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    seconds = max(1, seconds)
    try:
        output, _ = process.communicate(timeout=seconds)
        verdict = "passed" if process.returncode == 0 else f"FAILED ({process.returncode})"
    except subprocess.TimeoutExpired:
        verdict = f"not finished in {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if verdict.startswith("not finished"):
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired as stuck:  # a process may outlive SIGKILL while a GPU hangs
            output = (stuck.stdout or b"").decode(errors="replace") if isinstance(stuck.stdout, bytes) else ""
    if log and (folder := os.environ.get("OUT")):
        with Path(folder, log).open("a") as file:
            print(shlex.join(command), verdict, output, sep="\n", file=file)
    return verdict, output[-3000:]


def use_prebuilt(folder: Path) -> tuple[str, str]:
    """Copies the module that prebuild.py made for this Python into the package."""
    try:
        shutil.copy(find_module(folder), ROOT / "trak_fast")
    except ValueError as error:
        return "FAILED", str(error)
    return "passed", ""


def build(architecture: str, clock: Clock) -> tuple[str, str]:
    """Builds by pip, as users do, or else by prebuild.py: pip may lack setuptools or the right to write."""
    settings = {"TRAK_FAST_CUDA": "ON", "TRAK_FAST_CUDA_ARCHITECTURES": architecture}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--disable-pip-version-check"]
    verdict, output = run([*command, "--no-build-isolation", "--no-deps", "-e", "."], 240, **settings)
    if verdict == "passed" or verdict.startswith("not finished"):
        return verdict, output
    print(f"pip install: {verdict}, so prebuild.py builds\n{output[-1000:]}", flush=True)
    script = [sys.executable, str(ROOT / "benchmarks" / "prebuild.py"), "--normal"]
    target = ["--python", sys.executable, "--architecture", architecture, str(ROOT / "trak_fast")]
    nvcc = find_tool("nvcc")
    return run([*script, *target], min(260, clock.left - 60), **({"CUDACXX": nvcc} if nvcc else {}))


def find_tool(name: str) -> str | None:
    """Finds a program of the CUDA toolkit on PATH, beside nvcc, or in the usual folders."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(home) / "bin" for home in homes if home]
    found = (shutil.which(str(folder / name)) for folder in folders)
    return shutil.which(name) or next((tool for tool in found if tool), None)


def small_shapes(kernels: list[str]) -> None:
    """Compares each kernel with the processor, on shapes that are small enough for compute-sanitizer.

    Inputs come from the processor and results go there, so that nearly all kernels that run are the project's.
    """
    trak_fast = importlib.import_module("trak_fast")

    def check(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, case: object) -> None:
        error = (y.cpu() - expected).abs().amax(dim=1) / x.float().norm(dim=1)
        assert error.max() < 1e-3, f"{case}: off by {error.max():.2g} of the norm"  # a lost column: some 2e-2

    torch.manual_seed(0)
    for kernel, kind, B, dtype in itertools.product(
        [name for name in kernels if name not in NO_TILES],
        ("rademacher", "normal"),
        (3, 20, 140),
        (torch.bfloat16, torch.float32),
    ):
        os.environ["TRAK_FAST_CUDA_KERNEL"] = kernel
        x = torch.randn(B, 2100).to(dtype)
        y = trak_fast.project(x.cuda(), 300, proj_type=kind, offset=77)
        check(y, trak_fast.project(x, 300, proj_type=kind, offset=77), x, (kernel, kind, B, dtype))
    os.environ.pop("TRAK_FAST_CUDA_KERNEL", None)
    sizes = itertools.product((64, 1024, 65536, 131072), (1, 20), (torch.float32, torch.bfloat16, torch.float64))
    for k, B, dtype in sizes if SPARSE in kernels else ():
        x = torch.randn(B, 2100).to(dtype)
        y = trak_fast.project(x.cuda(), k, proj_type="sjlt", offset=76)
        check(y, trak_fast.project(x, k, proj_type="sjlt", offset=76), x, (SPARSE, k, B, dtype))
    for (kind, k), B in itertools.product(ROWS.items(), (3, 20) if ADJOINT in kernels else ()):
        x = torch.randn(B, k)
        y = trak_fast.project_adjoint(x.cuda(), 1100, proj_type=kind)
        check(y, trak_fast.project_adjoint(x, 1100, proj_type=kind), x, ("adjoint", kind, B))
    print("done")


class Checks:
    """The verdicts of the checks, printed as they are found."""

    def __init__(self) -> None:
        self.verdicts: dict[str, str] = {}

    def note(self, name: str, verdict: str, output: str) -> None:
        """Keeps and prints a verdict, and prints the output of a check that did not pass."""
        self.verdicts[name] = verdict
        print(f"{name}: {verdict}", flush=True)
        if not verdict.startswith("passed"):
            print(output, flush=True)

    @property
    def failed(self) -> bool:
        """True if a check went wrong; a check that is missing or had no time did not."""
        return any(verdict.startswith(("FAILED", "not finished")) for verdict in self.verdicts.values())


def smoke(checks: Checks, seconds: float) -> list[str]:
    """Runs gpu_smoke.py; returns the kernels, NO_TILES among them, that were right in every case that was reached."""
    gpu_smoke = importlib.import_module("gpu_smoke")
    names = [*importlib.import_module("trak_fast").info()["cuda_devices"][0]["kernels"], *NO_TILES]
    try:
        outcomes = gpu_smoke.check_cases("cuda", seconds=seconds, report=gpu_smoke.Reporter())
    except gpu_smoke.WorkerFailed as failure:
        checks.note("gpu_smoke.py", f"FAILED: no worker starts: {failure}", "")
        return []
    gpu_smoke.write_json(outcomes)
    print(gpu_smoke.tabulate(outcomes), flush=True)
    works = []
    for name in names:
        verdicts = [outcome.verdict for outcome in outcomes if outcome.case.kernel == name]
        right, reached = verdicts.count("ok"), sum(verdict != "skipped" for verdict in verdicts)
        if 0 < right == reached:
            works.append(name)
        verdict = "passed" if 0 < right == len(verdicts) else "FAILED" if right < reached else "not finished"
        checks.note(f"{name} against float64", f"{verdict}: {right} of {len(verdicts)} right", "")
    return works


def run_tests(checks: Checks, seconds: float, works: list[str]) -> None:
    """Runs the gpu tests of the kernels in `works`, which smoke() returned; the test of torch.compile comes last."""
    tests = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or seconds < 10:
        checks.note("gpu tests", f"{' and '.join(missing)} not there" if missing else "no time left", "")
        return
    # Warnings of another torch version are no errors here.
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "filterwarnings=", "-o", "addopts="]
    pytest += ["-p", "no:cacheprovider", "--maxfail=5", "--continue-on-collection-errors", *tests]
    if importlib.util.find_spec("pytest_timeout") is not None:
        pytest += ["--timeout", "30", "--timeout-method", "thread"]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") is not None else []
    broken = [f"not {name}" for name in (*KERNELS, *NO_TILES) if name not in works]
    end = time.monotonic() + seconds
    for name, options, chosen in (
        ("gpu tests", parallel, " and ".join([*broken, "not compiled_function"])),
        ("gpu test of torch.compile", [], "compiled_function"),
    ):
        kernel = next(kernel for kernel in works if kernel not in NO_TILES)
        verdict, output = run(
            [*pytest, *options, "-k", chosen],
            end - time.monotonic(),
            "gpu-tests.log",
            TRAK_FAST_CUDA_KERNEL=kernel,
        )
        last = output.strip().splitlines()[-1] if output.strip() else ""
        if verdict == "passed":  # also when all were skipped, which the last line shows
            verdict = f"passed: {last}" if " passed" in last else f"FAILED: {last}"
        checks.note(name, verdict, output)


def profile(checks: Checks, seconds: float) -> None:
    """Profiles one launch of each tile with Nsight Compute, at the clock that the device chooses."""
    tool = find_tool("ncu")
    if tool is None or seconds < 20:
        checks.note("ncu", "not there" if tool is None else "no time left", "")
        return
    sections = [f"--section={name}" for name in ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "LaunchStats")]
    command = [tool, "--clock-control", "none", "--kernel-name", "regex:tile|pack", *sections, "--csv"]
    verdict, _ = run([*command, sys.executable, __file__, "--profiled"], seconds, "ncu.csv", TRAK_FAST_CUDA_KERNEL="")
    checks.note("ncu", verdict, "")


def call_profiled() -> None:
    """Makes the calls that profile() looks at."""
    project = importlib.import_module("trak_fast").project
    for kind, dtype, B in [
        *(("rademacher", torch.bfloat16, B) for B in (8, 32, 128, 256)),
        *(("normal", torch.bfloat16, B) for B in (64, 256)),
        ("rademacher", torch.float32, 32),
    ]:
        project(torch.randn(B, 1 << 19, device="cuda").to(dtype), 4096, proj_type=kind)
    torch.cuda.synchronize()


def sanitize(checks: Checks, clock: Clock, works: list[str]) -> None:
    """Runs compute-sanitizer on small shapes, as long as there is time.

    Racecheck and synccheck do not understand warps that wait for the copy engine, and report CUTLASS's own kernels too,
    so for Hopper's tiles they are information only.
    """
    tool = find_tool("compute-sanitizer")
    hopper = [name for name in works if name.startswith("sm90")]
    others = [name for name in works if name not in hopper]
    for checker, kernels, informs in (
        ("memcheck", works, False),
        ("racecheck", others, False),
        ("synccheck", others, False),
        ("initcheck", works, False),
        ("racecheck", hopper, True),
        ("synccheck", hopper, True),
    ):
        name = f"{checker} of {', '.join(kernels)}"
        if tool is None or clock.left < 15 or not kernels:
            checks.note(name, "compute-sanitizer is not there" if tool is None else "no time left", "")
            continue
        command = [tool, "--tool", checker, "--error-exitcode", "9", sys.executable, __file__, "--small", *kernels]
        verdict, output = run(command, min(60, clock.left - 5), "sanitizers.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if verdict != "passed" and "Device not supported" in output:
            verdict = "compute-sanitizer does not support this device"
        elif verdict != "passed" and informs:
            verdict = f"reports something, which is information only: {verdict}"
        checks.note(name, verdict, output)


def prepare(
    options: argparse.Namespace, checks: Checks, results: Results, clock: Clock
) -> tuple[Gpu, list[str]] | None:
    """Builds and checks; returns the device to measure on and the kernels that are right, or None if no kernel is."""
    major, minor = torch.cuda.get_device_capability(0)
    if options.prebuilt:
        checks.note("prebuilt module", *use_prebuilt(options.prebuilt))
    else:
        checks.note("build", *build("90a" if (major, minor) == (9, 0) else f"{major}{minor}", clock))
    if checks.failed:
        return None
    try:
        devices = importlib.import_module("trak_fast").info()["cuda_devices"]
    except ImportError as error:
        checks.note("import", f"FAILED: {error}", "")
        return None
    if not devices:
        checks.note("devices", "FAILED: trak_fast finds none; is the driver older than nvcc?", "")
        return None
    works = smoke(checks, min(120, clock.left - 30))
    kernels = [name for name in works if name not in NO_TILES]
    print(f"{clock.left:.0f} s left", flush=True)
    if not kernels:
        return None
    if options.fast_jl:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
        seconds = min(150, clock.left - 120)
        verdict, output = run([*command, options.fast_jl], seconds, TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
        print(f"building fast_jl: {verdict}\n{'' if verdict == 'passed' else output}", flush=True)
    verdict, output = run([sys.executable, "-c", FAST_JL_TRIAL], 30)
    if verdict != "passed":
        last = output.strip().splitlines()[-1:] or [""]
        results.missing.append(f"fast_jl: {verdict} {last[0]}")
    importlib.invalidate_caches()
    return Gpu(kernels[0], with_fast_jl=verdict == "passed"), works


def print_quick_times(gpu: Gpu | Imagined, kernels: list[str], results: Results) -> None:
    """Prints the quick times of some kernels, or notes why there are none."""
    try:
        for line in gpu.quick_times(kernels):
            print(line, flush=True)
    except RuntimeError as error:
        results.failures.append(f"quick times: {str(error).splitlines()[0][:200]}")


def compare_variants(checks: Checks, folders: list[Path], seconds: float) -> None:
    """Runs gpu_variants.py; the module in use is the first that it compares."""
    if not folders:
        return
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_variants.py"), *map(str, folders)]
    verdict, output = run(command, seconds, "variants.log")
    checks.note("variants", verdict, output)
    if verdict == "passed":
        print(output, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 if something is wrong."""
    parser = argparse.ArgumentParser(description="Builds, tests and measures trak_fast on this machine's GPU.")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit for everything (default 8.5)")
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="has the module, from prebuild.py: no build")
    parser.add_argument(
        "--variants", type=Path, nargs="+", default=[], metavar="FOLDER", help="other modules, to compare"
    )
    parser.add_argument("--fast-jl", help="fast_jl's sdist, to build and to compare with")
    parser.add_argument("--skip-checks", action="store_true", help="no tests, no ncu and no sanitizers")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: imagined times, everything else as always")
    parser.add_argument("--small", nargs="+", metavar="KERNEL", help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    if options.small:
        small_shapes(options.small)
        return 0
    if options.profiled:
        call_profiled()
        return 0
    if options.prebuilt:
        try:
            find_module(options.prebuilt)
        except ValueError as error:
            parser.error(f"--prebuilt: {error}")
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device (--dry-run does without)")
    clock = Clock(options.minutes)
    checks = Checks()
    results = Results()
    device = "imagined" if options.dry_run else torch.cuda.get_device_name(0)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat()
    results_folder = Path(tempfile.gettempdir()) if options.dry_run else ROOT / "benchmarks" / "results"
    folder = Path(os.environ.get("OUT") or results_folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in device).lower()
    path = folder / f"{date[:10]}-{name}.json"

    saved = -math.inf

    def save(at_once: bool = False) -> None:
        """Writes the results, unless that was done less than SAVE_SECONDS ago: it takes time from the measurements."""
        nonlocal saved
        if at_once or time.monotonic() - saved > SAVE_SECONDS:
            head = {"date": date, "torch": torch.__version__, "device": device, "checks": checks.verdicts}
            path.write_text(json.dumps({**head, **results.as_json()}, indent=1))
            saved = time.monotonic()

    def finish() -> None:
        save(at_once=True)
        print(f"\nwritten to {path}\n{device}, torch {torch.__version__}")
        if options.dry_run:
            print("all times and verdicts below are IMAGINED")
        if results.copy_gb_per_s is not None and results.launch_us is not None:
            print(
                f"copy {results.copy_gb_per_s:.0f} GB/s (read and written), launch overhead {results.launch_us:.1f} µs"
            )
        for check, verdict in checks.verdicts.items():
            print(f"{check}: {verdict}")
        for line in [*(f"FAILED: {x}" for x in results.failures[:8]), *(f"missing: {x}" for x in results.missing[:8])]:
            print(line)
        print(table(results), flush=True)

    def give_up() -> None:
        results.failures.append("the device hangs, or a row took far longer than expected")
        finish()
        os._exit(3)

    # Work of the device cannot be interrupted, but another thread can write the report.
    watchdog = threading.Timer(max(1.0, clock.left) + 15, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        prepared: tuple[Gpu | Imagined, list[str]] | None = (Imagined(), KERNELS)
        if not options.dry_run:
            prepared = prepare(options, checks, results, clock)
        if prepared is not None:
            gpu, works = prepared
            kernels = [name for name in works if name not in NO_TILES]
            print_quick_times(gpu, kernels, results)
            more = not (options.dry_run or options.skip_checks)
            if more:
                run_tests(checks, 0.4 * clock.left, works)
            # The measurements take the time that is left, less a reserve for the steps after them.
            reserve = min((30 if options.variants else 0) + (90 if more else 0), 0.35 * clock.left)
            measure(gpu, all_cases(), Clock((clock.left - reserve) / 60), kernels, results, save)
            save(at_once=True)
            compare_variants(checks, options.variants, min(60, clock.left - 10))
            if more:
                profile(checks, min(60, clock.left - 10))
                sanitize(checks, clock, works)
    finally:
        watchdog.cancel()
        finish()
    return 2 if checks.failed or results.failures or prepared is None else 0


if __name__ == "__main__":
    sys.exit(main())
