"""The command `trak-fast bench`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .failure import _failed


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
    from ..bench import figures, page, results, runner, tables
    from ..bench.settings import defaults

    if arguments.compare:
        try:
            before, after = map(results.load, arguments.compare)
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
    found = run.run()
    print(tables.terminal(found), end="\n\n")
    print(f"results  {run.path.resolve()}")
    try:
        html = page.page(found)
    except ModuleNotFoundError as error:
        print(f"no page: {error.name} is not installed (pip install matplotlib)")
    else:
        (run.path.parent / "index.html").write_text(html, encoding="utf-8")
        print(f"page     {(run.path.parent / 'index.html').resolve()}")
    return 0
