"""The command `trak-fast demo`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..arguments import choice, integer
from .failure import Failure, checking_arguments
from .numbers import MOST_THREADS, number
from .terminal import say

KINDS = ("digits", "lm")
"""Names of the demonstrations."""
OUTPUTS = {"digits": "trak-fast-demo", "lm": "trak-fast-demo-lm"}
"""Folders that they write to by default."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "demo",
        help="train small models, say which training data explain their answers, check it, and write a page",
        description="digits: attribute small nets' answers on handwritten digits, check them against retraining, and "
        "write a page. lm: train a small language model from scratch, and find the documents that taught it its "
        "answers, which are told there in other words.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("kind", nargs="?", default="digits", metavar="KIND", help="digits or lm")
    flag = parser.add_argument
    outputs = " or ".join(OUTPUTS.values())
    flag("--output", default=argparse.SUPPRESS, metavar="DIR", help=f"folder to write to (default: {outputs})")
    flag("--seed", type=number, default=0, help="determines everything random")
    flag("--threads", type=number, default=torch.get_num_threads(), metavar="T", help="threads to use")
    digits = parser.add_argument_group("digits alone")
    flag = digits.add_argument
    flag("--proj-dim", type=number, default=2048, metavar="K", help="size of the projected gradients")
    flag("--checkpoints", type=number, default=5, metavar="C", help="nets to average scores over")
    flag("--subsets", type=number, default=100, metavar="S", help="random halves to retrain nets on")
    flag("--nets-per-subset", type=number, default=2, metavar="R", help="nets to retrain on each half")
    flag("--flipped", type=number, default=0.05, metavar="SHARE", help="share of the training labels to flip")
    flag("--epochs", type=number, default=20, metavar="E", help="passes over the training images")
    flag("--train-size", type=number, default=1347, metavar="N", help="training images")
    flag("--test-size", type=number, default=450, metavar="M", help="test images to attribute")
    defaults = {action.dest: action.default for action in digits._group_actions}
    parser.set_defaults(defaults_of_digits=defaults)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: An argument is refused, a package is missing or the output folder cannot be written to.
    """
    with checking_arguments():
        kind = choice("kind", arguments.kind, KINDS)
    output = getattr(arguments, "output", OUTPUTS[kind])
    if kind == "digits":
        _run_digits(arguments, output)
    else:
        _run_language(arguments, output)


def _run_digits(arguments: argparse.Namespace, output: str) -> None:
    """Runs the demonstration on digits.

    Raises:
        Failure: An argument is refused, a package is missing or the output folder cannot be written to.
    """
    with _needing("sklearn", "matplotlib", install="scikit-learn matplotlib"):
        from ..demo import digits, page
        from ..demo import run as demo
    with checking_arguments():
        names = [field.name for field in dataclasses.fields(digits.Settings)]
        settings = digits.Settings(**{name: getattr(arguments, name) for name in names})
        threads = integer("threads", arguments.threads, 1, MOST_THREADS)
    torch.set_num_threads(threads)
    with _writing():
        results = demo.run(output, settings)
    html = Path(output).expanduser().resolve() / "index.html"
    say(f"\n{page.summary(results)}\npage            {html}")


def _run_language(arguments: argparse.Namespace, output: str) -> None:
    """Runs the demonstration on a language model.

    Raises:
        Failure: An argument is refused, a package is missing or the output folder cannot be written to.
    """
    with checking_arguments():
        for name, default in arguments.defaults_of_digits.items():
            if getattr(arguments, name) != default:
                raise ValueError(f"--{name.replace('_', '-')} must be left out with lm: it is a setting of digits")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _needing("transformers", "tokenizers", "safetensors", install="transformers"):
        import transformers  # noqa: F401 - the demonstration imports it when its work has begun

        from ..demo import language
    with checking_arguments():
        settings = language.Settings(seed=arguments.seed)
        threads = integer("threads", arguments.threads, 1, MOST_THREADS)
    torch.set_num_threads(threads)
    with _writing(), checking_arguments():
        results = language.run(output, settings)
    folder = Path(output).expanduser().resolve()
    say(f"\n{language.summary(results)}\npage            {folder / 'run' / 'index.html'}")


@contextmanager
def _needing(*packages: str, install: str) -> Iterator[None]:
    """Names the packages that imports in the block lack.

    Raises:
        Failure: One of them is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in packages:
            raise
        raise Failure(f"the demo needs {error.name}, which is not installed: pip install {install}") from error


@contextmanager
def _writing() -> Iterator[None]:
    """Says that the output folder is the cause of what fails in the block.

    Raises:
        Failure: A file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot write to the output folder: {error}") from error
