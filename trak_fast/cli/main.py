"""The command `trak-fast`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import trak_fast

from .bench import _add_bench
from .demo import _add_demo
from .failure import _failed
from .info import _add_info
from .plan import _add_plan


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
