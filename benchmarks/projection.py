"""Measures the CPU projection against what one would use instead, in one run, and prints a table.

    python benchmarks/projection.py [--output benchmarks/results/NAME.json] [--quick]

Rounds are interleaved, so that a busy machine hurts all alike; figures are medians, ratios are taken of medians. Needs
traker 0.3.2 for its BasicProjector (`pip install --no-deps traker==0.3.2`), and 9 GB of memory for the matrix that
`torch.matmul` multiplies with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import trak_fast

# Linux keeps the peak of a process's resident memory, and sets it back on request.
MEMORY_PROBE = """
import torch, trak_fast
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
grads = torch.ones(32, 10**7, dtype=getattr(torch, "{dtype}"))
out = torch.zeros(32, {k})
trak_fast.project(grads[:, :5000], {k}, proj_type="{kind}")
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
trak_fast.project(grads, {k}, proj_type="{kind}", out=out)
print((status("VmHWM") - before) / 1024)
"""


def rounds(tasks: Mapping[str, Callable[[], object]], count: int, title: str) -> dict[str, list[float]]:
    """Seconds of each task in `count` interleaved rounds, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in tqdm(range(count + 1), desc=title, leave=False):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def with_isa(isa: str, task: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        os.environ["TRAK_FAST_ISA"] = isa
        task()

    return run


def against_stored_matrix(k: int, columns: int, repeats: int) -> list[dict[str, Any]]:
    """bf16 Rademacher against torch's product with the matrix already in memory."""
    matrix = torch.empty(columns, k, dtype=torch.bfloat16)
    matrix.bernoulli_(0.5).mul_(2).sub_(1)
    rows = []
    for batch in (1, 8, 16, 32, 64, 128, 256):
        grads = torch.randn(batch, columns).bfloat16()
        best = trak_fast.info()["instruction_sets"][0]
        seconds = rounds(
            {
                "ours": with_isa(best, lambda g=grads: trak_fast.project(g, k)),
                "stored": lambda g=grads: torch.matmul(g, matrix),
            },
            repeats,
            f"B = {batch}",
        )
        ours, stored = (statistics.median(seconds[name]) for name in ("ours", "stored"))
        rows.append(
            {
                "what": "rademacher bf16, product with a stored matrix",
                **{"isa": best, "B": batch, "D": columns, "k": k, "seconds": seconds},
                **{"ratio": stored / ours, "tflops": 2 * batch * columns * k / ours / 1e12},
                "fastest_tflops": 2 * batch * columns * k / min(seconds["ours"]) / 1e12,
            }
        )
    return rows


def against_traker(k: int, columns: int, repeats: int) -> list[dict[str, Any]]:
    """fp32 at the default precision, every instruction set, against traker's BasicProjector (one run: it is slow)."""
    from trak.projectors import BasicProjector, ProjectionType

    grads = torch.randn(32, columns)
    rows = []
    for kind in ("rademacher", "normal"):
        basic = BasicProjector(columns, k, 0, ProjectionType(kind), torch.device("cpu"))
        start = time.perf_counter()
        for _ in tqdm(range(1), desc=f"traker, {kind}", leave=False):
            basic.project(grads, 0)
        traker = time.perf_counter() - start
        tasks = {
            isa: with_isa(isa, lambda kind=kind: trak_fast.project(grads, k, proj_type=kind))
            for isa in trak_fast.info()["instruction_sets"]
        }
        for isa, seconds in rounds(tasks, repeats, f"fp32, {kind}").items():
            ours = statistics.median(seconds)
            rows.append(
                {
                    "what": f"{kind} fp32, traker BasicProjector",
                    **{"isa": isa, "B": 32, "D": columns, "k": k, "seconds": {"ours": seconds, "traker": [traker]}},
                    **{"ratio": traker / ours, "tflops": 2 * 32 * columns * k / ours / 1e12},
                    "fastest_tflops": 2 * 32 * columns * k / min(seconds) / 1e12,
                }
            )
    return rows


def torch_product(repeats: int) -> list[dict[str, Any]]:
    """What torch reaches on a big square bf16 product."""
    size = 4096
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    seconds = rounds({"torch": lambda: torch.matmul(a, b)}, repeats, "torch product")["torch"]
    tflops = 2 * size**3 / statistics.median(seconds) / 1e12
    return [{"what": f"for scale: torch bf16 product, {size} cubed", "tflops": tflops, "seconds": {"torch": seconds}}]


def extra_memory(k: int) -> list[dict[str, Any]]:
    """MiB above input and output at B = 32, D = 10^7: the process's peak, in a process of its own."""
    os.environ.pop("TRAK_FAST_ISA", None)
    rows = []
    for kind in ("rademacher", "normal"):
        for dtype in ("bfloat16", "float32"):
            probe = MEMORY_PROBE.format(kind=kind, dtype=dtype, k=k)
            peak = float(subprocess.check_output([sys.executable, "-c", probe], text=True))
            rows.append({"what": f"peak memory above input and output, {kind} {dtype}", "mib": peak})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the columns")
    arguments = parser.parse_args()
    shrink = 16 if arguments.quick else 1
    rows = [
        *torch_product(15),
        *against_stored_matrix(4096, 2**20 // shrink, 7),
        *against_traker(4096, 10**6 // shrink, 5),
        *extra_memory(4096 // shrink),
    ]
    machine = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/projection.py", *sys.argv[1:]]),
        "processor": platform.processor() or platform.machine(),
        "info": trak_fast.info(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    for row in rows:
        if "mib" in row:
            print(f"{row['what']:60} {row['mib']:8.1f} MiB")
        elif "isa" not in row:
            print(f"{row['what']:60} {row['tflops']:8.2f} TFLOP/s")
        else:
            print(
                f"{row['what']:48} {row['isa']:12} B = {row['B']:3}  {statistics.median(row['seconds']['ours']):8.3f} s"
                f"  {row['tflops']:6.2f} TFLOP/s (best {row['fastest_tflops']:5.2f})  {row['ratio']:7.1f} x"
            )


if __name__ == "__main__":
    main()
