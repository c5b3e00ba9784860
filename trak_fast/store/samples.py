"""Marks of samples: digests that tell if a row belongs to the sample at hand, and stored samples with their f and Q.

A digest guards against mistakes, such as a loader that gives another order than before, and not against forgers: 32
bits are enough, and CRC-32 is read from memory several times as fast as cryptographic hashes are computed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tensors import read_tensors, write_tensors


def digest_samples(batch: Sequence[Tensor], positions: NDArray[np.intp]) -> NDArray[np.uint32]:
    """Computes a digest of each of some samples.

    Zeros at the end of a tensor have no part in it: the same sample may be padded by more of them in another batch.

    Args:
        batch: Tensors (B, ...).
        positions: (b,) the samples' positions in the batch.

    Returns:
        (b,).
    """
    digests = np.zeros(len(positions), np.uint32)
    if not len(positions):
        return digests
    chosen = torch.from_numpy(positions)
    for tensor in batch:
        rows = tensor.detach()[chosen.to(tensor.device)].cpu()
        rows = rows.to_dense() if rows.layout != torch.strided else rows.resolve_conj().resolve_neg()
        data = rows.contiguous().reshape(len(positions), -1).view(torch.uint8).numpy() if rows.numel() else None
        kind = str(tensor.dtype).encode()
        for i in range(len(positions)):
            content = b"" if data is None else data[i].tobytes().rstrip(b"\0")
            digests[i] = zlib.crc32(content, zlib.crc32(kind, int(digests[i])))
    return digests


def first_of(numbers: NDArray[np.integer]) -> str:
    """Lists the first five numbers."""
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def other_samples_message(rows: NDArray[np.integer], path: Path) -> str:
    """Says that samples at `rows` are not those that the rows in a folder were stored from."""
    return (
        f"{len(rows)} samples are not those that the same rows of {path} were stored from: {first_of(rows)}. The "
        "loader gives another order or other data than then: shuffle=False? no augmentation, and the same dtypes and "
        "padding (see PaddedBatches)? Featurize again with "
        "load_checkpoint(..., _allow_featurizing_already_registered=True) or another save_dir, or let "
        "check_samples=False take samples as they come"
    )


@dataclass(frozen=True)
class StoredSamples:
    """Some samples with their f and Q, by which a task is known again.

    Attributes:
        batch: Their tensors, (P, ...) each, on the CPU.
        outputs: f, (P,) float64.
        weightings: Q, (P,) float64.
    """

    batch: list[Tensor]
    outputs: Tensor
    weightings: Tensor

    def save(self, path: Path) -> None:
        """Writes a file; without it, a task is compared by its description alone.

        Raises:
            ValueError: A tensor is neither dense nor of coordinates, or the format of safetensors lacks its dtype.
            OSError: The disk is full, for example.
        """
        tensors = {"outputs": self.outputs, "weightings": self.weightings}
        kinds = []
        for place, tensor in enumerate(self.batch):
            numbers = tensor
            if tensor.layout == torch.sparse_coo:
                numbers = tensor.coalesce().values()
                tensors[f"indices.{place}"] = tensor.coalesce().indices()
            numbers = numbers.resolve_conj().resolve_neg()
            tensors[f"numbers.{place}"] = torch.view_as_real(numbers) if numbers.is_complex() else numbers
            kinds.append({"shape": list(tensor.shape), "complex": tensor.is_complex()})
        try:
            write_tensors(path, tensors, {"batch": kinds})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"samples must be tensors that safetensors takes ({error})") from error

    @staticmethod
    def load(path: Path) -> StoredSamples | None:
        """Reads a file; returns None where there is none.

        Raises:
            ValueError: The file is truncated or corrupt.
        """
        if not path.exists():
            return None
        try:
            tensors, notes = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it") from error
        try:
            batch = []
            for place, kind in enumerate(notes["batch"]):
                numbers = tensors[f"numbers.{place}"]
                numbers = torch.view_as_complex(numbers) if kind["complex"] else numbers
                if (indices := tensors.get(f"indices.{place}")) is not None:
                    numbers = torch.sparse_coo_tensor(indices, numbers, kind["shape"], check_invariants=True).coalesce()
                batch.append(numbers)
            return StoredSamples(batch, tensors["outputs"], tensors["weightings"])
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(f"cannot read {path}, it is truncated or corrupt ({error}); delete it") from error
