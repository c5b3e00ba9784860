"""Prints a digest of every number that the package computes in a small run, to show that a change left all bits alone.

    python benchmarks/fingerprint.py > before.txt
    python benchmarks/fingerprint.py --against before.txt

Digests of projections hold on any machine with the same instruction set; those of features and scores depend on torch
and its threads too, so both runs belong on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import trak_fast

SAMPLES = 48
TARGETS = 8
CLASSES = 3
DRIVER_SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "plain": {"lambda_reg": 0, "curvature": False},
    "ridge": {"lambda_reg": 1e-3},
    "dual": {"proj_dim": 96},
    "dual normalized": {"proj_dim": 96, "normalize": True},
    "half": {"use_half_precision": True},
    "normal, cosine": {"proj_type": "normal", "normalize": True},
    "whole gradients": {"proj_dim": 0},
    "hooks": {"gradient_computer": trak_fast.HookGradientComputer},
    "part of the parameters": {"grad_wrt": ["2.*"], "chunk_size": 5},
}


def digest(value: Tensor | np.ndarray) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of an array's bytes, shape and dtype."""
    array = np.ascontiguousarray(value.numpy() if isinstance(value, Tensor) else value)
    sha = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def draw(seed: int, *shape: int) -> Tensor:
    """Draws normal numbers that depend on NumPy's generator alone."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def projections() -> Iterator[tuple[str, str]]:
    """Computes digests of projections, adjoints and entries of the matrix, for each instruction set and kind."""
    whole = draw(0, 9, 3000)
    for isa, kind in itertools.product(trak_fast.info()["instruction_sets"], trak_fast.info()["proj_types"]):
        k, k_parts, rows = (256, 64, 128) if kind == "sjlt" else (300, 65, 70)
        os.environ["TRAK_FAST_ISA"] = isa
        options: dict[str, Any] = {"proj_type": kind, "seed": 2**63 + 5, "model_id": 7}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            name = f"{isa} {kind} {str(dtype).removeprefix('torch.')}"
            yield f"project {name}", digest(trak_fast.project(whole.to(dtype), k, **options))
        parts = {"a": whole[:, :1001].reshape(9, 7, 143).mT, "b": whole[:, 1001:1002], "c": whole[:, 1002::2]}
        yield f"project {isa} {kind} parts", digest(trak_fast.project(parts, k_parts, offset=2**40 + 3, **options))
        for precision in ("medium", "high", "highest"):
            result = trak_fast.project(whole, 64, precision=precision, **options)
            yield f"project {isa} {kind} {precision}", digest(result)
        yield f"adjoint {isa} {kind}", digest(trak_fast.project_adjoint(draw(1, 5, rows), 2000, offset=77, **options))
        projector = trak_fast.Projector(3000, 64, seed=3, proj_type=kind)
        accumulator = projector.accumulator(9, model_id=2)
        accumulator.add([whole[:, :100], whole[:, 100:700]], 0)
        accumulator.add(whole[:, 700:], 700)
        yield f"accumulator {isa} {kind}", digest(accumulator.result())
    os.environ.pop("TRAK_FAST_ISA", None)
    for kind in trak_fast.info()["proj_types"]:
        entries = trak_fast.matrix(kind, 5, 6, range(100), [*range(1000), 2**48 - 1], proj_dim=256)
        yield f"matrix {kind}", digest(entries)


def attributions(folder: Path) -> Iterator[tuple[str, str]]:
    """Computes digests of all that a run of two checkpoints stores and returns, for several settings of the driver."""
    images, labels = draw(2, SAMPLES + TARGETS, 6), torch.arange(SAMPLES + TARGETS) % CLASSES
    for name, settings in DRIVER_SETTINGS.items():
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        save_dir = folder / name
        arguments = {"proj_dim": 32, "logging_level": 40, **settings}
        traker = trak_fast.TRAKer(model, "image_classification", SAMPLES, save_dir=save_dir, **arguments)
        checkpoints = []
        for model_id in range(2):
            drawn = enumerate(model.state_dict().items())
            checkpoints.append({key: draw(100 * model_id + i, *value.shape) for i, (key, value) in drawn})
            traker.load_checkpoint(checkpoints[-1], model_id)
            for start in range(0, SAMPLES, 20):
                stop = min(start + 20, SAMPLES)
                traker.featurize((images[start:stop], labels[start:stop]), num_samples=stop - start)
        traker.finalize_features()
        for model_id, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint("test", checkpoint, model_id, TARGETS)
            traker.score((images[SAMPLES:], labels[SAMPLES:]), num_samples=TARGETS)
        yield f"scores, {name}", digest(traker.finalize_scores("test"))
        for largest in (True, False):
            top = traker.top_scores("test", 5, largest=largest)
            yield f"top scores, {name}, {'highest' if largest else 'lowest'}", digest(top.indices) + digest(top.scores)
        yield f"self-influence, {name}", digest(traker.self_influence())
        for path in sorted(save_dir.rglob("*.npy")):
            yield f"{path.relative_to(folder)}", digest(np.load(path, allow_pickle=False))
        yield f"manifest, {name}", hashlib.sha256((save_dir / "manifest.json").read_bytes()).hexdigest()[:16]


def main() -> int:
    """Prints the digests, or what differs from those in a file; the exit status is 1 if something does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier output to compare with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{value}  {name}" for name, value in itertools.chain(projections(), attributions(Path(folder)))]
    if arguments.against is None:
        print("\n".join(lines))
        return 0
    before = arguments.against.read_text().splitlines()
    changed = sorted(set(lines) ^ set(before), key=lambda line: line.split("  ", 1)[1])
    print("\n".join([*changed, f"{len(set(lines) & set(before))} of {len(lines)} digests are the same"]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
