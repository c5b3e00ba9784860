"""Measures the sparse kind beside a copy of the gradients and beside what it takes the place of, and prints a table.

    python benchmarks/sparse.py [--threads N] [--rounds N] [--output benchmarks/results/NAME.json]

Gradients are float32. The floor is memory: bytes of gradients read in a second, as a share of the bytes that torch's
copy of the same gradients reads and writes in a second. Others are scikit-learn's SparseRandomProjection (density
1/√D), `index_add_` with stored rows and signs, as the package sjlt has it in PyTorch, and our best dense kernel. Rounds
are interleaved, and figures are medians. The last line is the memory of a call beyond gradients and result.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from adjoint import median_seconds
from record import make_parser, save
from sklearn.random_projection import SparseRandomProjection

import trak_fast

K = 4096
PAUSE = 0.02
"""Seconds between measurements."""

NONZEROS = (1, 2, 4, 8)

MEMORY = """
import sys, torch, trak_fast
batch, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
grads, out = torch.ones(batch, 2**20), torch.zeros(batch, 4096)
trak_fast.project(grads[:, :64], 4096, proj_type="sjlt", out=out)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
trak_fast.project(grads, 4096, proj_type="sjlt", out=out)
print((peak() - before) / 1024 / threads)
"""
"""Prints the MiB of each thread by which a call's peak exceeds the memory before it."""


def project_sparse(grads: torch.Tensor, nonzeros: int, k: int = K) -> Callable[[], object]:
    return functools.partial(trak_fast.project, grads, k, proj_type="sjlt", nonzeros=nonzeros)


def add_by_index(grads: torch.Tensor, nonzeros: int) -> Callable[[], object]:
    """Returns a projection by rows and signs that are stored."""
    rows = torch.randint(K, (nonzeros, grads.shape[1]))
    signs = torch.randint(2, rows.shape) * 2.0 - 1

    def run() -> torch.Tensor:
        result = torch.zeros(len(grads), K)
        for row, sign in zip(rows, signs, strict=True):
            result.index_add_(1, row, grads * sign)
        return result

    return run


def add_by_scikit_learn(grads: torch.Tensor) -> Callable[[], object]:
    X = grads.numpy()
    transformer = SparseRandomProjection(K, density=1 / math.sqrt(X.shape[1]), random_state=0).fit(X)
    return functools.partial(transformer.transform, X)


def measure_bandwidth(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Compares with a copy, D = 2^20."""
    grads = torch.randn(batch, 2**20)
    copy = torch.empty_like(grads)
    tasks: dict[str, Callable[[], object]] = {"copy": functools.partial(copy.copy_, grads)}
    tasks |= {f"c = {c}": project_sparse(grads, c) for c in NONZEROS}
    tasks["bfloat16, c = 4"] = project_sparse(grads.bfloat16(), 4)
    tasks["k = 65,536, c = 4"] = project_sparse(grads, 4, 65536)
    seconds = median_seconds(tasks, rounds, f"B = {batch}", PAUSE)
    moved = grads.numel() * 4
    return [
        {
            "what": name,
            "B": batch,
            "D": grads.shape[1],
            "seconds": time,
            "nanoseconds an entry": 1e9 * time / grads.numel(),
            "share of copy": moved / time / (2 * moved / seconds["copy"]),
        }
        for name, time in seconds.items()
    ]


def measure_others(grad_dim: int, rounds: int) -> list[dict[str, Any]]:
    """Compares with other projections, B = 32."""
    grads = torch.randn(32, grad_dim)
    tasks = {
        "trak_fast sjlt, c = 4": project_sparse(grads, 4),
        "trak_fast rademacher": functools.partial(trak_fast.project, grads, K),
        "scikit-learn sparse": add_by_scikit_learn(grads),
        "trak_fast sjlt, c = 1": project_sparse(grads, 1),
        "torch index_add_, c = 4": add_by_index(grads, 4),
        "torch index_add_, c = 1": add_by_index(grads, 1),
    }
    seconds = median_seconds(tasks, rounds, f"D = {grad_dim:,}", PAUSE)
    ours = seconds["trak_fast sjlt, c = 4"]
    return [
        {"what": name, "B": 32, "D": grad_dim, "seconds": time, "times as long as ours": time / ours}
        for name, time in seconds.items()
    ]


def measure_memory(batch: int, threads: int) -> float:
    """Returns the MiB of each thread beyond gradients and result, from a process of its own."""
    command = [sys.executable, "-c", MEMORY, str(batch), str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = [row for batch in (1, 32, 256) for row in measure_bandwidth(batch, arguments.rounds)]
    for row in bandwidth:
        print(
            f"B = {row['B']:3}  D = {row['D']:,}  {row['what']:18} {1e3 * row['seconds']:8.2f} ms  "
            f"{row['nanoseconds an entry']:5.2f} ns an entry  {row['share of copy']:.2f} of the copy's bytes a second",
            flush=True,
        )
    others = [row for grad_dim in (65_536, 10**6) for row in measure_others(grad_dim, arguments.rounds)]
    for row in others:
        print(
            f"B =  32  D = {row['D']:9,}  {row['what']:24} {1e3 * row['seconds']:8.2f} ms  "
            f"{row['times as long as ours']:6.1f} times as long as ours",
            flush=True,
        )
    memory = {str(batch): measure_memory(batch, arguments.threads) for batch in (32, 256)}
    for name, size in memory.items():
        print(f"B = {name:>3}  {size:.2f} MiB a thread beyond gradients and result")
    save(
        arguments.output,
        {"threads": arguments.threads, "bandwidth": bandwidth, "others": others, "MiB a thread": memory},
    )


if __name__ == "__main__":
    main()
