"""The projection y = P g and its adjoint P'y, where P (k × D) is made inside the multiplication and never stored."""

from .functions import matrix, project, project_adjoint
from .kernels import info
from .projector import Accumulator, Projector

__all__ = ["Accumulator", "Projector", "info", "matrix", "project", "project_adjoint"]
