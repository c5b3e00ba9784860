"""Measures how well scores predict retrained models (the LDS): trak_fast's defaults, fixed ridges, and traker 0.3.2.

    python benchmarks/attribution_quality.py [--quick] [--scenarios NAME ...] [--output benchmarks/results/NAME.json]

Scenarios differ in network, training size, flipped labels, noise and recipe. All have 300 test samples, and all but one
use scikit-learn's digits. Scenarios that are marked as held out played no part in finding the rules. For each scenario,
models are retrained on 100 random halves (3 models for each half). Then, for every k and number of checkpoints, this
measures the LDS of

- auto: trak_fast's default; "auto, Q as it is": with shrink_weights=False; "auto, X'X and Q as it is": with
  curvature=False too;
- ridge: the default, except that λ is c times the mean squared norm of the features, for each c of a grid;
- fixed: the same ridges, with X'X and Q as they are;
- traker: the score code of traker 0.3.2 at its defaults (float16, λ = 0). The features come from trak_fast's
  projection, which has the same distribution as traker's BasicProjector and is many times as fast; `--confirm` runs
  all of traker with BasicProjector once, at k = 256 on the first scenario.

Figures of 1 checkpoint are means over 5 checkpoints. Finished scenarios and retrained outputs stay in --work, so that
the same command goes on after a stop. Needs traker: `pip install --no-deps traker==0.3.2`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import make_parser, save
from scipy.stats import rankdata
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import trak_fast
from trak_fast import retraining
from trak_fast.demo.digits import build_net, margins
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.retraining import Recipe
from trak_fast.scales import joined
from trak_fast.scoring.gram import gram_matrix
from trak_fast.scoring.ridge import auto_ridge, curvature_weights, disagreement, shrunk_weights
from trak_fast.scoring.solver import Solver
from trak_fast.tasks import ImageClassification

PROJ_DIMS = [128, 256, 512, 1024, 2048, 4096]
FACTORS = np.geomspace(0.1, 100, 13)
"""Fixed ridges, in units of the mean squared norm of the features."""
SINGLES = 5
"""Checkpoints whose figures by themselves are averaged."""
TARGETS = 300

# Methods, by their names in results; BY_DEFAULT and PLAIN are followed by a factor.
AUTO = "auto"
AUTO_RAW = "auto, Q as it is"
AUTO_PLAIN = "auto, X'X and Q as it is"
BY_DEFAULT = "ridge "
PLAIN = "fixed "


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


def gelu_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))


def tabular_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))


class ResidualNet(nn.Module):
    """A network of convolutions with a skip connection and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 24, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(4, 24)
        self.second = nn.Conv2d(24, 24, 3, padding=1)
        self.third = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images)).relu()
        x = x + self.third(self.second(x).relu())
        return self.head(nn.functional.avg_pool2d(x.relu(), 2).flatten(1))


class AttentionNet(nn.Module):
    """A network of one transformer block, which takes each row of an image as a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.1 * torch.randn(8, 32))
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.wide = nn.Linear(32, 64)
        self.narrow = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(1, 2)) + self.place
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / 4).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))
        return self.head(x.mean(1))


def load_images() -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns scikit-learn's digits, (N, 1, 8, 8) in [0, 1], and their labels."""
    data = load_digits()
    return data.images[:, None] / 16, data.target


def load_cancer() -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns scikit-learn's breast cancer data, standardized, and its labels."""
    data = load_breast_cancer()
    return (data.data - data.data.mean(0)) / data.data.std(0), data.target


@dataclass(frozen=True)
class Scenario:
    """A problem to attribute.

    Attributes:
        build: Makes the network.
        train_size: The number of training samples, n.
        flipped: The share of training labels that are wrong.
        noise: The standard deviation of the noise that is added to the inputs.
        recipe: The training of each network.
        held_out: True if the scenario played no part in finding the rules.
        seed: The seed of the noise, the split and the flipped labels.
        data: Loads inputs and labels.
    """

    build: Callable[[], nn.Module]
    train_size: int
    flipped: float
    noise: float
    recipe: Recipe = field(default_factory=Recipe)
    held_out: bool = False
    seed: int = 0
    data: Callable[[], tuple[NDArray[Any], NDArray[Any]]] = load_images


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
    "tanh1200": Scenario(tanh_mlp, 1200, 0.1, 0.2, Recipe(epochs=25), seed=7),
    "cnn700": Scenario(build_net, 700, 0.15, 0.1, Recipe(epochs=15, learning_rate=0.05), seed=7),
    "mlp300": Scenario(mlp, 300, 0, 0.2, Recipe(epochs=40, weight_decay=3e-3), seed=7),
    "gelu900": Scenario(gelu_mlp, 900, 0.1, 0.1, Recipe(epochs=20), held_out=True, seed=11),
    "residual1100": Scenario(ResidualNet, 1100, 0.05, 0.2, Recipe(epochs=18), held_out=True, seed=11),
    "attention800": Scenario(AttentionNet, 800, 0.05, 0, Recipe(epochs=30, learning_rate=0.03), held_out=True, seed=11),
    "cancer269": Scenario(tabular_mlp, 269, 0.1, 0, Recipe(epochs=30), held_out=True, seed=11, data=load_cancer),
}


def load(scenario: Scenario) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training images and labels, and test images and labels."""
    rng = np.random.default_rng(scenario.seed)
    pixels, classes = scenario.data()
    images = torch.from_numpy(pixels).float()
    images = images + scenario.noise * torch.from_numpy(rng.standard_normal(pixels.shape)).float()
    labels = torch.from_numpy(classes).long()
    train, test = train_test_split(
        np.arange(len(labels)), train_size=scenario.train_size, test_size=TARGETS, stratify=classes,
        random_state=scenario.seed,
    )  # fmt: skip
    given = labels[train]
    flipped = rng.choice(len(train), round(scenario.flipped * len(train)), replace=False)
    count = int(labels.max()) + 1
    given[flipped] = (given[flipped] + torch.from_numpy(rng.integers(1, count, len(flipped)))) % count
    return images[train], given, images[test], labels[test]


def truth(name: str, work: Path, subsets: int, per_subset: int) -> tuple[NDArray[np.bool_], NDArray[np.floating[Any]]]:
    """Retrains networks on random halves; returns the halves as masks (S, n), and margins of the test images (S, m)."""
    scenario = SCENARIOS[name]
    images, labels, test_images, test_labels = load(scenario)
    masks = retraining.random_subsets(len(labels), subsets, seed=1)
    outputs = retraining.retrained_outputs(
        scenario.build, (images, labels), masks,
        lambda models: margins(retraining.forward(scenario.build, models, test_images), test_labels),
        scenario.recipe, 2, models_per_subset=per_subset, save_dir=work / "retrained", title=f"{name}: retraining",
    )  # fmt: skip
    return masks, outputs


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Returns centred ranks, each column scaled to length 1, or 0 if all its values are tied."""
    centered = rankdata(values, axis=0) - (len(values) + 1) / 2
    return centered / np.maximum(np.sqrt((centered**2).sum(axis=0)), 1e-30)


def features_of(
    scenario: Scenario, models: retraining.Models, count: int, images: Tensor, labels: Tensor, proj_dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Computes features (C, B, k) and weightings Q (C, B) of samples at `count` checkpoints."""
    features = []
    weights = []
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


def dense(solver: Solver, train: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float32]:
    """Computes the score matrix (n, m)."""
    solved = joined(solver.solve(targets)).float().numpy()
    return train @ solved if solver.primal else solved


def traker_scores(train: NDArray[np.float32], targets: NDArray[np.float32], grad_dim: int) -> NDArray[np.float32]:
    """Computes one checkpoint's scores by traker's own code at its defaults; NaN if traker finds X'X singular."""
    from trak.score_computers import BasicScoreComputer

    computer = BasicScoreComputer(torch.float16, torch.device("cpu"))
    halves = [(torch.from_numpy(np.array(x)) / grad_dim**0.5).half() for x in (train, targets)]
    scores = torch.zeros(len(train), len(targets))
    try:
        inverted = computer.get_x_xtx_inv(halves[0], computer.get_xtx(halves[0]))
        computer.get_scores(inverted, halves[1], accumulator=scores)
    except torch.linalg.LinAlgError:
        scores.fill_(torch.nan)
    return scores.numpy()


@dataclass(frozen=True)
class Problem:
    """A scenario's features and weightings at each checkpoint, and the answers of retrained networks.

    Attributes:
        train: Features of the training samples, (C, n, k).
        targets: Features of the test samples, (C, m, k).
        weights: Weightings Q of the training samples, (C, n).
        masks: Subsets that networks were retrained on, (S, n).
        answers: Ranks of the retrained networks' margins, (S, m).
        grad_dim: D.
    """

    train: NDArray[np.float32]
    targets: NDArray[np.float32]
    weights: NDArray[np.float64]
    masks: NDArray[np.bool_]
    answers: NDArray[np.float64]
    grad_dim: int

    def lds(self, scores: NDArray[Any], model_ids: list[int], method: str) -> float | None:
        """Returns the LDS of scores (n, m) of some checkpoints, or None where they are not finite."""
        if not np.isfinite(scores).all():
            return None
        mean = torch.from_numpy(self.weights[model_ids].mean(0))
        if method == AUTO or method.startswith(BY_DEFAULT):
            mean = shrunk_weights(mean)
        predicted = self.masks.astype(np.float64) @ (mean.numpy()[:, None] * scores)
        return float((ranks(predicted) * self.answers).sum(axis=0).mean())


def prepare(name: str, work: Path, subsets: int, per_subset: int, proj_dim: int, count: int) -> Problem:
    """Trains `count` checkpoints of a scenario and the networks on its subsets, and computes features of size k."""
    scenario = SCENARIOS[name]
    images, labels, test_images, test_labels = load(scenario)
    masks, outputs = truth(name, work, subsets, per_subset)
    everything = np.ones((count, len(labels)), bool)
    models = retraining.train(scenario.build, (images, labels), everything, scenario.recipe, 3, title="checkpoints")
    train, weights = features_of(scenario, models, count, images, labels, proj_dim)
    targets, _ = features_of(scenario, models, count, test_images, test_labels, proj_dim)
    grad_dim = sum(p.numel() for p in scenario.build().parameters())
    return Problem(train, targets, weights, masks, ranks(outputs), grad_dim)


class Tally:
    """The scores of one number of checkpoints, by method, as they are added checkpoint by checkpoint.

    Attributes:
        count: C, the number of checkpoints. With 1, the LDS is the mean over `SINGLES` checkpoints by themselves.
        disagreement: ρ, the distance between the kernels of the checkpoints.
        factors: The automatic ridges, in units of the mean squared norm of the features.
    """

    def __init__(self, problem: Problem, count: int, disagreement: float) -> None:
        self.count = count
        self.disagreement = disagreement
        self.factors: list[float] = []
        self._problem = problem
        self._singles: dict[str, list[float | None]] = {}
        self._totals: dict[str, Any] = {}

    def takes(self, model_id: int) -> bool:
        """Tells whether a checkpoint is among those of this tally."""
        return model_id < (SINGLES if self.count == 1 else self.count)

    def add(self, method: str, model_id: int, scores: NDArray[Any]) -> None:
        """Adds a method's scores (n, m) of a checkpoint."""
        if self.count == 1:
            self._singles.setdefault(method, []).append(self._problem.lds(scores, [model_id], method))
        else:
            self._totals[method] = self._totals.get(method, 0) + scores

    def lds(self) -> dict[str, float | None]:
        """Returns the LDS of each method; None where scores are not finite."""
        if self.count == 1:
            return {
                method: None if None in found else float(np.mean(found))  # type: ignore[arg-type]
                for method, found in self._singles.items()
            }
        model_ids = list(range(self.count))
        return {
            method: self._problem.lds(total / self.count, model_ids, method) for method, total in self._totals.items()
        }


def scores_over_ridges(
    train: NDArray[np.float32], targets: NDArray[np.float32], gram: Tensor, curvature: NDArray[np.float64] | None
) -> Iterator[tuple[float, NDArray[np.float64]]]:
    """Yields each factor of `FACTORS` and the scores (n, m) with that ridge, all from one decomposition."""
    n, k = train.shape
    left = torch.from_numpy(np.array(train, np.float64))
    right = torch.from_numpy(np.array(targets, np.float64))
    values, vectors = torch.linalg.eigh(gram)
    if k <= n:
        u = left @ vectors
        w = vectors.mT @ right.mT
    else:
        roots = torch.ones(n, 1).double() if curvature is None else torch.from_numpy(curvature).sqrt().unsqueeze(1)
        u = vectors / roots
        w = vectors.mT @ (roots * (left @ right.mT))
    for factor in FACTORS:
        yield factor, ((u / (values.clamp(min=0) + factor * gram.trace() / n)) @ w).numpy()


def add_checkpoint(problem: Problem, model_id: int, proj_dim: int, tallies: list[Tally]) -> None:
    """Adds the scores of one checkpoint, by every method, to the tallies that take it."""
    train = problem.train[model_id, :, :proj_dim]  # a row of the matrix does not depend on k
    targets = problem.targets[model_id, :, :proj_dim]
    n = len(train)
    q = problem.weights[model_id]
    for curvature in (curvature_weights(q * (1 - q)), None):
        gram = gram_matrix(train, torch.device("cpu"), curvature)
        for tally in tallies:
            ridge = auto_ridge(gram, n, proj_dim, tally.count, tally.disagreement)
            scores = dense(Solver(train, gram, ridge, curvature), train, targets)
            for method in (AUTO_PLAIN,) if curvature is None else (AUTO, AUTO_RAW):
                tally.add(method, model_id, scores)
            if curvature is not None:
                tally.factors.append(ridge * n / gram.trace().item())
        for factor, scores in scores_over_ridges(train, targets, gram, curvature):
            for tally in tallies:
                tally.add(f"{PLAIN if curvature is None else BY_DEFAULT}{factor:.4g}", model_id, scores)
    scores = traker_scores(train, targets, problem.grad_dim)
    for tally in tallies:
        tally.add("traker", model_id, scores)


def measure(name: str, work: Path, subsets: int, per_subset: int, proj_dims: list[int], counts: list[int]) -> Any:
    """Measures all LDS of a scenario, as a dictionary for JSON with one cell for each k and number of checkpoints."""
    scenario = SCENARIOS[name]
    problem = prepare(name, work, subsets, per_subset, max(proj_dims), max(*counts, SINGLES))
    cells: list[Any] = []
    for k in tqdm(proj_dims, desc=f"{name}: k"):
        tallies = [Tally(problem, c, disagreement(list(problem.train[:c, :, :k]))) for c in counts]
        for model_id in range(len(problem.train)):
            add_checkpoint(problem, model_id, k, [tally for tally in tallies if tally.takes(model_id)])
        cells += [
            {
                "k": k,
                "checkpoints": tally.count,
                "disagreement": tally.disagreement,
                "lds": tally.lds(),
                "auto_factor": float(np.exp(np.mean(np.log(tally.factors)))),
            }
            for tally in tallies
        ]
    return {
        "scenario": name,
        "held_out": scenario.held_out,
        "network": scenario.build.__name__,
        "train_size": problem.train.shape[1],
        "grad_dim": problem.grad_dim,
        "flipped": scenario.flipped,
        "noise": scenario.noise,
        "recipe": asdict(scenario.recipe),
        "subsets": subsets,
        "models_per_subset": per_subset,
        "mean_weighting": float(problem.weights.mean()),
        "cells": cells,
    }


def confirm(name: str, work: Path, subsets: int, per_subset: int) -> dict[str, Any]:
    """Measures the LDS of all of traker at its defaults, with BasicProjector and k = 256, for 1 and 5 checkpoints."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    scenario = SCENARIOS[name]
    images, labels, test_images, test_labels = load(scenario)
    n = len(labels)
    masks, outputs = truth(name, work, subsets, per_subset)
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
        for label, sets in (("5", [list(range(5))]), ("1", [[model_id] for model_id in range(5)])):
            found = []
            for model_ids in sets:
                scores = np.array(traker.finalize_scores("test", model_ids=model_ids), np.float64)
                found.append(trak_fast.metrics.lds(scores, masks, outputs).mean)
            results[label] = float(np.mean(found))
    return {"scenario": name, "k": 256, "lds": results}


def best_over_k(cells: list[Any], method: str) -> tuple[float, int]:
    """Finds the best LDS of a method, or of all methods whose names begin with one that ends in a space, and its k."""
    found = [
        (lds, cell["k"])
        for cell in cells
        for name, lds in cell["lds"].items()
        if lds is not None and (name.startswith(method) if method.endswith(" ") else name == method)
    ]
    return max(found, default=(float("nan"), 0))


def table(results: list[Any]) -> str:
    """Lists the best LDS over k of each method, and the worst LDS of the default for k ≥ 256."""
    lines = ["scenario         C   traker (k)     auto   worst   best ridge   Q as it is   X'X too   best fixed"]
    for result in results:
        for c in sorted({cell["checkpoints"] for cell in result["cells"]}):
            cells = [cell for cell in result["cells"] if cell["checkpoints"] == c]

            worst = min(cell["lds"][AUTO] for cell in cells if cell["k"] >= 256)
            traker, traker_k = best_over_k(cells, "traker")
            best = {method: best_over_k(cells, method)[0] for method in (AUTO, BY_DEFAULT, AUTO_RAW, AUTO_PLAIN, PLAIN)}
            lines.append(
                f"{result['scenario']:14}{'*' if result['held_out'] else ' '} {c:2}  {traker:6.3f} "
                f"({traker_k:4})  {best[AUTO]:6.3f}  {worst:6.3f}       {best[BY_DEFAULT]:6.3f}       "
                f"{best[AUTO_RAW]:6.3f}    {best[AUTO_PLAIN]:6.3f}       {best[PLAIN]:6.3f}"
            )
    return "\n".join([*lines, "all but worst are the best over k; worst: of auto over k >= 256; * held out"])


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one small scenario, 2 sizes, 30 subsets")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--checkpoints", nargs="+", type=int, default=[1, 5], metavar="C")
    parser.add_argument("--confirm", action="store_true", help="also run all of traker, with its BasicProjector")
    parser.add_argument(
        "--work", type=Path, default=Path("build/attribution_quality"), help="folder for finished scenarios"
    )
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
    summary = {
        "traker": "score code of 0.3.2, float16, lambda 0, on features of trak_fast's projection",
        "traker_with_basic_projector": confirmed,
        "results": results,
    }
    save(arguments.output, summary)
    print(table(results))
    if confirmed:
        print(f"all of traker with BasicProjector, {confirmed['scenario']}, k = 256: {confirmed['lds']}")


if __name__ == "__main__":
    main()
