"""All about a machine and its software that figures may depend on."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

import torch

from .. import projection


def environment(device: str) -> dict[str, Any]:
    """All about the machine and its software that figures may depend on."""
    facts: dict[str, Any] = {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "trak_fast": projection.info(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "build": torch.__config__.show()},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("TRAK_FAST_", "OMP_", "MKL_", "KMP_", "TORCH_", "CUDA_", "NVIDIA_", "PYTORCH_"))
        },
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
