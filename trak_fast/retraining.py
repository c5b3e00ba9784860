"""Trains many small models at once, each on its own subset of the training set: the truth that scores are judged by.

Models of one architecture are stacked and trained together by vmap, which on small models is several times as fast as
one after the other. `retrained_outputs` keeps finished parts on disk, so that a killed run goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from tqdm.auto import tqdm

from .arguments import integer, real
from .store.files import atomic_file
from .store.manifest import bytes_of

MODELS_AT_ONCE = 25
"""Models that are stacked. Random numbers are drawn for so many together, so weights and outputs depend on it."""

Models = dict[str, Tensor]
"""Parameters and buffers of S models by name, stacked: (S, ...) each."""


@dataclass(frozen=True)
class Recipe:
    """The settings of training: SGD with momentum and weight decay, the step constant at first and then falling to 0.

    Attributes:
        epochs: Passes over the subset; each leaves out the samples that do not fill a last batch.
        batch_size: Samples a step.
        learning_rate: The step's size during the first fifth of the steps.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A number is out of its range.
            TypeError: A value is no number, or `epochs` or `batch_size` no integer.
        """
        integer("epochs", self.epochs, 1)
        integer("batch_size", self.batch_size, 1)
        real("learning_rate", self.learning_rate, 0)
        real("momentum", self.momentum, 0)
        real("weight_decay", self.weight_decay, 0)


def random_subsets(num_samples: int, count: int, seed: int, share: float = 0.5) -> NDArray[np.bool_]:
    """Draws subsets of one size.

    Args:
        num_samples: Samples to choose from, n.
        count: Subsets.
        seed: Seed of the draws.
        share: Share of the samples in each subset, which has round(`share` · n).

    Returns:
        Masks, (count, n) bool.

    Raises:
        ValueError: `share` leaves no sample in, or none out, or `count` is less than 1.
        TypeError: `num_samples` or `count` is no integer.
    """
    num_samples = integer("num_samples", num_samples, 2)
    count = integer("count", count, 1)
    size = round(share * num_samples)
    if not 0 < size < num_samples:
        raise ValueError(f"share must leave 1 to {num_samples - 1} of {num_samples} samples in, not {size}")
    first = np.tile(np.arange(num_samples) < size, (count, 1))
    return np.random.default_rng(seed).permuted(first, axis=1)


def train(
    build: Callable[[], nn.Module],
    data: Sequence[Tensor],
    masks: NDArray[np.bool_],
    recipe: Recipe,
    seed: int | Sequence[int],
    *,
    loss: Callable[..., Tensor] = F.cross_entropy,
    title: str = "training",
) -> Models:
    """Trains one model on each subset, MODELS_AT_ONCE of them at a time, where `data` is.

    Args:
        build: Makes a model with fresh random weights (from torch's global generator).
        data: The training set's tensors (n, ...): the model's input, then what `loss` takes after its output.
        masks: (S, n) bool, the samples that each model sees, equally many for each.
        recipe: The settings of training.
        seed: Seed of the weights and of the order of samples. A model depends on it and on its own place in `masks`.
        loss: `loss(model(input), *rest)`, the mean over a batch.
        title: Title of the progress bar.

    Returns:
        Parameters and buffers of the trained models, detached.

    Raises:
        ValueError: Shapes do not fit, or subsets differ in size or have less than a batch.
        TypeError: `masks` is not boolean.
    """
    subsets = _members(masks, len(data[0]))
    steps = subsets.shape[1] // recipe.batch_size
    if steps == 0:
        size = subsets.shape[1]
        raise ValueError(
            f"masks must have at least one batch of {recipe.batch_size} samples in each subset, not {size}"
        )
    seeds = np.random.SeedSequence(seed).spawn(-(-len(subsets) // MODELS_AT_ONCE))
    trained = []
    with tqdm(total=len(subsets) * recipe.epochs, desc=title, unit="epoch", disable=None) as bar:
        for i, part_seed in enumerate(seeds):
            part = subsets[i * MODELS_AT_ONCE : (i + 1) * MODELS_AT_ONCE]
            trained.append(_train_together(build, data, part, recipe, np.random.default_rng(part_seed), loss, bar))
    return {name: torch.cat([models[name] for models in trained]) for name in trained[0]}


def _train_together(
    build: Callable[[], nn.Module],
    data: Sequence[Tensor],
    subsets: NDArray[np.integer],
    recipe: Recipe,
    rng: np.random.Generator,
    loss: Callable[..., Tensor],
    bar: tqdm[Any],
) -> Models:
    """Trains one model on each of a few subsets of one size, whose samples' numbers are (S, size)."""
    device = data[0].device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**32)))
        models = [build().to(device).train() for _ in subsets]
        weights, buffers = stack_module_state(models)

        def loss_of(weights: Models, buffers: Models, *batch: Tensor) -> Tensor:
            return loss(functional_call(models[0], (weights, buffers), (batch[0],)), *batch[1:])

        steps = subsets.shape[1] // recipe.batch_size
        total = recipe.epochs * steps
        optimizer = torch.optim.SGD(
            weights.values(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 1.25 * (1 - step / total)))
        for _ in range(recipe.epochs):
            order = torch.from_numpy(rng.permuted(subsets, axis=1)[:, : steps * recipe.batch_size]).to(device)
            for inds in torch.split(order, recipe.batch_size, dim=1):
                optimizer.zero_grad()
                losses = vmap(loss_of, randomness="different")(weights, buffers, *(x[inds] for x in data))
                # the models share nothing, so the gradient of the sum is each model's own
                torch.autograd.backward(losses.sum())
                optimizer.step()
                schedule.step()
            bar.update(len(subsets))
    return {name: tensor.detach() for name, tensor in {**weights, **buffers}.items()}


def _members(masks: NDArray[np.bool_], num_samples: int) -> NDArray[np.integer]:
    """Checks masks, and returns the numbers of the samples in each subset, (S, size)."""
    masks = np.asarray(masks)
    if masks.dtype != np.bool_:
        raise TypeError(f"masks must be bool, not {masks.dtype}")
    if masks.ndim != 2 or masks.shape[1] != num_samples or not len(masks):
        raise ValueError(f"masks must have shape (S, {num_samples}), as data has, not {masks.shape}")
    sizes = masks.sum(axis=1)
    if (sizes != sizes[0]).any():
        raise ValueError(f"masks must have equally many samples in each subset, not {sizes.min()} to {sizes.max()}")
    return np.nonzero(masks)[1].reshape(len(masks), -1)


def forward(build: Callable[[], nn.Module], models: Models, inputs: Tensor) -> Tensor:
    """Runs S models in evaluation mode on inputs (B, ...); returns their outputs stacked, (S, B, ...)."""
    model = build().to(inputs.device).eval()

    def outputs(state: Models) -> Tensor:
        result: Tensor = functional_call(model, state, (inputs,))
        return result

    with torch.no_grad():
        result: Tensor = vmap(outputs, chunk_size=MODELS_AT_ONCE)(models)
    return result


def state_dict(models: Models, index: int) -> dict[str, Tensor]:
    """Returns the state dict of one of the models."""
    return {name: tensor[index] for name, tensor in models.items()}


def retrained_outputs(
    build: Callable[[], nn.Module],
    data: Sequence[Tensor],
    masks: NDArray[np.bool_],
    evaluate: Callable[[Models], Tensor],
    recipe: Recipe,
    seed: int,
    *,
    models_per_subset: int = 1,
    loss: Callable[..., Tensor] = F.cross_entropy,
    save_dir: str | os.PathLike[str] | None = None,
    title: str = "retraining",
) -> NDArray[np.float64]:
    """Retrains models on subsets and returns their outputs, averaged over `models_per_subset` models of each subset.

    Args:
        build: As in `train`.
        data: As in `train`.
        masks: As in `train`.
        evaluate: Maps S' models to their outputs (S', m), such as the margins on m targets.
        recipe: As in `train`.
        seed: As in `train`.
        models_per_subset: Models with weights and orders of their own for each subset.
        loss: As in `train`.
        save_dir: Folder that keeps finished parts, so that the same call goes on after a crash. Parts of other data,
            masks, recipe or seed are not used; `build`, `evaluate` and `loss` are not compared.
        title: Title of the progress bar.

    Returns:
        (S, m) float64.

    Raises:
        ValueError: As in `train`.
        TypeError: As in `train`.
    """
    models_per_subset = integer("models_per_subset", models_per_subset, 1)
    _members(masks, len(data[0]))
    every = np.repeat(masks, models_per_subset, axis=0)
    key = _key(data, every, recipe, seed)
    parts = []
    for start in tqdm(range(0, len(every), MODELS_AT_ONCE), desc=title, unit="part", disable=None):
        path = None if save_dir is None else Path(save_dir).expanduser() / f"outputs-{key}-{start}.npy"
        if path is not None and path.exists():
            parts.append(np.load(path, allow_pickle=False))
            continue
        part = every[start : start + MODELS_AT_ONCE]
        models = train(build, data, part, recipe, [seed, start], loss=loss, title=f"{title}, models {start} on")
        parts.append(evaluate(models).double().cpu().numpy())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, parts[-1])
    outputs = np.concatenate(parts)
    mean: NDArray[np.float64] = outputs.reshape(len(masks), models_per_subset, -1).mean(axis=1)
    return mean


def _key(data: Sequence[Tensor], masks: NDArray[np.bool_], recipe: Recipe, seed: int) -> str:
    """Returns a digest of all that retrained models depend on, apart from code."""
    sha = hashlib.sha256(json.dumps([asdict(recipe), seed, MODELS_AT_ONCE]).encode())
    for tensor in (*data, torch.from_numpy(np.ascontiguousarray(masks))):
        sha.update(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}".encode())
        sha.update(bytes_of(tensor).data)
    return sha.hexdigest()[:16]
