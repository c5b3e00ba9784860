"""The command `trak-fast bench`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..arguments import integer
from ..store.files import atomic_file
from .failure import Failure, checking_arguments
from .numbers import MOST_THREADS, number
from .terminal import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "measure every random projection that this machine has, side by side"
    epilog = (
        "Each projection runs in a process of its own. An interrupted run, or one that its budget was too short for, "
        "goes on when the same command is given again. --compare shows what changed between two results."
    )
    parser = commands.add_parser("bench", help=text, description=text, epilog=epilog)
    parser.set_defaults(run=run)
    flag = parser.add_argument
    flag("--output", default="trak-fast-bench", metavar="DIR", help="folder to write to")
    flag("--budget", type=number, default=270.0, metavar="S", help="seconds to measure for (270)")
    flag("--device", metavar="DEVICE", help="cpu or cuda; default: a CUDA device if there is one")
    flag("--batches", type=number, nargs="+", metavar="B", help="gradients at a time")
    flag("--grad-dims", type=number, nargs="+", metavar="D", help="sizes of a gradient")
    flag("--proj-dims", type=number, nargs="+", metavar="K", help="projected sizes")
    flag("--dtypes", nargs="+", metavar="T", help="the gradients' dtypes: float32, bfloat16, float16")
    flag("--proj-types", nargs="+", metavar="KIND", help="kinds of matrix: rademacher, normal, sjlt")
    flag("--check-dims", type=number, nargs="*", metavar="D", help="sizes to check the results at")
    flag("--check-proj-dim", type=number, metavar="K", help="projected size of these")
    flag("--only", nargs="+", metavar="NAME", help="projections with one of these in their name")
    flag("--full", action="store_true", help="every combination, not one thing varied at a time")
    flag("--threads", type=number, metavar="T", help="processor threads to use")
    flag("--compare", nargs=2, type=Path, metavar="JSON", help="two results; nothing is measured")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: An argument is refused, results cannot be read or written, or measuring them failed.
    """
    from ..bench import page, tables
    from ..bench.process import WorkerError
    from ..bench.runner import Run
    from ..bench.settings import Settings, defaults

    if arguments.compare:
        say(_comparison(*arguments.compare))
        return
    with checking_arguments():
        if arguments.threads is not None:
            integer("threads", arguments.threads, 1, MOST_THREADS)
        names = [field.name for field in dataclasses.fields(Settings)]
        given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        settings = dataclasses.replace(defaults(arguments.device), **given)
    try:
        with checking_arguments():
            benchmark = Run(settings, Path(arguments.output) / "results.json", arguments.budget)
        if benchmark.resumed:
            say("going on with the unfinished run that is there")
        results = benchmark.run()
        say(tables.terminal(results), end="\n\n")
        say(f"results  {benchmark.path.resolve()}")
        try:
            html = page.page(results)
        except ModuleNotFoundError as error:
            say(f"no page: {error.name} is not installed (pip install matplotlib)")
        else:
            path = benchmark.path.with_name("index.html")
            with atomic_file(path) as temporary:
                temporary.write_text(html, encoding="utf-8")
            say(f"page     {path.resolve()}")
    except OSError as error:
        raise Failure(f"cannot write to the output folder: {error}") from error
    except WorkerError as error:
        raise Failure(f"the measurements ended early: {error}") from error


def _comparison(before: Path, after: Path) -> str:
    """Compares two files of results.

    Raises:
        Failure: One of them holds none.
    """
    from ..bench import figures, results, tables

    try:
        return tables.compared(figures.compare(results.load(before), results.load(after)))
    except ValueError as error:
        raise Failure(str(error)) from error
