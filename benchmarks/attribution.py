"""Times a whole TRAK run against traker 0.3.2 with its BasicProjector, in one process on the same data.

    python benchmarks/attribution.py [--output benchmarks/results/NAME.json]

A convolutional network on random images, one checkpoint, float32, the same batches; every stage is timed. traker runs
once (its projector draws the matrix again for each batch), trak_fast several times before it and after it, with
gradients by torch.func, which is the default and what traker does, and by hooks; figures are medians. Needs
`pip install --no-deps traker==0.3.2`.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import make_parser, save
from torch import Tensor, nn
from tqdm import tqdm

import trak_fast

BATCH = 32
CASES = [(96, 512, 64), (960, 64, 32)]
"""Width of the last hidden layer, which sets D; training samples; targets. traker draws D x k numbers a batch."""


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def data(size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)]


def run(make: Callable[[Path], Any], train: list[Tensor], targets: list[Tensor], title: str) -> dict[str, float]:
    """Seconds of each stage of a run."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal start
        seconds[name] = time.perf_counter() - start
        start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        traker = make(Path(folder))
        state = traker.model.state_dict()
        stage("open")
        traker.load_checkpoint(state, model_id=0)
        for i in tqdm(range(0, len(train[0]), BATCH), desc=title, leave=False):
            batch = [x[i : i + BATCH] for x in train]
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        stage("featurize")
        traker.finalize_features()
        stage("finalize features")
        traker.start_scoring_checkpoint("test", state, model_id=0, num_targets=len(targets[0]))
        for i in range(0, len(targets[0]), BATCH):
            batch = [x[i : i + BATCH] for x in targets]
            traker.score(batch=batch, num_samples=len(batch[0]))
        stage("score")
        traker.finalize_scores("test")
        stage("finalize scores")
    return {**seconds, "all": sum(seconds.values())}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--proj-dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="runs of trak_fast before and after the one of traker")
    arguments = parser.parse_args()
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    rows = []
    for width, train_size, num_targets in CASES:
        train, targets = data(train_size, 0), data(num_targets, 1)
        torch.manual_seed(0)
        model = network(width).eval()
        size = sum(p.numel() for p in model.parameters())
        options: dict[str, Any] = {"model": model, "task": "image_classification", "train_set_size": len(train[0])}
        options |= {"device": "cpu", "proj_dim": arguments.proj_dim, "use_half_precision": False}
        options |= {"logging_level": logging.ERROR}

        def ours(folder: Path, options: dict[str, Any] = options) -> Any:
            return trak_fast.TRAKer(save_dir=folder, **options)

        def hooks(folder: Path, options: dict[str, Any] = options) -> Any:
            return trak_fast.TRAKer(save_dir=folder, gradient_computer=trak_fast.HookGradientComputer, **options)

        def theirs(folder: Path, options: dict[str, Any] = options, size: int = size) -> Any:
            projector = BasicProjector(size, arguments.proj_dim, 0, ProjectionType.rademacher, torch.device("cpu"))
            return TRAKer(save_dir=folder, projector=projector, lambda_reg=1e-3, **options)

        fast: dict[str, list[dict[str, float]]] = {"torch.func": [], "hooks": []}
        run(ours, train, targets, "warm-up")
        for turn in range(2 * arguments.repeats):
            if turn == arguments.repeats:
                slow = run(theirs, train, targets, f"traker, D = {size}")
            for name, make in (("torch.func", ours), ("hooks", hooks)):
                fast[name].append(run(make, train, targets, f"trak_fast, D = {size}"))
        row: dict[str, Any] = {"D": size, "k": arguments.proj_dim, "n": train_size, "m": num_targets, "batch": BATCH}
        row |= {"seconds": {**fast, "traker": slow}}
        row |= {"ratio": {name: slow["all"] / statistics.median(f["all"] for f in fast[name]) for name in fast}}
        rows.append(row)
        print(f"D = {size}, k = {arguments.proj_dim}, {train_size} training samples, {num_targets} targets")
        for stage in slow:
            line = f"  {stage:18} traker {slow[stage]:8.2f} s"
            for name, runs in fast.items():
                own = statistics.median(f[stage] for f in runs)
                line += f"   {name} {own:8.3f} s {slow[stage] / own:7.1f} x"
            print(line)
    save(arguments.output, {"rows": rows})


if __name__ == "__main__":
    main()
