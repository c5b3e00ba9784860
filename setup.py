"""Builds the compiled module with CMake. Knows nothing of torch: one build serves every torch version.

Environment variables:
    TRAK_FAST_CUDA: AUTO (default: build the CUDA part where a CUDA compiler is found), ON or OFF.
    TRAK_FAST_CUDA_ARCHITECTURES: list such as "90a;120" instead of the default one (see CMakeLists.txt).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_cuda_compiler() -> str | None:
    """nvcc's path from CUDACXX, PATH, CUDA_HOME or the usual folder, else None."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if named:
        return named
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((str(nvcc) for home in homes if home and (nvcc := Path(home, "bin", "nvcc")).is_file()), None)


class BuildWithCMake(build_ext):  # type: ignore[misc]
    """Configures and builds in a fixed folder, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / (sys.implementation.cache_tag or "python")
        variables = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            "Python_EXECUTABLE": sys.executable,
            "TRAK_FAST_VERSION": self.distribution.get_version(),
            "pybind11_DIR": subprocess.check_output(
                [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
            ).strip(),
        }
        for name in ("TRAK_FAST_CUDA", "TRAK_FAST_CUDA_ARCHITECTURES"):
            if name in os.environ:
                variables[name] = os.environ[name]
        environment = dict(os.environ)
        compiler = find_cuda_compiler()
        if compiler and environment.get("TRAK_FAST_CUDA", "AUTO") != "OFF":
            environment["CUDACXX"] = compiler
        # An isolated build's tools lie in a new folder each time, so what CMake remembers of them is dropped. Object
        # files stay, which --fresh would delete.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in variables.items()]
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


setup(ext_modules=[Extension("trak_fast._C", sources=[])], cmdclass={"build_ext": BuildWithCMake})
