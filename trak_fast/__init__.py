"""TRAK data attribution with fused random projection kernels."""

from . import metrics
from .gradients_hooks import HookGradientComputer
from .projection import Projector, info, matrix, project, project_adjoint
from .scores import save_table
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
