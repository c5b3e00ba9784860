"""The compiled module: its sole importer, which allocates what the kernels need."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from . import checks

try:
    from .. import _C as _C
except ImportError as error:
    raise ImportError(
        f"trak_fast's compiled module is missing or does not load ({error}). In a source folder, install with "
        "`pip install -e .`, or start Python elsewhere to use an installed trak_fast."
    ) from error


ISA_VARIABLE = "TRAK_FAST_ISA"
KERNEL_VARIABLE = "TRAK_FAST_CUDA_KERNEL"
_CUDA_DIMENSIONS = 7  # that kernels take, the batch included; tensors with more are flattened before


def info() -> dict[str, Any]:
    """What was built and what was found: versions, instruction sets (best first) and CUDA."""
    devices = _C.cuda_device_count()
    return {
        "version": _C.VERSION,
        "matrix_definition": _C.DEFINITION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_sets": _C.instruction_sets(),
        "instruction_sets_built": _C.built_instruction_sets(),
        "cuda_version": _C.cuda_version(),
        "cuda_architectures": _C.cuda_architectures().split(",") if _C.cuda_architectures() else [],
        "cuda_devices": [{"name": torch.cuda.get_device_name(i), "kernels": _C.cuda_kernels(i)} for i in range(devices)]
        if torch.cuda.is_available()
        else [],
    }


def _instruction_set() -> str:
    name = os.environ.get(ISA_VARIABLE, "")
    available = _C.instruction_sets()
    if name and name not in available:
        raise ValueError(f"{ISA_VARIABLE} is {name!r}, this processor's instruction sets are {', '.join(available)}")
    return name


def _project_cuda(projection: _C.Projection, add: bool, kind: int, device: torch.device) -> None:
    """Launches the projection on the current stream; all memory that it needs comes from torch's allocator."""
    kernel = os.environ.get(KERNEL_VARIABLE, "")
    _C.project_cuda(projection, add, _normal_table(kind, device), _Scratch(device), *_place(device), kernel)


def _adjoint_cuda(adjoint: _C.Adjoint, kind: int, device: torch.device) -> None:
    """As :func:`_project_cuda`."""
    _C.project_adjoint_cuda(adjoint, _normal_table(kind, device), _Scratch(device), *_place(device))


class _Scratch:
    """Memory for the kernels of one call, which asks for it once it knows how much; freed with this object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, size: int) -> int:
        self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory.data_ptr()


def _place(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    assert device.index is not None
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _normal_table(kind: int, device: torch.device) -> int:
    """Where the device has the table that the normal kind needs; 0 for the other."""
    return _device_table(device).data_ptr() if kind == checks.KINDS["normal"] else 0


@functools.lru_cache
def _device_table(device: torch.device) -> Tensor:
    """The normal table's upper half as bfloat16 and as float16, which both hold it exactly: (2, 32768) int16."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first projection with proj_type='normal' on {device} uploads a table, which a CUDA graph cannot "
            "capture: make a Projector with that device and proj_type, or project once, before the capture"
        )
    bits = bytearray(ctypes.string_at(_C.normal_half_table(), 2 * 32768))
    bf16 = torch.frombuffer(bits, dtype=torch.bfloat16)
    return torch.stack([bf16.view(torch.int16), bf16.to(torch.float16).view(torch.int16)]).to(device)
