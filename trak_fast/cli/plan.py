"""The command `trak-fast plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import lm
from .failure import WRONG_ARGUMENT, Failure, checking_arguments
from .numbers import number
from .terminal import say

if TYPE_CHECKING:
    from ..plan.predict import Prediction

EPILOG = """
With --model and --train, the run is one of trak-fast lm: some batches of these documents are computed by this model,
and nothing but --train and the model has to be known.
"""

SHARED = ("params", "proj_dim", "dtype", "device", "json")
"""Flags that both kinds of plans have."""

NEEDED = ("params", "proj_dim", "samples")
"""Flags that plans without a model need."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "predict time, memory and disk of a TRAK run on this machine, and what the projection distorts"
    parser = commands.add_parser("plan", help=text, description=text, epilog=EPILOG)
    flag = parser.add_argument
    flag(
        "--params",
        nargs="+",
        type=number,
        metavar="D",
        help="parameters, 1.3e9 for example; names of parameters with --model, as of trak-fast lm",
    )
    flag("--proj-dim", type=number, metavar="K", help="size of the projected gradients")
    flag("--samples", type=number, metavar="N", help="training samples")
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
    parser.set_defaults(run=run)
    own = _names(parser)
    model = parser.add_argument_group("runs of trak-fast lm")
    model.add_argument("--model", nargs="+", metavar="MODEL", help="folders of save_pretrained or of adapters")
    lm.add_training(model)
    model.add_argument("--query", nargs="+", metavar="FILE", help="questions: the same kinds of files")
    lm.add_way(parser, omitted=SHARED)
    lm.add_machine(parser.add_argument_group("machine, with --model"), omitted=SHARED)
    parser.set_defaults(of_numbers=own - {*SHARED}, of_models=_names(parser) - own)


def _names(parser: argparse.ArgumentParser) -> set[str]:
    """Returns the names of the flags that a parser has so far."""
    return {action.dest for action in parser._actions if action.dest != "help"}


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: An argument is refused, or the machine's rates can be neither read nor measured; and as
            `trak-fast lm` fails.
    """
    if arguments.model is not None:
        _require_none(arguments, arguments.of_numbers, "be left out with --model, which tells it with --train")
        _plan_model(arguments)
        return
    _require_none(arguments, arguments.of_models, "be left out without --model")
    if missing := [name for name in NEEDED if getattr(arguments, name) is None]:
        raise Failure(
            f"{', '.join(map(_flag, missing))} must be given, or --model and --train for a run of trak-fast lm",
            WRONG_ARGUMENT,
        )
    if len(arguments.params) > 1:
        raise Failure("--params must be one number without --model, not several", WRONG_ARGUMENT)
    arguments.params = arguments.params[0]
    _plan_numbers(arguments)


def _flag(name: str) -> str:
    """Returns the flag of an argument's name."""
    return "--" + name.replace("_", "-")


def _require_none(arguments: argparse.Namespace, names: Sequence[str] | set[str], rule: str) -> None:
    """Refuses flags of the other kind of plans.

    Raises:
        Failure: One is given.
    """
    given = sorted(
        name for name in names if not (getattr(arguments, name) is None or getattr(arguments, name) is False)
    )
    if given:
        raise Failure(f"{', '.join(map(_flag, given))} must {rule}", WRONG_ARGUMENT)


def _plan_model(arguments: argparse.Namespace) -> None:
    """Predicts a run of `trak-fast lm`, as its --dry-run does, which leaves nothing behind.

    Raises:
        Failure: As `trak-fast lm` fails.
    """
    if arguments.train is None:
        raise Failure("--train must be given with --model: a file of training documents, or several", WRONG_ARGUMENT)
    if arguments.params is not None and not all(isinstance(name, str) for name in arguments.params):
        raise Failure(
            "--params must be names with --model, which says how many there are: all, linear, trainable, or patterns",
            WRONG_ARGUMENT,
        )
    commands = argparse.ArgumentParser().add_subparsers()
    lm.add(commands)
    options = commands.choices["lm"].parse_args([])
    for name in (*arguments.of_models, *SHARED):
        if name != "model":
            setattr(options, name, getattr(arguments, name))
    options.models, options.dry_run, options.folder_is_told = arguments.model, True, False
    try:
        with tempfile.TemporaryDirectory(prefix="trak-fast-plan-", dir=".") as folder:
            options.out = str(Path(folder) / "run")
            lm.run(options)
    except OSError as error:
        raise Failure(f"cannot time the disk of this folder: {error}") from error


def _plan_numbers(arguments: argparse.Namespace) -> None:
    """Predicts a run of TRAKer from numbers alone.

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
