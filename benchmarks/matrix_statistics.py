"""Computes statistics of the projection matrix, of bergson's and of torch's generator: they differ in speed alone.

    python benchmarks/matrix_statistics.py [--output benchmarks/results/NAME.json]

Each figure is printed beside that of an ideal matrix. bergson is left out if it is not installed.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from record import make_parser, save
from torch import Tensor
from tqdm import tqdm

import trak_fast

ROWS = 512
COLUMNS = 16384
TRIALS = 400
"""Matrices whose distortion of lengths is measured."""
IDEAL = {"spread / ideal": "1 ± 0.05", "of rows": "4.4 ± 0.3", "of columns": "5.1 ± 0.3"}
"""Figures of an ideal matrix, by the end of the figure's name. All other figures are in standard errors: 0 ± 1."""
Make = Callable[[str, int, int, int], Tensor]
"""Makes a matrix (rows, columns) from kind, number of the matrix, rows and columns."""


def make_ours(kind: str, number: int, rows: int, columns: int) -> Tensor:
    """Makes rows of P by the fused adjoint, which is the fastest way."""
    return trak_fast.project_adjoint(torch.eye(rows), columns, proj_type=kind, seed=1, model_id=number)


def make_bergsons(kind: str, number: int, rows: int, columns: int) -> Tensor:
    """Makes bergson's matrix for a module."""
    from bergson.collector.projection_matrix import random_matrix

    matrix: Tensor = random_matrix(f"module{number}/single", rows, columns, "cpu", kind)
    return matrix


def make_torchs(kind: str, number: int, rows: int, columns: int) -> Tensor:
    """Draws a matrix with torch's generator."""
    generator = torch.Generator().manual_seed(number)
    if kind == "normal":
        return torch.randn(rows, columns, generator=generator)
    return torch.randint(0, 2, (rows, columns), generator=generator).float().mul_(2).sub_(1)


def statistics(make: Make, kind: str, title: str) -> dict[str, float]:
    """Computes deviations from an ideal matrix, in standard errors except for those that `IDEAL` names."""
    P = make(kind, 0, ROWS, COLUMNS).double()
    entries = P.numel()
    rows = P @ P.T / COLUMNS
    columns = P[:, :2048].T @ P[:, :2048] / ROWS
    neighbours = (P[:, 1:] * P[:, :-1]).mean()
    other = make(kind, 1, ROWS, COLUMNS).double()
    kurtosis = 3.0 if kind == "normal" else 1.0
    spread = math.sqrt(96 if kind == "normal" else 1)  # standard deviation of x⁴ if x is normal; of ±1 it is 0
    found = {
        "mean": float(P.mean()) * math.sqrt(entries),
        "kurtosis": float(P.pow(4).mean() - kurtosis) / spread * math.sqrt(entries),
        "neighbouring columns": float(neighbours) * math.sqrt(entries),
        "two matrices": float((P * other).mean()) * math.sqrt(entries),
        "largest correlation of rows": float(rows.triu(1).abs().max()) * math.sqrt(COLUMNS),
        "largest correlation of columns": float(columns.triu(1).abs().max()) * math.sqrt(ROWS),
    }
    for shape, g in gradients().items():
        ratios = []
        for number in tqdm(range(TRIALS), desc=f"{title}, {kind}, {shape}", leave=False):
            y = make(kind, 100 + number, 64, len(g)).double() @ g
            ratios.append(float(y.square().sum() / g.square().sum()) / 64)
        values = torch.tensor(ratios, dtype=torch.float64)
        ideal = 2 / 64 if kind == "normal" else 2 / 64 * (1 - float(g.pow(4).sum() / g.square().sum() ** 2))
        found[f"length, {shape}: mean"] = float(values.mean() - 1) / math.sqrt(ideal / TRIALS)
        found[f"length, {shape}: spread / ideal"] = float(values.std()) / math.sqrt(ideal)
    return found


def gradients() -> dict[str, Tensor]:
    """Draws gradients (2048,) of three shapes: dense, with a few large elements, and with its first elements only."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2048, generator=generator, dtype=torch.float64)
    first = torch.zeros(2048, dtype=torch.float64)
    first[:32] = 1
    return {"dense": dense, "heavy-tailed": dense**5, "first columns": first}


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    makers: dict[str, Make] = {"trak_fast": make_ours, "torch": make_torchs}
    if importlib.util.find_spec("bergson"):
        makers["bergson"] = make_bergsons
    results: dict[str, Any] = {}
    for kind in ("rademacher", "normal"):
        table = {name: statistics(make, kind, name) for name, make in makers.items()}
        results[kind] = table
        print(f"\n{kind:40}{'ideal':>12}" + "".join(f"{name:>12}" for name in makers))
        for figure in table["trak_fast"]:
            ideal = next((ideal for end, ideal in IDEAL.items() if figure.endswith(end)), "0 ± 1")
            print(f"{figure:40}{ideal:>12}" + "".join(f"{table[name][figure]:12.2f}" for name in makers))
    grads = torch.randn(32, 10**5)
    seconds = {}
    for name in makers:
        start = time.perf_counter()
        if name == "trak_fast":
            trak_fast.project(grads, 4096)
        else:
            torch.matmul(grads, makers[name]("rademacher", 0, 4096, 10**5).T)
        seconds[name] = time.perf_counter() - start
    results["seconds to project (32, 100000) to 4096, rademacher"] = seconds
    print(f"\n{'seconds, B = 32, D = 10^5, k = 4096':40}" + "".join(f"{seconds[name]:12.3f}" for name in makers))
    save(arguments.output, results)


if __name__ == "__main__":
    main()
