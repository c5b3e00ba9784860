"""Measures the adjoint P'y beside the projection and beside torch's product with a stored matrix, and prints a table.

    python benchmarks/adjoint.py [--output benchmarks/results/NAME.json]

float32, k = 4096, D = 2^17, interleaved rounds, medians. The stored matrix takes 2 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from projection import rounds, with_isa

import trak_fast

K, COLUMNS = 4096, 2**17


def measure(batch: int, stored: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    g, y = torch.randn(batch, COLUMNS), torch.randn(batch, K)
    tasks = {"stored": lambda: torch.matmul(y, stored)}
    kinds = [(isa, kind) for isa in trak_fast.info()["instruction_sets"] for kind in ("rademacher", "normal")]
    for isa, kind in kinds:
        tasks[f"{isa} {kind} P g"] = with_isa(isa, lambda kind=kind: trak_fast.project(g, K, proj_type=kind))
        tasks[f"{isa} {kind} P'y"] = with_isa(
            isa, lambda kind=kind: trak_fast.project_adjoint(y, COLUMNS, proj_type=kind)
        )
    seconds = {name: statistics.median(s) for name, s in rounds(tasks, repeats, f"B = {batch}").items()}
    return [
        {
            **{"isa": isa, "kind": kind, "B": batch, "D": COLUMNS, "k": K, "stored": seconds["stored"]},
            **{"project": seconds[f"{isa} {kind} P g"], "adjoint": seconds[f"{isa} {kind} P'y"]},
        }
        for isa, kind in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    stored = torch.randn(K, COLUMNS)
    rows = [row for batch in (1, 8, 32, 128) for row in measure(batch, stored, arguments.repeats)]
    for row in rows:
        work = 2 * row["B"] * K * COLUMNS / 1e9
        print(
            f"B = {row['B']:3}  {row['isa']:12} {row['kind']:10}  P'y {work / row['adjoint']:6.0f} GFLOP/s   "
            f"{row['project'] / row['adjoint']:5.2f} x as fast as P g   "
            f"{row['stored'] / row['adjoint']:5.2f} x as fast as a stored matrix"
        )
    if arguments.output:
        command = " ".join(["python", "benchmarks/adjoint.py", *sys.argv[1:]])
        machine = {"date": date.today().isoformat(), "command": command, "info": trak_fast.info()}
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
