"""The command `trak-fast`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import trak_fast


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit status: 0 for success, 1 for a failure that a message on stderr explains. Wrong arguments exit
        with 2 by SystemExit, as argparse does.
    """
    parser = argparse.ArgumentParser(prog="trak-fast", description="Fast random projections for data attribution.")
    parser.add_argument("--version", action="version", version=f"trak-fast {trak_fast.info()['version']}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in (_add_demo, _add_bench, _add_plan, _add_info):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        return _failed("interrupted", 130)


def _failed(message: str, status: int = 1) -> int:
    print(f"trak-fast: error: {message}", file=sys.stderr)
    return status


def _add_demo(commands: Any) -> None:
    text = "attribute small nets' answers on handwritten digits, check them against retraining, and write a page"
    demo = commands.add_parser(
        "demo", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    demo.set_defaults(run=_demo, usage_error=demo.error)
    demo.add_argument("--output", default="trak-fast-demo", metavar="DIR", help="folder to write to")
    demo.add_argument("--proj-dim", type=int, default=2048, metavar="K", help="size of the projected gradients")
    demo.add_argument("--checkpoints", type=int, default=5, metavar="C", help="nets to average scores over")
    demo.add_argument("--subsets", type=int, default=100, metavar="S", help="random halves to retrain nets on")
    demo.add_argument("--nets-per-subset", type=int, default=2, metavar="R", help="nets to retrain on each half")
    demo.add_argument("--flipped", type=float, default=0.05, metavar="SHARE", help="training labels to flip")
    demo.add_argument("--epochs", type=int, default=20, metavar="E", help="passes over the training images")
    demo.add_argument("--train-size", type=int, default=1347, metavar="N", help="training images")
    demo.add_argument("--test-size", type=int, default=450, metavar="M", help="test images to attribute")
    demo.add_argument("--seed", type=int, default=0, help="of everything random")
    demo.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="T", help="threads to use")


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from . import demo, report
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("sklearn", "matplotlib"):
            raise
        return _failed(f"the demo needs {error.name}, which is not installed: pip install scikit-learn matplotlib")
    try:
        settings = demo.Settings(**{name: getattr(arguments, name) for name in demo.Settings.__dataclass_fields__})
        if arguments.threads < 1:
            raise ValueError(f"threads must be at least 1, not {arguments.threads}")
    except ValueError as error:
        arguments.usage_error(str(error))
    torch.set_num_threads(arguments.threads)
    try:
        results = demo.run(arguments.output, settings)
    except OSError as error:
        return _failed(f"cannot write to the output folder: {error}")
    page = Path(arguments.output).resolve() / "index.html"
    print(f"\n{report.summary(results)}\npage            {page}")
    return 0


def _add_bench(commands: Any) -> None:
    text = "measure every random projection that this machine has, side by side"
    epilog = (
        "Each projection runs in a process of its own. An interrupted run, or one that its budget was too short for, "
        "goes on when the same command is given again. --compare shows what changed between two results."
    )
    bench = commands.add_parser("bench", help=text, description=text, epilog=epilog)
    bench.set_defaults(run=_bench, usage_error=bench.error)
    bench.add_argument("--output", default="trak-fast-bench", metavar="DIR", help="folder to write to")
    bench.add_argument("--budget", type=float, default=270.0, metavar="S", help="seconds to measure for (270)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: a CUDA device if there is one")
    bench.add_argument("--batches", type=int, nargs="+", metavar="B", help="gradients at a time")
    bench.add_argument("--grad-dims", type=int, nargs="+", metavar="D", help="sizes of a gradient")
    bench.add_argument("--proj-dims", type=int, nargs="+", metavar="K", help="projected sizes")
    bench.add_argument("--dtypes", nargs="+", metavar="T", help="of gradients: float32, bfloat16, float16")
    bench.add_argument("--proj-types", nargs="+", metavar="KIND", help="rademacher, normal")
    bench.add_argument("--check-dims", type=int, nargs="*", metavar="D", help="sizes to check the results at")
    bench.add_argument("--check-proj-dim", type=int, metavar="K", help="projected size of these")
    bench.add_argument("--only", nargs="+", metavar="NAME", help="projections with one of these in their name")
    bench.add_argument("--full", action="store_true", help="every combination, not one thing varied at a time")
    bench.add_argument("--threads", type=int, metavar="T", help="processor threads to use")
    bench.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="two results; nothing is measured")


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import figures, page, runner, tables
    from .bench.settings import defaults

    if arguments.compare:
        try:
            before, after = map(runner.load, arguments.compare)
        except ValueError as error:
            return _failed(str(error))
        print(tables.compared(figures.compare(before, after)))
        return 0
    try:
        settings = defaults(arguments.device)
        given = {name: getattr(arguments, name) for name in settings.__dataclass_fields__}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
        settings = dataclasses.replace(settings, **given)
        if not arguments.budget > 0:
            raise ValueError(f"budget must be above 0, not {arguments.budget}")
        run = runner.Run(settings, Path(arguments.output) / "results.json", arguments.budget)
    except ValueError as error:
        arguments.usage_error(str(error))
    except OSError as error:
        return _failed(f"cannot write to the output folder: {error}")
    if run.resumed:
        print("going on with the unfinished run that is there")
    results = run.run()
    print(tables.terminal(results), end="\n\n")
    print(f"results  {run.path.resolve()}")
    try:
        html = page.page(results)
    except ModuleNotFoundError as error:
        print(f"no page: {error.name} is not installed (pip install matplotlib)")
    else:
        (run.path.parent / "index.html").write_text(html, encoding="utf-8")
        print(f"page     {(run.path.parent / 'index.html').resolve()}")
    return 0


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
    from .bench import plan, rates, runner
    from .bench.settings import defaults

    given = {name: getattr(arguments, name) for name in plan.Job.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        if given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu") == "cuda":
            defaults("cuda")  # checks that there is one
        job = plan.Job(**given)
    except ValueError as error:
        arguments.usage_error(str(error))
    try:
        known = rates.from_results(job, runner.load(arguments.bench)) if arguments.bench else rates.calibrate(job)
    except ValueError as error:
        return _failed(str(error))
    found = plan.predict(job, known)
    print(json.dumps(found, indent=1) if arguments.json else plan.text(job, found))
    return 0


def _add_info(commands: Any) -> None:
    text = "say what was built into this installation and what the machine has"
    info = commands.add_parser("info", help=text, description=text)
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="as JSON")


def _info(arguments: argparse.Namespace) -> int:
    facts = trak_fast.info()
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name.replace('_', ' '):<24}{'none' if text in (None, '') else text}")
    return 0
