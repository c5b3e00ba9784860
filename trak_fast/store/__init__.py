"""Features on disk: what survives the process that computed it."""

from .folder import Store
from .manifest import digest, manifest_of
from .rows import Rows

__all__ = ["Rows", "Store", "digest", "manifest_of"]
