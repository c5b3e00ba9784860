"""Layers that put trak_fast in the place of other libraries' projections, one file for each library.

A layer imports or changes a library only when it is told to. `python -m trak_fast.compat script.py` runs a script with
all layers in place.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["install_fast_jl"]


def install_fast_jl() -> ModuleType:
    """Makes `import fast_jl` find `trak_fast.compat.fast_jl` in this process, also where fast_jl is installed.

    Returns:
        The module `trak_fast.compat.fast_jl`.
    """
    module = importlib.import_module("trak_fast.compat.fast_jl")
    sys.modules["fast_jl"] = module
    return module
