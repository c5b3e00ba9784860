"""Features on disk: what survives the process that computed it."""

from .folder import Store
from .manifest import describe, digest
from .rows import Rows

__all__ = ["Rows", "Store", "describe", "digest"]
