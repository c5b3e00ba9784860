"""The digits, the nets trained on them, and the settings of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import integer, real
from ..retraining import Models, forward
from ..tasks.classification import margin

IMAGES = 1797
"""Images of scikit-learn's digits."""
CLASSES = 10
BATCH_SIZE = 64
EXAMPLES = 6
"""Test images that the page shows."""
IMAGES_PER_EXAMPLE = 5
"""Most helpful, and most harmful, training images that it shows beside each."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the same settings on the same machine give the same figures, times aside.

    Attributes:
        seed: Determines everything random, in [0, 2^32).
        proj_dim: Size of the projected gradients, k.
        checkpoints: Nets that scores are averaged over, C.
        subsets: Random halves of the training images that nets are retrained on, S.
        nets_per_subset: Nets retrained on each half; their outputs are averaged.
        flipped: Share of the training labels to flip, in (0, 0.5].
        epochs: Passes over the training images, for every net.
        train_size: Training images, n; the digits are 1,797 in all.
        test_size: Test images, the targets, m.
    """

    seed: int
    proj_dim: int
    checkpoints: int
    subsets: int
    nets_per_subset: int
    flipped: float
    epochs: int
    train_size: int
    test_size: int

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            TypeError: A setting is no number.
            ValueError: A setting is out of its range.
        """
        limits = {
            "seed": (0, 2**32 - 1), "proj_dim": (1, 2**32), "checkpoints": (1, 1000), "subsets": (2, 100_000),
            "nets_per_subset": (1, 1000), "epochs": (1, 10_000), "train_size": (4 * BATCH_SIZE, IMAGES - 2 * EXAMPLES),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            integer(name, getattr(self, name), low, high)
        integer("test_size", self.test_size, 2 * EXAMPLES, IMAGES - self.train_size)
        real("flipped", self.flipped, 1 / self.train_size, 0.5)


class Data(NamedTuple):
    """Images (·, 1, 8, 8) float32 in [0, 1] and labels (·,) int64; `true_labels` are the training labels unflipped."""

    images: Tensor
    labels: Tensor
    true_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """True where a training label was flipped, (n,)."""
        return (self.labels != self.true_labels).numpy()


def load_data(settings: Settings, rng: np.random.Generator) -> Data:
    """Loads scikit-learn's digits, split by class, with `settings.flipped` of the training labels made wrong."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    chosen, test = train_test_split(
        np.arange(len(labels)),
        train_size=settings.train_size,
        test_size=settings.test_size,
        stratify=digits.target,
        random_state=int(rng.integers(2**32)),
    )
    given = labels[chosen]
    flipped = rng.choice(len(chosen), round(settings.flipped * len(chosen)), replace=False)
    given[flipped] = (given[flipped] + torch.from_numpy(rng.integers(1, CLASSES, len(flipped)))) % CLASSES
    return Data(images[chosen], given, labels[chosen], images[test], labels[test])


def build_net() -> nn.Module:
    """Makes a convolutional net with 38,282 parameters, (B, 1, 8, 8) to logits (B, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def logits_of(nets: Models, images: Tensor) -> Tensor:
    """Computes the logits (S, B, 10) of S nets for images (B, 1, 8, 8)."""
    return forward(build_net, nets, images)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the model outputs log p/(1 − p) of the labelled class, (S, B) float64, from logits (S, B, 10)."""
    return margin(logits.flatten(0, 1).double(), labels.repeat(len(logits))).view(len(logits), -1)


def mean_losses(nets: Models, data: Data) -> NDArray[np.float32]:
    """Computes the nets' mean loss on each training image, with the label that it was trained with (n,)."""
    log_p = logits_of(nets, data.images).log_softmax(-1).mean(0)
    return -log_p.gather(1, data.labels.unsqueeze(1)).squeeze(1).numpy()


def pixel_similarity(data: Data) -> NDArray[np.float32]:
    """Computes scores (n, m) without any net, to compare with: the images' cosine, negative where labels differ."""
    center = data.images.mean(0)
    given, test = (F.normalize((images - center).flatten(1)) for images in (data.images, data.test_images))
    sign = torch.where(data.labels.unsqueeze(1) == data.test_labels, 1.0, -1.0)
    return (given @ test.mT * sign).numpy()
