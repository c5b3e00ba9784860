"""The demonstration behind `trak-fast demo`: attribution on handwritten digits, checked against retraining.

Small convolutional nets are trained on scikit-learn's digits, with some training labels flipped. TRAK attributes
their outputs on test images to the training images. Two facts that TRAK is not told judge the scores: the flipped
labels, and the answers of nets that are really retrained on random halves of the training images.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from ..store.files import temporary_folder
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
from .results import (
    INSPECTED,
    Agreement,
    Arrays,
    Example,
    FlippedLabels,
    Ranking,
    Results,
    Throughput,
    Timings,
    TrainImage,
)


class Clock:
    """Seconds spent in each named stage; those of a stage inside another do not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the block as a stage."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inner
            self._inner = outer + elapsed


def run(output: str | os.PathLike[str], settings: Settings) -> Results:
    """Runs the demonstration and writes `index.html`, `results.json`, `arrays.npz` and `pictures/*.png`.

    The files appear at the very end, each at once, over those of an earlier run.

    Args:
        output: The folder to write to, made if it is missing.
        settings: The run's settings.

    Returns:
        The contents of results.json.

    Raises:
        OSError: `output` cannot be made or written to, which is tried before anything is computed.
    """
    output = Path(output).expanduser().resolve()
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    with temporary_folder(output / "unfinished") as folder:
        results, arrays = _evaluate(settings, folder / "features")
        finished = folder / "finished"
        page.write(finished, results, arrays)
        for file in sorted(finished.rglob("*.*"), key=lambda file: file.suffix == ".html"):  # the page last
            file.replace(output / file.relative_to(finished))
    return results


def _evaluate(settings: Settings, folder: Path) -> tuple[Results, Arrays]:
    """Computes everything but the page: the results, and the arrays that they come from."""
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
            flipped_labels = FlippedLabels(
                inspected=list(INSPECTED),
                self_influence=_ranking(self_influence, data.flipped),
                loss=_ranking(losses, data.flipped),
            )
            agreement = _agreement(data, settings, scores, masks, outputs, rng)
        examples = _examples(data, scores, test_logits, rng)

    grad_dim = sum(tensor[0].numel() for tensor in nets.values())
    entries = settings.checkpoints * (n + m) * grad_dim
    total = sum(clock.seconds.values())
    projecting = clock.seconds["project"]
    results = Results(
        settings=settings,
        train_images=n,
        test_images=m,
        flipped_images=int(data.flipped.sum()),
        grad_dim=grad_dim,
        test_accuracy=float((test_logits.argmax(-1) == data.test_labels).double().mean()),
        flipped_labels=flipped_labels,
        lds=agreement,
        examples=examples,
        timings=Timings(
            seconds={**clock.seconds, "total": total},
            projection=Throughput(
                share=projecting / total,
                gradient_entries_per_second=entries / projecting,
                flop_per_second=2 * entries * settings.proj_dim / projecting,
            ),
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        ),
    )
    arrays = Arrays(
        images=data.images.numpy(),
        labels=data.labels.numpy(),
        true_labels=data.true_labels.numpy(),
        test_images=data.test_images.numpy(),
        test_labels=data.test_labels.numpy(),
        flipped=data.flipped,
        scores=scores,
        self_influence=self_influence,
        loss=losses,
        masks=masks,
        outputs=outputs,
    )
    return results, arrays


def attribute(
    data: Data, nets: Models, settings: Settings, folder: Path, clock: Clock
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Computes TRAK scores (n, m) of the training images for the test images, and self-influence (n,)."""

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
        net,
        "image_classification",
        train_set_size=len(data.labels),
        save_dir=folder,
        gradient_computer=TimedGradients,
        projector=TimedProjector(grad_dim, settings.proj_dim, seed=settings.seed),
    )
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
        build_net,
        (data.images, data.labels),
        masks,
        lambda nets: margins(logits_of(nets, data.test_images), data.test_labels),
        Recipe(settings.epochs, BATCH_SIZE),
        int(rng.integers(2**32)),
        models_per_subset=settings.nets_per_subset,
    )
    return masks, outputs


def _agreement(
    data: Data,
    settings: Settings,
    scores: NDArray[np.float32],
    masks: NDArray[np.bool_],
    outputs: NDArray[np.float64],
    rng: np.random.Generator,
) -> Agreement:
    """Computes the LDS of the scores, its 95 % bootstrap interval over subsets and targets, and that of chance."""
    result = lds(scores, masks, outputs)
    interval = lds_interval(scores, masks, outputs, seed=rng)
    return Agreement(
        subsets=settings.subsets,
        nets=settings.subsets * settings.nets_per_subset,
        mean=result.mean,
        interval_95=(interval.low, interval.high),
        chance_95=(interval.chance_low, interval.chance_high),
        per_target=result.per_target.tolist(),
        pixel_similarity=lds(pixel_similarity(data), masks, outputs).mean,
    )


def _ranking(values: NDArray[np.float32], flipped: NDArray[np.bool_]) -> Ranking:
    """Counts the flipped labels that are found when the images of the highest values are inspected first."""
    budgets = [round(share * len(flipped)) for share in INSPECTED]
    detection = mislabel_detection(values, flipped)
    return Ranking(auc=detection.auc, found=detection.recall[budgets].tolist(), curve=detection.recall.tolist())


def _examples(data: Data, scores: NDArray[np.float32], test_logits: Tensor, rng: np.random.Generator) -> list[Example]:
    """Finds the extreme training images of some test images: half where the nets are least sure, half random."""
    hardest = margins(test_logits, data.test_labels).mean(0).argsort(stable=True).numpy()
    half = EXAMPLES // 2
    predicted = test_logits.softmax(-1).mean(0).argmax(-1)
    flipped = data.flipped

    def train_image(i: int, target: int) -> TrainImage:
        return TrainImage(
            train_image=int(i),
            label=int(data.labels[i]),
            true_label=int(data.true_labels[i]),
            flipped=bool(flipped[i]),
            score=float(scores[i, target]),
        )

    examples = []
    for target in [*hardest[:half], *rng.choice(hardest[half:], EXAMPLES - half, replace=False)]:
        order = np.argsort(-scores[:, target], kind="stable")
        examples.append(
            Example(
                test_image=int(target),
                label=int(data.test_labels[target]),
                predicted=int(predicted[target]),
                helpful=[train_image(i, target) for i in order[:IMAGES_PER_EXAMPLE]],
                harmful=[train_image(i, target) for i in order[::-1][:IMAGES_PER_EXAMPLE]],
            )
        )
    return examples
