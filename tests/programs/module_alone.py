"""Compares the compiled module with the reference by NumPy alone, where torch is absent: on an emulated processor.

    python module_alone.py MODULE

MODULE is the file of a built `_C`, which is loaded from there. Compares the golden values, entries of the matrix at
edges and at random, and 100 random projections with their adjoints, on each instruction set of the processor and on
one thread and two, which must agree in every bit. Ends with an error at the first difference.

The bounds are derived in helpers/projections.py, test_adjoint.py and test_sparse.py. Here float32 enters as three
terms, which hold all of it: ε is 2^-24 for float64 and 0 for the rest, and n = 3 D is enough for every kernel.
"""

import ctypes
import hashlib
import importlib.util
import math
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
PROJECTIONS = 100
KINDS = ["rademacher", "normal", "sjlt"]
DTYPES = ["float32", "bfloat16", "float16", "float64"]
"""Kinds and dtypes in the order of the numbers that the module has for them."""

BATCHES = [1, 2, 3, 4, 5, 8, 15, 17, 33]
PROJ_DIMS = [1, 2, 31, 32, 33, 127, 129, 300]
SPARSE_DIMS = [(16, 1), (64, 4), (512, 1), (1024, 2), (512, 4), (128, 8)]
"""k and c of the sparse kind."""

LARGE = {"rademacher": (17, 257, 1501), "normal": (17, 257, 1501), "sjlt": (17, 128, 4001)}
"""B, k and the least D of projections that are large enough for a second thread; k is the last of `SPARSE_DIMS`."""

# Where an index meets the end of a register, a block or a word of the counter, as in test_matrix.py.
EDGES = [0, 2, 8, 16, 32, 128, 512, 2**16, 2**31, 2**32, 2**37, 2**40, 2**41, 2**45, 2**48 - 2]
COLUMNS = sorted({edge + step for edge in EDGES for step in (-513, -512, -1, 0, 1) if edge + step >= 0})
ROWS = [0, 1, 15, 16, 17, 31, 32, 511, 512, 4095, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


def load(loader: Any, name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = load(ExtensionFileLoader("_C", sys.argv[1]), "_C", Path(sys.argv[1]))
reference = load(None, "reference", ROOT / "trak_fast/projection/reference.py")


class Matrix(NamedTuple):
    """A matrix P; `proj_dim` and `nonzeros` are 0 where its entries do not depend on them."""

    kind: str
    seed: int
    stream: int
    proj_dim: int = 0
    nonzeros: int = 0

    def expected(self, rows: Any, columns: Any) -> NDArray[np.float32]:
        entries: NDArray[np.float32] = reference.matrix(
            self.kind, self.seed, self.stream, rows, columns, self.proj_dim, self.nonzeros
        )
        return entries

    def compiled(self, rows: Any, columns: Any) -> NDArray[np.float32]:
        rows, columns = np.asarray(rows, dtype=np.uint32), np.asarray(columns, dtype=np.uint64)
        out = np.empty((rows.size, columns.size), dtype=np.float32)
        MODULE.matrix(
            kind=KINDS.index(self.kind),
            seed=self.seed,
            stream=self.stream,
            block_rows=self.proj_dim // self.nonzeros if self.nonzeros else 0,
            rows=rows.ctypes.data,
            row_count=rows.size,
            columns=columns.ctypes.data,
            column_count=columns.size,
            out=out.ctypes.data,
        )
        return out


def require(agree: Any, what: object) -> None:
    if not agree:
        raise SystemExit(f"the module and the reference differ: {what}")


def compare_golden_values() -> int:
    """Compares the module, and the reference as this machine computes it, with the golden values."""
    compared = 0
    for line in (ROOT / "tests/golden_values.txt").read_text().splitlines():
        keyword, *fields = line.split() or ["#"]
        if keyword == "table":
            half = np.ctypeslib.as_array((ctypes.c_uint16 * 32768).from_address(MODULE.normal_half_table()))
            upper = (half.astype(np.uint32) << 16).view(np.float32)
            for table in (np.concatenate([-upper[::-1], upper]), reference.normal_table()):
                require(hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == fields[0], line)
        elif keyword in ("block", "entry"):
            kind, *numbers, value = fields
            seed, stream, *place = map(int, numbers)
            row, rows, column, columns = place if keyword == "block" else (place[0], 1, place[1], 1)
            for make in (Matrix(kind, seed, stream).compiled, Matrix(kind, seed, stream).expected):
                block = make(range(row, row + rows), range(column, column + columns)).astype("<f4")
                found = hashlib.sha256(block.tobytes()).hexdigest() if keyword == "block" else float(block[0, 0])
                require(found == (value if keyword == "block" else float(value)), line)
            compared += rows * columns
    require(compared > 0, "there are no golden values")
    return compared


def compare_entries(rng: np.random.Generator) -> int:
    """Compares entries at edges and at random, of all kinds and several seeds, exactly."""
    compared = 0
    for kind in KINDS:
        for seed, stream in [(0, 0), (2**32 - 1, 1), (2**32, 2**31), (0x89ABCDEF_01234567, 5), (2**64 - 1, 2**32 - 1)]:
            for proj_dim, nonzeros in SPARSE_DIMS if kind == "sjlt" else [(0, 0)]:
                matrix = Matrix(kind, seed, stream, proj_dim, nonzeros)
                highest = proj_dim or 2**32
                rows = [row for row in ROWS if row < highest] + rng.integers(highest, size=9).tolist()
                columns = COLUMNS + rng.integers(2**48, size=40).tolist()
                require(np.array_equal(matrix.compiled(rows, columns), matrix.expected(rows, columns)), matrix)
                compared += len(rows) * len(columns)
    return compared


class Stored(NamedTuple):
    """A tensor (B, ...) as it lies in memory, with its values as (B, D) float64."""

    array: NDArray[Any]
    dtype: str
    values: NDArray[np.float64]

    def part(self) -> Any:
        strides = [stride // self.array.itemsize for stride in self.array.strides]
        return MODULE.Part(
            data=self.array.ctypes.data,
            dtype=DTYPES.index(self.dtype),
            columns=self.values.shape[1],
            batch_stride=strides[0],
            sizes=self.array.shape[1:],
            strides=strides[1:],
        )


def lay_out(rng: np.random.Generator, shape: list[int], dtype: type) -> tuple[NDArray[Any], NDArray[Any]]:
    """Makes memory full of NaN, and a view of this shape in it: dense, or with gaps and dimensions in any order."""
    order, steps, firsts = list(range(len(shape))), [1] * len(shape), [0] * len(shape)
    if rng.random() < 0.7:
        order = rng.permutation(len(shape)).tolist()
        steps, firsts = rng.integers(1, 4, len(shape)).tolist(), rng.integers(0, 3, len(shape)).tolist()
    not_a_number = 0xFFFF if dtype is np.uint16 else np.nan  # uint16: bits of bfloat16
    memory: NDArray[Any] = np.full([firsts[axis] + steps[axis] * shape[axis] for axis in order], not_a_number, dtype)
    slices = [slice(first, first + step * size, step) for first, step, size in zip(firsts, steps, shape, strict=True)]
    return memory, memory.transpose(np.argsort(order))[tuple(slices)]


def random_tensor(rng: np.random.Generator, dtype: str, batch: int, columns: int, scale: float) -> Stored:
    """Makes normal values in a tensor of two or three dimensions, sometimes one value all along one of them."""
    sizes = [batch, columns]
    if rng.random() < 0.5:
        inner = int(rng.choice([size for size in range(1, columns + 1) if columns % size == 0]))
        sizes = [batch, columns // inner, inner]
    unique = list(sizes)
    if rng.random() < 0.15:
        unique[rng.integers(len(sizes))] = 1
    numbers = scale * rng.standard_normal(unique)
    _, array = lay_out(rng, unique, np.uint16 if dtype == "bfloat16" else np.dtype(dtype).type)
    if dtype == "bfloat16":
        bits = numbers.astype(np.float32).view(np.uint32)
        array[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        held = (array.astype(np.uint32) << 16).view(np.float32)
    else:
        array[...] = numbers
        held = array
    values = np.broadcast_to(held.astype(np.float64), sizes).reshape(batch, columns)
    return Stored(np.broadcast_to(array, sizes), dtype, values)


def compare_results(
    rng: np.random.Generator, call: Any, expected: NDArray[np.float64], bound: NDArray[np.float64], what: str
) -> None:
    """Calls the module on each instruction set with outputs that are views, and compares what it writes there.

    On one thread and two it must be the same bits, and nothing beside the view may be written.
    """
    for isa in MODULE.instruction_sets():
        results = []
        for threads in (1, 2):
            memory, out = lay_out(rng, list(expected.shape), np.float32)
            out[...] = 0
            call(out.ctypes.data, *(stride // 4 for stride in out.strides), isa, threads)
            require(np.isnan(memory).sum() == memory.size - out.size, f"{what} writes beside its output, or NaN")
            require(np.all(np.abs(out - expected) <= bound), f"{what}, {isa}")
            results.append(out)
        require(np.array_equal(results[0], results[1]), f"{what}, {isa}, one thread and two")


def compare_projection(number: int) -> None:
    """Compares one random projection and its adjoint with products with the reference's matrix in float64."""
    rng = np.random.default_rng(number)
    kind, large = KINDS[number % 3], number % 7 == 6  # so that each kind comes with each first dtype, large and small
    nonzeros, batch, proj_dim = 0, int(rng.choice(BATCHES)), int(rng.choice(PROJ_DIMS))
    if kind == "sjlt":
        proj_dim, nonzeros = SPARSE_DIMS[-1 if large else rng.integers(len(SPARSE_DIMS))]
    if large:
        batch, proj_dim, _ = LARGE[kind]
    seed, stream = int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(2**32))
    widths = [int(2 ** rng.uniform(0, 9.5)) for _ in range(rng.integers(1, 5))]
    widths[-1] += LARGE[kind][2] * large
    dtypes = [DTYPES[number % 4], *rng.choice(DTYPES, len(widths) - 1).tolist()]
    scale = float(rng.choice([1, 2.0**-18]))  # the latter for numbers that are subnormal in float16
    parts = [random_tensor(rng, dtype, batch, width, scale) for dtype, width in zip(dtypes, widths, strict=True)]
    grads, grad_dim = np.concatenate([part.values for part in parts], axis=1), sum(widths)
    offset = int(rng.choice([0, 1, 511, 2**32 - 300, 2**41 - 257, 2**48 - grad_dim]))
    shared = {"kind": KINDS.index(kind), "seed": seed, "stream": stream, "offset": offset, "nonzeros": nonzeros}
    columns = np.arange(offset, offset + grad_dim, dtype=np.uint64)
    P = Matrix(kind, seed, stream, proj_dim, nonzeros).expected(range(proj_dim), columns).astype(np.float64)

    def project(out: int, batch_stride: int, row_stride: int, isa: str, threads: int) -> None:
        described = MODULE.Projection(
            **shared,
            rows=proj_dim,
            batch=batch,
            terms=3,
            parts=[part.part() for part in parts],
            out=out,
            out_batch_stride=batch_stride,
            out_row_stride=row_stride,
        )
        MODULE.project(described, isa, threads)

    y = random_tensor(rng, DTYPES[number % 4], batch, proj_dim, scale)

    def project_adjoint(out: int, batch_stride: int, column_stride: int, isa: str, threads: int) -> None:
        described = MODULE.Adjoint(
            **shared,
            columns=grad_dim,
            batch=batch,
            y=y.part(),
            out=out,
            out_batch_stride=batch_stride,
            out_column_stride=column_stride,
        )
        MODULE.project_adjoint(described, isa, threads)

    rounded, y_rounded = "float64" in dtypes, y.dtype == "float64"
    if kind == "sjlt":
        chunks = grad_dim * nonzeros // proj_dim + 2
        depth = min(64, chunks) + chunks // 64 + 2 + rounded
        bound = depth * 2.0**-24 * (1 + 2.0**-10) * (np.abs(grads) @ np.abs(P).T)
        adjoint_bound = (nonzeros + y_rounded) * 2.0**-24 * (1 + 2.0**-10) * (np.abs(y.values) @ np.abs(P))
    else:
        n = 3 * grad_dim
        norm, y_norm = (np.linalg.norm(values, axis=1, keepdims=True) for values in (grads, y.values))
        bound = (6 * rounded + 36 * math.sqrt(n)) * 2.0**-24 * norm + n * 2.0**-124
        adjoint_bound = (6 * y_rounded + 36 * math.sqrt(proj_dim)) * 2.0**-24 * y_norm
    case = f"{kind}, {dtypes}, B = {batch}, D = {widths}, k = {proj_dim}, c = {nonzeros}, offset {offset}"
    compare_results(rng, project, grads @ P.T, bound, f"projection of {case}")
    compare_results(rng, project_adjoint, y.values @ P, adjoint_bound, f"adjoint of {case}")


entries = compare_golden_values() + compare_entries(np.random.default_rng(0))
for number in range(PROJECTIONS):
    compare_projection(number)
print(f"{PROJECTIONS} projections and {entries} matrix entries agree with the reference")
