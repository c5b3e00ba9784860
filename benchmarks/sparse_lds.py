"""Measures the LDS of the sparse kind of projection beside the dense one, with the noise of the seeds.

    python benchmarks/sparse_lds.py [--quick] [--scenarios NAME ...] [--output benchmarks/results/NAME.json]

The scenarios, the checkpoints and the retrained networks are those of attribution_quality.py (300 networks a scenario,
100 random halves), the scores trak_fast's default. Only the projection differs: "rademacher", "sjlt" with 1 entry a
column and "sjlt" with 4. All kinds meet the same gradients. Every kind has several seeds, as the LDS of one seed
differs from that of another.

Intervals are of the difference to rademacher, at 95 %, by a bootstrap that draws targets (the same for both kinds) and
seeds (each kind's own). "seed noise" is the standard deviation, over seeds, of rademacher's LDS. Figures of 1
checkpoint are means over 5 checkpoints. Finished scenarios and retrained outputs stay in --work, so that the same
command goes on after a stop.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_quality import SCENARIOS, SINGLES, TARGETS, dense, load, ranks, truth
from numpy.typing import NDArray
from record import make_parser, save
from torch import Tensor
from tqdm import tqdm

import trak_fast
from trak_fast import retraining
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.scoring.gram import gram_matrix
from trak_fast.scoring.ridge import auto_ridge, curvature_weights, disagreement, shrunk_weights
from trak_fast.scoring.solver import Solver
from trak_fast.tasks import ImageClassification

NAMES = ["cancer269", "mlp300", "cnn200", "cnn400", "mlp1000", "gelu900", "small1000", "attention800"]
"""Scenarios that are measured by default: those that train fast."""
KINDS: dict[str, int | None] = {"rademacher": None, "sjlt:1": 1, "sjlt:4": 4}
"""Entries in each column by kind; the first kind is the one that others are compared with."""
COUNTS = [1, SINGLES]
"""Numbers of checkpoints, C."""
DRAWS = 4000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Problem:
    """A scenario's gradients and weightings at each checkpoint, and the answers of retrained networks.

    Attributes:
        train: Gradients of the training samples, (n, D) for each checkpoint.
        targets: Gradients of the test samples, (m, D) for each checkpoint.
        weights: Weightings Q of the training samples, (C, n).
        masks: Subsets that networks were retrained on, (S, n).
        answers: Ranks of the retrained networks' margins, (S, m).
    """

    train: list[Tensor]
    targets: list[Tensor]
    weights: NDArray[np.float64]
    masks: NDArray[np.bool_]
    answers: NDArray[np.float64]

    def lds(self, scores: NDArray[Any], model_ids: list[int]) -> NDArray[np.float64]:
        """Computes each target's LDS (m,) from scores (n, m) of some checkpoints."""
        mean = shrunk_weights(torch.from_numpy(self.weights[model_ids].mean(0)))
        predicted = self.masks.astype(np.float64) @ (mean.numpy()[:, None] * scores)
        found: NDArray[np.float64] = (ranks(predicted) * self.answers).sum(axis=0)
        return found


def gradients_of(name: str, models: retraining.Models, model_id: int, train: bool) -> tuple[Tensor, Tensor]:
    """Computes gradients (B, D) and weightings (B,) of a scenario's training or test samples at a checkpoint."""
    images, labels, test_images, test_labels = load(SCENARIOS[name])
    model = SCENARIOS[name].build()
    model.load_state_dict(retraining.state_dict(models, model_id))
    computer = FunctionalGradientComputer(model.eval(), ImageClassification())
    samples = (images, labels) if train else (test_images, test_labels)
    parts = list(zip(*(tensor.split(100) for tensor in samples), strict=True))
    by_name = [computer.compute_per_sample_grad(part) for part in parts]
    grads = torch.cat([torch.cat([tensor.flatten(1) for tensor in part.values()], dim=1) for part in by_name])
    return grads, torch.cat([computer.compute_loss_grad(part).double() for part in parts])


def prepare(name: str, work: Path, subsets: int, per_subset: int) -> Problem:
    """Trains the checkpoints of a scenario and the networks on its subsets, and computes gradients."""
    scenario = SCENARIOS[name]
    images, labels, _, _ = load(scenario)
    masks, outputs = truth(name, work, subsets, per_subset)
    everything = np.ones((SINGLES, len(labels)), bool)
    models = retraining.train(scenario.build, (images, labels), everything, scenario.recipe, 3, title="checkpoints")
    train = [gradients_of(name, models, model_id, train=True) for model_id in range(SINGLES)]
    targets = [gradients_of(name, models, model_id, train=False)[0] for model_id in range(SINGLES)]
    weights = torch.stack([weights for _, weights in train]).numpy()
    return Problem([grads for grads, _ in train], targets, weights, masks, ranks(outputs))


def lds_of_kind(problem: Problem, kind: str, k: int, seed: int) -> dict[int, NDArray[np.float64]]:
    """Computes each target's LDS (m,) by number of checkpoints, with one kind of projection, k and seed."""
    projector = trak_fast.Projector(
        problem.train[0].shape[1], k, proj_type=kind.split(":")[0], seed=seed, nonzeros=KINDS[kind]
    )
    train = [projector.project(grads, model_id).numpy() for model_id, grads in enumerate(problem.train)]
    targets = [projector.project(grads, model_id).numpy() for model_id, grads in enumerate(problem.targets)]
    n = len(train[0])
    distances = {count: disagreement(train[:count]) for count in COUNTS}
    totals: dict[int, NDArray[np.float64]] = {}
    for model_id in range(SINGLES):
        q = problem.weights[model_id]
        curvature = curvature_weights(q * (1 - q))
        gram = gram_matrix(train[model_id], torch.device("cpu"), curvature)
        for count in COUNTS:
            ridge = auto_ridge(gram, n, k, count, distances[count])
            scores = dense(Solver(train[model_id], gram, ridge, curvature), train[model_id], targets[model_id])
            added = problem.lds(scores, [model_id]) if count == 1 else scores
            totals[count] = totals.get(count, 0) + added / SINGLES
    everyone = list(range(SINGLES))
    return {count: total if count == 1 else problem.lds(total, everyone) for count, total in totals.items()}


def interval(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Computes the 95 % interval of the mean difference of two arrays (seeds, m) of LDS by target."""
    rng = np.random.default_rng(0)
    seeds, targets = first.shape
    drawn = rng.integers(targets, size=(DRAWS, targets))
    means = []
    for array in (first, second):
        chosen = rng.integers(seeds, size=(DRAWS, seeds))
        means.append(np.array([array[s].mean(0)[t].mean() for s, t in zip(chosen, drawn, strict=True)]))
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return widened(float(first.mean() - second.mean()), float(low), float(high), [first.mean(1), second.mean(1)])


def widened(difference: float, low: float, high: float, by_seed: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Widens an interval by the variance of the seeds that a bootstrap of so few doesn't see, one part in `seeds`."""
    missing = sum(float(values.var(ddof=1)) / len(values) ** 2 for values in by_seed)
    below, above = (math.hypot(side, 1.96 * math.sqrt(missing)) for side in (difference - low, high - difference))
    return difference - below, difference + above


def summarise(found: dict[str, NDArray[np.float64]], k: int, count: int) -> dict[str, Any]:
    """Summarises LDS (seeds, m) by kind as a cell for JSON."""
    base = next(iter(KINDS))
    return {
        "k": k,
        "checkpoints": count,
        "lds": {kind: float(values.mean()) for kind, values in found.items()},
        "lds of seeds": {kind: [float(value) for value in values.mean(1)] for kind, values in found.items()},
        "seed noise": float(found[base].mean(1).std(ddof=1)),
        f"less {base}": {
            kind: {
                "difference": float(values.mean() - found[base].mean()),
                "interval": interval(values, found[base]),
            }
            for kind, values in found.items()
            if kind != base
        },
    }


def measure(name: str, work: Path, subsets: int, per_subset: int, proj_dims: list[int], seeds: int) -> dict[str, Any]:
    """Measures all LDS of a scenario, with one cell for each k and number of checkpoints."""
    problem = prepare(name, work, subsets, per_subset)
    cells = []
    for k in proj_dims:
        found: dict[int, dict[str, list[NDArray[np.float64]]]] = {count: {} for count in COUNTS}
        runs = [(kind, seed) for seed in range(seeds) for kind in KINDS]
        for kind, seed in tqdm(runs, desc=f"{name}, k = {k}"):
            for count, values in lds_of_kind(problem, kind, k, seed).items():
                found[count].setdefault(kind, []).append(values)
        for count, by_kind in found.items():
            cells.append(summarise({kind: np.stack(values) for kind, values in by_kind.items()}, k, count))
    return {
        "scenario": name,
        "train_size": len(problem.train[0]),
        "grad_dim": problem.train[0].shape[1],
        "targets": TARGETS,
        "subsets": subsets,
        "models_per_subset": per_subset,
        "seeds": seeds,
        "cells": cells,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Lists the LDS of each kind and the differences to the dense kind with their intervals."""
    base, *others = KINDS
    lines = [f"{'scenario':14}{'k':>6}{'C':>3}{base:>12}{'seed noise':>12}" + "".join(f"{k:>28}" for k in others)]
    for result in results:
        for cell in result["cells"]:
            line = f"{result['scenario']:14}{cell['k']:6}{cell['checkpoints']:3}{cell['lds'][base]:12.4f}"
            line += f"{cell['seed noise']:12.4f}"
            for kind in others:
                found = cell[f"less {base}"][kind]
                low, high = found["interval"]
                line += f"{found['difference']:+10.4f} [{low:+.4f}, {high:+.4f}]"
            lines.append(line)
    return "\n".join([*lines, f"columns of sjlt: the difference to {base}, with its 95 % interval"])


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one small scenario, one size, 2 seeds, 30 subsets")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=NAMES, metavar="NAME")
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[512, 2048, 4096], metavar="K")
    parser.add_argument("--seeds", type=int, default=4, metavar="S", help="seeds of each kind (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/attribution_quality"), help="folder for finished scenarios"
    )
    arguments = parser.parse_args()
    names, proj_dims, seeds = arguments.scenarios, arguments.proj_dims, arguments.seeds
    subsets, per_subset = 100, 3
    if arguments.quick:
        names, proj_dims, seeds, subsets, per_subset = ["cancer269"], [512], 2, 30, 1
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = []
    for name in tqdm(names, desc="scenarios"):
        sizes = "-".join(map(str, [subsets, per_subset, seeds, *proj_dims]))
        done = arguments.work / f"sparse-{name}-{sizes}.json"
        if not done.exists():
            temporary = done.with_suffix(".part")
            temporary.write_text(json.dumps(measure(name, arguments.work, subsets, per_subset, proj_dims, seeds)))
            temporary.replace(done)
        results.append(json.loads(done.read_text()))
        print(table(results[-1:]), flush=True)
    save(arguments.output, {"results": results})
    print(table(results))


if __name__ == "__main__":
    main()
