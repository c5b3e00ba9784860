"""Compares what `trak-fast plan` predicts with a real run, stage by stage, and says whether they agree within 25 %.

    python benchmarks/plan.py [--output benchmarks/results/NAME.json]

The gradient of the model is timed by itself and handed to the plan (`gradient_seconds`), because no rate of the machine
says what a model's gradient costs; projection, X'X, solve, scores and disk are predicted from rates. Of the real run,
`featurize` holds gradients, projection and X'X, and `score` the rest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import trak_fast
from trak_fast.bench import plan

BATCH = 32
CASES = [(512, 1024, 512, 64), (1024, 2048, 256, 64), (256, 1024, 1536, 512)]
"""Width of the net's hidden layers, k, training samples, targets."""


def data(size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 256, generator=generator), torch.randint(10, (size,), generator=generator)]


def gradient_seconds(model: nn.Module) -> float:
    """Of one training sample: its gradient and its weighting, copied out of the driver's way."""
    computer = trak_fast.traker.FunctionalGradientComputer(
        model, trak_fast.tasks.resolve_task("image_classification"), None, torch.float32, torch.device("cpu")
    )
    computer.load_model_params(model)
    batch, times = data(BATCH, 2), []
    for _ in range(7):
        start = time.perf_counter()
        computer.compute_per_sample_grad(batch)
        computer.compute_loss_grad(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / BATCH


def run(model: nn.Module, proj_dim: int, train: list[Tensor], targets: list[Tensor], title: str) -> dict[str, float]:
    """Seconds of both halves of a run, and bytes on disk."""
    state = model.state_dict()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        traker = trak_fast.TRAKer(
            model, "image_classification", len(train[0]), folder, proj_dim=proj_dim, logging_level=40
        )
        start = time.perf_counter()
        traker.load_checkpoint(state, model_id=0)
        for i in tqdm(range(0, len(train[0]), BATCH), desc=title, leave=False, disable=None):
            batch = [x[i : i + BATCH] for x in train]
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        middle = time.perf_counter()
        traker.start_scoring_checkpoint("test", state, model_id=0, num_targets=len(targets[0]))
        for i in range(0, len(targets[0]), BATCH):
            batch = [x[i : i + BATCH] for x in targets]
            traker.score(batch, num_samples=len(batch[0]))
        traker.finalize_scores("test")
        end = time.perf_counter()
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"featurize": middle - start, "score": end - middle, "total": end - start, "disk": disk}


def predicted(model: nn.Module, proj_dim: int, samples: int, targets: int) -> dict[str, float]:
    """What the plan says of the same figures."""
    job = plan.Job(
        sum(p.numel() for p in model.parameters()), proj_dim, samples, targets=targets, batch=BATCH,
        gradient_seconds=gradient_seconds(model),
    )  # fmt: skip
    found = plan.predict(job, plan.calibrate(job))
    seconds, share = found["seconds"], samples / (samples + targets)
    each = seconds["gradients"] + seconds["projection"] + seconds["store"]
    featurize = each * share + seconds["X'X"]
    return {
        "featurize": featurize, "score": seconds["total"] - featurize, "total": seconds["total"],
        "disk": found["disk_bytes"]["total"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="1: what threads wait for each other is not predicted")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for width, proj_dim, samples, targets in CASES:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        shape = {"D": sum(p.numel() for p in model.parameters()), "k": proj_dim, "n": samples, "m": targets}
        plans, runs = [], []
        train, test = data(samples, 0), data(targets, 1)
        run(model, proj_dim, [x[:64] for x in train], [x[:32] for x in test], "warm-up")
        for _ in range(arguments.repeats):  # interleaved, as a busy machine slows both
            plans.append(predicted(model, proj_dim, samples, targets))
            runs.append(run(model, proj_dim, train, test, str(shape)))
        for what in ("featurize", "score", "total", "disk"):
            guess, real = (statistics.median(found[what] for found in several) for several in (plans, runs))
            rows.append({**shape, "what": what, "predicted": guess, "real": real, "ratio": guess / real})
            unit = "B" if what == "disk" else "s"
            print(f"{shape}  {what:10} predicted {guess:12.4g} {unit}  real {real:12.4g} {unit}  {guess / real:5.2f} x")
    if arguments.output:
        machine = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/plan.py", *sys.argv[1:]]),
            "processor": platform.processor() or platform.machine(),
            "info": trak_fast.info(),
        }
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    off = [row for row in rows if row["what"] in ("total", "disk") and not 0.75 <= row["ratio"] <= 1.25]
    print(f"{len(off)} of {sum(row['what'] in ('total', 'disk') for row in rows)} totals are off by more than 25 %")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
