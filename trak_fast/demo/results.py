"""The results of the demonstration; results.json holds `Results` as it is, arrays.npz holds `Arrays`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .digits import Settings

INSPECTED = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the training images after whose inspection the flipped labels found are counted."""
HEADLINE = INSPECTED.index(0.05)
"""Place of the share that the headline is about."""


@dataclass(frozen=True)
class Ranking:
    """An order in which the training images are inspected.

    Attributes:
        auc: Area under the ROC curve.
        found: Share of the flipped labels found after each share of `INSPECTED`.
        curve: Share of the flipped labels found after each number of images, 0 to n.
    """

    auc: float
    found: list[float]
    curve: list[float]


@dataclass(frozen=True)
class FlippedLabels:
    """The search for the flipped labels.

    Attributes:
        inspected: The shares of `INSPECTED`.
        self_influence: The order of TRAK's score of each image for itself.
        loss: The order of the nets' loss on each image.
    """

    inspected: list[float]
    self_influence: Ranking
    loss: Ranking


@dataclass(frozen=True)
class Agreement:
    """The agreement of scores with retrained nets.

    Attributes:
        subsets: Random halves of the training images, S.
        nets: Nets retrained on all of them together.
        mean: The LDS: the mean rank correlation of all test images.
        interval_95: Its bootstrap interval over halves and test images.
        chance_95: The interval of the LDS of exchanged halves.
        per_target: The rank correlation of each test image, (m,).
        pixel_similarity: The LDS of pixels' similarity.
    """

    subsets: int
    nets: int
    mean: float
    interval_95: tuple[float, float]
    chance_95: tuple[float, float]
    per_target: list[float]
    pixel_similarity: float


@dataclass(frozen=True)
class TrainImage:
    """A training image shown beside a test image.

    Attributes:
        train_image: Its number.
        label: The label that the nets were trained with.
        true_label: The right label.
        flipped: True if the two differ.
        score: Its score for the test image.
    """

    train_image: int
    label: int
    true_label: int
    flipped: bool
    score: float


@dataclass(frozen=True)
class Example:
    """A test image with its most helpful and most harmful training images, the extremes first.

    Attributes:
        test_image: Its number.
        label: Its label.
        predicted: The nets' answer.
        helpful: The training images of the highest scores.
        harmful: The training images of the lowest scores.
    """

    test_image: int
    label: int
    predicted: int
    helpful: list[TrainImage]
    harmful: list[TrainImage]

    def columns(self) -> dict[str, list[TrainImage]]:
        """Returns the training images by the names that pictures have."""
        return {"helpful": self.helpful, "harmful": self.harmful}


@dataclass(frozen=True)
class Throughput:
    """The speed of the projection.

    Attributes:
        share: Its share of all seconds.
        gradient_entries_per_second: Entries of gradients that went in.
        flop_per_second: Additions and multiplications, 2 k for each entry.
    """

    share: float
    gradient_entries_per_second: float
    flop_per_second: float


@dataclass(frozen=True)
class Timings:
    """The time of a run.

    Attributes:
        seconds: Seconds of each stage, by its name, and of all as "total".
        projection: The speed of the projection.
        machine: Machine, threads and version of torch.
    """

    seconds: dict[str, float]
    projection: Throughput
    machine: str


@dataclass(frozen=True)
class Results:
    """All figures of a run; fields have the order of the file.

    Attributes:
        settings: The run's settings.
        train_images: Training images, n.
        test_images: Test images, m.
        flipped_images: Training images with a flipped label.
        grad_dim: Parameters of a net, D.
        test_accuracy: Share of the answers on test images that are right.
        flipped_labels: The search for the flipped labels.
        lds: The agreement of scores with retrained nets.
        examples: Some test images.
        timings: The time of the run.
    """

    settings: Settings
    train_images: int
    test_images: int
    flipped_images: int
    grad_dim: int
    test_accuracy: float
    flipped_labels: FlippedLabels
    lds: Agreement
    examples: list[Example]
    timings: Timings


class Arrays(NamedTuple):
    """The arrays that the results come from.

    Attributes:
        images: Training images (n, 1, 8, 8) in [0, 1].
        labels: Their labels in training (n,).
        true_labels: Their right labels (n,).
        test_images: Test images (m, 1, 8, 8) in [0, 1].
        test_labels: Their labels (m,).
        flipped: True where the label was flipped (n,).
        scores: Scores (n, m).
        self_influence: Scores of the training images for themselves (n,).
        loss: The nets' mean loss on the training images (n,).
        masks: Random halves (S, n).
        outputs: Outputs of the nets retrained on them (S, m).
    """

    images: NDArray[Any]
    labels: NDArray[Any]
    true_labels: NDArray[Any]
    test_images: NDArray[Any]
    test_labels: NDArray[Any]
    flipped: NDArray[np.bool_]
    scores: NDArray[np.float32]
    self_influence: NDArray[np.float32]
    loss: NDArray[np.float32]
    masks: NDArray[np.bool_]
    outputs: NDArray[np.float64]
