"""The command `trak-fast plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .failure import Failure, checking_arguments
from .numbers import number
from .terminal import say

if TYPE_CHECKING:
    from ..plan.predict import Prediction


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "predict time, memory and disk of a TRAK run on this machine, and what the projection distorts"
    parser = commands.add_parser("plan", help=text, description=text)
    parser.set_defaults(run=run)
    flag = parser.add_argument
    flag("--params", type=number, required=True, metavar="D", help="parameters, 1.3e9 for example")
    flag("--proj-dim", type=number, required=True, metavar="K", help="size of the projected gradients")
    flag("--samples", type=number, required=True, metavar="N", help="training samples")
    flag("--targets", type=number, metavar="M", help="samples to attribute (1000)")
    flag("--checkpoints", type=number, metavar="C", help="checkpoints (1)")
    flag("--batch", type=number, metavar="B", help="gradients at a time (32)")
    flag("--dtype", metavar="T", help="the gradients' dtype: float32 (the default), bfloat16 or float16")
    flag("--proj-type", metavar="KIND", help="kind of matrix: rademacher (the default), normal or sjlt")
    flag("--nonzeros", type=number, metavar="C", help="entries in each column of sjlt: 1, 2, 4 (the default) or 8")
    flag("--device", metavar="DEVICE", help="cpu or cuda; default: a CUDA device if there is one")
    flag("--half", action="store_true", help="features stored in float16")
    flag(
        "--tokens",
        type=number,
        metavar="T",
        help="tokens of a sample, to estimate its gradient's time; 1 if it has none",
    )
    flag("--gradient-seconds", type=number, metavar="S", help="seconds of one sample's gradient, if known")
    flag("--processes", type=number, metavar="P", help="machines or GPUs like this one (1)")
    flag("--bench", type=Path, metavar="JSON", help="take rates from results of trak-fast bench")
    flag("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: An argument is refused, or the machine's rates can be neither read nor measured.
    """
    from ..bench import results
    from ..bench.settings import check_device
    from ..plan import predict, rates
    from ..plan.job import Job

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    with checking_arguments():
        names = [field.name for field in dataclasses.fields(Job)]
        job = Job(**{name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})
        check_device(job.device)
    try:
        if arguments.bench is None:
            known = rates.calibrate(job)
        else:
            known = rates.from_results(job, results.load(arguments.bench))
    except ValueError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"cannot time the disk of this folder: {error}") from error
    found = predict.predict(job, known)
    say(json.dumps(_content(found), indent=1) if arguments.json else predict.text(job, found))


def _content(found: Prediction) -> dict[str, Any]:
    """Arranges a prediction for JSON."""
    distortion = found.distortion
    return {
        "seconds": found.seconds.rows(),
        "memory_bytes": found.memory.rows(),
        "disk_bytes": found.disk.rows(),
        "distortion": {"norm": distortion.norm, "cosine": distortion.cosine, "all": distortion.every_distance},
        "rates": dataclasses.asdict(found.rates),
    }
