"""TRAK data attribution with fused random projection kernels."""

from . import metrics
from .projection import Projector, info, matrix, project, project_adjoint
from .traker import TRAKer

__all__ = ["Projector", "TRAKer", "info", "matrix", "metrics", "project", "project_adjoint"]
