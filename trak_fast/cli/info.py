"""The command `trak-fast info`."""

from __future__ import annotations

import argparse
import json

import trak_fast

from .terminal import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "say what was built into this installation and what the machine has"
    parser = commands.add_parser("info", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    facts = trak_fast.info()
    if arguments.json:
        say(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        say(f"{name.replace('_', ' '):<24}{'none' if text in (None, '', 0) else text}")
