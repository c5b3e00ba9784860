"""The command `trak-fast plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .failure import _failed


def _count(text: str) -> int:
    """A whole number, also in the form 1.3e9."""
    value = float(text)
    if not value.is_integer():
        raise ValueError
    return int(text) if text.isdigit() else int(value)


_count.__name__ = "count"  # what argparse calls it in an error


def _add_plan(commands: Any) -> None:
    text = "predict time, memory and disk of a TRAK run on this machine, and what the projection distorts"
    plan = commands.add_parser("plan", help=text, description=text)
    plan.set_defaults(run=_plan, usage_error=plan.error)
    plan.add_argument("--params", type=_count, required=True, metavar="D", help="parameters, 1.3e9 for example")
    plan.add_argument("--proj-dim", type=_count, required=True, metavar="K", help="size of the projected gradients")
    plan.add_argument("--samples", type=_count, required=True, metavar="N", help="training samples")
    plan.add_argument("--targets", type=_count, metavar="M", help="samples to attribute (1000)")
    plan.add_argument("--checkpoints", type=_count, metavar="C", help="checkpoints (1)")
    plan.add_argument("--batch", type=_count, metavar="B", help="gradients at a time (32)")
    plan.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the gradients (float32)")
    plan.add_argument("--proj-type", choices=("rademacher", "normal"), help="kind of matrix (rademacher)")
    plan.add_argument("--device", choices=("cpu", "cuda"), help="default: a CUDA device if there is one")
    plan.add_argument("--half", action="store_true", help="features stored in float16")
    plan.add_argument(
        "--tokens",
        type=_count,
        metavar="T",
        help="tokens of a sample, to estimate its gradient's time; 1 if it has none",
    )
    plan.add_argument("--gradient-seconds", type=float, metavar="S", help="of one sample's gradient, if known")
    plan.add_argument("--processes", type=_count, metavar="P", help="machines or GPUs like this one (1)")
    plan.add_argument("--bench", type=Path, metavar="JSON", help="take rates from results of trak-fast bench")
    plan.add_argument("--json", action="store_true", help="as JSON")


def _plan(arguments: argparse.Namespace) -> int:
    from ..bench import results
    from ..bench.settings import defaults
    from ..plan import job, predict, rates

    given = {name: getattr(arguments, name) for name in job.Job.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        if given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu") == "cuda":
            defaults("cuda")  # checks that there is one
        run = job.Job(**given)
    except ValueError as error:
        arguments.usage_error(str(error))
    try:
        known = rates.from_results(run, results.load(arguments.bench)) if arguments.bench else rates.calibrate(run)
    except ValueError as error:
        return _failed(str(error))
    found = predict.predict(run, known)
    print(json.dumps(found, indent=1) if arguments.json else predict.text(run, found))
    return 0
