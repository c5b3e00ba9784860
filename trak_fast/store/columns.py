"""The files of a folder of rows: their names, shapes and dtypes, and the disk space that they need."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .encodings import CODED, code_width, item_type

FEATURES = "features"
EXPONENTS = "features_exponent"
"""The column whose rows may have any scale, and the file of their powers of two."""

SCALES = "features_scale"
"""The file of factors and squared norms of rows that are stored in few bits (encodings.py)."""


def require_space(path: Path, num_rows: int, shapes: Mapping[str, tuple[int, ...]], store_dtype: str) -> None:
    """Checks that a disk has space for rows.

    Raises:
        OSError: It has too little.
    """
    arrays = stored_arrays(num_rows, shapes, store_dtype).values()
    needed = sum(np.dtype(array.dtype).itemsize * int(np.prod(array.shape)) for array in arrays)
    if (free := shutil.disk_usage(path).free) < needed:
        raise OSError(errno.ENOSPC, f"features need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free", str(path))


class StoredArray(NamedTuple):
    """The contents of a file."""

    shape: tuple[int, ...]
    dtype: type[np.generic]


def stored_arrays(num_rows: int, shapes: Mapping[str, tuple[int, ...]], store_dtype: str) -> dict[str, StoredArray]:
    """Lists the files of a folder of rows, by their names without .npy."""
    arrays = {name: StoredArray((num_rows, *shape), np.float32) for name, shape in shapes.items()}
    if FEATURES in shapes:
        items = code_width(store_dtype, shapes[FEATURES][0])
        arrays[FEATURES] = StoredArray((num_rows, items), item_type(store_dtype))
        arrays[EXPONENTS] = StoredArray((num_rows,), np.int16)
        if store_dtype in CODED:
            arrays[SCALES] = StoredArray((num_rows, 2), np.float32)
    arrays["digests"] = StoredArray((num_rows,), np.uint32)
    arrays["done"] = StoredArray((num_rows,), np.bool_)
    return arrays
