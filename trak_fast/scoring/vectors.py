"""Scores as inner products of plain vectors, for programs that search vectors or join tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..scales import beyond_float32
from ..store.files import atomic_file, create_array
from .gram import blocks
from .scores import ScoreMatrix


def write_vectors(matrix: ScoreMatrix, train: Path, targets: Path) -> None:
    """Writes vectors whose inner products are the scores.

    A training sample's vector holds its features at all checkpoints, one after the other, times its weight in the
    scores; a target's vector holds the vectors whose products with features are its scores, (X'RX + λI)⁻¹ φ.

    Args:
        matrix: The scores, (n, m), of C checkpoints with features of k numbers.
        train: A .npy file to write, (n, C·k) float32.
        targets: The same for the targets, (m, C·k) float32.

    Raises:
        ValueError: Numbers are beyond float32.
        OSError: The disk is full, for example.
    """
    train.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = matrix.checkpoints
    n, m = matrix.shape
    k = checkpoints[0].targets.shape[1]
    width = len(checkpoints) * k
    with (
        atomic_file(train) as train_file,
        atomic_file(targets) as targets_file,
        tqdm(total=(n + m) * len(checkpoints), desc="vectors", unit_scale=True, disable=None) as bar,
    ):
        create_array(train_file, (n, width), np.float32)
        create_array(targets_file, (m, width), np.float32)
        for path, count in ((train_file, n), (targets_file, m)):
            array = open_memmap(path, "r+")
            for index, checkpoint in enumerate(checkpoints):
                own = slice(index * k, (index + 1) * k)
                for rows in blocks(count, k):
                    if path == train_file:
                        vectors = checkpoint.read_features(rows).double() * matrix.weights[rows, None]
                    else:
                        vectors = checkpoint.solver.coefficients(checkpoint.targets[rows]).mT
                    array[rows, own] = _narrowed(vectors)
                    bar.update(rows.stop - rows.start)
            array.flush()


def _narrowed(vectors: Tensor) -> NDArray[np.float32]:
    """Returns vectors (B, k) as float32.

    Raises:
        ValueError: It does not hold the largest number of one.
    """
    largest = vectors.abs().amax(dim=1).cpu().numpy()
    if (bad := beyond_float32(largest)).any():
        raise ValueError(
            f"the largest number of a vector must be 0 or in [1.18e-38, 3.4e+38], not {largest[bad][0]:.3g}; multiply "
            "the model output f by a constant"
        )
    return vectors.to(torch.float32).cpu().numpy()
