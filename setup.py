"""Decides whether the compiled module gets a CUDA part, and builds it with CMake.

It knows nothing of torch: one build serves every version.

Environment variables:
    TRAK_FAST_CUDA: AUTO (default: with the CUDA part if this machine has a GPU that it serves and a compiler can be
        had), ON (also without a GPU; the build fails without a compiler) or OFF.
    TRAK_FAST_CUDA_ARCHITECTURES: "all" or a list such as "90a;120" instead of those of the GPUs found. Naming some
        turns AUTO into ON.
    CMAKE_ARGS: further arguments for CMake, by which packagers name compilers and flags.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if sys.version_info < (3, 10):  # noqa: UP036 - pip would fetch all dependencies before it says so
    raise SystemExit("trak_fast needs Python 3.10 or newer")

ROOT = Path(__file__).parent.resolve()

COMPILER_PACKAGES = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.*"
"""The CUDA compiler as pip has it, also in the extra `cuda`. No package of CUDA 12 holds nvcc."""

PIP_CUDA = (13, 0)
"""The version of CUDA that is in COMPILER_PACKAGES."""

LEAST_CUDA = (12, 8)
"""Oldest CUDA compiler that knows all our architectures and flags."""

LEAST_DRIVERS = {12: 525, 13: 580}
"""From major versions of CUDA to the oldest major version of the driver that runs what their compilers make."""

USUAL_HOME = "/usr/local/cuda"
"""Folder in which NVIDIA's installers put CUDA."""

LEAST_CAPABILITY = (8, 0)
"""Oldest compute capability that the kernels serve."""

PATIENCE = 60
"""Seconds that a program may take to say what it is."""


class Gpu(NamedTuple):
    """A device that the driver lists."""

    capability: tuple[int, int]
    driver: int


class Compiler(NamedTuple):
    """A CUDA compiler, and the architectures it knows, as numbers such as 90."""

    path: str
    version: tuple[int, int]
    architectures: tuple[int, ...] = ()


class CudaPart(NamedTuple):
    """The decision about the CUDA part."""

    architectures: str
    """As CMakeLists.txt takes them; empty without a CUDA part."""

    reason: str
    compiler: Compiler | None = None
    """The compiler; None without a CUDA part, and if it has yet to come from pip."""


def ask(*command: str) -> str:
    """Runs a program and returns what it prints; nothing if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


@functools.cache
def find_gpus() -> list[Gpu]:
    """Lists the GPUs of this machine; none if the driver does not answer."""
    output = ask("nvidia-smi", "--query-gpu=compute_cap,driver_version", "--format=csv,noheader")
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*,\s*(\d+)", output, re.MULTILINE)
    return [Gpu((int(major), int(minor)), int(driver)) for major, minor, driver in found]


def read_compiler(path: str) -> Compiler | None:
    """Asks a compiler for its version and architectures; None if it does not run."""
    version = re.search(r"release (\d+)\.(\d+)", ask(path, "--version"))
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)", ask(path, "--list-gpu-arch"))})
    return Compiler(path, (int(version[1]), int(version[2])), tuple(known)) if version else None


def suits(version: tuple[int, int], gpus: Sequence[Gpu]) -> bool:
    """Returns True if a compiler is new enough for the kernels, and not too new for the driver of some GPUs."""
    least_driver = LEAST_DRIVERS.get(version[0], 0)
    return version >= LEAST_CUDA and all(gpu.driver >= least_driver for gpu in gpus)


def find_compiler(environment: Mapping[str, str], gpus: Sequence[Gpu]) -> Compiler | None:
    """Finds a CUDA compiler that suits the kernels and some GPUs.

    It looks at CUDACXX, PATH, CUDA_HOME, CUDA_PATH, the usual folder, and packages of pip, in this order.

    Raises:
        SystemExit: CUDACXX names no compiler, or one that does not suit.
    """
    least = ".".join(map(str, LEAST_CUDA))
    if named := environment.get("CUDACXX"):
        compiler = read_compiler(named)
        if compiler is None:
            raise SystemExit(f"CUDACXX must name an nvcc of CUDA {least} or newer, but {named} does not run")
        if not suits(compiler.version, gpus):
            has = ".".join(map(str, compiler.version))
            drivers = f", and driver {min(gpu.driver for gpu in gpus)} must run what it makes" if gpus else ""
            raise SystemExit(
                f"CUDACXX must name an nvcc of CUDA {least} or newer{drivers}, but {named} is of CUDA {has}"
            )
        return compiler
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), USUAL_HOME]
    homes += [str(Path(folder, "nvidia", "cu13")) for folder in sys.path]
    paths = [shutil.which("nvcc", path=environment.get("PATH"))]
    paths += [str(Path(home, "bin", "nvcc")) for home in homes if home]
    compilers = (read_compiler(path) for path in paths if path)
    return next((compiler for compiler in compilers if compiler and suits(compiler.version, gpus)), None)


def architectures_of(gpus: Sequence[Gpu], compiler: Compiler | None) -> list[str]:
    """Lists the architectures for those GPUs that the kernels serve, oldest first.

    A GPU that is newer than its compiler gets the newest architecture that the compiler knows and the GPU can run, by
    itself or as PTX.
    """
    numbers = {10 * gpu.capability[0] + gpu.capability[1] for gpu in gpus if gpu.capability >= LEAST_CAPABILITY}
    if compiler and compiler.architectures:
        numbers = {max(known for known in compiler.architectures if known <= number) for number in numbers}
    # Hopper's own instructions need the architecture with an a.
    return [f"{number}a" if number == 90 else str(number) for number in sorted(numbers)]


def decide_cuda_part(
    environment: Mapping[str, str],
    gpus: Sequence[Gpu],
    find: Callable[[Mapping[str, str], Sequence[Gpu]], Compiler | None],
) -> CudaPart:
    """Decides for which architectures the module is compiled, if any.

    A machine without a GPU gets no CUDA part unless it is asked for, even if it has a compiler: for all architectures
    it takes minutes, and most of those who install on such a machine have no use for it. Whoever builds for other
    machines says so.

    Args:
        environment: The environment variables.
        gpus: The GPUs of this machine.
        find: Finds a compiler, as `find_compiler` does; only called if one is needed.

    Raises:
        SystemExit: A variable has a value that is not allowed.
    """
    wanted = environment.get("TRAK_FAST_CUDA", "").upper() or "AUTO"
    if wanted not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"TRAK_FAST_CUDA must be AUTO, ON or OFF, not {environment['TRAK_FAST_CUDA']!r}")
    named = ";".join(re.split("[;, ]+", environment.get("TRAK_FAST_CUDA_ARCHITECTURES", "").strip(" ;,")))
    if named and named != "all" and not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*", named):
        raise SystemExit(f'TRAK_FAST_CUDA_ARCHITECTURES must be all or a list such as "90a;120", not {named!r}')
    if wanted == "OFF":
        return CudaPart("", "TRAK_FAST_CUDA=OFF")
    if named:
        return CudaPart(named, f"TRAK_FAST_CUDA_ARCHITECTURES={named}", find(environment, []))
    served = [gpu for gpu in gpus if gpu.capability >= LEAST_CAPABILITY]
    if not served and wanted == "ON":
        return CudaPart("all", "TRAK_FAST_CUDA=ON", find(environment, []))
    if not served:
        old = f"the GPUs are older than compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        return CudaPart("", (old if gpus else "no GPU was found") + "; TRAK_FAST_CUDA=ON builds it all the same")
    compiler = find(environment, served)
    if compiler is None and not suits(PIP_CUDA, served):
        least = ".".join(map(str, LEAST_CUDA))
        reason = (
            f"driver {min(gpu.driver for gpu in served)} needs a compiler of CUDA {least} to 12.9, and none was found"
        )
        if wanted == "ON":
            raise SystemExit(
                f"the CUDA part is wanted (TRAK_FAST_CUDA=ON), but {reason}; update the driver or name one"
            )
        return CudaPart("", reason)
    architectures = architectures_of(served, compiler)
    return CudaPart(";".join(architectures), f"a GPU of {' and '.join(architectures)}", compiler)


def find_cuda_part() -> CudaPart:
    """Decides about the CUDA part on this machine."""
    return decide_cuda_part(os.environ, find_gpus(), find_compiler)


def run_cmake(*arguments: str, environment: Mapping[str, str]) -> None:
    """Runs CMake, whose output comes before.

    Raises:
        SystemExit: It failed.
    """
    if subprocess.run(["cmake", *arguments], check=False, env=environment).returncode:
        raise SystemExit(
            "CMake failed, see above for its reason. The build needs a compiler of C++20, such as GCC 10 or newer "
            "(Debian: apt install g++); a wheel of trak_fast needs none."
        )


class BuildPackage(build_py):  # type: ignore[misc]
    """Copies the package as it is: what an earlier build has left could be modules that are gone."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "trak_fast"), ignore_errors=True)
        super().run()


class BuildWithCMake(build_ext):  # type: ignore[misc]
    """Configures and builds in a fixed folder, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        cuda = find_cuda_part()
        if cuda.architectures and cuda.compiler is None:
            raise SystemExit(
                f"the CUDA part is wanted ({cuda.reason}), but there is no nvcc: a build without isolation needs "
                f'`pip install "{COMPILER_PACKAGES}"` before, or TRAK_FAST_CUDA=OFF'
            )
        arguments = os.environ.get("CMAKE_ARGS", "")
        processor = re.search(r"-DCMAKE_SYSTEM_PROCESSOR=(\w+)", arguments)
        # One folder for all versions of Python: only the bindings depend on it.
        build = ROOT / "build" / f"cmake-{processor[1] if processor else platform.machine()}"
        variables = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(Path(self.get_ext_fullpath(ext.name)).parent.resolve()),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": subprocess.check_output(
                [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
            ).strip(),
            "TRAK_FAST_CUDA": "ON" if cuda.architectures else "OFF",
        }
        environment = dict(os.environ)
        text = f"without CUDA ({cuda.reason})"
        if cuda.compiler:
            variables["TRAK_FAST_CUDA_ARCHITECTURES"] = cuda.architectures
            environment["CUDACXX"] = cuda.compiler.path
            libraries = Path(cuda.compiler.path).resolve().parents[1] / "lib"
            if "cu13" in libraries.parts:  # pip's compiler looks for its libraries in lib64, which it lacks
                environment["CUDAFLAGS"] = f"-L{libraries} {environment.get('CUDAFLAGS', '')}"
            version = ".".join(map(str, cuda.compiler.version))
            text = f"with CUDA {version} for {cuda.architectures} ({cuda.reason}), which can take minutes"
        print(f"trak_fast: building {text}", flush=True)
        configure = ["-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in variables.items()]
        configure += shlex.split(arguments)
        build.mkdir(parents=True, exist_ok=True)
        with (build / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # builds for two versions of Python at once take turns
            # An isolated build's tools lie in a new folder each time, so what CMake remembers of them is dropped.
            # Object files stay, which --fresh would delete.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            run_cmake(*configure, environment=environment)
            run_cmake("--build", str(build), environment=environment)


def list_requirements() -> list[str]:
    """Lists what an isolated build needs beyond pyproject.toml: the compiler, if the machine has none."""
    cuda = find_cuda_part()
    return [COMPILER_PACKAGES] if cuda.architectures and cuda.compiler is None else []


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("trak_fast._C", sources=[])],
        cmdclass={"build_py": BuildPackage, "build_ext": BuildWithCMake},
        setup_requires=list_requirements(),
    )
