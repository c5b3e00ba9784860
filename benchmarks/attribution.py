"""Times a whole TRAK run against traker 0.3.2 with its BasicProjector, in one process on the same data.

    python benchmarks/attribution.py [--output benchmarks/results/NAME.json]

A convolutional network on random images with one checkpoint, in float32 and in the same batches; every stage is timed.
traker runs once, as its projector draws the matrix again for each batch. trak_fast runs several times before it and
after it, with gradients by torch.func (the default, and traker's way) and by hooks; figures are medians. Needs
`pip install --no-deps traker==0.3.2`.
"""

from __future__ import annotations

import functools
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
"""Width of the last hidden layer, number of training samples and number of targets. The width sets D, and traker draws
D x k numbers for each batch."""


def network(width: int) -> nn.Module:
    """Returns a convolutional network for images (3, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def data(size: int, seed: int) -> list[Tensor]:
    """Draws random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)]


def run(opened: Callable[..., Any], train: list[Tensor], targets: list[Tensor], title: str) -> dict[str, float]:
    """Runs all of TRAK with a TRAKer that `opened(save_dir=...)` returns, and returns the seconds of each stage."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def end_stage(name: str) -> None:
        nonlocal start
        seconds[name] = time.perf_counter() - start
        start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        traker = opened(save_dir=Path(folder))
        state = traker.model.state_dict()
        end_stage("open")
        traker.load_checkpoint(state, model_id=0)
        for i in tqdm(range(0, len(train[0]), BATCH), desc=title, leave=False):
            batch = [x[i : i + BATCH] for x in train]
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        end_stage("featurize")
        traker.finalize_features()
        end_stage("finalize features")
        traker.start_scoring_checkpoint("test", state, model_id=0, num_targets=len(targets[0]))
        for i in range(0, len(targets[0]), BATCH):
            batch = [x[i : i + BATCH] for x in targets]
            traker.score(batch=batch, num_samples=len(batch[0]))
        end_stage("score")
        traker.finalize_scores("test")
        end_stage("finalize scores")
    return {**seconds, "all": sum(seconds.values())}


def open_traker(save_dir: Path, size: int, options: dict[str, Any]) -> Any:
    """Opens traker's own TRAKer with its BasicProjector for gradients of a size."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(size, options["proj_dim"], 0, ProjectionType.rademacher, torch.device("cpu"))
    return TRAKer(save_dir=save_dir, projector=projector, lambda_reg=1e-3, **options)


def compare(width: int, train_size: int, num_targets: int, proj_dim: int, repeats: int) -> dict[str, Any]:
    """Runs trak_fast and traker on one problem, prints the time of each stage, and returns all times and the ratios."""
    train = data(train_size, 0)
    targets = data(num_targets, 1)
    torch.manual_seed(0)
    model = network(width).eval()
    size = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {
        "model": model,
        "task": "image_classification",
        "train_set_size": train_size,
        "device": "cpu",
        "proj_dim": proj_dim,
        "use_half_precision": False,
        "logging_level": logging.ERROR,
    }
    ours = functools.partial(trak_fast.TRAKer, **options)
    hooks = functools.partial(ours, gradient_computer=trak_fast.HookGradientComputer)
    theirs = functools.partial(open_traker, size=size, options=options)
    fast: dict[str, list[dict[str, float]]] = {"torch.func": [], "hooks": []}
    run(ours, train, targets, "warm-up")
    for turn in range(2 * repeats):
        if turn == repeats:
            slow = run(theirs, train, targets, f"traker, D = {size}")
        for name, opened in (("torch.func", ours), ("hooks", hooks)):
            fast[name].append(run(opened, train, targets, f"trak_fast, D = {size}"))
    print(f"D = {size}, k = {proj_dim}, {train_size} training samples, {num_targets} targets")
    for stage in slow:
        line = f"  {stage:18} traker {slow[stage]:8.2f} s"
        for name, runs in fast.items():
            own = statistics.median(seconds[stage] for seconds in runs)
            line += f"   {name} {own:8.3f} s {slow[stage] / own:7.1f} x"
        print(line)
    return {
        "D": size,
        "k": proj_dim,
        "n": train_size,
        "m": num_targets,
        "batch": BATCH,
        "seconds": {**fast, "traker": slow},
        "ratio": {
            name: slow["all"] / statistics.median(seconds["all"] for seconds in runs) for name, runs in fast.items()
        },
    }


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--proj-dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="runs of trak_fast before and after the one of traker")
    arguments = parser.parse_args()
    rows = [compare(*case, proj_dim=arguments.proj_dim, repeats=arguments.repeats) for case in CASES]
    save(arguments.output, {"rows": rows})


if __name__ == "__main__":
    main()
