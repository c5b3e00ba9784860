"""The command `trak-fast info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import trak_fast


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
