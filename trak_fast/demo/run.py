"""The demonstration behind `trak-fast demo`: attribution on handwritten digits, checked against retraining.

Small convolutional nets are trained on scikit-learn's digits, with some training labels flipped. TRAK attributes
their outputs on test images to the training images. Two facts that TRAK is not told judge the scores: which labels
were flipped, and what nets answer that are really retrained on random halves of the training images.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from ..gradients.functional import FunctionalGradientComputer
from ..metrics import lds, lds_interval, mislabel_detection
from ..projection.projector import Projector
from ..retraining import Models, Recipe, random_subsets, retrained_outputs, state_dict, train
from ..traker import TRAKer
from . import page
from .digits import (
    BATCH_SIZE,
    EXAMPLES,
    IMAGES_PER_EXAMPLE,
    Data,
    Settings,
    build_net,
    load_data,
    logits_of,
    margins,
    mean_losses,
    pixel_similarity,
)


class Clock:
    """Seconds spent in each named stage; those of a stage inside another do not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inner
            self._inner = outer + elapsed


def run(output: str | os.PathLike[str], settings: Settings) -> dict[str, Any]:
    """Runs the demonstration and writes `index.html`, `results.json`, `arrays.npz` and `pictures/*.png`.

    The files appear at the very end, each at once, over those of an earlier run.

    Args:
        output: The folder to write to, made if it is missing.
        settings: What to run.

    Returns:
        What results.json holds.

    Raises:
        OSError: `output` cannot be made or written to, which is tried before anything is computed.
    """
    output = Path(output).resolve()
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as folder:
        results, arrays = _evaluate(settings, Path(folder) / "features")
        finished = Path(folder) / "finished"
        page.write(finished, results, arrays)
        for file in sorted(finished.rglob("*.*"), key=lambda file: file.suffix == ".html"):  # the page last
            file.replace(output / file.relative_to(finished))
    return results


def _evaluate(settings: Settings, folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Everything but the page: the results, and the arrays that they come from."""
    clock = Clock()
    rng = np.random.default_rng(settings.seed)
    with clock("the rest"):
        data = load_data(settings, rng)
        n, m = len(data.labels), len(data.test_labels)
        with clock("train"):
            everything = np.ones((settings.checkpoints, n), bool)
            recipe = Recipe(settings.epochs, BATCH_SIZE)
            nets = train(build_net, (data.images, data.labels), everything, recipe, int(rng.integers(2**32)))
        losses, test_logits = mean_losses(nets, data), logits_of(nets, data.test_images)
        scores, self_influence = attribute(data, nets, settings, folder, clock)

        with clock("retrain"):
            masks, outputs = retrain(data, settings, rng)
        with clock("evaluate"):
            rankings = {"self_influence": self_influence, "loss": losses}
            flipped_labels = _compare_rankings(rankings, data.flipped)
            agreement = {
                "subsets": settings.subsets,
                "nets": settings.subsets * settings.nets_per_subset,
                **_agreement(scores, masks, outputs, rng),
                "pixel_similarity": lds(pixel_similarity(data), masks, outputs).mean,
            }
        examples = _examples(data, scores, test_logits, rng)

    grad_dim = sum(tensor[0].numel() for tensor in nets.values())
    entries = settings.checkpoints * (n + m) * grad_dim
    total, projecting = sum(clock.seconds.values()), clock.seconds["project"]
    results = {
        "settings": asdict(settings),
        "train_images": n,
        "test_images": m,
        "flipped_images": int(data.flipped.sum()),
        "grad_dim": grad_dim,
        "test_accuracy": float((test_logits.argmax(-1) == data.test_labels).double().mean()),
        "flipped_labels": flipped_labels,
        "lds": agreement,
        "examples": examples,
        "timings": {
            "seconds": {**clock.seconds, "total": total},
            "projection": {
                "share": projecting / total,
                "gradient_entries_per_second": entries / projecting,
                "flop_per_second": 2 * entries * settings.proj_dim / projecting,
            },
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        },
    }
    arrays: dict[str, NDArray[Any]] = {
        **{name: tensor.numpy() for name, tensor in data._asdict().items()},
        "flipped": data.flipped, "scores": scores, **rankings, "masks": masks, "outputs": outputs,
    }  # fmt: skip
    return results, arrays


def attribute(
    data: Data, nets: Models, settings: Settings, folder: Path, clock: Clock
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """TRAK scores (n, m) of the training images for the test images, and self-influence (n,)."""

    class TimedGradients(FunctionalGradientComputer):
        def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
            with clock("gradients"):
                return super().compute_per_sample_grad(batch)

    class TimedProjector(Projector):
        def project(self, grads: Any, model_id: int = 0) -> Tensor:
            with clock("project"):
                return super().project(grads, model_id)

    net = build_net()
    grad_dim = sum(parameter.numel() for parameter in net.parameters())
    traker = TRAKer(
        net, "image_classification", train_set_size=len(data.labels), save_dir=folder,
        gradient_computer=TimedGradients, projector=TimedProjector(grad_dim, settings.proj_dim, seed=settings.seed),
    )  # fmt: skip
    train_loader = DataLoader(TensorDataset(data.images, data.labels), BATCH_SIZE)
    test_loader = DataLoader(TensorDataset(data.test_images, data.test_labels), BATCH_SIZE)
    checkpoints = [state_dict(nets, c) for c in range(settings.checkpoints)]
    with clock("store features"), tqdm(total=len(checkpoints) * len(data.labels), desc="featurizing") as bar:
        for model_id, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, model_id)
            for images, labels in train_loader:
                traker.featurize((images, labels), num_samples=len(labels))
                bar.update(len(labels))
    with clock("solve and score"):
        traker.finalize_features()
    with clock("store features"), tqdm(total=len(checkpoints) * len(data.test_labels), desc="scoring") as bar:
        for model_id, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint("test", checkpoint, model_id, num_targets=len(data.test_labels))
            for images, labels in test_loader:
                traker.score((images, labels), num_samples=len(labels))
                bar.update(len(labels))
    with clock("solve and score"):
        return np.array(traker.finalize_scores("test")), traker.self_influence()


def retrain(data: Data, settings: Settings, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Trains nets on random halves of the training images.

    Returns:
        The halves (S, n), and the nets' mean outputs log p/(1 − p) of the right class of each test image (S, m).
    """
    masks = random_subsets(len(data.labels), settings.subsets, int(rng.integers(2**32)))
    outputs = retrained_outputs(
        build_net, (data.images, data.labels), masks,
        lambda nets: margins(logits_of(nets, data.test_images), data.test_labels),
        Recipe(settings.epochs, BATCH_SIZE), int(rng.integers(2**32)), models_per_subset=settings.nets_per_subset,
    )  # fmt: skip
    return masks, outputs


def _agreement(
    scores: NDArray[np.float32], masks: NDArray[np.bool_], outputs: NDArray[np.float64], rng: np.random.Generator
) -> dict[str, Any]:
    """The LDS, its 95 % bootstrap interval over subsets and targets, and the 95 % that chance would give."""
    result, interval = lds(scores, masks, outputs), lds_interval(scores, masks, outputs, seed=rng)
    return {
        "mean": result.mean,
        "interval_95": [interval.low, interval.high],
        "chance_95": [interval.chance_low, interval.chance_high],
        "per_target": result.per_target.tolist(),
    }


def _compare_rankings(rankings: dict[str, NDArray[np.float32]], flipped: NDArray[np.bool_]) -> dict[str, Any]:
    """How many of the flipped labels each ranking finds in its first 1, 2, 5, 10 and 20 %, and the curves."""
    inspected = [0.01, 0.02, 0.05, 0.1, 0.2]
    budgets = [round(share * len(flipped)) for share in inspected]
    results: dict[str, Any] = {"inspected": inspected}
    for name, ranking in rankings.items():
        detection = mislabel_detection(ranking, flipped)
        results[name] = {
            "auc": detection.auc,
            "found": detection.recall[budgets].tolist(),
            "curve": detection.recall.tolist(),
        }
    return results


def _examples(
    data: Data, scores: NDArray[np.float32], test_logits: Tensor, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The extreme training images of some test images: half those that the nets are least sure of, half at random."""
    hardest = margins(test_logits, data.test_labels).mean(0).argsort(stable=True).numpy()
    half = EXAMPLES // 2
    predicted = test_logits.softmax(-1).mean(0).argmax(-1)
    flipped = data.flipped

    def train_image(i: int, target: int) -> dict[str, Any]:
        return {
            "train_image": int(i), "label": int(data.labels[i]), "true_label": int(data.true_labels[i]),
            "flipped": bool(flipped[i]), "score": float(scores[i, target]),
        }  # fmt: skip

    examples = []
    for target in [*hardest[:half], *rng.choice(hardest[half:], EXAMPLES - half, replace=False)]:
        order = np.argsort(-scores[:, target], kind="stable")
        examples.append(
            {
                "test_image": int(target),
                "label": int(data.test_labels[target]),
                "predicted": int(predicted[target]),
                "helpful": [train_image(i, target) for i in order[:IMAGES_PER_EXAMPLE]],
                "harmful": [train_image(i, target) for i in order[::-1][:IMAGES_PER_EXAMPLE]],
            }
        )
    return examples
