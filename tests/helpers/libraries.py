"""Other libraries that tests run for real: their tests are skipped where one is missing, unless CI demands them all."""

import importlib
import os
import warnings
from types import ModuleType

import pytest


def needs(name: str) -> ModuleType:
    """Imports a module or skips the whole test file; raises an error if TRAK_FAST_NEEDS_LIBRARIES is set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about each other
        if os.environ.get("TRAK_FAST_NEEDS_LIBRARIES"):
            return importlib.import_module(name)
        module: ModuleType = pytest.importorskip(name)
    return module
