"""Times scores of many training samples from disk, and shows what limits them: the disk or the matrix product.

    python benchmarks/scores.py [--samples 1000000] [--targets 1000] [--proj-dim 4096] [--output NAME.json]

Makes a store of random features in float16 (8 GB at the default size) in --folder, then computes the highest scores of
each target, and with --full also the file of all scores (4 GB). Each is computed in a process of its own with cold
caches, whose peak memory is recorded. For comparison, the features are read once without computing, and the product is
computed without reading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import make_parser, save
from torch import Tensor, nn
from tqdm import tqdm

import trak_fast
from trak_fast.store.rows import from_mantissas, to_mantissas

BLOCK = 4096
"""Training samples that are read, written or multiplied at a time."""


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the model's output for one sample: the function that is attributed."""
    return model(x[None])[0, 0]


def open_store(folder: Path, samples: int, proj_dim: int) -> trak_fast.TRAKer:
    """Opens a TRAKer of a small model in a folder."""
    torch.manual_seed(0)
    return trak_fast.TRAKer(
        nn.Linear(3, 1), output, samples, folder, proj_dim=proj_dim, use_half_precision=True, lambda_reg=1e-3
    )


def make(folder: Path, samples: int, targets: int, proj_dim: int) -> None:
    """Makes a finalized store, whose features are one random block again and again, with its rows shifted each time."""
    traker = open_store(folder, samples, proj_dim)
    state = traker.model.state_dict()
    traker.load_checkpoint(state, 0)
    rng = np.random.default_rng(0)
    block, exponents = to_mantissas(rng.standard_normal((BLOCK, proj_dim), dtype=np.float32), np.float16)
    rows = traker.store.train(0)
    with (rows.path / "features.npy").open("r+b", buffering=0) as file:
        file.seek(rows.files["features"].offset)
        for start in tqdm(range(0, samples, BLOCK), desc="writing features"):
            file.write(np.roll(block, start // BLOCK, axis=0)[: samples - start].tobytes())
        os.fsync(file.fileno())
    np.lib.format.open_memmap(rows.path / "features_exponent.npy", "r+")[:] = exponents[0]
    np.lib.format.open_memmap(rows.path / "weights.npy", "r+")[:] = 1
    np.lib.format.open_memmap(rows.path / "done.npy", "r+")[:] = True
    values = from_mantissas(block, exponents[:1])
    gram = (values.T @ values).astype(np.float64) * (samples / BLOCK)
    traker.store.save_gram(0, gram[None])
    traker.start_scoring_checkpoint("test", state, 0, num_targets=targets)
    traker.store.targets(0, "test").write(
        np.arange(targets), features=rng.standard_normal((targets, proj_dim), dtype=np.float32)
    )


def drop_from_cache(path: Path) -> None:
    """Takes a file out of the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(what: str, folder: Path, samples: int, targets: int, proj_dim: int, top: int) -> dict[str, float]:
    """Measures one thing: "read", "product", "top" or "full".

    Returns:
        The seconds that passed, the seconds of all processors together, and the peak of this process's memory in MiB.
    """
    features = folder / "checkpoint_0" / "train" / "features.npy"
    drop_from_cache(features)
    start = time.perf_counter()
    busy_start = time.process_time()
    if what == "read":
        buffer = memoryview(bytearray(BLOCK * proj_dim * 2))
        with features.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    elif what == "product":
        block = torch.randn(BLOCK // 2, proj_dim)
        solved = torch.randn(proj_dim, targets)
        for _ in range(0, samples, len(block)):
            block @ solved
    elif what == "top":
        open_store(folder, samples, proj_dim).top_scores("test", top)
    else:
        open_store(folder, samples, proj_dim).finalize_scores("test")
    seconds = time.perf_counter() - start
    busy = time.process_time() - busy_start
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return {"seconds": seconds, "processor_seconds": busy, "peak_mib": peak}


def main() -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--proj-dim", type=int, default=4096)
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--full", action="store_true", help="also write the file of all scores")
    parser.add_argument("--folder", type=Path, help="where to make the store, on the disk to measure")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.samples, arguments.targets, arguments.proj_dim)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, *size, arguments.top)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        make(Path(name), *size)
        command = [sys.executable, *sys.argv, "--folder", name]
        for what in ["read", "product", "top", *(["full"] if arguments.full else [])]:
            answer = subprocess.run([*command, "--measure", what], check=True, stdout=subprocess.PIPE, text=True).stdout
            results[what] = json.loads(answer)
    samples, targets, proj_dim = size
    labels = {
        "read": f"reading {2e-9 * samples * proj_dim:.1f} GB of features",
        "product": f"the product alone, {2e-12 * samples * targets * proj_dim:.2f} TFLOP in float32",
        "top": f"the {arguments.top} highest scores of each target",
        "full": f"all scores, a file of {4e-9 * samples * targets:.1f} GB",
    }
    print(f"{samples} training samples, {targets} targets, k = {proj_dim}")
    for what, result in results.items():
        cost = f"{result['seconds']:8.1f} s ({result['processor_seconds']:.1f} of processors)"
        print(f"  {labels[what]:50} {cost}   peak memory {result['peak_mib']:6.0f} MiB")
    save(arguments.output, {"n": samples, "m": targets, "k": proj_dim, "top": arguments.top, "results": results})


if __name__ == "__main__":
    main()
