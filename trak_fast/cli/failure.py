"""Failures of a command, as messages and exit statuses."""

from __future__ import annotations

import sys


def _failed(message: str, status: int = 1) -> int:
    print(f"trak-fast: error: {message}", file=sys.stderr)
    return status
