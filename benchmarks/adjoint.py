"""Measures the adjoint P'y beside the projection and beside torch's product with a stored matrix, and prints a table.

    python benchmarks/adjoint.py [--output benchmarks/results/NAME.json]

Gradients are float32, k = 4096, D = 2^17. Rounds are interleaved, and figures are medians. The stored matrix takes
2 GB of memory.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from record import make_parser, save
from tqdm import tqdm

import trak_fast

K = 4096
COLUMNS = 2**17


def median_seconds(
    tasks: Mapping[str, Callable[[], object]], count: int, title: str, pause: float = 0
) -> dict[str, float]:
    """Returns the median seconds of each task in `count` interleaved rounds, after one round of warm-up.

    Args:
        tasks: The tasks by their names.
        count: The number of rounds.
        title: The title of the progress bar.
        pause: Seconds before each task, which then runs once untimed and once timed. torch's threads stay awake for
            some milliseconds after a task, and take processors from the next one; a pause sends processors to sleep.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in tqdm(range(count + 1), desc=title, leave=False):
        for name, task in tasks.items():
            if pause:
                time.sleep(pause)
                task()
            start = time.perf_counter()
            task()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def with_isa(isa: str, task: Callable[..., object], *arguments: object, proj_type: str) -> Callable[[], object]:
    """Returns a call of a function with one instruction set."""

    def run() -> None:
        os.environ["TRAK_FAST_ISA"] = isa
        task(*arguments, proj_type=proj_type)

    return run


def measure(batch: int, stored: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Times projection and adjoint of B = `batch` for each instruction set and kind, and the stored matrix (k, D)."""
    g = torch.randn(batch, COLUMNS)
    y = torch.randn(batch, K)
    tasks: dict[str, Callable[[], object]] = {"stored": functools.partial(torch.matmul, y, stored)}
    kinds = [(isa, kind) for isa in trak_fast.info()["instruction_sets"] for kind in ("rademacher", "normal")]
    for isa, kind in kinds:
        tasks[f"{isa} {kind} P g"] = with_isa(isa, trak_fast.project, g, K, proj_type=kind)
        tasks[f"{isa} {kind} P'y"] = with_isa(isa, trak_fast.project_adjoint, y, COLUMNS, proj_type=kind)
    seconds = median_seconds(tasks, repeats, f"B = {batch}")
    return [
        {
            "isa": isa,
            "kind": kind,
            "B": batch,
            "D": COLUMNS,
            "k": K,
            "stored": seconds["stored"],
            "project": seconds[f"{isa} {kind} P g"],
            "adjoint": seconds[f"{isa} {kind} P'y"],
        }
        for isa, kind in kinds
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    stored = torch.randn(K, COLUMNS)
    rows = [row for batch in (1, 8, 32, 128) for row in measure(batch, stored, arguments.repeats)]
    for row in rows:
        gigaflop = 2 * row["B"] * K * COLUMNS / 1e9
        print(
            f"B = {row['B']:3}  {row['isa']:12} {row['kind']:10}  P'y {gigaflop / row['adjoint']:6.0f} GFLOP/s   "
            f"{row['project'] / row['adjoint']:5.2f} x as fast as P g   "
            f"{row['stored'] / row['adjoint']:5.2f} x as fast as a stored matrix"
        )
    save(arguments.output, {"rows": rows})


if __name__ == "__main__":
    main()
