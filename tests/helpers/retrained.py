"""A small classifier of digits, and what is needed to judge attribution of it: nets retrained on halves of the data."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from trak_fast.tasks import margin

TRAIN, TARGETS, SUBSETS, CHECKPOINTS, STEPS = 400, 60, 60, 2, 150


def network() -> nn.Sequential:
    """A net of 2,410 parameters, (B, 64) to logits (B, 10)."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Retrained(NamedTuple):
    """Training data and targets, checkpoints trained on all of the data, and the retrained nets' outputs."""

    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    checkpoints: list[dict[str, Tensor]]
    masks: NDArray[np.bool_]
    outputs: NDArray[np.float64]


@functools.cache
def retrained() -> Retrained:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    train, targets = (x[:TRAIN], y[:TRAIN]), (x[-TARGETS:], y[-TARGETS:])
    masks = np.random.default_rng(0).permuted(np.tile(np.arange(TRAIN) < TRAIN // 2, (SUBSETS, 1)), axis=1)
    everything = fit(*train, torch.ones(CHECKPOINTS, TRAIN), seed=1)
    checkpoints = [{name: w[c].clone() for name, w in everything.items()} for c in range(CHECKPOINTS)]
    nets = fit(*train, torch.from_numpy(masks).float(), seed=2)
    logits = forward(nets, targets[0])
    outputs = torch.stack([margin(net.double(), targets[1]) for net in logits])
    return Retrained(train, targets, checkpoints, masks, outputs.numpy())


def forward(nets: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.baddbmm(nets["0.bias"].unsqueeze(1), x.expand(len(nets["0.bias"]), -1, -1), nets["0.weight"].mT)
    return torch.baddbmm(nets["2.bias"].unsqueeze(1), hidden.relu(), nets["2.weight"].mT)


def fit(x: Tensor, y: Tensor, weights: Tensor, seed: int) -> dict[str, Tensor]:
    """Trains one net for each row of `weights` (S, n), by gradient descent with momentum and weight decay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [network().state_dict() for _ in weights]
    nets = {name: torch.stack([start[name] for start in starts]).requires_grad_() for name in starts[0]}
    optimizer = torch.optim.SGD(nets.values(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    for _ in range(STEPS):
        losses = F.cross_entropy(forward(nets, x).transpose(1, 2), y.expand(len(weights), -1), reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum(1) / weights.sum(1)).sum().backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in nets.items()}
