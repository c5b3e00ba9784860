"""Two-sided sketches as docs/two-sided.md defines them, in plain NumPy and float64, from whole gradients."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_fast.projection import reference
from trak_fast.tasks import Task

Arrays = dict[str, NDArray[np.float64]]


def gradients_alone(model: nn.Module, task: Task, batch: Sequence[Tensor]) -> list[Arrays]:
    """Differentiates f of each sample by itself, with autograd, by all parameters."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for i in range(len(batch[0])):
        output = task.get_outputs(model, {}, {}, [x[i : i + 1] for x in batch])
        parts = torch.autograd.grad(output.sum(), parameters)
        found.append({name: part.double().numpy() for name, part in zip(names, parts, strict=True)})
    return found


def one_side(gradient: NDArray[np.float64], first: int, side: int, seed: int, model_id: int) -> NDArray[np.float64]:
    """Projects the first dimension of a matrix to `side` numbers, if it is longer."""
    size = len(gradient)
    if size <= side:
        return gradient
    columns = np.arange(first, first + size, dtype=np.uint64)
    entries = reference.matrix("rademacher", seed, model_id, np.arange(side), columns)
    return entries.astype(np.float64) @ gradient / np.sqrt(side)


def blocks(gradients: Arrays, sketched: Collection[str], side: int, seed: int, model_id: int) -> Arrays:
    """Replaces the gradients of sketched parameters by their sketches."""
    place = 2**47
    result = {}
    for name, gradient in gradients.items():
        result[name] = gradient
        if name in sketched:
            height, width = gradient.shape
            half = one_side(gradient, place, side, seed, model_id)
            result[name] = one_side(half.T, place + height, side, seed, model_id).T
            place += height + width
    return result


def flattened(samples: Sequence[Arrays]) -> NDArray[np.float64]:
    """Returns all numbers of each sample side by side, (B, columns)."""
    return np.stack([np.concatenate([value.reshape(-1) for value in sample.values()]) for sample in samples])
