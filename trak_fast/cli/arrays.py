"""Arrays that a command is given as files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from ..torch_files import read_torch_file
from .failure import WRONG_ARGUMENT, Failure

TORCH_ENDINGS = (".pt", ".pth")
"""Endings of the files that torch.save wrote."""


def read_array(flag: str, path: Path) -> NDArray[Any]:
    """Reads the array of a file; nothing that the file holds is executed.

    Args:
        flag: The flag that named the file, for messages.
        path: A .npy file, of which rows are read when they are used; or a tensor that torch.save wrote, .pt or .pth.

    Returns:
        The array. A tensor of bfloat16, which NumPy lacks, becomes float32.

    Raises:
        Failure: The file is of another kind (status 2), or it is missing or cannot be read (status 1).
    """
    path = path.expanduser()
    ending = path.suffix.lower()
    if ending not in (".npy", *TORCH_ENDINGS):
        raise Failure(
            f"{flag} must be a file of np.save (.npy) or torch.save (.pt, .pth), not {str(path)!r}; "
            "np.save writes an array to the first",
            WRONG_ARGUMENT,
        )
    try:
        content = read_torch_file(path) if ending in TORCH_ENDINGS else np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise Failure(f"cannot read {flag}: {error}") from error
    except (ValueError, EOFError, RuntimeError, LookupError, pickle.UnpicklingError) as error:
        raise Failure(f"cannot read {flag}: {path} is truncated or no {ending} file of plain numbers") from error
    if isinstance(content, NpzFile):
        content.close()
        raise Failure(f"{flag} must hold one array, not those of np.savez; np.save writes one", WRONG_ARGUMENT)
    if isinstance(content, Tensor):
        return _array_of(flag, content)
    if not isinstance(content, np.ndarray):
        raise Failure(
            f"{flag} must hold one tensor, not {type(content).__name__}; torch.save(tensor, path) writes one",
            WRONG_ARGUMENT,
        )
    return content


def _array_of(flag: str, tensor: Tensor) -> NDArray[Any]:
    """Returns the array of a tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Failure(f"{flag} must hold a dense tensor, not {tensor.layout}; to_dense() makes one", WRONG_ARGUMENT)
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
