"""Files that torch.save wrote: read without running code that they may hold, or refused."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch

SAFE_SINCE = "2.6"
"""The first version of torch whose `weights_only=True` keeps a file from running code (CVE-2025-32434)."""


class UnsafeTorchError(ValueError):
    """The refusal of a file that this version of torch cannot read safely."""


def require_safe_torch(path: str | os.PathLike[str], instead: str) -> None:
    """Checks that the version of torch keeps files of torch.save from running code.

    Args:
        path: The file, for the message.
        instead: The other way out, for the message.

    Raises:
        UnsafeTorchError: It does not.
    """
    if torch.__version__ < SAFE_SINCE:
        raise UnsafeTorchError(
            f"{os.fspath(path)} is a file of torch.save, and in torch {torch.__version__} such a file can run code, "
            f"whatever weights_only says (CVE-2025-32434); use torch {SAFE_SINCE} or newer, or {instead}"
        )


def read_torch_file(path: str | os.PathLike[str], instead: str) -> Any:
    """Reads a file of torch.save. Its tensors stay on disk until they are used, and nothing in it is executed.

    Args:
        path: The file.
        instead: The other way out where torch cannot read files safely, for the message.

    Raises:
        UnsafeTorchError: The version of torch cannot keep files from running code.
        OSError: The file cannot be opened.
        Exception: It is damaged, or holds more than tensors, numbers and strings; torch has errors of many classes.
    """
    require_safe_torch(path, instead)
    # files of torch < 1.6 are no archives, and cannot be mapped
    return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
