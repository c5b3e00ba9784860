"""TRAK data attribution with fused random projection kernels."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from . import gradients, scoring, tasks
from .features.streaming import GradientProjector
from .gradients import HookGradientComputer
from .projection import Projector, info, kernels, matrix, project, project_adjoint
from .scoring import save_table
from .tasks import FunctionTask, Task
from .traker import TRAKer

if TYPE_CHECKING:
    from . import metrics

__all__ = [
    "FunctionTask",
    "GradientProjector",
    "HookGradientComputer",
    "Projector",
    "TRAKer",
    "Task",
    "__version__",
    "info",
    "matrix",
    "metrics",
    "project",
    "project_adjoint",
    "save_table",
]

__version__ = kernels.version()

# Modules of public names that have become folders of another name: imports by the old path go on working.
for _name, _folder in {"gradients_hooks": gradients, "scores": scoring, "task": tasks}.items():
    sys.modules[f"{__name__}.{_name}"] = _folder
    setattr(sys.modules[__name__], _name, _folder)


def __getattr__(name: str) -> ModuleType:
    """Imports `metrics` when it is first used: SciPy's statistics would take a third of the time of this import."""
    if name != "metrics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.metrics")
