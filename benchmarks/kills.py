"""Kills TRAK runs at random moments until they are through, and compares their scores with an uninterrupted run's.

    python benchmarks/kills.py [--kills 100] [--output benchmarks/results/NAME.json]

A run featurizes and scores with two checkpoints, and saves its sum of X'X with each batch; every second run keeps its
features in float16. Each process of a run gets SIGKILL after a random part of the time that a whole run takes, and the
next process resumes. The exit status is 1 if a run's scores differ.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import make_parser, save
from torch import nn
from tqdm import tqdm

import trak_fast
from trak_fast.scoring import partial_grams

TRAIN = 600
TARGETS = 60
BATCH = 50
PROJ_DIM = 256


def data(size: int, seed: int) -> list[torch.Tensor]:
    """Draws random samples (size, 30) and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 30, generator=generator), torch.randint(5, (size,), generator=generator)]


def run(save_dir: Path, half: bool) -> None:
    """Runs TRAK from its beginning; work that is in the folder already is not repeated."""
    torch.set_num_threads(1)
    partial_grams.SAVE_SECONDS = 0
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))
    checkpoints = []
    for seed in range(2):
        torch.manual_seed(seed)
        checkpoints.append({name: 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()})
    traker = trak_fast.TRAKer(
        model, "image_classification", TRAIN, save_dir, proj_dim=PROJ_DIM, use_half_precision=half
    )
    samples = data(TRAIN, 10)
    targets = data(TARGETS, 11)
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id)
        for start in range(0, TRAIN, BATCH):
            traker.featurize([x[start : start + BATCH] for x in samples], num_samples=BATCH)
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("test", checkpoint, model_id, num_targets=TARGETS)
        for start in range(0, TARGETS, BATCH):
            batch = [x[start : start + BATCH] for x in targets]
            traker.score(batch, num_samples=len(batch[0]))
    traker.finalize_scores("test")
    traker.top_scores("test", 10)


def attempt(save_dir: Path, half: bool, seconds: float | None) -> bool:
    """Starts one process of a run and kills it after some seconds, or never; returns True if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            run(save_dir, half)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a process failed by itself (status {status})")
    return status == 0


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    arguments = parser.parse_args()
    # torch loads some modules on first use: they are loaded before the forks, so that kills fall into the run itself
    torch.set_num_threads(1)
    torch.func.vmap(torch.func.grad(torch.sum))(torch.ones(1, 1))
    moments = random.Random(arguments.seed)
    kills = 0
    runs = 0
    equal = 0
    same_bits = 0
    worst = 0.0
    stages = dict.fromkeys(("featurizing", "scoring"), 0)
    with tempfile.TemporaryDirectory() as name, tqdm(total=arguments.kills, desc="kills") as bar:
        folder = Path(name)
        expected = []
        for half in (False, True):
            start = time.perf_counter()
            attempt(folder / f"whole-{half}", half, None)
            whole = time.perf_counter() - start
            expected.append(np.load(folder / f"whole-{half}" / "scores" / "test.npy", allow_pickle=False))
        while kills < arguments.kills:
            half = runs % 2 == 1
            save_dir = folder / f"run-{runs}"
            finished = False
            while not finished:
                left = kills < arguments.kills
                finished = attempt(save_dir, half, moments.uniform(0, whole) if left else None)
                if left and not finished:
                    kills += 1
                    bar.update()
                    stages["scoring" if (save_dir / "checkpoint_1" / "gram.npy").exists() else "featurizing"] += 1
            runs += 1
            scores = np.load(save_dir / "scores" / "test.npy", allow_pickle=False)
            difference = float(np.abs(scores - expected[half]).max() / np.abs(expected[half]).max())
            worst = max(worst, difference)
            equal += difference < 1e-5  # float32 rounding: a resumed batch may be cut elsewhere
            same_bits += bool((scores == expected[half]).all())
    result = {
        "kills": kills,
        "killed_while": stages,
        "runs": runs,
        "runs_with_equal_scores": equal,
        "runs_with_the_same_bits": same_bits,
        "largest_relative_difference": worst,
    }
    save(arguments.output, result)
    print(
        f"{kills} kills ({stages['featurizing']} while featurizing, {stages['scoring']} while scoring) in {runs} runs: "
        f"{equal} of {runs} end with equal scores, {same_bits} of them bit for bit; largest difference {worst:.1e}"
    )
    raise SystemExit(int(equal != runs))


if __name__ == "__main__":
    main()
