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
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

COMPILER_PACKAGES = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.*"
"""The CUDA compiler as pip has it, also in the extra `cuda`. No package of CUDA 12 holds nvcc."""

LEAST_DRIVER = 580
"""Oldest major version of the driver that runs what compilers of CUDA 13 make, COMPILER_PACKAGES among them."""

LEAST_CUDA = (12, 8)
"""Oldest CUDA compiler that knows all our architectures and flags."""

USUAL_HOME = "/usr/local/cuda"
"""Folder in which NVIDIA's installers put CUDA."""

LEAST_CAPABILITY = (8, 0)
"""Oldest compute capability that the kernels serve."""


class Gpu(NamedTuple):
    """A device that the driver lists."""

    capability: tuple[int, int]
    driver: int


class Compiler(NamedTuple):
    """A CUDA compiler."""

    path: str
    version: tuple[int, int]


class CudaPart(NamedTuple):
    """The decision about the CUDA part."""

    architectures: str
    """As CMakeLists.txt takes them; empty without a CUDA part."""

    reason: str
    compiler: Compiler | None = None
    """The compiler; None without a CUDA part, and if it has yet to come from pip."""


def find_gpus() -> list[Gpu]:
    """Lists the GPUs of this machine; none if the driver does not answer."""
    command = ["nvidia-smi", "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*,\s*(\d+)", output, re.MULTILINE)
    return [Gpu((int(major), int(minor)), int(driver)) for major, minor, driver in found]


def read_compiler(path: str) -> Compiler | None:
    """Asks a compiler for its version; None if it does not run."""
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"release (\d+)\.(\d+)", output)
    return Compiler(path, (int(version[1]), int(version[2]))) if version else None


def find_compiler(environment: Mapping[str, str]) -> Compiler | None:
    """Finds a CUDA compiler that is new enough.

    It looks at CUDACXX, PATH, CUDA_HOME, CUDA_PATH, the usual folder, and packages of pip, in this order.

    Raises:
        SystemExit: CUDACXX names no compiler, or one that is too old.
    """
    least = ".".join(map(str, LEAST_CUDA))
    if named := environment.get("CUDACXX"):
        compiler = read_compiler(named)
        if compiler is None or compiler.version < LEAST_CUDA:
            has = "does not run" if compiler is None else f"is of CUDA {compiler.version[0]}.{compiler.version[1]}"
            raise SystemExit(f"CUDACXX must name an nvcc of CUDA {least} or newer, but {named} {has}")
        return compiler
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), USUAL_HOME]
    homes += [str(Path(folder, "nvidia", "cu13")) for folder in sys.path]
    paths = [
        shutil.which("nvcc", path=environment.get("PATH")),
        *(str(Path(home, "bin", "nvcc")) for home in homes if home),
    ]
    compilers = (read_compiler(path) for path in paths if path)
    return next((compiler for compiler in compilers if compiler and compiler.version >= LEAST_CUDA), None)


def architectures_of(gpus: Sequence[Gpu]) -> list[str]:
    """Lists the architectures of those GPUs that the kernels serve, oldest first."""
    capabilities = sorted({gpu.capability for gpu in gpus if gpu.capability >= LEAST_CAPABILITY})
    # Hopper's own instructions need the architecture with an a.
    return [f"{major}{minor}" + "a" * ((major, minor) == (9, 0)) for major, minor in capabilities]


def decide_cuda_part(environment: Mapping[str, str], gpus: Sequence[Gpu], compiler: Compiler | None) -> CudaPart:
    """Decides for which architectures the module is compiled, if any.

    A machine without a GPU gets no CUDA part unless it is asked for, even if it has a compiler: for all architectures
    it takes minutes, and most of those who install on such a machine have no use for it. Whoever builds for other
    machines says so.

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
    found = architectures_of(gpus)
    if named:
        return CudaPart(named, f"TRAK_FAST_CUDA_ARCHITECTURES={named}", compiler)
    if wanted == "ON":
        return CudaPart(";".join(found) or "all", "TRAK_FAST_CUDA=ON", compiler)
    if not found:
        old = f"the GPUs are older than compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        return CudaPart("", (old if gpus else "no GPU was found") + "; TRAK_FAST_CUDA=ON builds it all the same")
    oldest = min(gpu.driver for gpu in gpus)
    if oldest < LEAST_DRIVER and (compiler is None or compiler.version >= (13, 0)):
        least = ".".join(map(str, LEAST_CUDA))
        return CudaPart("", f"driver {oldest} needs a compiler of CUDA {least} to 12.9, and none was found first")
    return CudaPart(";".join(found), f"a GPU of {' and '.join(found)}", compiler)


def find_cuda_part() -> CudaPart:
    """Decides about the CUDA part on this machine."""
    return decide_cuda_part(os.environ, find_gpus(), find_compiler(os.environ))


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
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in variables.items()]
        configure += shlex.split(arguments)
        build.mkdir(parents=True, exist_ok=True)
        with (build / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # builds for two versions of Python at once take turns
            # An isolated build's tools lie in a new folder each time, so what CMake remembers of them is dropped.
            # Object files stay, which --fresh would delete.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            subprocess.run(configure, check=True, env=environment)
            subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


def list_requirements() -> list[str]:
    """Lists what an isolated build needs beyond pyproject.toml: the compiler, if the machine has none."""
    cuda = find_cuda_part()
    return [COMPILER_PACKAGES] if cuda.architectures and cuda.compiler is None else []


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("trak_fast._C", sources=[])],
        cmdclass={"build_ext": BuildWithCMake},
        setup_requires=list_requirements(),
    )
