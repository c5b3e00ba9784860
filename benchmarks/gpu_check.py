"""Everything that needs a GPU, in one command of under nine minutes: build, tests, sanitizers, measurements.

    python benchmarks/gpu_check.py [--minutes 8.5] [--fast-jl fast_jl-0.1.3.tar.gz] [--dry-run]

For a bare machine without network: needs torch, pybind11, cmake, ninja and nvcc, and builds for the device's own
architecture. Writes JSON to $OUT or benchmarks/results/, also while it measures, and prints a short table last, with
each target as reached or not. Measurements stop when the time is up; the rows that the targets need come first. A
kernel that fails or hangs on small shapes is reported and left out; so is what is missing: pytest, compute-sanitizer,
fast_jl. How times are taken stands in gpu_measure.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from gpu_measure import KERNELS, Clock, Gpu, Imagined, Results, all_cases, measure, table

ROOT = Path(__file__).resolve().parents[1]
ADJOINT = "adjoint"  # among the names of kernels on small shapes
FAST_JL_TRIAL = """
import fast_jl, torch
fast_jl.project_rademacher_8(torch.randn(8, 10000, device="cuda").half(), 512, 0, 100)
torch.cuda.synchronize()
"""


def run(command: list[str], seconds: float, **environment: str) -> tuple[str, str]:
    """Whether a command passed within a time, and the end of its output. Its children end with it."""
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
    return verdict, output[-3000:]


def build(architecture: str, clock: Clock) -> tuple[str, str]:
    """As users do, by pip; where that is not possible (no setuptools, a read-only environment), by CMake alone."""
    settings = {"TRAK_FAST_CUDA": "ON", "TRAK_FAST_CUDA_ARCHITECTURES": architecture}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--disable-pip-version-check"]
    verdict, output = run([*command, "--no-build-isolation", "--no-deps", "-e", "."], 240, **settings)
    if verdict == "passed" or verdict.startswith("not finished"):
        return verdict, output
    print(f"pip install: {verdict}, so CMake builds\n{output[-1000:]}", flush=True)
    folder = str(ROOT / "build" / (sys.implementation.cache_tag or "python"))  # setup.py's
    (Path(folder) / "CMakeCache.txt").unlink(missing_ok=True)
    variables = {**settings, "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(ROOT / "trak_fast")}
    variables["Python_EXECUTABLE"] = sys.executable
    if (nvcc := find_tool("nvcc")) is not None:
        variables["CMAKE_CUDA_COMPILER"] = nvcc
    _, pybind11 = run([sys.executable, "-m", "pybind11", "--cmakedir"], 30)
    variables["pybind11_DIR"] = pybind11.strip()
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", folder, *(f"-D{k}={v}" for k, v in variables.items())]
    if shutil.which("cmake") is None:
        return "FAILED: cmake is not there", output
    verdict, output = run(configure, 60)
    return run(["cmake", "--build", folder], min(200, clock.left - 60)) if verdict == "passed" else (verdict, output)


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc, or in the usual folders."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(home) / "bin" for home in homes if home]
    found = (shutil.which(str(folder / name)) for folder in folders)
    return shutil.which(name) or next((tool for tool in found if tool), None)


def small_shapes(kernels: list[str]) -> None:
    """Each kernel against the processor on shapes that are small enough for compute-sanitizer.

    Inputs come from the processor and results go there, so that nearly all kernels that run are the project's.
    """
    trak_fast = importlib.import_module("trak_fast")
    adjoint, kernels = ADJOINT in kernels, [kernel for kernel in kernels if kernel != ADJOINT]

    def check(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, what: object) -> None:
        error = (y.cpu() - expected).abs().amax(dim=1) / x.float().norm(dim=1)
        assert error.max() < 1e-3, f"{what}: off by {error.max():.2g} of the norm"  # a lost column: some 2e-2

    torch.manual_seed(0)
    for kernel, kind, B, dtype in itertools.product(
        kernels, ("rademacher", "normal"), (3, 20, 140), (torch.bfloat16, torch.float32)
    ):
        os.environ["TRAK_FAST_CUDA_KERNEL"] = kernel
        x = torch.randn(B, 2100).to(dtype)
        y = trak_fast.project(x.cuda(), 300, proj_type=kind, offset=77)
        check(y, trak_fast.project(x, 300, proj_type=kind, offset=77), x, (kernel, kind, B, dtype))
    for kind, B in itertools.product(("rademacher", "normal"), (3, 20) if adjoint else ()):
        x = torch.randn(B, 300)
        y = trak_fast.project_adjoint(x.cuda(), 1100, proj_type=kind)
        check(y, trak_fast.project_adjoint(x, 1100, proj_type=kind), x, ("adjoint", kind, B))
    print("done")


class Checks:
    """What passed and what did not, printed as it is found."""

    def __init__(self) -> None:
        self.verdicts: dict[str, str] = {}

    def note(self, name: str, verdict: str, output: str) -> None:
        self.verdicts[name] = verdict
        print(f"{name}: {verdict}", flush=True)
        if not verdict.startswith("passed"):
            print(output, flush=True)

    @property
    def failed(self) -> bool:
        """Whether something went wrong; what is missing or had no time is not wrong."""
        return any(verdict.startswith(("FAILED", "not finished")) for verdict in self.verdicts.values())


def try_kernels(checks: Checks, clock: Clock, kernels: list[str]) -> list[str]:
    """The kernels that are right on small shapes: others would hang or spoil all that follows."""
    works = []
    for kernel in [*kernels, ADJOINT]:
        verdict, output = run([sys.executable, __file__, "--small", kernel], min(60, clock.left - 20))
        checks.note(f"{kernel} on small shapes", verdict, output)
        if verdict == "passed":
            works.append(kernel)
    return works


def check_correctness(checks: Checks, clock: Clock, minutes_for_measuring: float, kernels: list[str]) -> None:
    """Runs the gpu tests and the sanitizers while enough time is left to measure. kernels: as for small_shapes."""
    spare = clock.left - 60 * minutes_for_measuring
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        checks.note("gpu tests", f"{' and '.join(missing)} not there", "")
    elif spare < 10:
        checks.note("gpu tests", "no time left", "")
    else:
        # Warnings of another torch version are no errors here.
        pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "-m", "gpu", "-o", "filterwarnings="]
        pytest += ["--continue-on-collection-errors", "-p", "no:cacheprovider", *tests]
        broken = [name for name in (*KERNELS, ADJOINT) if name not in kernels]
        pytest += ["-k", " and ".join(f"not {name}" for name in broken)] if broken else []
        verdict, output = run(pytest, 0.6 * spare, TRAK_FAST_CUDA_KERNEL=kernels[0])
        summary = output.strip().splitlines()[-1] if output.strip() else ""
        if verdict == "passed":  # also when all were skipped, which the summary shows
            verdict = f"passed: {summary}" if " passed" in summary else f"FAILED: {summary}"
        checks.note("gpu tests", verdict, output)
    tool = find_tool("compute-sanitizer")
    for checker in ("memcheck", "racecheck", "synccheck", "initcheck"):
        spare = clock.left - 60 * minutes_for_measuring
        if tool is None:
            checks.note(checker, "compute-sanitizer is not there", "")
        elif spare < 10:
            checks.note(checker, "no time left", "")
        else:
            command = [tool, "--tool", checker, "--error-exitcode", "9", sys.executable, __file__, "--small", *kernels]
            verdict, output = run(command, min(60, spare), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            if verdict != "passed" and "Device not supported" in output:
                verdict = "compute-sanitizer does not support this device"
            checks.note(checker, verdict, output)


def prepare(
    options: argparse.Namespace, checks: Checks, results: Results, clock: Clock
) -> tuple[Gpu, list[str]] | None:
    """Builds and checks; the device to measure on and the kernels that work there, None if there are none."""
    major, minor = torch.cuda.get_device_capability(0)
    verdict, output = build("90a" if (major, minor) == (9, 0) else f"{major}{minor}", clock)
    checks.note("build", verdict, output)
    if verdict != "passed":
        return None
    print(f"{clock.left:.0f} s left", flush=True)
    try:
        devices = importlib.import_module("trak_fast").info()["cuda_devices"]
    except ImportError as error:
        checks.note("import", f"FAILED: {error}", "")
        return None
    if not devices:
        checks.note("devices", "FAILED: trak_fast finds none; is the driver older than nvcc?", "")
        return None
    works = try_kernels(checks, clock, devices[0]["kernels"])
    kernels = [kernel for kernel in works if kernel != ADJOINT]
    if not kernels:
        return None
    if not options.skip_checks:
        check_correctness(checks, clock, options.measure_minutes, works)
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
    return Gpu(kernels[0], with_fast_jl=verdict == "passed"), kernels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds, tests and measures trak_fast on this machine's GPU.")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything (default 8.5)")
    parser.add_argument("--measure-minutes", type=float, default=4, help="of these, kept for measuring (default 4)")
    parser.add_argument("--fast-jl", help="fast_jl's sdist, to build and to compare with")
    parser.add_argument("--skip-checks", action="store_true", help="build, try small shapes and measure, nothing else")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: imagined times, everything else as always")
    parser.add_argument("--small", nargs="+", metavar="KERNEL", help="only run small shapes with these kernels")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    if options.small:
        small_shapes(options.small)
        return 0
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device (--dry-run does without)")
    clock, checks, results = Clock(options.minutes), Checks(), Results()
    device = "imagined" if options.dry_run else torch.cuda.get_device_name(0)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat()
    results_folder = Path(tempfile.gettempdir()) if options.dry_run else ROOT / "benchmarks" / "results"
    folder = Path(os.environ.get("OUT") or results_folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in device).lower()
    path = folder / f"{date[:10]}-{name}.json"

    def save() -> None:
        head = {"date": date, "torch": torch.__version__, "device": device, "checks": checks.verdicts}
        path.write_text(json.dumps({**head, **results.as_json()}, indent=1))

    def finish() -> None:
        save()
        print(f"\nwritten to {path}\n{device}, torch {torch.__version__}")
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

    # What the device is asked for cannot be interrupted, but the report can be written beside it.
    watchdog = threading.Timer(max(1.0, clock.left) + 15, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        prepared: tuple[Gpu | Imagined, list[str]] | None = (Imagined(), KERNELS)
        if not options.dry_run:
            prepared = prepare(options, checks, results, clock)
        if prepared is not None:
            measure(prepared[0], all_cases(), clock, prepared[1], results, save)
    finally:
        watchdog.cancel()
        finish()
    return 2 if checks.failed or results.failures or prepared is None else 0


if __name__ == "__main__":
    sys.exit(main())
