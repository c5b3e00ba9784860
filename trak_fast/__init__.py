"""TRAK data attribution with fused random projection kernels."""

import sys

from . import gradients, metrics, scoring, tasks
from .gradients import HookGradientComputer
from .projection import Projector, info, matrix, project, project_adjoint
from .scoring import save_table
from .tasks import FunctionTask, Task
from .traker import TRAKer

__all__ = [
    "FunctionTask",
    "HookGradientComputer",
    "Projector",
    "TRAKer",
    "Task",
    "info",
    "matrix",
    "metrics",
    "project",
    "project_adjoint",
    "save_table",
]

# Modules of public names that have become folders of another name: imports by the old path go on working.
for _name, _folder in {"gradients_hooks": gradients, "scores": scoring, "task": tasks}.items():
    sys.modules[f"{__name__}.{_name}"] = _folder
