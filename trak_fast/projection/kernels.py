"""The only door to the compiled module: takes checked arguments, allocates through torch, and calls it."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import checks

try:
    from .. import _C as _C
except ImportError as error:
    raise ImportError(
        f"trak_fast's compiled module is missing or does not load ({error}). In a source folder, install with "
        "`pip install -e .`, or start Python elsewhere to use an installed trak_fast."
    ) from None

ISA_VARIABLE = "TRAK_FAST_ISA"
"""Name of the environment variable that forces an instruction set."""

KERNEL_VARIABLE = "TRAK_FAST_CUDA_KERNEL"
"""Name of the environment variable that forces a CUDA kernel."""

_CUDA_DIMENSIONS = 7
"""Dimensions that CUDA kernels take, the batch included; tensors with more are flattened before."""


def project(projection: checks.Projection, out: Tensor | None = None) -> Tensor:
    """Adds a projection to `out`, or puts it into a new tensor: (B, k) float32."""
    tensors = projection.tensors
    batch, device = tensors[0].shape[0], tensors[0].device
    nothing = batch == 0 or projection.columns == 0
    on_cuda = device.type == "cuda"
    add = out is not None
    if out is None:
        out = torch.empty(batch, projection.proj_dim, dtype=torch.float32, device=device)
        if not on_cuda:  # its kernels always add
            # not by torch, whose threads would stay awake for milliseconds and take the processors from the kernels'
            out.numpy().fill(0)
        elif nothing:
            out.zero_()
    if nothing:
        return out
    if on_cuda:
        tensors = [tensor.flatten(1) if tensor.ndim > _CUDA_DIMENSIONS else tensor for tensor in tensors]
    part = projection.part
    described = _C.Projection(
        kind=part.kind,
        seed=part.seed,
        stream=part.model_id,
        rows=projection.proj_dim,
        batch=batch,
        offset=part.offset,
        terms=checks.terms_of(projection.precision, tensors),
        nonzeros=part.nonzeros,
        parts=[part_of(tensor) for tensor in tensors if tensor.numel()],
        out=out.data_ptr(),
        out_batch_stride=out.stride(0),
        out_row_stride=out.stride(1),
    )
    if on_cuda:
        index, stream = _place(device)
        kernel = os.environ.get(KERNEL_VARIABLE, "")
        _C.project_cuda(described, add, _normal_table(part.kind, device), _Scratch(device), index, stream, kernel)
    else:
        _C.project(described, _instruction_set(), torch.get_num_threads())
    return out


def project_adjoint(adjoint: checks.Adjoint, out: Tensor | None = None) -> Tensor:
    """Adds an adjoint to `out`, or puts it into a new tensor: (B, D) float32."""
    y, part = adjoint.y, adjoint.part
    if out is None:
        out = torch.zeros(y.shape[0], adjoint.grad_dim, dtype=torch.float32, device=y.device)
    if out.numel() == 0:
        return out
    described = _C.Adjoint(
        kind=part.kind,
        seed=part.seed,
        stream=part.model_id,
        columns=adjoint.grad_dim,
        batch=y.shape[0],
        offset=part.offset,
        nonzeros=part.nonzeros,
        y=part_of(y),
        out=out.data_ptr(),
        out_batch_stride=out.stride(0),
        out_column_stride=out.stride(1),
    )
    if y.device.type == "cuda":
        index, stream = _place(y.device)
        _C.project_adjoint_cuda(described, _normal_table(part.kind, y.device), _Scratch(y.device), index, stream)
    else:
        _C.project_adjoint(described, _instruction_set(), torch.get_num_threads())
    return out


def matrix(
    part: checks.MatrixPart, proj_dim: int, rows: npt.NDArray[np.uint32], columns: npt.NDArray[np.uint64]
) -> Tensor:
    """Returns entries of a matrix of `proj_dim` rows, (len(rows), len(columns)) float32."""
    out = torch.empty(len(rows), len(columns), dtype=torch.float32, device="cpu")
    _C.matrix(
        kind=part.kind,
        seed=part.seed,
        stream=part.model_id,
        block_rows=proj_dim // part.nonzeros if part.nonzeros else 0,
        rows=rows.ctypes.data,
        row_count=len(rows),
        columns=columns.ctypes.data,
        column_count=len(columns),
        out=out.data_ptr(),
    )
    return out


def version() -> str:
    """Returns the version of trak_fast that the compiled module was built from."""
    return _C.VERSION


def definition() -> int:
    """Returns the number of the matrix's definition."""
    return _C.DEFINITION


def prepare(kind: int, device: torch.device) -> None:
    """Uploads the table of the normal kind to a device, which a CUDA graph could not capture."""
    if kind == checks.KINDS["normal"]:
        _device_table(torch.empty(0, device=device).device)


def info() -> dict[str, Any]:
    """Returns what was built and what was found: versions, instruction sets (best first) and CUDA."""
    devices = _C.cuda_device_count()
    return {
        "version": _C.VERSION,
        "matrix_definition": _C.DEFINITION,
        "proj_types": list(checks.KINDS),
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


def part_of(tensor: Tensor) -> _C.Part:
    """Describes a tensor (B, ...) to the compiled module, trailing dimensions merged where memory allows."""
    columns = checks.width(tensor)
    sizes: list[int] = []
    strides: list[int] = []
    if tensor.is_contiguous():  # the loop would say the same, in more time
        sizes.append(columns)
        strides.append(1)
    else:
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True):
            if size == 1:
                continue
            if sizes and strides[-1] == stride * size:
                sizes[-1] *= size
                strides[-1] = stride
            else:
                sizes.append(size)
                strides.append(stride)
    return _C.Part(
        data=tensor.data_ptr(),
        dtype=checks.DTYPES[tensor.dtype],
        columns=columns,
        batch_stride=tensor.stride(0),
        sizes=sizes,
        strides=strides,
    )


def _instruction_set() -> str:
    """Returns the instruction set that the environment forces, or "" for the best."""
    if ISA_VARIABLE not in os.environ:
        return ""
    name = os.environ[ISA_VARIABLE]
    if name and name not in (available := _C.instruction_sets()):
        raise ValueError(f"{ISA_VARIABLE} must be one of {', '.join(map(repr, available))}, not {name!r}")
    return name


class _Scratch:
    """Memory for the kernels of one call, which ask for it once they know how much; it is freed with this object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, size: int) -> int:
        self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory.data_ptr()


def _place(device: torch.device) -> tuple[int, int]:
    """Returns the device's number and its current stream."""
    assert device.index is not None
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _normal_table(kind: int, device: torch.device) -> int:
    """Returns the address on the device of the table that the normal kind needs; 0 for a kind without."""
    return _device_table(device).data_ptr() if kind == checks.KINDS["normal"] else 0


@functools.lru_cache
def _device_table(device: torch.device) -> Tensor:
    """Uploads the normal table's upper half as bfloat16 and float16, which both hold it exactly: (2, 32768) int16."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first projection with proj_type='normal' on {device} uploads a table, which a CUDA graph cannot "
            "capture: make a Projector with that device and proj_type, or project once, before the capture"
        )
    bits = bytearray(ctypes.string_at(_C.normal_half_table(), 2 * 32768))
    bf16 = torch.frombuffer(bits, dtype=torch.bfloat16)
    return torch.stack([bf16.view(torch.int16), bf16.to(torch.float16).view(torch.int16)]).to(device)
