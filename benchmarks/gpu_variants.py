"""Compares prebuilt modules on one GPU: each is checked, then all are timed in turns.

    python benchmarks/gpu_variants.py FOLDER [FOLDER ...]

The folders are made by prebuild.py, such as for kernels compiled with other flags. In a round every module runs once,
so that heat and clocks are the same for all. Speeds are medians over the rounds, printed as TFLOP/s and relative to the
installed module.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import os
import statistics
import sys
from pathlib import Path
from types import ModuleType

import torch
from gpu_measure import event_ms
from gpu_smoke import BOUND, relative_errors
from prebuild import find_module

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5


def load_module(folder: Path) -> ModuleType:
    """Loads a folder's module under a name of its own: pybind11 gives the first of two modules of one name twice.

    Raises:
        ValueError: The folder has no module for this Python.
    """
    path = find_module(folder)
    spec = importlib.util.spec_from_file_location(f"{path.resolve().parent}._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_module(project: object, matrices: dict[str, torch.Tensor]) -> list[str]:
    """Lists the cases in which the module in use is wrong: kind, batch size and dtype."""
    wrong = []
    for (kind, P), B, dtype in itertools.product(
        matrices.items(), (3, 16, 32, 64, 128, 256), (torch.bfloat16, torch.float32)
    ):
        grads = torch.randn(B, P.shape[1], device="cuda").to(dtype)
        y = project(grads, len(P), proj_type=kind, offset=72)  # type: ignore[operator]
        errors = relative_errors(y, grads, P.T)
        if not errors.max() < BOUND:
            wrong.append(f"{kind} B={B} {dtype}: off by {errors.max():.2g} of the norm")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 if a module is wrong."""
    parser = argparse.ArgumentParser(description="Compares prebuilt modules on this machine's GPU.")
    parser.add_argument("folders", type=Path, nargs="+", help="written by prebuild.py")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    trak_fast = importlib.import_module("trak_fast")
    kernels = importlib.import_module("trak_fast.projection.kernels")
    try:
        modules = {
            "installed": kernels._C,
            **{str(folder.resolve()): load_module(folder) for folder in options.folders},
        }
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    if len({id(module) for module in modules.values()}) != 1 + len(options.folders):
        parser.error("a folder is named twice")
    os.environ.pop("TRAK_FAST_CUDA_KERNEL", None)
    matrices = {
        kind: trak_fast.matrix(kind, 0, 0, range(300), torch.arange(20_000) + 72).cuda()
        for kind in ("rademacher", "normal")
    }
    failed = False
    for name, kernels._C in modules.items():
        for message in check_module(trak_fast.project, matrices):
            print(f"{name} is WRONG: {message}", flush=True)
            failed = True
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for kind, dtype, B in [
        *(("rademacher", torch.bfloat16, B) for B in (8, 16, 32, 64, 128, 256)),
        *(("normal", torch.bfloat16, B) for B in (8, 32, 64, 128, 256)),
        *(("rademacher", torch.float32, B) for B in (8, 32, 128)),
    ]:
        k = 4096
        D = 1 << 21 if kind == "normal" else 1 << 22
        grads = torch.randn(B, D, device="cuda").to(dtype)
        times: dict[str, list[float]] = {name: [] for name in modules}
        for turn, (name, module) in itertools.product(range(ROUNDS + 1), modules.items()):
            kernels._C = module
            ms = event_ms(functools.partial(trak_fast.project, grads, k, proj_type=kind), flush)
            if turn > 0:  # the first round warms up
                times[name].append(ms)
        medians = {name: statistics.median(found) for name, found in times.items()}
        speeds = (
            f"{name} {2 * B * k * D / ms / 1e9:.0f} ({medians['installed'] / ms:.2f})" for name, ms in medians.items()
        )
        print(f"{kind} {str(dtype)[6:]} B={B}: {', '.join(speeds)}", flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
