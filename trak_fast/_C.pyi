"""The compiled module (csrc/bindings.cpp)."""

DEFINITION: int
VERSION: str

def project(
    kind: int,
    seed: int,
    stream: int,
    rows: int,
    batch: int,
    offset: int,
    terms: int,
    parts: list[tuple[int, int, int, int, list[int], list[int]]],
    out: int,
    out_batch_stride: int,
    out_row_stride: int,
    instruction_set: str,
    threads: int,
    /,
) -> None: ...
def project_adjoint(
    kind: int,
    seed: int,
    stream: int,
    columns: int,
    batch: int,
    offset: int,
    y: tuple[int, int, int, int, list[int], list[int]],
    out: int,
    out_batch_stride: int,
    out_column_stride: int,
    instruction_set: str,
    threads: int,
    /,
) -> None: ...
def matrix(
    kind: int, seed: int, stream: int, rows: int, row_count: int, columns: int, column_count: int, out: int, /
) -> None: ...
def normal_half_table() -> int: ...
def matrix_block_cuda(
    kind: int,
    seed: int,
    stream: int,
    first_row: int,
    rows: int,
    first_column: int,
    columns: int,
    normal_half: int,
    out: int,
    device: int,
    cuda_stream: int,
    /,
) -> None: ...
def instruction_sets() -> list[str]: ...
def built_instruction_sets() -> list[str]: ...
def cuda_architectures() -> str: ...
def cuda_version() -> int: ...
def cuda_device_count() -> int: ...
