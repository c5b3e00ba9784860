"""Features on disk, which survive the process that computed them."""

from .folder import Store
from .locks import BusyError
from .manifest import digest, manifest_of
from .rows import Rows

__all__ = ["BusyError", "Rows", "Store", "digest", "manifest_of"]
