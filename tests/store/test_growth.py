"""Arrays on disk that get more rows in place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from trak_fast.store.files import create_array, grow_array


@pytest.mark.parametrize(("first", "second"), [((0, 3), (7, 3)), ((9,), (10,)), ((99, 2), (10**5, 2)), ((5,), (5,))])
def test_an_array_that_grows_keeps_its_rows_also_if_its_header_was_cut_in_two(
    tmp_path: Path, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    path, whole = tmp_path / "x.npy", tmp_path / "whole.npy"
    create_array(path, first, np.float32)
    create_array(whole, second, np.float32)
    values = np.arange(math.prod(first), dtype=np.float32)
    header = path.stat().st_size - values.nbytes
    with path.open("r+b") as file:
        file.seek(header)
        file.write(values.tobytes())
    torn, new = bytearray(path.read_bytes()), whole.read_bytes()[:header]
    for cut in (0, 10, header // 2, header - 1, header):
        torn[:cut] = new[:cut]
        path.write_bytes(torn)
        for _ in range(2):
            grow_array(path, second, np.float32)
            assert path.read_bytes()[:header] == new
            grown = np.load(path, mmap_mode="r")
            assert grown.shape == second
            np.testing.assert_array_equal(grown.reshape(-1)[: len(values)], values)
            assert not grown.reshape(-1)[len(values) : len(values) + 1000].any()


def test_a_file_that_is_no_array_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for content in (b"", b"\x93NUMPY\x01\x00", b"something else altogether", b"\x93NUMPY\x01\x00\x05\x00     "):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a \.npy file with room for"):
            grow_array(path, (3,), np.float32)
        assert path.read_bytes() == content
