"""The facts of a machine and its software that figures may depend on."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from .. import projection

PREFIXES = ("TRAK_FAST_", "OMP_", "MKL_", "KMP_", "TORCH_", "CUDA_", "NVIDIA_", "PYTORCH_")
"""Beginnings of the names of environment variables that may change a result or its time."""


@dataclass(frozen=True)
class Machine:
    """The machine.

    Attributes:
        system: Name and version of the operating system.
        python: Python's version.
        processor: The processor's name.
        cores: Number of logical cores.
        memory_bytes: Size of its memory.
    """

    system: str
    python: str
    processor: str
    cores: int | None
    memory_bytes: int


@dataclass(frozen=True)
class TorchBuild:
    """The torch that is installed.

    Attributes:
        version: Its version.
        cuda: Version of CUDA that it was built with, or None.
        build: torch's own description of its build.
    """

    version: str
    cuda: str | None
    build: str


@dataclass(frozen=True)
class Device:
    """A CUDA device.

    Attributes:
        name: Its name.
        capability: Its compute capability, as "9.0".
        memory_bytes: Size of its memory.
        multiprocessors: Number of streaming multiprocessors.
    """

    name: str
    capability: str
    memory_bytes: int
    multiprocessors: int


@dataclass(frozen=True)
class Environment:
    """All facts together.

    Attributes:
        machine: The machine.
        trak_fast: The facts of `trak_fast.info()`.
        torch: The torch that is installed.
        variables: Environment variables that may matter.
        device: The CUDA device, if the benchmark uses one.
    """

    machine: Machine
    trak_fast: dict[str, Any]
    torch: TorchBuild
    variables: dict[str, str]
    device: Device | None = None


def environment(device: str) -> Environment:
    """Gathers the facts for a benchmark on "cpu" or "cuda"."""
    return Environment(
        machine=Machine(
            system=platform.platform(),
            python=platform.python_version(),
            processor=_processor(),
            cores=os.cpu_count(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        ),
        trak_fast=projection.info(),
        torch=TorchBuild(version=torch.__version__, cuda=torch.version.cuda, build=torch.__config__.show()),
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        device=_cuda_device() if device == "cuda" else None,
    )


def _cuda_device() -> Device:
    """Describes the first CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    return Device(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
    )


def _processor() -> str:
    """Returns the processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
