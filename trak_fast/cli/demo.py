"""The command `trak-fast demo`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ..arguments import integer
from .failure import Failure, checking_arguments
from .numbers import MOST_THREADS, number
from .terminal import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "attribute small nets' answers on handwritten digits, check them against retraining, and write a page"
    parser = commands.add_parser(
        "demo", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    flag = parser.add_argument
    flag("--output", default="trak-fast-demo", metavar="DIR", help="folder to write to")
    flag("--proj-dim", type=number, default=2048, metavar="K", help="size of the projected gradients")
    flag("--checkpoints", type=number, default=5, metavar="C", help="nets to average scores over")
    flag("--subsets", type=number, default=100, metavar="S", help="random halves to retrain nets on")
    flag("--nets-per-subset", type=number, default=2, metavar="R", help="nets to retrain on each half")
    flag("--flipped", type=number, default=0.05, metavar="SHARE", help="share of the training labels to flip")
    flag("--epochs", type=number, default=20, metavar="E", help="passes over the training images")
    flag("--train-size", type=number, default=1347, metavar="N", help="training images")
    flag("--test-size", type=number, default=450, metavar="M", help="test images to attribute")
    flag("--seed", type=number, default=0, help="determines everything random")
    flag("--threads", type=number, default=torch.get_num_threads(), metavar="T", help="threads to use")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: An argument is refused, a package is missing or the output folder cannot be written to.
    """
    try:
        from ..demo import digits, page
        from ..demo import run as demo
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("sklearn", "matplotlib"):
            raise
        raise Failure(
            f"the demo needs {error.name}, which is not installed: pip install scikit-learn matplotlib"
        ) from error
    with checking_arguments():
        names = [field.name for field in dataclasses.fields(digits.Settings)]
        settings = digits.Settings(**{name: getattr(arguments, name) for name in names})
        threads = integer("threads", arguments.threads, 1, MOST_THREADS)
    torch.set_num_threads(threads)
    try:
        results = demo.run(arguments.output, settings)
    except OSError as error:
        raise Failure(f"cannot write to the output folder: {error}") from error
    html = Path(arguments.output).expanduser().resolve() / "index.html"
    say(f"\n{page.summary(results)}\npage            {html}")
