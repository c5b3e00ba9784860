"""Files of tensors in the format of safetensors, which holds numbers and nothing that could be run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import atomic_file

NOTES = "trak_fast"
"""The entry of a file's header that has its notes as JSON."""


class TensorFile(NamedTuple):
    """The content of a file.

    Attributes:
        tensors: Tensors by name, on the CPU.
        notes: Numbers, strings and lists of them by name.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    publish: Callable[[Path], AbstractContextManager[Path]] = atomic_file,
) -> None:
    """Writes a file, whole or not at all.

    It is put together in memory: the writer of files of safetensors leaves temporary ones behind when it is killed,
    lets nobody else read the file, and hides that a disk is full.

    Args:
        path: The file.
        tensors: Dense tensors by name.
        notes: Numbers, strings and lists of them by name.
        publish: `files.atomic_file`, or `files.first_file`.

    Raises:
        ValueError: A tensor has a layout that the format lacks.
        KeyError: A tensor has a dtype that the format lacks.
        OSError: The disk is full, for example.
    """
    # tensors may share memory, which the format does not take
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = save(plain, {NOTES: json.dumps(dict(notes))})
    with publish(path) as temporary:
        temporary.write_bytes(content)


def read_tensors(path: Path) -> TensorFile:
    """Reads a file of `write_tensors`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is truncated or corrupt, or of another format.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"cannot read {path}, it is no file")
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()[NOTES])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"cannot read {path}, it is truncated or corrupt ({error})") from error
    if not isinstance(notes, dict):
        raise ValueError(f"cannot read {path}, it is corrupt (its notes are no JSON object)")
    return TensorFile(tensors, notes)
