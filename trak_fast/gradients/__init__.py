"""The gradient of each sample's model output with respect to chosen parameters, by torch.func or by hooks."""

from ..tasks.base import evaluation_mode
from .base import GradientComputer
from .functional import FunctionalGradientComputer
from .hooks import HookGradientComputer
from .parameters import select_parameters

__all__ = [
    "FunctionalGradientComputer",
    "GradientComputer",
    "HookGradientComputer",
    "evaluation_mode",
    "select_parameters",
]
