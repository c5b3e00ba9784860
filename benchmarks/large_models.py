"""Measures tokens a second and memory of each way from a language model to features, and prints a table.

    python benchmarks/large_models.py [--model gpt2-small|gpt2-one-layer|gpt2-xl|llama-1b|tiny] [--device cuda]
        [--dtype bfloat16] [--ways TEXT ...] [--output benchmarks/results/NAME.json]

Models have random weights, and texts are random tokens without padding. Each way runs in a process of its own, in
interleaved rounds; figures are medians over rounds of the median batch. Memory is the peak of the first batch above the
loaded model: of the process on a CPU, of torch's allocator on a GPU. The yardstick is forward and backward with frozen
weights. For streamed ways, the time beyond the yardstick is divided by that of the same projections alone. Ways that
fail, take more than --limit, or whose library is missing are listed with the reason (large_model_peers.py says what the
libraries need).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import torch
from large_model_ways import ALONE, FROZEN, MODELS, PATIENCE, WAYS, Facts, Settings, measure
from record import make_parser, save
from tqdm import tqdm


def measure_apart(name: str, settings: Settings, repeats: int, limit: float) -> Facts:
    """Measures a way in a process of its own; the result has "missing", the reason, where that cannot be."""
    command = [sys.executable, __file__, "--way", name, "--settings", json.dumps(dataclasses.asdict(settings))]
    command += ["--repeats", str(repeats)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings.threads)}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"missing": f"takes more than {limit:.0f} s"}
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return {"missing": lines[-1] if lines else f"ended with status {result.returncode}"}
    return json.loads(result.stdout.splitlines()[-1])


def measure_rounds(names: list[str], settings: Settings, options: argparse.Namespace) -> dict[str, list[Facts]]:
    """Measures ways in interleaved rounds; one that is missing, or needs patience, is not run again."""
    rounds: dict[str, list[Facts]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in tqdm(names, desc=f"round {number + 1} of {options.rounds}", leave=False):
            if not any("missing" in facts or facts["seconds"] > PATIENCE for facts in rounds[name]):
                rounds[name].append(measure_apart(name, settings, options.repeats, options.limit))
    return rounds


def summarise(name: str, rounds: list[Facts], settings: Settings, clock: str) -> dict[str, Any]:
    """Returns a row: medians of the rounds, or the reason why there are none."""
    if missing := [facts["missing"] for facts in rounds if "missing" in facts]:
        return {"way": name, "missing": missing[0]}
    row = {key: statistics.median(facts[key] for facts in rounds) for key in rounds[0]}
    tokens = settings.batch * settings.tokens
    return {"way": name, "tokens a second": tokens / row[clock], **row, "rounds": rounds}


def add_ratios(rows: list[dict[str, Any]], clock: str) -> None:
    """Adds the speed relative to the yardstick, and what streaming takes beyond it relative to the projection alone."""
    seconds = {row["way"]: row[clock] for row in rows if "missing" not in row}
    if FROZEN not in seconds:
        return
    for row in rows:
        if row["way"] in seconds:
            row["share of yardstick"] = seconds[FROZEN] / row[clock]
    for way, alone in (("streamed ±1", ALONE["rademacher"]), ("streamed sjlt", ALONE["sjlt"])):
        row = next((row for row in rows if row["way"] == way and way in seconds), None)
        if row is not None and alone in seconds:
            row["beyond of projection"] = (seconds[way] - seconds[FROZEN]) / seconds[alone]


def print_row(row: dict[str, Any]) -> None:
    """Prints a line of the table."""
    if "missing" in row:
        print(f"{row['way']:34} missing: {row['missing']}")
        return
    notes = ""
    if "share of yardstick" in row:
        notes += f"  {row['share of yardstick']:5.2f} of the yardstick's speed"
    if "beyond of projection" in row:
        notes += f"  time beyond the yardstick: {row['beyond of projection']:.2f} of the projection alone"
    if "share in projection" in row:
        notes += f"  {row['share in projection']:.0%} of the time in projection"
    print(
        f"{row['way']:34} {row['tokens a second']:10,.0f} tokens/s {row['seconds']:9.3f} s"
        f" {row['CPU seconds']:9.3f} CPU s {row['MiB']:8,.0f} MiB"
        f"  D = {row.get('columns', 0):13,.0f}  features {row.get('features', 0):9,.0f}"
        f"{notes}"
    )


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=8, help="B")
    parser.add_argument("--tokens", type=int, default=128, help="T")
    parser.add_argument("--proj-dim", type=int, default=1024, help="k")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="batches timed in each process after the first one")
    parser.add_argument(
        "--clock", choices=("seconds", "CPU seconds"), default="seconds",
        help="the time that speeds and ratios are of; other programs disturb the processor's little",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a process may take")
    parser.add_argument("--ways", nargs="+", default=[""], help="ways to measure: those whose names contain a text")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print("\n" + json.dumps(measure(options.way, Settings(**options.settings), options.repeats)))
        return
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    names = [name for name in WAYS if any(text in name for text in options.ways)]
    rounds = measure_rounds(names, settings, options)
    rows = [summarise(name, rounds[name], settings, options.clock) for name in names]
    add_ratios(rows, options.clock)
    print(settings)
    for row in rows:
        print_row(row)
    save(options.output, {"settings": dataclasses.asdict(settings), "clock": options.clock, "rows": rows})


if __name__ == "__main__":
    main()
