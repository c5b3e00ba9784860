"""The command `trak-fast`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

import trak_fast

from ..gradients.errors import is_out_of_memory
from . import bench, demo, info, lds, lm, plan, terminal
from .failure import INTERRUPTED, OUTSIDE_WORLD, Failure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit status: 0 for success; 1 for a failure of the outside world, 2 for a refused argument and 130 for an
        interruption, each explained by a sentence on stderr; 141, without one, where the reader of the output has gone.

    Raises:
        SystemExit: argparse does not know the flags (status 2), or was asked for help or the version (status 0).
    """
    terminal.accept_any_letter()
    parser = argparse.ArgumentParser(prog="trak-fast", description="Fast random projections for data attribution.")
    parser.add_argument("--version", action="version", version=f"trak-fast {trak_fast.info()['version']}")
    commands = parser.add_subparsers(metavar="command", dest="command")
    for command in (lm, demo, bench, plan, lds, info):
        command.add(commands)
    try:
        try:
            arguments, unknown = parser.parse_known_args(argv)
            if arguments.command is None:
                parser.error(f"a command is required, one of {', '.join(commands.choices)}; -h describes them")
            if unknown:
                _refuse_unknown(commands.choices[arguments.command], unknown)
        except SystemExit:
            terminal.flush()
            raise
        arguments.run(arguments)
        terminal.flush()
    except Failure as failure:
        terminal.discard()
        return _failed(failure.message, failure.status)
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(f"this machine has too little memory: {str(error).splitlines()[0]}", OUTSIDE_WORLD)
    return 0


def _refuse_unknown(command: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Refuses flags that a command does not have, and names the one that was meant, if it is clear.

    Raises:
        SystemExit: Always, with status 2.
    """
    flags = [flag for action in command._actions for flag in action.option_strings]
    meant = [found for word in unknown for found in difflib.get_close_matches(word.partition("=")[0], flags, 1)]
    hint = f"; did you mean {meant[0]}?" if meant else ""
    command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _failed(message: str, status: int) -> int:
    """Prints a failure's sentence, if it has one, and returns its exit status."""
    if message:
        print(f"trak-fast: error: {message}", file=sys.stderr)
    return status
