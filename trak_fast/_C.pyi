"""The compiled module (csrc/bindings.cpp). Addresses, sizes and strides are integers; sizes and strides in elements."""

from collections.abc import Callable

DEFINITION: int
VERSION: str

class Part:
    def __init__(
        self, *, data: int, dtype: int, columns: int, batch_stride: int, sizes: list[int], strides: list[int]
    ) -> None: ...

class Projection:
    def __init__(
        self,
        *,
        kind: int,
        seed: int,
        stream: int,
        rows: int,
        batch: int,
        offset: int,
        terms: int,
        nonzeros: int,
        parts: list[Part],
        out: int,
        out_batch_stride: int,
        out_row_stride: int,
    ) -> None: ...

class Adjoint:
    def __init__(
        self,
        *,
        kind: int,
        seed: int,
        stream: int,
        columns: int,
        batch: int,
        offset: int,
        nonzeros: int,
        y: Part,
        out: int,
        out_batch_stride: int,
        out_column_stride: int,
    ) -> None: ...

# from bytes to an address on the device
Allocate = Callable[[int], int]

def project(projection: Projection, instruction_set: str, threads: int, /) -> None: ...
def project_cuda(
    projection: Projection, add: bool, half_table: int, scratch: Allocate, device: int, cuda_stream: int, kernel: str, /
) -> None: ...
def project_adjoint(adjoint: Adjoint, instruction_set: str, threads: int, /) -> None: ...
def project_adjoint_cuda(
    adjoint: Adjoint, half_table: int, scratch: Allocate, device: int, cuda_stream: int, /
) -> None: ...
def matrix(
    *,
    kind: int,
    seed: int,
    stream: int,
    block_rows: int,
    rows: int,
    row_count: int,
    columns: int,
    column_count: int,
    out: int,
) -> None: ...
def normal_half_table() -> int: ...
def instruction_sets() -> list[str]: ...
def built_instruction_sets() -> list[str]: ...
def cuda_architectures() -> str: ...
def cuda_version() -> int: ...
def cuda_device_count() -> int: ...
def cuda_kernels(device: int, /) -> list[str]: ...
