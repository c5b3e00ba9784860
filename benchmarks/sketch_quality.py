"""Measures how far the sparse kind of projection bends inner products and lengths, beside the dense kind.

    python benchmarks/sketch_quality.py [--quick] [--output benchmarks/results/NAME.json]

An estimate is ⟨Px, Py⟩/s with s = k for "rademacher" and s = c, the entries in a column, for "sjlt"; a length is the
case x = y. Errors are in units of √((‖x‖² ‖y‖² + ⟨x, y⟩²)/k), the standard deviation with an ideal matrix of
independent normal entries, so that its root mean square (rms) is 1 for inner products and for lengths. (For vectors
of length 1 the unit is 1/√k times 1 to √2.) Entries ±1 are a little better, as a coordinate does not err with itself.
With K = k/c and x_m the part of x in the m-th chunk of K columns, the mean squares are known exactly:

- rademacher: (‖x‖² ‖y‖² + ⟨x, y⟩² - 2 Σ_j x_j² y_j²)/k
- sjlt: (1 + (c - 1)/K) (‖x‖² ‖y‖² + ⟨x, y⟩² - Σ_m (‖x_m‖² ‖y_m‖² + ⟨x_m, y_m⟩²))/k

because signs are independent, two columns of a chunk never meet, and two of different chunks meet in a block with
probability 1/K (tests/projection/test_statistics.py). "theory" is the rms from these. The second is at most 1 + (c -
1)/K times the first, whatever the vectors. The tail is another matter, and is measured over many seeds.

Vectors: per-sample gradients of three small networks, and patterns that an affine hash of chunks might treat badly:
few coordinates, periods, strides and layers of widths about K, in 16 chunks. Patterns are made anew for the K of each
c. Figures have a standard error over seeds; "worse" is what is worse than rademacher by more than four of them (some
thousand figures are compared).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attribution_quality import SCENARIOS, load
from numpy.typing import NDArray
from record import make_parser, save
from torch import Tensor
from tqdm import tqdm

import trak_fast
from trak_fast import retraining
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.tasks import ImageClassification

NETWORKS = {"CNN on digits": "cnn400", "MLP on digits": "mlp1000", "attention on digits": "attention800"}
"""Networks whose gradients are measured, as scenarios of attribution_quality.py."""
SAMPLES = 48
"""Gradients of each network."""
CHUNKS = 16
"""Chunks of K columns that patterns extend over."""
FAR = 4.0
"""Units from which an error counts as far out. A normal variable is 1 in 16,000 times."""


@dataclass(frozen=True)
class Kind:
    """A kind of projection: dense, or sparse with `nonzeros` entries in a column."""

    nonzeros: int | None = None

    @property
    def name(self) -> str:
        """The name in results."""
        return "rademacher" if self.nonzeros is None else f"sjlt:{self.nonzeros}"

    @property
    def proj_type(self) -> str:
        """The argument of `trak_fast.project`."""
        return "rademacher" if self.nonzeros is None else "sjlt"

    def estimates(self, vectors: Tensor, k: int, seed: int) -> NDArray[np.float64]:
        """Computes ⟨Px, Py⟩/s for all pairs of vectors (V, D), (V, V)."""
        y = trak_fast.project(
            vectors, k, proj_type=self.proj_type, model_id=seed, nonzeros=self.nonzeros, precision="highest"
        )
        wide = y.double().numpy()
        products: NDArray[np.float64] = wide @ wide.T / (self.nonzeros or k)
        return products

    def variance(self, vectors: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        """Computes the variance of the estimates from theory, (V, V)."""
        inner = vectors @ vectors.T
        squares = np.diag(inner)
        whole = np.outer(squares, squares) + inner**2
        if self.nonzeros is None:
            return (whole - 2 * vectors**2 @ (vectors**2).T) / k
        width = k // self.nonzeros
        padded = np.pad(vectors, ((0, 0), (0, -vectors.shape[1] % width)))
        for start in range(0, padded.shape[1], width):
            part = padded[:, start : start + width]
            products = part @ part.T
            whole = whole - np.outer(np.diag(products), np.diag(products)) - products**2
        return whole.clip(min=0) * (1 + (self.nonzeros - 1) / width) / k


DENSE = Kind()
SPARSE = [Kind(1), Kind(2), Kind(4), Kind(8)]


def gradients(scenario_name: str) -> Tensor:
    """Trains a scenario's network; returns gradients (SAMPLES, D) of its first training samples."""
    scenario = SCENARIOS[scenario_name]
    images, labels, _, _ = load(scenario)
    everything = np.ones((1, len(labels)), bool)
    models = retraining.train(scenario.build, (images, labels), everything, scenario.recipe, 3, title=scenario_name)
    model = scenario.build()
    model.load_state_dict(retraining.state_dict(models, 0))
    computer = FunctionalGradientComputer(model.eval(), ImageClassification())
    grads = computer.compute_per_sample_grad((images[:SAMPLES], labels[:SAMPLES]))
    return torch.cat([tensor.flatten(1) for tensor in grads.values()], dim=1)


def patterns(width: int) -> dict[str, Tensor]:
    """Makes vectors (V, 16 K) of each pattern, for chunks of K = `width` columns."""
    generator = torch.Generator().manual_seed(width)
    columns = CHUNKS * width

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def on(places: list[int]) -> Tensor:
        """Makes three vectors with random values at some places only."""
        vectors = torch.zeros(3, columns)
        vectors[:, places] = draw(3, len(places))
        return vectors

    def repeated(period: int) -> Tensor:
        return draw(3, period).repeat(1, -(-columns // period))[:, :columns]

    def layer(features: Tensor) -> Tensor:
        """Makes a linear layer's gradients from its inputs (3, width of the layer): outer products, row by row."""
        rows = columns // features.shape[1]
        return (draw(3, rows, 1) * features.unsqueeze(1)).flatten(1)

    def relu(size: int) -> Tensor:
        return draw(3, size).relu()

    def decaying(size: int) -> Tensor:
        return draw(3, size) / torch.arange(1, size + 1)

    eye = torch.zeros(2, columns)
    eye[0, 0] = eye[1, width + 3] = 1
    spread = draw(3, columns) / columns**0.5
    spread[:, 5] += 1
    every_eighth = torch.where(torch.arange(width) % 8 == 0, 1.0, 0.0)
    half = torch.where(torch.arange(columns) < columns // 2, 1.0, -1.0)
    alternating = torch.where(torch.arange(columns) % 2 == 0, 1.0, -0.5)
    both = [0, width]
    return {
        "one heavy coordinate among many": spread,
        "two coordinates": torch.stack([eye[0] + eye[1], eye[0], eye[1]]),
        "four coordinates, K/2 apart in two chunks": on([start + x for start in both for x in (7, 7 + width // 2)]),
        "eight coordinates, K/4 apart in two chunks": on(
            [start + 7 + i * width // 4 for start in both for i in range(4)]
        ),
        "every 8th column of two chunks": on([start + x for start in both for x in range(0, width, 8)]),
        "every 2nd column of two chunks": on([start + x for start in both for x in range(0, width, 2)]),
        "every 3rd column of two chunks": on([start + x for start in both for x in range(0, width, 3)]),
        "first 16 columns of two chunks": on([start + x for start in both for x in range(16)]),
        "two whole chunks": on(list(range(2 * width))),
        "one chunk": on(list(range(3 * width, 4 * width))),
        "one chunk's width, half a chunk off": on(list(range(width // 2, width // 2 + width))),
        "stride K: one column a chunk": on(list(range(5, columns, width))),
        "stride K + 1": on(list(range(5, columns, width + 1))),
        "stride K/2": on(list(range(5, columns, width // 2))),
        "stride K/8": on(list(range(5, columns, width // 8))),
        "stride 3": on(list(range(0, columns, 3))),
        "period 8": repeated(8),
        "period 7": repeated(7),
        "period K/2": repeated(width // 2),
        "period K": repeated(width),
        "period K - 1": repeated(width - 1),
        "constant": torch.stack([torch.ones(columns), half, alternating]),
        "layer of width K": layer(relu(width)),
        "layer of width 2 K": layer(relu(2 * width)),
        "layer of width K/2": layer(relu(width // 2)),
        "layer of width K, features as 1/j": layer(decaying(width)),
        "layer of width 2 K, features as 1/j": layer(decaying(2 * width)),
        "layer of width K, every 8th feature active": layer(relu(width) * every_eighth),
        "layer of width K, one feature active": layer(relu(width) * 0.01 + torch.eye(width)[3]),
        "heavy-tailed (fifth power of normal)": draw(3, columns) ** 5,
    }


@dataclass(frozen=True)
class Errors:
    """Errors in units, and the rms that theory gives.

    Attributes:
        values: (seeds, pairs).
        theory: The rms over pairs from theory.
    """

    values: NDArray[np.float64]
    theory: float

    def mean_over_seeds(self, figures: NDArray[np.float64]) -> tuple[float, float]:
        """Returns the mean of figures (seeds, pairs) and its standard error, as seeds are independent and not pairs."""
        by_seed = figures.mean(1)
        return float(by_seed.mean()), float(by_seed.std(ddof=1) / math.sqrt(len(by_seed)))

    def summary(self) -> dict[str, float]:
        """Summarises the errors as a dictionary for JSON."""
        square, square_error = self.mean_over_seeds(self.values**2)
        far, far_error = self.mean_over_seeds((np.abs(self.values) > FAR).astype(np.float64))
        rms = math.sqrt(square)
        return {
            "rms": rms,
            "standard error": square_error / (2 * rms) if rms else 0.0,
            "theory": self.theory,
            "99.9 %": float(np.quantile(np.abs(self.values), 0.999)),
            "worst": float(np.abs(self.values).max()),
            "far": far,
            "far, standard error": far_error,
        }


def errors_of(vectors: Tensor, groups: dict[str, slice], kind: Kind, k: int, seeds: int) -> dict[str, dict[str, Any]]:
    """Measures the errors of inner products and lengths within each group of vectors (V, D)."""
    wide = vectors.double().numpy()
    inner = wide @ wide.T
    squares = np.diag(inner)
    unit = np.sqrt((np.outer(squares, squares) + inner**2) / k)
    expected = {name: kind.variance(wide[group], k) / unit[group, group] ** 2 for name, group in groups.items()}
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in groups}
    for seed in tqdm(range(seeds), desc=f"{kind.name}, k = {k}", leave=False):
        error = (kind.estimates(vectors, k, seed) - inner) / unit
        for name, group in groups.items():
            found[name].append(error[group, group])
    results = {}
    for name, parts in found.items():
        stacked = np.stack(parts)
        pairs = np.triu_indices(stacked.shape[1], 1)
        lengths = np.arange(stacked.shape[1])
        results[name] = {
            quantity: Errors(stacked[:, i, j], math.sqrt(expected[name][i, j].mean())).summary()
            for quantity, (i, j) in {"inner products": pairs, "lengths": (lengths, lengths)}.items()
        }
    return results


def meetings(k: int, seeds: int) -> dict[str, dict[str, float]]:
    """Measures the estimate of ⟨x, y⟩ = 0 for two unit vectors of one coordinate each, as a share of their lengths."""
    results = {}
    for kind in [DENSE, *SPARSE]:
        columns = [0, k // (kind.nonzeros or 1) + 3]
        values = []
        for seed in tqdm(range(seeds), desc=f"two coordinates, {kind.name}, k = {k}", leave=False):
            P = trak_fast.matrix(
                kind.proj_type, 0, seed, range(k), columns, proj_dim=k, nonzeros=kind.nonzeros
            ).numpy()  # fmt: skip
            values.append(abs(float(P[:, 0] @ P[:, 1])) / (kind.nonzeros or k))
        found = np.array(values)
        results[kind.name] = {
            "nonzero": float((found > 0).mean()),
            "rms": float(np.sqrt((found**2).mean())),
            "99 %": float(np.quantile(found, 0.99)),
            "99.9 %": float(np.quantile(found, 0.999)),
            "99.99 %": float(np.quantile(found, 0.9999)),
            "worst": float(found.max()),
        }
        if kind.nonzeros is not None:
            results[kind.name]["nonzero, theory"] = 1 - (1 - kind.nonzeros / k) ** kind.nonzeros
    return results


def is_worse(sparse: dict[str, float], dense: dict[str, float], figure: str, error: str) -> bool:
    """Tells whether a figure is above that of the dense kind by more than four standard errors of the difference."""
    return sparse[figure] - dense[figure] > 4 * math.hypot(sparse[error], dense[error])


def compare(name: str, k: int, by_kind: dict[str, dict[str, Any]], dense: dict[str, dict[str, Any]]) -> list[Any]:
    """Makes one row for each kind and quantity, which says in what the sparse kind is worse; prints them."""
    rows = []
    for kind, quantities in by_kind.items():
        for quantity, found in quantities.items():
            beside = dense[kind][quantity]
            worse = [
                label
                for label, figure, error in (("rms", "rms", "standard error"), ("tail", "far", "far, standard error"))
                if is_worse(found, beside, figure, error)
            ]
            rows.append(
                {"vectors": name, "k": k, "kind": kind, "of": quantity, **found, "dense": beside, "worse": worse}
            )
            print(
                f"{name:44}{k:5} {kind:11}{quantity:15}{found['rms']:6.3f} ± {found['standard error']:.3f}"
                f" ({found['theory']:.3f})  dense {beside['rms']:.3f} ± {beside['standard error']:.3f}"
                f"  99.9 % {found['99.9 %']:6.2f} / {beside['99.9 %']:5.2f}  worst {found['worst']:6.2f} /"
                f" {beside['worst']:5.2f}  far {found['far']:.5f} / {beside['far']:.5f}  {' '.join(worse)}",
                flush=True,
            )
    return rows


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few seeds, one size")
    parser.add_argument("--proj-dims", nargs="+", type=int, default=[512, 4096], metavar="K")
    arguments = parser.parse_args()
    sizes, real, dense_seeds, sparse_seeds, draws = arguments.proj_dims, 100, 300, 2000, 20_000
    if arguments.quick:
        sizes, real, dense_seeds, sparse_seeds, draws = sizes[:1], 10, 20, 50, 500
    networks = {name: gradients(scenario) for name, scenario in NETWORKS.items()}
    rows: dict[str, list[Any]] = {"networks": [], "patterns": []}
    tails = {}
    for k in sizes:
        for name, grads in networks.items():
            whole = {name: slice(0, len(grads))}
            by_kind = {kind.name: errors_of(grads, whole, kind, k, real)[name] for kind in [DENSE, *SPARSE]}
            rows["networks"] += compare(name, k, by_kind, dict.fromkeys(by_kind, by_kind[DENSE.name]))
        measured: dict[str, dict[str, dict[str, Any]]] = {}
        beside: dict[str, dict[str, dict[str, Any]]] = {}
        for kind in SPARSE:
            made = patterns(k // (kind.nonzeros or 1))
            stacked = torch.cat(list(made.values()))
            groups = {name: slice(3 * i, 3 * i + 3) for i, name in enumerate(made)}
            for name, found in errors_of(stacked, groups, kind, k, sparse_seeds).items():
                measured.setdefault(name, {})[kind.name] = found
            for name, found in errors_of(stacked, groups, DENSE, k, dense_seeds).items():
                beside.setdefault(name, {})[kind.name] = found
        for name, by_kind in measured.items():
            rows["patterns"] += compare(name, k, by_kind, beside[name])
        tails[str(k)] = meetings(k, draws)
        for kind_name, tail in tails[str(k)].items():
            print(f"two coordinates, k = {k}, {kind_name}: {tail}")
    seeds = {"networks": real, "patterns": sparse_seeds, "patterns, dense": dense_seeds, "two coordinates": draws}
    save(arguments.output, {"seeds": seeds, **rows, "two coordinates": tails})


if __name__ == "__main__":
    main()
