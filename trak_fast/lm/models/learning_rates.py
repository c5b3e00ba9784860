"""Finds the learning rates with which checkpoints were trained, in what transformers' Trainer leaves beside them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...torch_files import read_torch_file


def learning_rates(paths: Sequence[Path], optimizers: Sequence[Path | None]) -> list[float | None]:
    """Finds the learning rate of each checkpoint; LESS weighs checkpoints by them.

    LESS takes the mean rate of a checkpoint's epoch (Xia et al., "LESS", ICML 2024, section 3.2). Here, the rate of
    one of several checkpoints of a run is the mean of those that `trainer_state.json` logs after the checkpoint before
    it (after step 0 for the first) and up to its own step. That of a checkpoint alone, or without a log since the
    one before, is the last that is logged up to its step. Checkpoints are of one run if their folders lie in the same
    folder.

    Without a log, the rate is that of `scheduler.pt`, then that of the first group in the optimizer's file.

    Args:
        paths: Folders of checkpoints.
        optimizers: The file of the optimizer of each, None where there is none.

    Returns:
        The rates; None where nothing has one.
    """
    states = [_read_state(path) for path in paths]
    steps = [_step(state) for state in states]
    runs = [path.resolve().parent for path in paths]
    result = []
    for place, (path, state, step, optimizer) in enumerate(zip(paths, states, steps, optimizers, strict=True)):
        rest = [s for i, s in enumerate(steps) if i != place and runs[i] == runs[place] and s is not None]
        start = None
        if rest and step is not None:
            start = max((s for s in rest if s < step), default=0)
        rate = _logged(state, start, step)
        result.append(rate if rate is not None else _left(path / "scheduler.pt", optimizer))
    return result


def _read_state(path: Path) -> Mapping[str, Any]:
    """Reads `trainer_state.json`; nothing if it is missing or no JSON."""
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _step(state: Mapping[str, Any]) -> int | None:
    step = state.get("global_step")
    return step if isinstance(step, int) else None


def _logged(state: Mapping[str, Any], start: int | None, step: int | None) -> float | None:
    """Returns the mean of the logged rates after `start`, or the last one if `start` is None or there are none."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    found = []
    for entry in entries:
        rate, at = _number(entry.get("learning_rate")), entry.get("step", 0)
        if rate is not None and isinstance(at, int) and (step is None or at <= step):
            found.append((at, rate))
    if not found:
        return None
    since = [rate for at, rate in found if start is not None and at > start]
    return statistics.fmean(since) if since else max(found, key=lambda pair: pair[0])[1]


def _left(scheduler: Path, optimizer: Path | None) -> float | None:
    """Reads the rate in the file of a scheduler or, if there is none, of an optimizer."""
    rates = _content(scheduler).get("_last_lr")
    if isinstance(rates, (list, tuple)) and rates and (rate := _number(rates[0])) is not None:
        return rate
    groups = _content(optimizer).get("param_groups") if optimizer is not None else None
    if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], dict):
        return _number(groups[0].get("lr"))
    return None


def _content(path: Path) -> Mapping[str, Any]:
    """Reads a file of torch.save, whose tensors stay on disk; nothing if it is missing or cannot be read.

    A rate is wanted by one method only, and a file without one may not keep others from running.
    """
    if not path.is_file():
        return {}
    try:
        content = read_torch_file(path)
    except Exception:  # pickle, zip and torch have errors of many classes
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: object) -> float | None:
    """Returns a finite number, or None if it is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
