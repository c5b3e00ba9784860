"""TRAK data attribution with fused random projection kernels."""

from . import metrics
from .projection import Projector, info, matrix, project
from .traker import TRAKer

__all__ = ["Projector", "TRAKer", "info", "matrix", "metrics", "project"]
