"""`python -m trak_fast.compat`: runs a program with trak_fast in fast_jl, traker, dattri, bergson and sjlt."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

STARTUP = Path(__file__).with_name("startup")
"""The folder of sitecustomize.py, which Python runs when it starts with this folder in PYTHONPATH."""

DESCRIPTION = """\
Runs a Python program with trak_fast in the place of the projections of fast_jl, traker, dattri, bergson and sjlt.
Processes that the program starts get it too. If a launcher starts Python itself, put the folder into its environment
instead:

    PYTHONPATH="$(python -m trak_fast.compat --path)${PYTHONPATH:+:$PYTHONPATH}" accelerate launch train.py
"""


def main(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: Its arguments, without the name of the command.
    """
    parser = argparse.ArgumentParser(
        "python -m trak_fast.compat", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", action="store_true", help="print the folder for PYTHONPATH, and do nothing else")
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module, as in `python -m`")
    parser.add_argument("program", nargs="?", metavar="PROGRAM", help="a script, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the program's arguments")
    given = parser.parse_args(argv)
    if given.path:
        print(STARTUP)
        return
    if given.program is None:
        parser.error("name a program to run")
    if not given.module:
        given.program = os.path.expanduser(given.program)
    if not given.module and not Path(given.program).exists():
        parser.error(f"PROGRAM must be the path of a script, not {given.program!r}")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{STARTUP}{os.pathsep}{before}" if before else str(STARTUP)
    spec = importlib.util.spec_from_file_location("trak_fast_startup", STARTUP / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    startup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(startup)
    startup.install()
    sys.argv = [given.program, *given.arguments]
    if given.module:
        sys.path.insert(0, os.getcwd())
        if not _finds_module(given.program):
            parser.error(f"PROGRAM must be the name of a module, not {given.program!r}")
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(given.program).resolve().parent))
        runpy.run_path(given.program, run_name="__main__")


def _finds_module(name: str) -> bool:
    """Says if Python finds a module; the packages that it is in are imported for that, as they are to run it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return False
        raise  # a package that is there misses something else


if __name__ == "__main__":
    main(sys.argv[1:])
