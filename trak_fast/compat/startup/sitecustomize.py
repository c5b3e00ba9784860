"""Puts trak_fast into fast_jl, traker, dattri, bergson and sjlt when a program imports them.

Python runs a file of this name when it starts, if its folder is in PYTHONPATH; `python -m trak_fast.compat` puts it
there. torch and trak_fast are imported only with one of those libraries. If there is another sitecustomize, it runs
too.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules of other libraries, and the layers that patch them.
LAYERS = {
    "trak.projectors": "trak_fast.compat.traker",
    "dattri.func.projection": "trak_fast.compat.dattri",
    "bergson.collector.collector": "trak_fast.compat.bergson",
    "sjlt": "trak_fast.compat.sjlt",
}


class FastJlLoader(importlib.abc.Loader):
    """A loader that fills a module with the contents of trak_fast.compat.fast_jl."""

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module("trak_fast.compat.fast_jl")
        vars(module).update({name: getattr(source, name) for name in ("__all__", "__doc__", *source.__all__)})


class PatchingLoader(importlib.abc.Loader):
    """A loader that loads a module as another loader does, then patches it."""

    def __init__(self, loader: importlib.abc.Loader, layer: str) -> None:
        self.loader = loader
        self.layer = layer

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.layer).patch()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)


class Finder(importlib.abc.MetaPathFinder):
    """A finder of the modules that are replaced or patched."""

    trak_fast = True  # marks the finder, so that it is installed once

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "fast_jl":
            return ModuleSpec(fullname, FastJlLoader())
        if fullname not in LAYERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = PatchingLoader(spec.loader, LAYERS[fullname])
        return spec


def install() -> None:
    """Adds the finder to Python's; a second call changes nothing."""
    if not any(hasattr(finder, "trak_fast") for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def run_the_next_sitecustomize() -> None:
    """Runs the sitecustomize that Python would have found without this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    install()
    run_the_next_sitecustomize()
