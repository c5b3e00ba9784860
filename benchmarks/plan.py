"""Compares what `trak-fast plan` predicts with real runs: time, disk, memory and gradients.

    python benchmarks/plan.py [--output benchmarks/results/NAME.json]

Time and disk are measured in whole runs of an MLP, stage by stage. The gradient's time is measured by itself and handed
to the plan; projection, X'X, solve and scores are predicted from rates. In the real run, `featurize` holds gradients,
projection and X'X, and `score` the rest.

Memory is the highest anonymous memory of each stage, in a fresh process, above that of the loaded model and of
libraries that have done everything once. Arrays that are mapped from files do not count, as the system takes them back.

Gradients are compared by the time of a sample's gradient and weighting, which the plan predicts from parameters and
tokens alone. The time of 8 FLOP a parameter and token, at a product's rate, is printed beside it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor, nn
from tqdm import tqdm

import trak_fast
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.plan import predict as plan
from trak_fast.plan import rates
from trak_fast.plan.job import Job

BATCH = 32
CASES = [(512, 1024, 512, 64), (1024, 2048, 256, 64), (256, 1024, 1536, 512)]
"""Width of the net's hidden layers, k, training samples, targets."""
MEMORY_CASES = [(2048, 512, 96, 32), (256, 4096, 4352, 64), (256, 3072, 3072, 6144), (256, 8192, 3072, 512)]
"""The same numbers, where most memory goes to gradients, to X'X, to scores, and to a system of n × n."""
LEAST_MEMORY = 200 << 20
"""Bytes below which the memory of the interpreter and its libraries hides the rest."""
GRADIENT_CASES = [
    (1, 512, 2, 32),
    (1, 1024, 5, 32),
    (32, 128, 4, 32),
    (64, 256, 4, 16),
    (128, 384, 6, 8),
    (128, 512, 2, 8),
]
"""Tokens (1: an MLP), width, layers and batch of each model."""
MARGIN = 0.25


def mlp(width: int, hidden: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(hidden) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(256, width), nn.ReLU(), *layers, nn.Linear(width, 10))


class Transformer(nn.Module):
    """A transformer of torch's own layers, unlike the plan's stand-in."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def data(size: int, seed: int, shape: tuple[int, ...] = (256,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator)]


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gradient_seconds(model: nn.Module, batch: list[Tensor], repeats: int = 7) -> float:
    """Measures the seconds of one sample's gradient and weighting, computed as the driver does."""
    computer = FunctionalGradientComputer(model.eval(), trak_fast.tasks.resolve_task("image_classification"))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        computer.compute_per_sample_grad(batch)
        computer.compute_loss_grad(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / len(batch[0])


def run(
    model: nn.Module, proj_dim: int, train: list[Tensor], targets: list[Tensor], stage: Callable[[str], object]
) -> int:
    """Makes a whole run, calls `stage` with the name of each stage, and returns the bytes on disk."""
    state = model.state_dict()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        stage("featurize")
        traker = trak_fast.TRAKer(
            model, "image_classification", len(train[0]), folder, proj_dim=proj_dim, logging_level=40
        )
        traker.load_checkpoint(state, model_id=0)
        for i in tqdm(range(0, len(train[0]), BATCH), leave=False, disable=None):
            batch = [x[i : i + BATCH] for x in train]
            traker.featurize(batch, num_samples=len(batch[0]))
        stage("X'X")
        traker.finalize_features()
        stage("targets")
        traker.start_scoring_checkpoint("test", state, model_id=0, num_targets=len(targets[0]))
        for i in range(0, len(targets[0]), BATCH):
            batch = [x[i : i + BATCH] for x in targets]
            traker.score(batch, num_samples=len(batch[0]))
        stage("scores")
        traker.finalize_scores("test")
        stage("end")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def timed(model: nn.Module, proj_dim: int, train: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
    """Measures the seconds of both halves of a run, and the bytes on disk."""
    begun: dict[str, float] = {}
    disk = run(model, proj_dim, train, targets, lambda name: begun.setdefault(name, time.perf_counter()))
    start, middle, end = (begun[name] for name in ("featurize", "targets", "end"))
    return {"featurize": middle - start, "score": end - middle, "total": end - start, "disk": disk}


def predicted(model: nn.Module, proj_dim: int, samples: int, targets: int) -> dict[str, float]:
    """Computes the plan's prediction of the same figures."""
    job = Job(
        params(model), proj_dim, samples, targets=targets, batch=BATCH,
        gradient_seconds=gradient_seconds(model, data(BATCH, 2)),
    )  # fmt: skip
    found = plan.predict(job, rates.calibrate(job))
    seconds = found.seconds
    share = samples / (samples + targets)
    each = seconds.gradients + seconds.projection + seconds.store
    featurize = each * share + seconds.gram
    return {
        "featurize": featurize, "score": seconds.total - featurize, "total": seconds.total,
        "disk": found.disk.total,
    }  # fmt: skip


class Watch:
    """Reads the process's anonymous memory every two milliseconds, in a thread."""

    def __init__(self) -> None:
        self.stage, self.peaks = "", {"": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def enter(self, stage: str) -> None:
        self.peaks[stage], self.stage = 0, stage

    def now(self) -> int:
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while True:
            self.peaks[self.stage] = max(self.peaks[self.stage], self.now())
            time.sleep(0.002)


def peaks(width: int, proj_dim: int, samples: int, targets: int, threads: int) -> dict[str, int]:
    """Bytes of each stage of a run, in a process that has done nothing yet."""
    torch.set_num_threads(threads)
    small = mlp(32)
    for size in (256, 32):  # more samples than k, and fewer
        run(small, 64, data(size, 0), data(32, 1), lambda name: None)
    model, train, test = mlp(width), data(samples, 0), data(targets, 1)
    gc.collect()
    watch = Watch()
    before = watch.now()
    run(model, proj_dim, train, test, watch.enter)
    return {stage: peak - before for stage, peak in watch.peaks.items()}


class Report:
    """Rows of predicted and real figures."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, shape: dict[str, int], what: str, guess: float, real: float, unit: str, counts: bool = True) -> None:
        row = {**shape, "what": what, "predicted": guess, "real": real, "ratio": guess / real, "counts": counts}
        self.rows.append(row)
        name = " ".join(f"{key}={value}" for key, value in shape.items())
        print(
            f"{name:40} {what:20} predicted {guess:10.4g} {unit:3}  real {real:10.4g} {unit:3}  {guess / real:5.2f} x"
            + ("" if counts else "  (does not count)"),
            flush=True,
        )

    def off(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["counts"] and abs(row["ratio"] - 1) > MARGIN]


def check_runs(report: Report, repeats: int) -> None:
    for width, proj_dim, samples, targets in CASES:
        model, train, test = mlp(width), data(samples, 0), data(targets, 1)
        shape = {"D": params(model), "k": proj_dim, "n": samples, "m": targets}
        plans, runs = [], []
        timed(model, proj_dim, [x[:64] for x in train], [x[:32] for x in test])  # warm-up
        for _ in range(repeats):  # interleaved, as a busy machine slows both
            plans.append(predicted(model, proj_dim, samples, targets))
            runs.append(timed(model, proj_dim, train, test))
        for what in ("featurize", "score", "total", "disk"):
            guess, real = (statistics.median(found[what] for found in several) for several in (plans, runs))
            report.add(shape, what, guess, real, "B" if what == "disk" else "s", what in ("total", "disk"))


def check_memory(report: Report, threads: int) -> None:
    context = multiprocessing.get_context("spawn")
    for width, proj_dim, samples, targets in MEMORY_CASES:
        job = Job(params(mlp(width)), proj_dim, samples, targets=targets, batch=BATCH)
        guess = plan.predict(job, rates.Rates(1, 1, 1, 1, 1, 1, "none")).memory.rows()
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            real = pool.submit(peaks, width, proj_dim, samples, targets, threads).result()
        shape = {"D": job.params, "k": proj_dim, "n": samples, "m": targets}
        for what, stages in (("featurize", ["featurize"]), ("X'X", ["X'X"]), ("scores", ["solve", "scores"])):
            most = max(guess[stage] for stage in stages)
            report.add(shape, f"memory, {what}", most / 2**20, real[what] / 2**20, "MiB", real[what] > LEAST_MEMORY)


def check_gradients(report: Report, repeats: int) -> None:
    for tokens, width, layers, batch in GRADIENT_CASES:
        model = mlp(width, layers - 1) if tokens == 1 else Transformer(width, layers)
        samples = data(batch, 0, (256,) if tokens == 1 else (tokens, width))
        job = Job(params(model), 64, 1000, batch=batch, tokens=tokens)
        guesses, reals, products = [], [], []
        for _ in range(repeats):
            reals.append(gradient_seconds(model, samples, 4))
            guesses.append(job.params * rates.gradient_rate(job))
            products.append(rates.calibrate(Job(64, 1024, 64, batch=1)).float32)
        shape = {"D": job.params, "tokens": tokens, "width": width, "B": batch}
        real = statistics.median(reals)
        report.add(shape, "gradient", 1e3 * statistics.median(guesses), 1e3 * real, "ms")
        flop = 1e3 * rates.FLOP_PER_PARAMETER * job.params * tokens / statistics.median(products)
        report.add(shape, "gradient, by FLOP", flop, 1e3 * real, "ms", False)


def main() -> int:
    checks: dict[str, Callable[[Report, argparse.Namespace], None]] = {
        "runs": lambda report, options: check_runs(report, options.repeats),
        "memory": lambda report, options: check_memory(report, options.threads),
        "gradients": lambda report, options: check_gradients(report, options.repeats),
    }
    parser = record.make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(checks), default=list(checks))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="1: what threads wait for each other is not predicted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report()
    for name in options.only:
        checks[name](report, options)
    record.save(options.output, {"rows": report.rows})
    counted = sum(row["counts"] for row in report.rows)
    print(f"{len(report.off())} of {counted} figures that count are off by more than {MARGIN:.0%}")
    by_flop = [row["ratio"] for row in report.rows if row["what"] == "gradient, by FLOP"]
    if by_flop:
        print(
            f"8 FLOP a parameter and token at a product's rate are {min(by_flop):.2f} to {max(by_flop):.2f} of the "
            "gradient's time: a lower bound, of use for long sequences alone"
        )
    return 1 if report.off() else 0


if __name__ == "__main__":
    sys.exit(main())
