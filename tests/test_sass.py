"""What the compiler made of the CUDA kernels: the matrix instructions meant, few others around them, and no spills.

Reads the objects of the last build with cuobjdump, from the CUDA toolkit or from the triton package. The counts are of
a whole function: its unrolled loop over 512 columns (tile_sm90) or 128 (tile_sm80), and what stands around it.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Kernel(NamedTuple):
    architecture: str  # "sm_80"
    name: str
    parameters: tuple[int, ...]  # of the template
    operations: Counter[str]


def cuobjdump() -> str | None:
    on_path = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return on_path or next((str(tool) for folder in folders if (tool := folder / "cuobjdump").is_file()), None)


@functools.cache
def kernels() -> list[Kernel]:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump: install the CUDA toolkit's, or triton")
    objects = [path for path in ROOT.glob("build/*/CMakeFiles/*/csrc/cuda/*.cu.o") if "emulated" not in path.parts[-6]]
    if not objects:
        pytest.skip("needs a build with CUDA in this folder")
    found = []
    for path in objects:
        text = subprocess.run([tool, "--dump-sass", str(path)], capture_output=True, text=True, check=True).stdout
        architecture = ""
        for piece in re.split(r"(?=arch = )|(?=Function : )", text):
            if match := re.match(r"arch = (\S+)", piece):
                architecture = match[1]
            elif match := re.match(r"Function : \S*?\d(tile_sm\d\d|adjoint|pack|reduce)(\S*)", piece):
                parameters = tuple(int(number) for number in re.findall(r"E?L(?:NS_4KindE|[bi])(\d+)", match[2]))
                lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z]+)?)", piece)
                operations = Counter(line.split(".")[0] for line in lines) + Counter(x for x in lines if "." in x)
                found.append(Kernel(architecture, match[1], parameters, operations))
    return found


def of_name(name: str) -> list[Kernel]:
    chosen = [kernel for kernel in kernels() if kernel.name == name]
    assert chosen, f"no {name} in the build"
    return chosen


def test_every_kernel_is_there_for_every_architecture() -> None:
    built = {kernel.architecture for kernel in kernels() if kernel.name == "tile_sm80"}
    for architecture in built:
        names = Counter(kernel.name for kernel in kernels() if kernel.architecture == architecture)
        assert names["tile_sm80"] == 2 * 5 + 2 * 4, names  # types and widths of both kinds
        assert names["tile_sm90"] == (2 * 2 * 6 if architecture == "sm_90a" else 0), names
        assert names["reduce"] == 1
        assert names["pack"] == 2
        assert names["adjoint"] > 0


def test_no_spills() -> None:
    for kernel in kernels():
        assert kernel.operations["LDL"] + kernel.operations["STL"] == 0, kernel


def test_hopper_tiles() -> None:
    for kernel in of_name("tile_sm90"):
        kind, _, width = kernel.parameters
        fragments = 2 if width <= 128 else 1
        operations = kernel.operations
        assert operations["HGMMA"] == 32 * fragments, kernel
        assert operations["HMMA"] == 0, kernel
        # One for each step: more would mean that the compiler serialises the multiplications.
        assert operations["WARPGROUP.ARRIVE"] <= 33, kernel
        # Two registers a step and a thread's rows each, one operation a register, and Philox; normal: the table.
        assert operations["LOP3"] <= (240 if kind == 0 else 1200) * fragments, kernel
        assert operations["LDS"] <= (0 if kind == 0 else 260) * fragments, kernel
        assert operations["UTMALDG"] > 0, kernel


def test_portable_tiles() -> None:
    for kernel in of_name("tile_sm80"):
        kind, _, width = kernel.parameters
        multiplications = width * (2 if width <= 64 else 1)  # 8 steps, width / 8 groups, one or two fragments
        assert kernel.operations["HMMA"] > 0, kernel
        assert kernel.operations["HMMA"] % multiplications == 0, kernel
        unrolled = kernel.operations["HMMA"] // multiplications
        assert kernel.operations["LOP3"] <= unrolled * (300 if kind == 0 else 750), kernel
        assert kernel.operations["LDGSTS"] > 0, kernel


def test_adjoint_multiplies_by_tensor_cores() -> None:
    for kernel in of_name("adjoint"):
        assert kernel.operations["HMMA"] > 0, kernel
        assert kernel.operations["MOVM"] > 0, kernel
