"""The compiled matrix, entry for entry: as `trak_fast.matrix` shows it and as every projection kernel multiplies it."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak_fast
from trak_fast.projection import reference

KINDS = ["rademacher", "normal"]
# Where an index meets the end of a register, a block, a 32-bit word of the counter, or the first columns that use the
# counter's third word (2^37 for the normal kind, 2^41 for Rademacher).
EDGES = [0, 2, 8, 16, 32, 128, 512, 2**16, 2**31, 2**32, 2**37, 2**40, 2**41, 2**45, 2**48 - 2]
COLUMNS = sorted({edge + step for edge in EDGES for step in (-513, -512, -1, 0, 1) if edge + step >= 0})
ROWS = [0, 1, 15, 16, 17, 31, 32, 511, 512, 4095, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


@pytest.mark.parametrize("proj_type", KINDS)
def test_golden_values(golden: dict[str, list[list[str]]], proj_type: str) -> None:
    for kind, *numbers, sha256 in golden["block"]:
        seed, model_id, row, rows, column, columns = map(int, numbers)
        if kind == proj_type:
            block = trak_fast.matrix(kind, seed, model_id, range(row, row + rows), range(column, column + columns))
            assert block.dtype == torch.float32
            assert block.shape == (rows, columns)
            assert hashlib.sha256(block.numpy().astype("<f4").tobytes()).hexdigest() == sha256
    for kind, *numbers, value in golden["entry"]:
        seed, model_id, row, column = map(int, numbers)
        if kind == proj_type:
            assert trak_fast.matrix(kind, seed, model_id, [row], [column]).item() == float(value)


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x89ABCDEF_01234567, 2**63, 2**64 - 1])
@pytest.mark.parametrize("model_id", [0, 1, 2**31, 2**32 - 1])
def test_edges_of_every_index(proj_type: str, seed: int, model_id: int) -> None:
    expected = reference.matrix(proj_type, seed, model_id, ROWS, COLUMNS)
    assert np.array_equal(trak_fast.matrix(proj_type, seed, model_id, ROWS, COLUMNS).numpy(), expected)


@pytest.mark.parametrize("proj_type", KINDS)
@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    seed=st.integers(0, 2**64 - 1),
    model_id=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(0, 2**32 - 1), max_size=9),
    columns=st.lists(st.integers(0, 2**48 - 1), max_size=40),
)
def test_any_index(proj_type: str, seed: int, model_id: int, rows: list[int], columns: list[int]) -> None:
    expected = reference.matrix(proj_type, seed, model_id, rows, columns)
    assert np.array_equal(trak_fast.matrix(proj_type, seed, model_id, rows, columns).numpy(), expected)


def test_index_containers() -> None:
    rows, columns = np.arange(40, 0, -3), torch.tensor([7, 2**41, 0, 7])
    expected = reference.matrix("normal", 1, 2, rows, columns.tolist())
    for given_as in (np.asarray, torch.tensor, list, tuple, lambda rows: np.asarray(rows, dtype=np.uint32)):
        assert np.array_equal(trak_fast.matrix("normal", 1, 2, given_as(rows), columns).numpy(), expected)
    assert np.array_equal(trak_fast.matrix("normal", 1, 2, rows[::-1], columns[::2]).numpy(), expected[::-1, ::2])


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0, 2**32 - 512, 2**41 - 257, 2**48 - 512])
def test_kernels_multiply_exactly_this_matrix(isa: str, proj_type: str, dtype: torch.dtype, offset: int) -> None:
    """Projecting the unit vector e_j gives column j of P: one product by 1, and sums with zeros, are exact."""
    k, seed, model_id = 4099, 0xFEDCBA98_76543210, 0x9ABCDEF1
    unit = torch.eye(512, dtype=dtype)
    columns = range(offset, offset + 512)
    expected = reference.matrix(proj_type, seed, model_id, range(k), columns).T
    options = {"proj_type": proj_type, "seed": seed, "model_id": model_id, "offset": offset}
    assert np.array_equal(trak_fast.project(unit, k, **options).numpy(), expected)
    # Kernels may treat small batches differently.
    start = 0
    for batch in (1, 2, 7, 15, 16, 17, 31, 33, 48, 64, 65):
        y = trak_fast.project(unit[start : start + batch], k, **options)
        assert np.array_equal(y.numpy(), expected[start : start + batch]), f"batch of {batch}"
        start += batch


@pytest.mark.parametrize("proj_type", KINDS)
def test_row_count_does_not_change_the_rows(isa: str, proj_type: str) -> None:
    unit = torch.eye(40)
    expected = reference.matrix(proj_type, 3, 4, range(1100), range(40)).T
    for k in (*range(1, 70), 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1100):
        y = trak_fast.project(unit, k, proj_type=proj_type, seed=3, model_id=4)
        assert np.array_equal(y.numpy(), expected[:, :k]), f"proj_dim {k}"
