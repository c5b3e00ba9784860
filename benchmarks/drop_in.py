"""Runs traker's, dattri's and bergson's own code with their projection and with ours, and prints seconds and quality.

    python benchmarks/drop_in.py [--output benchmarks/results/NAME.json]

The model is the convolutional net of `trak-fast demo` (38,282 parameters) on scikit-learn's digits, k = 2048; quality
is the linear datamodeling score over 60 nets retrained on random halves. A library that is not installed is left out
(`pip install --no-deps traker==0.3.2 dattri==0.3.0`; bergson with what it imports).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from record import make_parser, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trak_fast import retraining
from trak_fast.demo import digits
from trak_fast.demo.run import retrain
from trak_fast.metrics import lds

TRAIN = 640
TARGETS = 64
K = 2048
BATCH = 64


class Problem(NamedTuple):
    """The digits, a trained net, and the outputs of nets retrained on subsets (masks)."""

    data: digits.Data
    checkpoint: dict[str, Tensor]
    masks: NDArray[np.bool_]
    outputs: NDArray[np.float64]


def prepare() -> Problem:
    """Trains a net, and retrains nets on random halves of its training samples."""
    settings = digits.Settings(
        seed=0, proj_dim=K, checkpoints=1, subsets=60, nets_per_subset=1, flipped=0.05, epochs=15,
        train_size=TRAIN, test_size=TARGETS,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    data = digits.load_data(settings, rng)
    recipe = retraining.Recipe(settings.epochs)
    nets = retraining.train(digits.build_net, (data.images, data.labels), np.ones((1, TRAIN), bool), recipe, seed=0)
    masks, outputs = retrain(data, settings, rng)
    return Problem(data, retraining.state_dict(nets, 0), masks, outputs)


def run_traker(problem: Problem) -> NDArray[np.float32]:
    """Returns the scores (n, m) of traker's TRAKer."""
    import trak

    data = problem.data
    with tempfile.TemporaryDirectory() as folder:
        traker = trak.TRAKer(
            model=digits.build_net(), task="image_classification", train_set_size=TRAIN, save_dir=folder, device="cpu",
            proj_dim=K, use_half_precision=False, lambda_reg=1e-3, logging_level=logging.CRITICAL,
        )  # fmt: skip
        traker.load_checkpoint(problem.checkpoint, model_id=0)
        for batch in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("test", problem.checkpoint, model_id=0, num_targets=TARGETS)
        traker.score(batch=(data.test_images, data.test_labels), num_samples=TARGETS)
        return np.array(traker.finalize_scores(exp_name="test"))


def run_dattri(problem: Problem) -> NDArray[np.float32]:
    """Returns the scores (n, m) of dattri's TRAKAttributor."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = digits.build_net()
    data = problem.data

    def loss(params: dict[str, Tensor], sample: tuple[Tensor, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, params, sample[0].unsqueeze(0))
        return nn.functional.cross_entropy(output, sample[1].unsqueeze(0))

    def logit(params: dict[str, Tensor], sample: tuple[Tensor, Tensor]) -> Tensor:
        p = torch.exp(-loss(params, sample))
        return torch.log(p / (1 - p))

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "checkpoint.pt")
        torch.save(problem.checkpoint, file)
        attributor = TRAKAttributor(
            task=AttributionTask(loss_func=logit, model=model, checkpoints=[file]),
            correct_probability_func=lambda params, sample: torch.exp(-loss(params, sample)),
            projector_kwargs={"proj_dim": K, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"},
            device="cpu", regularization=1e-3,
        )  # fmt: skip
        attributor.cache(DataLoader(TensorDataset(data.images, data.labels), BATCH))
        with torch.no_grad():
            scores = attributor.attribute(DataLoader(TensorDataset(data.test_images, data.test_labels), BATCH))
        return scores.numpy()


def project_with_bergson(problem: Problem) -> None:
    """Projects one batch of gradients, module by module, as bergson's hooks do."""
    from bergson.collector import collector

    for name, tensor in problem.checkpoint.items():
        grads = torch.ones(BATCH, tensor.numel())
        collector.project_global(f"{name}/single", grads, K, "rademacher")


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Appends the seconds that a block takes to a list."""
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def compare(name: str, run: Callable[[Problem], Any], problem: Problem, rounds: int) -> dict[str, Any]:
    """Times interleaved rounds with the library's own projection and with ours, and measures the LDS of both."""
    layer = importlib.import_module(f"trak_fast.compat.{name}")
    seconds: dict[str, list[float]] = {"own": [], "ours": []}
    quality: dict[str, float] = {}
    for _ in range(rounds):
        for which in ("own", "ours"):
            with layer.patch() if which == "ours" else contextlib.nullcontext(), timed(seconds[which]):
                scores = run(problem)
            if scores is not None:
                quality[which] = lds(scores, problem.masks, problem.outputs).mean
    return {"library": name, "seconds": seconds, "lds": quality}


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the libraries' own
    problem = prepare()
    rows = []
    for name, module, run in (
        ("traker", "trak", run_traker),
        ("dattri", "dattri", run_dattri),
        ("bergson", "bergson", project_with_bergson),
    ):
        if importlib.util.find_spec(module) is None:
            print(f"{name} is not installed: left out")
            continue
        rows.append(compare(name, run, problem, arguments.rounds))
    for row in rows:
        own, ours = (float(np.median(row["seconds"][which])) for which in ("own", "ours"))
        quality = "  LDS {own:.3f} and {ours:.3f}".format(**row["lds"]) if row["lds"] else ""
        print(f"{row['library']:8} own {own:8.2f} s   ours {ours:8.2f} s   {own / ours:6.1f} x{quality}")
    save(arguments.output, {"rows": rows})


if __name__ == "__main__":
    main()
