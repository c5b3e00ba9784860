"""Builds the compiled module for another Python and one CUDA architecture, into a folder that can be copied.

    python benchmarks/prebuild.py --python python3.12 --architecture 90a prebuilt

It is for a machine with a GPU but without network, compiler or time: copy this project and the folder there, and run
`python benchmarks/gpu_check.py --prebuilt prebuilt`. The build needs nvcc and the other Python with its headers, but
none of its packages; cmake, ninja and pybind11 come from the Python that runs this. Unless --normal is given, a Hopper
kernel that waits in vain for two seconds ends with an error, so that a mistake cannot hang the device
(TRAK_FAST_BOUNDED_WAIT).
"""

from __future__ import annotations

import argparse
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_module(folder: Path) -> Path:
    """Returns the path of a folder's module for the Python that runs this.

    Raises:
        ValueError: The folder has none; the message says what it has.
    """
    module = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not module.is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(f"{folder} holds {there}, not {module.name}: prebuild.py --python python{version} makes it")
    return module


def build_module(python: str, architecture: str, folder: Path, flags: str = "", bounded_wait: bool = True) -> Path:
    """Builds `folder`/_C.*.so.

    Args:
        python: Path or name of the Python that the module is for.
        architecture: As in CMakeLists.txt, such as "90a".
        folder: Made if it is missing; a module for the same Python in it is replaced.
        flags: Further flags for nvcc.
        bounded_wait: If True, a Hopper kernel that waits in vain for two seconds ends with an error.

    Returns:
        The module's path.

    Raises:
        ValueError: There is no such Python, or no cmake.
        subprocess.CalledProcessError: The build failed; its output was printed.
    """
    import pybind11

    found = shutil.which(python)
    if found is None:
        raise ValueError(f"--python must be the name or the path of a program, not {python!r}")
    if shutil.which("cmake") is None:
        raise ValueError("cmake is not there")
    variables = {
        "TRAK_FAST_CUDA": "ON",
        "TRAK_FAST_CUDA_ARCHITECTURES": architecture,
        "TRAK_FAST_BOUNDED_WAIT": "ON" if bounded_wait else "OFF",
        "Python_EXECUTABLE": found,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder.resolve()),
        "CMAKE_CUDA_FLAGS": flags,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as build:
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", build]
        subprocess.run([*configure, *(f"-D{name}={value}" for name, value in variables.items())], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
    suffix = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    return folder / ("_C" + subprocess.check_output([found, "-c", suffix], text=True).strip())


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Builds the compiled module for a machine that cannot build it.")
    parser.add_argument("folder", type=Path, help="where the module goes")
    parser.add_argument(
        "--python", default="python3.12", help="the Python that will load it, with headers (default python3.12)"
    )
    parser.add_argument(
        "--architecture", default="90a", help="architecture of the GPU, such as 80, 86, 89 (default 90a: H100, H200)"
    )
    parser.add_argument("--flags", default="", help="further flags for nvcc, for variants of the kernels")
    parser.add_argument("--normal", action="store_true", help="waits without a bound, as in the build of users")
    options = parser.parse_args(arguments)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # its cmake and ninja
    try:
        module = build_module(
            options.python,
            options.architecture,
            options.folder,
            flags=options.flags,
            bounded_wait=not options.normal,
        )
    except ValueError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"built {module} ({module.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
