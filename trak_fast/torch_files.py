"""Files that torch.save wrote: read without running code that they may hold."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Reads a file of torch.save. Its tensors stay on disk until they are used, and nothing in it is executed.

    Raises:
        OSError: The file cannot be opened.
        Exception: It is damaged, or holds more than tensors, numbers and strings; torch has errors of many classes.
    """
    # files of torch < 1.6 are no archives, and cannot be mapped
    return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
