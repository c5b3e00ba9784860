"""The command line, the machine's record and the file of results that the benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import trak_fast


def make_parser(documentation: str) -> argparse.ArgumentParser:
    """Returns a parser with the option --output, described by the first line of a script's documentation."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def machine() -> dict[str, Any]:
    """Returns the date, the command that runs, the processor, and the record of this installation."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "processor": platform.processor() or platform.machine(),
        "info": trak_fast.info(),
    }


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes the machine's record and the results as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
