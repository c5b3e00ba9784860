"""The command `trak-fast`: flags, messages and exit statuses; the work is done in bench/, plan/ and demo/."""

from .main import main

__all__ = ["main"]
