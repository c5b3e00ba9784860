"""Measures what a small call costs: `project` of (1, 512) to k = 64, and `Accumulator.add` of a list of two tensors.

    python benchmarks/call_cost.py [FOLDER ...]

With folders, source trees that are built, each is measured in a process of its own, in interleaved rounds: the ratio of
two trees is then worth more than their times.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch

ROUNDS = 9
CALLS = 2000
"""Calls in a round, whose median is taken."""


def median_microseconds(call: Callable[[], object]) -> float:
    """Measures the median time of a call."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def measure() -> dict[str, float]:
    """Measures each call on one thread, in microseconds."""
    import trak_fast

    torch.set_num_threads(1)
    row = torch.randn(1, 512)
    pair = [torch.randn(1, 16, 16), torch.randn(1, 256)]
    accumulator = trak_fast.Projector(512, 64).accumulator(1)
    calls = {
        "project (1, 512) to 64": lambda: trak_fast.project(row, 64),
        "Accumulator.add of 2 tensors": lambda: accumulator.add(pair, 0),
    }
    return {name: median_microseconds(call) for name, call in calls.items()}


def main() -> None:
    """Prints medians for this installation, or for each folder."""
    if sys.argv[1:] == ["--once"]:
        print("\n".join(f"{name}\t{value}" for name, value in measure().items()))
        return
    folders = sys.argv[1:] or [""]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for folder in folders:
            environment = {**os.environ, "PYTHONPATH": folder} if folder else dict(os.environ)
            command = [sys.executable, __file__, "--once"]
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            for line in output.splitlines():
                name, value = line.split("\t")
                found[name, folder].append(float(value))
    for (name, folder), values in sorted(found.items()):
        print(f"{name:<30} {statistics.median(values):7.2f} µs  {folder}")


if __name__ == "__main__":
    main()
