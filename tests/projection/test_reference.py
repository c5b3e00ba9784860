"""The reference against published known answers, and against the definition read out for one entry at a time."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_fast.projection import reference

Golden = dict[str, list[list[str]]]


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


def entry(proj_type: str, seed: int, stream: int, i: int, j: int) -> float:
    """Computes P[i, j] as the definition's text says, in Python's unbounded integers."""
    block = j // (512 if proj_type == "rademacher" else 32)
    t = (j % 8) // 2
    tag = 0 if proj_type == "rademacher" else 1
    counter = (block & 0xFFFFFFFF, i, t | tag << 8 | (block >> 32) << 16, stream)
    words = [int(word) for word in reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))]
    if proj_type == "rademacher":
        bit = 16 * (j % 2) + 2 * ((j % 128) // 16) + (j % 16) // 8
        return 1.0 - 2.0 * (words[(j % 512) // 128] >> bit & 1)
    word = words[2 * ((j % 32) // 16) + (j % 16) // 8]
    return float(reference.normal_table()[word >> 16 if j % 2 else word & 0xFFFF])


def test_philox_gives_the_known_answers(golden: Golden) -> None:
    numbers = np.array([[int(field, 16) for field in fields] for fields in golden["philox"]])
    for row in numbers:
        assert reference.philox4x32(row[:4], row[4:6]).tolist() == row[6:].tolist()


def test_normal_table_is_the_defined_one(golden: Golden) -> None:
    table = reference.normal_table()
    assert [sha256(table)] == golden["table"][0]
    assert np.array_equal(table, -table[::-1])
    assert np.all(np.diff(table) >= 0)
    assert len(np.unique(table)) == 2680
    assert table.max() == 4.3125
    assert np.mean(np.square(table, dtype=np.float64)) == pytest.approx(1.000001, abs=5e-7)


def test_matrix_gives_the_golden_values(golden: Golden) -> None:
    for proj_type, *numbers, expected in golden["block"]:
        seed, stream, first_row, rows, first_column, columns = map(int, numbers)
        block = reference.matrix(
            proj_type, seed, stream, range(first_row, first_row + rows), range(first_column, first_column + columns)
        )
        assert block.shape == (rows, columns)
        assert sha256(block) == expected
    for proj_type, *numbers, value in golden["entry"]:
        seed, stream, row, column = map(int, numbers)
        assert reference.matrix(proj_type, seed, stream, [row], [column]).item() == float(value)


@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    columns=st.lists(st.integers(0, 2**53 - 1) | st.integers(0, 2000), min_size=1, max_size=12),
)
def test_matrix_is_the_definition_entry_by_entry(
    proj_type: str, seed: int, stream: int, rows: list[int], columns: list[int]
) -> None:
    expected = [[entry(proj_type, seed, stream, i, j) for j in columns] for i in rows]
    assert reference.matrix(proj_type, seed, stream, rows, columns).tolist() == expected


def test_project_is_the_product_with_the_matrix() -> None:
    # So many rows that the columns are taken in three chunks, of 512 and a rest.
    grads = np.random.default_rng(0).integers(-9, 9, (3, 1100)).astype(np.float32)
    k, offset = 2**16, 2**41 - 500
    P = reference.matrix("rademacher", 5, 7, range(0, k, 4099), range(offset, offset + 1100))
    expected = [[sum(int(p) * int(g) for p, g in zip(row, sample, strict=True)) for row in P] for sample in grads]
    y = reference.project(grads, k, "rademacher", 5, 7, offset)
    assert np.array_equal(y[:, ::4099], expected)
