"""The command `trak-fast demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .failure import _failed


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
        from ..demo import digits, page, run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("sklearn", "matplotlib"):
            raise
        return _failed(f"the demo needs {error.name}, which is not installed: pip install scikit-learn matplotlib")
    try:
        settings = digits.Settings(**{name: getattr(arguments, name) for name in digits.Settings.__dataclass_fields__})
        if arguments.threads < 1:
            raise ValueError(f"threads must be at least 1, not {arguments.threads}")
    except ValueError as error:
        arguments.usage_error(str(error))
    torch.set_num_threads(arguments.threads)
    try:
        results = run.run(arguments.output, settings)
    except OSError as error:
        return _failed(f"cannot write to the output folder: {error}")
    html = Path(arguments.output).resolve() / "index.html"
    print(f"\n{page.summary(results)}\npage            {html}")
    return 0
