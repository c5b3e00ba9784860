"""Measures how well scores predict retrained models (the LDS): trak_fast's defaults, fixed ridges, and traker 0.3.2.

    python benchmarks/attribution_quality.py [--quick] [--scenarios NAME ...] [--output benchmarks/results/NAME.json]

Scenarios differ in network, training size, flipped labels, pixel noise and recipe; all use scikit-learn's digits and
300 test images. Those marked held out played no part in finding the rule for the ridge. For each: models retrained on
100 random halves (3 for each half), then, for every k and number of checkpoints, the LDS of

- auto: trak_fast's default; auto, X'X: the same with curvature=False;
- fixed: λ = c times the mean squared norm of the features, X'X, for each c on a grid;
- traker: 0.3.2's own score code at its defaults (float16, λ = 0). Its features come from trak_fast's projection, which
  has the distribution of its BasicProjector's and is many times as fast; `--confirm` runs all of traker with
  BasicProjector once, at k = 256 on the first scenario.

A run with 1 checkpoint is the mean over 5 of them. Finished scenarios and retrained outputs stay in --work, so that the
same command goes on after a stop. Needs traker: `pip install --no-deps traker==0.3.2`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm
from trak.score_computers import BasicScoreComputer

import trak_fast
from trak_fast import retraining
from trak_fast.demo import build_net, margins
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.retraining import Recipe
from trak_fast.solver import Solver, auto_ridge, curvature_weights, gram_matrix
from trak_fast.tasks import ImageClassification

PROJ_DIMS = [128, 256, 512, 1024, 2048, 4096]
FACTORS = np.geomspace(0.1, 100, 13)
SINGLES = 5
AUTO_PLAIN = "auto, X'X"
TARGETS = 300


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.GroupNorm(4, 32), nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GroupNorm(4, 32), nn.GELU(), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A problem: `noise` is the standard deviation added to pixels in [0, 1], `flipped` a share of the labels."""

    build: Callable[[], nn.Module]
    train_size: int
    flipped: float
    noise: float
    recipe: Recipe = field(default_factory=Recipe)
    held_out: bool = False
    seed: int = 0


SCENARIOS = {
    "cnn1347": Scenario(build_net, 1347, 0.05, 0),
    "cnn1000noisy": Scenario(build_net, 1000, 0.1, 0.3),
    "cnn400": Scenario(build_net, 400, 0.05, 0, Recipe(epochs=30)),
    "mlp1000": Scenario(mlp, 1000, 0.1, 0.15),
    "deep1000": Scenario(deep, 1000, 0.05, 0.1),
    "small1000": Scenario(small, 1000, 0.2, 0.15),
    "cnn1000long": Scenario(build_net, 1000, 0.1, 0.3, Recipe(weight_decay=0.0, epochs=30)),
    "cnn200": Scenario(build_net, 200, 0.05, 0.1, Recipe(epochs=40, batch_size=32)),
    "mlp1347short": Scenario(mlp, 1347, 0.05, 0, Recipe(epochs=8)),
    "tanh1200": Scenario(tanh_mlp, 1200, 0.1, 0.2, Recipe(epochs=25), held_out=True, seed=7),
    "cnn700": Scenario(build_net, 700, 0.15, 0.1, Recipe(epochs=15, learning_rate=0.05), held_out=True, seed=7),
    "mlp300": Scenario(mlp, 300, 0, 0.2, Recipe(epochs=40, weight_decay=3e-3), held_out=True, seed=7),
}


def load(scenario: Scenario) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    rng = np.random.default_rng(scenario.seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    images = images + scenario.noise * torch.from_numpy(rng.standard_normal(images.shape)).float()
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), train_size=scenario.train_size, test_size=TARGETS, stratify=digits.target,
        random_state=scenario.seed,
    )  # fmt: skip
    given = labels[train]
    flipped = rng.choice(len(train), round(scenario.flipped * len(train)), replace=False)
    given[flipped] = (given[flipped] + torch.from_numpy(rng.integers(1, 10, len(flipped)))) % 10
    return images[train], given, images[test], labels[test]


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Centred ranks of length 1, or 0 where all are tied."""
    centered = rankdata(values, axis=0) - (len(values) + 1) / 2
    return centered / np.maximum(np.sqrt((centered**2).sum(axis=0)), 1e-30)


def features_of(
    scenario: Scenario, models: retraining.Models, count: int, images: Tensor, labels: Tensor, proj_dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Features (C, B, k) and weightings Q (C, B) of samples."""
    features, weights = [], []
    for model_id in range(count):
        model = scenario.build()
        model.load_state_dict(retraining.state_dict(models, model_id))
        computer = FunctionalGradientComputer(model.eval(), ImageClassification())
        grad_dim = sum(p.numel() for p in model.parameters())
        projector = trak_fast.Projector(grad_dim, proj_dim, seed=0)
        parts = list(zip(images.split(100), labels.split(100), strict=True))
        features.append(torch.cat([projector.project(computer.compute_per_sample_grad(p), model_id) for p in parts]))
        weights.append(torch.cat([computer.compute_loss_grad(part).double() for part in parts]))
    return torch.stack(features).numpy(), torch.stack(weights).numpy()


def dense(solver: Solver, targets: NDArray[np.float32]) -> NDArray[np.float32]:
    scores = np.zeros((len(solver.features), len(targets)), np.float32)
    for rows, columns, block in solver.scores(targets):
        scores[rows, columns] = block
    return scores


def traker_scores(train: NDArray[np.float32], targets: NDArray[np.float32], grad_dim: int) -> NDArray[np.float32]:
    """One checkpoint's scores by traker's own code at its defaults; NaN where it finds X'X singular."""
    computer = BasicScoreComputer(torch.float16, torch.device("cpu"))
    halves = [(torch.from_numpy(np.array(x)) / grad_dim**0.5).half() for x in (train, targets)]
    scores = torch.zeros(len(train), len(targets))
    try:
        inverted = computer.get_x_xtx_inv(halves[0], computer.get_xtx(halves[0]))
        computer.get_scores(inverted, halves[1], accumulator=scores)
    except torch.linalg.LinAlgError:
        scores.fill_(torch.nan)
    return scores.numpy()


def measure(name: str, work: Path, subsets: int, per_subset: int, proj_dims: list[int], counts: list[int]) -> Any:
    """All LDS of a scenario."""
    scenario = SCENARIOS[name]
    images, labels, test_images, test_labels = load(scenario)
    n = len(labels)
    masks = retraining.random_subsets(n, subsets, seed=1)
    outputs = retraining.retrained_outputs(
        scenario.build, (images, labels), masks,
        lambda models: margins(retraining.forward(scenario.build, models, test_images), test_labels),
        scenario.recipe, 2, models_per_subset=per_subset, save_dir=work / "retrained", title=f"{name}: retraining",
    )  # fmt: skip
    most = max(*counts, SINGLES)
    everything = np.ones((most, n), bool)
    models = retraining.train(scenario.build, (images, labels), everything, scenario.recipe, 3, title="checkpoints")
    train, weights = features_of(scenario, models, most, images, labels, max(proj_dims))
    targets, _ = features_of(scenario, models, most, test_images, test_labels, max(proj_dims))
    grad_dim = sum(p.numel() for p in scenario.build().parameters())
    real = ranks(outputs)

    def lds(scores: NDArray[Any], model_ids: list[int]) -> float | None:
        if not np.isfinite(scores).all():
            return None
        predicted = masks.astype(np.float64) @ (weights[model_ids].mean(0)[:, None] * scores)
        return float((ranks(predicted) * real).sum(axis=0).mean())

    cells = []
    for k in tqdm(proj_dims, desc=f"{name}: k"):
        x, phi = train[:, :, :k], targets[:, :, :k]  # a row of the matrix does not depend on k
        singles: dict[str, list[float | None]] = {}
        totals = {c: dict[str, Any]() for c in counts if c > 1}
        factors: dict[int, list[float]] = {c: [] for c in counts}

        def note(kind: str, c: int, model_id: int, scores: Any, singles: Any = singles, totals: Any = totals) -> None:
            if c == 1:
                singles.setdefault(kind, []).append(lds(scores, [model_id]))
            elif model_id < c:
                totals[c][kind] = totals[c].get(kind, 0) + scores

        for model_id in range(most):
            one, phi_one = x[model_id], phi[model_id]
            q = weights[model_id]
            used = [c for c in counts if (model_id < SINGLES if c == 1 else model_id < c)]
            for kind, r in (("auto", curvature_weights(q * (1 - q))), (AUTO_PLAIN, None)):
                gram = gram_matrix(one, torch.device("cpu"), r)
                for c in used:
                    ridge = auto_ridge(gram, n, k, c)
                    note(kind, c, model_id, dense(Solver(one, gram, ridge, r), phi_one))
                    if r is None:
                        factors[c].append(ridge * n / gram.trace().item())
            left = torch.from_numpy(np.array(one, np.float64))
            right = torch.from_numpy(np.array(phi_one, np.float64))
            values, vectors = torch.linalg.eigh(gram)  # the whole path from one decomposition
            if k <= n:
                u, w = left @ vectors, vectors.mT @ right.mT
            else:
                u, w = vectors, vectors.mT @ (left @ right.mT)
            for factor in FACTORS:
                scores = ((u / (values.clamp(min=0) + factor * gram.trace() / n)) @ w).numpy()
                for c in used:
                    note(f"fixed {factor:.4g}", c, model_id, scores)
            scores = traker_scores(one, phi_one, grad_dim)
            for c in used:
                note("traker", c, model_id, scores)
        for c in counts:
            if c == 1:
                found = {kind: None if None in v else float(np.mean(v)) for kind, v in singles.items()}  # type: ignore[arg-type]
            else:
                found = {kind: lds(total / c, list(range(c))) for kind, total in totals[c].items()}
            cells.append(
                {"k": k, "checkpoints": c, "auto_factor": float(np.exp(np.mean(np.log(factors[c])))), "lds": found}
            )
    return {
        "scenario": name, "held_out": scenario.held_out, "network": scenario.build.__name__, "train_size": n,
        "grad_dim": grad_dim, "flipped": scenario.flipped, "noise": scenario.noise, "recipe": asdict(scenario.recipe),
        "subsets": subsets, "models_per_subset": per_subset, "mean_weighting": float(weights.mean()), "cells": cells,
    }  # fmt: skip


def confirm(name: str, work: Path, subsets: int, per_subset: int) -> dict[str, Any]:
    """The LDS of all of traker at its defaults, with its BasicProjector and k = 256, for 1 and 5 checkpoints."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    scenario = SCENARIOS[name]
    images, labels, test_images, test_labels = load(scenario)
    n = len(labels)
    masks = retraining.random_subsets(n, subsets, seed=1)
    outputs = retraining.retrained_outputs(
        scenario.build, (images, labels), masks,
        lambda models: margins(retraining.forward(scenario.build, models, test_images), test_labels),
        scenario.recipe, 2, models_per_subset=per_subset, save_dir=work / "retrained",
    )  # fmt: skip
    models = retraining.train(scenario.build, (images, labels), np.ones((5, n), bool), scenario.recipe, 3)
    model = scenario.build()
    grad_dim = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(grad_dim, 256, 0, ProjectionType.rademacher, torch.device("cpu"), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model, "image_classification", n, save_dir=folder, device="cpu", projector=projector, logging_level=40
        )
        for model_id in tqdm(range(5), desc="traker with BasicProjector"):
            traker.load_checkpoint(retraining.state_dict(models, model_id), model_id)
            for x, y in zip(images.split(100), labels.split(100), strict=True):
                traker.featurize((x, y), num_samples=len(y))
        traker.finalize_features()
        results = {}
        for model_id in range(5):
            traker.start_scoring_checkpoint("test", retraining.state_dict(models, model_id), model_id, TARGETS)
            for x, y in zip(test_images.split(100), test_labels.split(100), strict=True):
                traker.score((x, y), num_samples=len(y))
        for label, ids in (("5", [list(range(5))]), ("1", [[i] for i in range(5)])):
            results[label] = float(
                np.mean(
                    [
                        trak_fast.metrics.lds(
                            np.array(traker.finalize_scores("test", model_ids=i), np.float64), masks, outputs
                        ).mean
                        for i in ids
                    ]
                )
            )
    return {"scenario": name, "k": 256, "lds": results}


def best_factor(results: list[Any]) -> dict[str, float]:
    """For each number of checkpoints, the factor with the highest LDS on average, relative to each cell's best."""
    kinds = [f"fixed {factor:.4g}" for factor in FACTORS]
    best = {}
    for c in sorted({cell["checkpoints"] for result in results for cell in result["cells"]}):
        cells = [cell["lds"] for result in results for cell in result["cells"] if cell["checkpoints"] == c]
        relative = np.array([[lds[kind] for kind in kinds] for lds in cells])
        relative /= relative.max(axis=1, keepdims=True)
        best[str(c)] = float(FACTORS[relative.mean(axis=0).argmax()])
    return best


def table(results: list[Any]) -> str:
    """The best LDS over k of each kind, and the worst of the default for k ≥ 256."""
    best = best_factor(results)
    lines = ["scenario        C   traker (k)     auto   worst   auto, X'X   best ridge   one ridge (c)"]
    for result in results:
        for c in sorted({cell["checkpoints"] for cell in result["cells"]}):
            cells = [cell for cell in result["cells"] if cell["checkpoints"] == c]

            def top(kind: str, cells: list[Any] = cells) -> tuple[float, int]:
                found = [(cell["lds"][kind], cell["k"]) for cell in cells if cell["lds"][kind] is not None]
                return max(found, default=(float("nan"), 0))

            path = max(v for cell in cells for kind, v in cell["lds"].items() if kind.startswith("fixed"))
            worst = min(cell["lds"]["auto"] for cell in cells if cell["k"] >= 256)
            one = top(f"fixed {best[str(c)]:.4g}")[0]
            lines.append(
                f"{result['scenario']:13}{'*' if result['held_out'] else ' '} {c:2}  {top('traker')[0]:6.3f} "
                f"({top('traker')[1]:4})  {top('auto')[0]:6.3f}  {worst:6.3f}   {top(AUTO_PLAIN)[0]:6.3f}      "
                f"{path:6.3f}       {one:6.3f} ({best[str(c)]:.3g})"
            )
    return "\n".join([*lines, "all but worst are the best over k; worst: of auto over k >= 256; * held out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small scenario, 2 sizes, 30 subsets")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--checkpoints", nargs="+", type=int, default=[1, 5], metavar="C")
    parser.add_argument("--confirm", action="store_true", help="also run all of traker, with its BasicProjector")
    parser.add_argument("--work", type=Path, default=Path("build/attribution_quality"), help="folder for what is done")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    subsets, per_subset, proj_dims = (30, 1, [128, 512]) if arguments.quick else (100, 3, PROJ_DIMS)
    names = ["cnn200"] if arguments.quick else arguments.scenarios
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = []
    for name in tqdm(names, desc="scenarios"):
        sizes = "-".join(map(str, [subsets, per_subset, *arguments.checkpoints, *proj_dims]))
        done = arguments.work / f"{name}-{sizes}.json"
        if not done.exists():
            result = measure(name, arguments.work, subsets, per_subset, proj_dims, arguments.checkpoints)
            temporary = done.with_suffix(".part")
            temporary.write_text(json.dumps(result))
            temporary.replace(done)
        results.append(json.loads(done.read_text()))
    confirmed = confirm(names[0], arguments.work, subsets, per_subset) if arguments.confirm else None
    if arguments.output:
        summary = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/attribution_quality.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "traker": "score code of 0.3.2, float16, lambda 0, on features of trak_fast's projection",
            "traker_with_basic_projector": confirmed,
            "best_fixed_factor": best_factor(results),
            "results": results,
        }
        arguments.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(table(results))
    if confirmed:
        print(f"all of traker with BasicProjector, {confirmed['scenario']}, k = 256: {confirmed['lds']}")


if __name__ == "__main__":
    main()
