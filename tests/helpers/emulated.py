"""An emulated device for tests of the CUDA kernels: builds tests/emulator and the module, and stands in for a GPU."""

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"sm80": 80, "sm90": 90, "sm90_wide": 90}  # and a compute capability that has them


@functools.cache
def build() -> Path:
    """Builds the emulated module and the emulator's own tests with CMake, and returns their folder.

    TRAK_FAST_SANITIZE names sanitizers to build with; their libraries have to be loaded before Python is.
    """
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        pytest.skip(f"building the emulated device needs {', '.join(missing)}")
    import pybind11

    sanitizers = os.environ.get("TRAK_FAST_SANITIZE", "")
    folder = ROOT / "build" / ("sanitized/emulated" if sanitizers else "emulated")
    variables = {
        "TRAK_FAST_EMULATE": "ON",
        "TRAK_FAST_SANITIZE": sanitizers,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of pytest's workers, one builds and the others wait
        for command in ([*configure, *(f"-D{k}={v}" for k, v in variables.items())], ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.fail(f"{' '.join(command)}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}", pytrace=False)
    return folder


@functools.cache
def module() -> ModuleType:
    (path,) = build().glob("_C_emulated.*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Device:
    """A stand-in for the compiled module: CUDA kernels on the emulated device do what it would do on the CPU.

    Attributes:
        kernel: The tile kernel to use; "" for the device's best.
    """

    def __init__(self, kernel: str = "") -> None:
        self.kernel = kernel
        self._module = module()
        self._library = ctypes.CDLL(self._module.__file__)
        self._library.emulator_count.restype = ctypes.c_int64
        bits = bytearray(ctypes.string_at(self._module.normal_half_table(), 2 * 32768))
        bf16 = torch.frombuffer(bits, dtype=torch.bfloat16)
        self._table = torch.stack([bf16.view(torch.int16), bf16.to(torch.float16).view(torch.int16)])
        self.set(KERNELS.get(kernel, 90))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def set(self, capability: int, multiprocessors: int = 4, seed: int = 0) -> None:
        """Sets what the device says of itself, and the order in which its threads run from here on."""
        self._library.emulator_set_device(1, capability, multiprocessors)
        self._library.emulator_set_seed(ctypes.c_uint64(seed))

    def launches(self, projection: Any) -> int:
        """Counts the kernels that a projection launches. None runs, so its tensors need not be there."""
        self.count("launch")
        self._library.emulator_set_idle(1)
        try:
            self.run(projection, add=False)
        finally:
            self._library.emulator_set_idle(0)
        return self.count("launch")

    def count(self, what: str) -> int:
        """Counts an instruction ("wgmma", "mma bf16", "block", "launch" ...): its performances since the last call."""
        return int(self._library.emulator_count(what.encode()))

    def project(self, projection: Any, instruction_set: str = "", threads: int = 1) -> None:
        """Adds a projection to its output, as the CPU's function does."""
        self.run(projection, add=True)

    def run(self, projection: Any, add: bool) -> None:
        with scratch() as allocate:
            self._module.project_cuda(projection, add, self._table.data_ptr(), allocate, 0, 0, self.kernel)

    def project_adjoint(self, adjoint: Any, instruction_set: str = "", threads: int = 1) -> None:
        with scratch() as allocate:
            self._module.project_adjoint_cuda(adjoint, self._table.data_ptr(), allocate, 0, 0)

    def scratch_bytes(self, projection: Any) -> int:
        """Returns the bytes of scratch memory that a projection asks for; it gets none, and ends with that error."""
        asked: list[int] = []

        def refuse(size: int) -> int:
            asked.append(size)
            raise MemoryError("refused")

        with pytest.raises(MemoryError, match="refused"):
            self._module.project_cuda(projection, False, self._table.data_ptr(), refuse, 0, 0, self.kernel)
        (size,) = asked
        return size


@contextlib.contextmanager
def scratch() -> Iterator[Callable[[int], int]]:
    """Gives a call its scratch memory, once: bytes full of NaN, beside which nothing may be written."""
    given: list[tuple[torch.Tensor, int, int]] = []

    def allocate(size: int) -> int:
        memory = torch.full((size + 768,), 255, dtype=torch.uint8)
        start = 256 + -memory.data_ptr() % 256
        given.append((memory, start, size))
        return memory.data_ptr() + start

    yield allocate
    ((memory, start, size),) = given
    assert memory[:start].eq(255).all()
    assert memory[start + size :].eq(255).all()
