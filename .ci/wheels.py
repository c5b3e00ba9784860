"""Builds what is released, into dist/: the source archive, and a wheel for each Python that this machine has.

    pip install -c constraints.txt ".[release]" && python .ci/wheels.py

On x86-64, with the CUDA part; and for arm64 without it, if Debian's g++-aarch64-linux-gnu is there. It needs g++,
readelf and nvcc; no container. The wheels run on every Linux with glibc 2.28 or newer (2018), which auditwheel checks:
the module is linked against libraries that have only the symbols of that release (`link_to_old_glibc`), and contains
the runtimes of C++ and CUDA. The kernels are compiled once for all versions of Python.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Target(NamedTuple):
    """A processor and the compiler for it."""

    machine: str
    compiler: str


PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""Versions of Python that get a wheel, if this machine has them."""

GLIBC = (2, 28)
"""Newest release of glibc whose symbols a wheel may need."""

LARGEST_WHEEL = 4_000_000
"""Most bytes that a wheel may have."""

TARGETS = (Target("x86_64", "g++"), Target("aarch64", "aarch64-linux-gnu-g++"))
"""Processors that get wheels; the first is that of this machine."""

LIBRARIES = {"c": "libc.so.6", "m": "libm.so.6", "pthread": "libpthread.so.0", "dl": "libdl.so.2", "rt": "librt.so.1"}
"""Libraries of glibc by their names for the linker."""

MOVED = {"pthread_": "pthread", "sem_": "pthread", "dl": "dl", "shm_": "rt", "timer_": "rt", "aio_": "rt", "mq_": "rt"}
"""Prefixes of symbols that glibc 2.34 has moved into libc, and the libraries in which older releases look for them."""


def find_pythons(names: list[str]) -> dict[str, str]:
    """Finds the programs that run: from version, such as 3.12, to path."""
    found: dict[str, str] = {}
    for name in names:
        command = [name, "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
        try:
            version, path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
        except (OSError, subprocess.SubprocessError):
            continue
        found.setdefault(version, path.strip())
    return found


def read_symbols(library: str) -> dict[str, tuple[str, bool]]:
    """Reads the symbols of a library that old releases of glibc have too.

    Args:
        library: Path of an ELF file.

    Returns:
        From name to the newest version that is not above GLIBC, and whether glibc 2.34 has moved it into libc.
    """
    lines = subprocess.run(["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True).stdout
    versions: dict[str, list[tuple[int, ...]]] = {}
    for line in lines.splitlines():
        match = re.search(r" (?:FUNC|OBJECT|IFUNC|NOTYPE|TLS) +(?:GLOBAL|WEAK) .* (\w+)@@?GLIBC_([\d.]+)$", line)
        if match and " UND " not in line:
            versions.setdefault(match[1], []).append(tuple(map(int, match[2].split("."))))
    symbols = {}
    for name, known in versions.items():
        old = [version for version in known if version <= GLIBC]
        if old:
            symbols[name] = ("GLIBC_" + ".".join(map(str, max(old))), (2, 34) in known)
    return symbols


def link_to_old_glibc(compiler: str, folder: Path) -> str:
    """Makes libraries that a linker takes for those of an old glibc, and returns the flags that do.

    They have the names and versions of the old symbols and no code: at run time the real libraries take their place.
    What newer headers and runtimes refer to beyond these is either dropped as unused (`--gc-sections`: the random
    device of libstdc++), or defined here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        name: subprocess.check_output([compiler, f"-print-file-name={soname}"], text=True).strip()
        for name, soname in LIBRARIES.items()
    }
    symbols: dict[str, dict[str, str]] = {name: {} for name in LIBRARIES}
    for home, path in paths.items():
        for symbol, (version, moved) in read_symbols(path).items():
            homes = [library for prefix, library in MOVED.items() if moved and symbol.startswith(prefix)]
            symbols[homes[0] if homes else home][symbol] = version
    for name, soname in LIBRARIES.items():
        source, script = folder / f"{name}.s", folder / f"{name}.versions"
        stubs = [
            f".globl stub{i}\n.type stub{i}, %function\n.symver stub{i}, {symbol}@@{release}\nstub{i}: .byte 0\n"
            for i, (symbol, release) in enumerate(symbols[name].items())
        ]
        source.write_text(".text\n" + "".join(stubs))
        script.write_text("".join(f"{release} {{}};\n" for release in sorted(set(symbols[name].values()))))
        flags = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script={script}"]
        subprocess.run([compiler, *flags, str(source), "-o", str(folder / soname)], check=True)
        if name != "c":
            (folder / f"lib{name}.so").symlink_to(soname)
    # The real libc.so is such a script too.
    real = Path(subprocess.check_output([compiler, "-print-file-name=libc.so"], text=True).strip()).read_text()
    (folder / "libc.so").write_text(re.sub(r"\S+libc\.so\.6", str(folder / "libc.so.6"), real))
    # libstdc++ asks this variable of glibc 2.32 whether it may leave locks out; zero is always right.
    single = folder / "single_threaded.s"
    single.write_text(
        ".bss\n.globl __libc_single_threaded\n.hidden __libc_single_threaded\n__libc_single_threaded: .zero 1\n"
        '.section .note.GNU-stack,"",%progbits\n'
    )
    subprocess.run([compiler, "-c", str(single), "-o", str(folder / "single_threaded.o")], check=True)
    # Newer releases have the moved functions in libc, so that a linker would leave these libraries out.
    libraries = "-Wl,--push-state,--no-as-needed -lpthread -ldl -lrt -Wl,--pop-state"
    return f"-L{folder} {folder / 'single_threaded.o'} {libraries} -Wl,--gc-sections -s"


def build_wheel(python: str, output: Path, work: Path, target: Target, settings: dict[str, str]) -> None:
    """Builds a wheel in isolation, as pip does for users, checks it and moves it to a folder.

    Args:
        python: Path of the Python that it is for.
        output: The folder.
        work: A temporary folder.
        target: The processor that it is for.
        settings: Environment variables of the build.

    Raises:
        SystemExit: The wheel breaks a rule.
        subprocess.CalledProcessError: The build failed, or auditwheel refuses the wheel; the output was printed.
    """
    command = [sys.executable, "-m", "pip", "--python", python, "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(work / "built"), str(ROOT)], check=True, env={**os.environ, **settings})
    (built,) = (work / "built").glob("*.whl")
    # The Python that ran names its own processor.
    retag = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", f"linux_{target.machine}"]
    subprocess.run([*retag, str(built)], check=True)
    (built,) = (work / "built").glob("*.whl")
    # For another processor auditwheel takes no tag, but chooses the oldest that fits.
    native = target.machine == platform.machine()
    tag = ["--plat", f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{target.machine}", "--only-plat"] if native else []
    repair = [sys.executable, "-m", "auditwheel", "repair", *tag, "--wheel-dir", str(work), str(built)]
    subprocess.run(repair, check=True)
    (wheel,) = work.glob("*.whl")
    release = min(int(minor) for minor in re.findall(r"manylinux_2_(\d+)", wheel.name))
    if release > GLIBC[1]:
        raise SystemExit(f"{wheel.name} needs glibc 2.{release}")
    # What auditwheel does not look at: the size, and symbols without a version, which only Python's have.
    size = wheel.stat().st_size
    if size > LARGEST_WHEEL:
        raise SystemExit(f"{wheel.name} has {size:,} bytes, more than {LARGEST_WHEEL:,}")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        module = archive.extract(name, work)
    listed = subprocess.check_output(["readelf", "--dyn-syms", "-W", module], text=True)
    undefined = re.findall(r" GLOBAL .* UND (\S+)$", listed, re.MULTILINE)
    strange = [symbol for symbol in undefined if "@" not in symbol and not re.match("_?Py", symbol)]
    if strange:
        raise SystemExit(f"{wheel.name} needs {', '.join(strange)}, which glibc {GLIBC[0]}.{GLIBC[1]} lacks")
    shutil.move(wheel, output / wheel.name)
    print(f"{wheel.name}  {size / 1e6:.2f} MB", flush=True)


def settings_of(target: Target, version: str, python: str, linker_flags: str) -> dict[str, str]:
    """Returns the environment variables by which setup.py builds for a processor and a Python."""
    arguments = f"-DCMAKE_MODULE_LINKER_FLAGS='{linker_flags}'"
    if target.machine == platform.machine():
        return {"TRAK_FAST_CUDA": "ON", "TRAK_FAST_CUDA_ARCHITECTURES": "all", "CMAKE_ARGS": arguments}
    suffix = f".cpython-{version.replace('.', '')}-{target.machine}-linux-gnu.so"
    arguments += f" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR={target.machine}"
    arguments += f" -DCMAKE_CXX_COMPILER={target.compiler}"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('include'))"]
    arguments += f" -DPython_INCLUDE_DIR={subprocess.check_output(command, text=True).strip()}"
    # pybind11 asks the Python that runs, unless all three are there.
    arguments += f" -DPYTHON_MODULE_EXTENSION={suffix} -DPYTHON_MODULE_DEBUG_POSTFIX= -DPYTHON_IS_DEBUG=0"
    return {"TRAK_FAST_CUDA": "OFF", "CMAKE_ARGS": arguments, "SETUPTOOLS_EXT_SUFFIX": suffix}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Builds the source archive and a wheel for each Python found.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder to write to (default dist)")
    parser.add_argument("--python", nargs="+", help="programs to build for (default: those on PATH and of pyenv)")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    usual = [f"python{version}" for version in PYTHONS]
    usual += [str(path) for version in PYTHONS for path in sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    found = find_pythons(arguments.python or usual)
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", str(output), str(ROOT)], check=True)
    missing = [f"Python {version}" for version in PYTHONS if version not in found and not arguments.python]
    with tempfile.TemporaryDirectory() as temporary:
        for target in TARGETS:
            if not shutil.which(target.compiler):
                missing.append(target.compiler)
                continue
            work = Path(temporary, target.machine)
            flags = link_to_old_glibc(target.compiler, work / "glibc")
            for version, python in found.items():
                settings = settings_of(target, version, python, flags)
                build_wheel(python, output, work / version, target, settings)
    if missing:
        print(f"not on this machine, so without their wheels: {', '.join(missing)}")


if __name__ == "__main__":
    main()
