"""Features on disk, which survive the process that computed them."""

from .folder import Store
from .manifest import digest, manifest_of
from .rows import Rows

__all__ = ["Rows", "Store", "digest", "manifest_of"]
