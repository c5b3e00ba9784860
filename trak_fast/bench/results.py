"""The file that holds the results of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = 1


def load(path: Path) -> dict[str, Any]:
    """Results of a run.

    Raises:
        ValueError: The file holds none.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "timings" not in results:
        raise ValueError(f"{path} holds no results of trak-fast bench (format {FORMAT})")
    return results


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
