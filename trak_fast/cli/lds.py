"""The command `trak-fast lds`."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import read_array
from .failure import checking_arguments
from .terminal import say

if TYPE_CHECKING:
    from ..metrics import LDSInterval

BLOCK_BYTES = 64 << 20
"""Bytes of the scores, as float64, that are read at a time."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its flags."""
    text = "measure how well scores predict retrained models: the linear datamodeling score, with its interval"
    epilog = (
        "Files are of np.save (.npy) or torch.save (.pt, .pth). A high score means that the training sample helps the "
        "query, so the sum of the scores of a subset predicts low losses, or high outputs, of the model trained on it. "
        "Queries whose predictions or losses are all equal are left out."
    )
    parser = commands.add_parser("lds", help=text, description=text, epilog=epilog)
    parser.set_defaults(run=run)
    flag = parser.add_argument
    flag("--scores", type=Path, required=True, metavar="FILE", help="(n, m): of n training samples for m queries")
    flag(
        "--masks",
        type=Path,
        required=True,
        metavar="FILE",
        help="the training samples of each of S subsets: (S, n) bool or 0 and 1; or their numbers from 0, (S, size)",
    )
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument(
        "--losses",
        type=Path,
        metavar="FILE",
        help="(S, m): each query's loss by the model trained on each subset, low where it is good",
    )
    truth.add_argument(
        "--outputs", type=Path, metavar="FILE", help="instead of losses, outputs that are high where the model is good"
    )
    flag("--json", action="store_true", help="print JSON, with the correlation of each query")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        Failure: A file cannot be read, or holds no such array as its flag asks for.
    """
    from .. import metrics

    name = "outputs" if arguments.losses is None else "losses"
    scores = read_array("--scores", arguments.scores)
    masks = read_array("--masks", arguments.masks)
    truth = read_array(f"--{name}", getattr(arguments, name))
    with checking_arguments():
        _require_numbers("--scores", scores)
        _require_numbers(f"--{name}", truth)
        truth = np.array(truth, np.float64)
        _require_finite(f"--{name}", truth, 0)
        masks = _boolean(masks, len(scores), len(truth))
        _require_fitting(name, scores, masks, truth)
        predicted, rounding = _predictions(scores, masks)
        # sums of equal numbers may differ by their rounding, which must not count as an order
        varies = (np.ptp(predicted, axis=0) > rounding) & (np.ptp(truth, axis=0) > 0)
        if not varies.any():
            raise ValueError(
                f"--scores, --masks and --{name} must have a query with predictions and {name} that differ between "
                f"subsets, not {len(varies)} without; are all subsets, or all scores of a query, the same?"
            )
        outputs = truth[:, varies] if name == "outputs" else -truth[:, varies]
        # predictions are sums over subsets already: each subset has its own row alone
        own = np.eye(len(outputs), dtype=bool)
        found = metrics.lds(predicted[:, varies], own, outputs)
        interval = metrics.lds_interval(predicted[:, varies], own, outputs)
    if arguments.json:
        per_query: list[float | None] = [None] * len(varies)
        for query, value in zip(np.flatnonzero(varies).tolist(), found.per_target.tolist(), strict=True):
            per_query[query] = value
        content = {
            "lds": found.mean,
            "interval_95": [interval.low, interval.high],
            "chance_95": [interval.chance_low, interval.chance_high],
            "models": len(outputs),
            "queries": int(varies.sum()),
            "left_out": int((~varies).sum()),
            "per_query": per_query,
        }
        say(json.dumps(content, indent=1))
        return
    say(_sentence(found.mean, interval, varies, len(outputs), name))


def _sentence(mean: float, interval: LDSInterval, varies: NDArray[np.bool_], models: int, name: str) -> str:
    """Tells the result in one line."""
    numbers = f"LDS {mean:.3f}, 95% interval {interval.low:.3f} to {interval.high:.3f}".replace("-", "−")
    left_out = int((~varies).sum())
    more = f"; {left_out} left out, whose predictions or {name} are all equal" if left_out else ""
    count = int(varies.sum())
    queries = "1 query" if count == 1 else f"{count} queries"
    return f"{numbers} (mean over {queries} of the rank correlation with {models} retrained models{more})"


def _require_numbers(flag: str, array: NDArray[Any]) -> None:
    """Checks the dimensions and the dtype of an array.

    Raises:
        ValueError: It has not two dimensions.
        TypeError: It holds no real numbers.
    """
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{flag} must hold real numbers, not {array.dtype}")
    if array.ndim != 2:
        advice = "; reshape(-1, 1) makes the two dimensions of one query" if array.ndim == 1 else ""
        raise ValueError(f"{flag} must have 2 dimensions, not shape {array.shape}{advice}")


def _require_finite(flag: str, values: NDArray[np.float64], first: int) -> None:
    """Checks the numbers of an array, or of a part of it that begins with row `first`.

    Raises:
        ValueError: One is not finite; the message has its place.
    """
    if not (finite := np.isfinite(values)).all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"{flag} must be finite, not {values[row, column]} in row {first + row}, column {column} (from 0); "
            "leave this row or column out of all files"
        )


def _boolean(masks: NDArray[Any], num_samples: int, num_subsets: int) -> NDArray[np.bool_]:
    """Returns masks (S, n) of 0 and 1, or lists of numbers (S, size), as boolean masks.

    Numbers other than 0 and 1 make an array of integers one of lists.

    Raises:
        ValueError: There are not two dimensions, or numbers are neither 0 and 1 nor those of training samples, each
            once in a row, in `num_subsets` rows.
        TypeError: The array holds no numbers.
    """
    if masks.ndim != 2:
        raise ValueError(f"--masks must have 2 dimensions, not shape {masks.shape}; a row for each subset")
    if masks.dtype.kind not in "bfiu":
        raise TypeError(f"--masks must hold bool, 0 and 1, or integers, not {masks.dtype}")
    chosen = masks != 0
    strange = masks[chosen & (masks != 1)]
    if masks.dtype.kind == "b" or not len(strange):
        return np.asarray(chosen)
    if masks.dtype.kind == "f" or masks.shape[1] == num_samples:
        raise ValueError(
            f"--masks must hold 0 and 1 where it is {masks.dtype} {masks.shape}, not {strange[0]}; "
            "1 marks the training samples that the model was trained on"
        )
    if len(masks) != num_subsets:
        turned = "; transpose it" if masks.shape[1] == num_subsets else ""
        raise ValueError(
            f"--masks must have a row of numbers for each of {num_subsets} subsets, not shape {masks.shape}{turned}"
        )
    low, high = int(masks.min()), int(masks.max())
    if low < 0 or high >= num_samples:
        raise ValueError(
            f"--masks must hold numbers of training samples in [0, {num_samples - 1}], as --scores has {num_samples} "
            f"rows, not {low if low < 0 else high}"
        )
    result = np.zeros((len(masks), num_samples), bool)
    np.put_along_axis(result, np.asarray(masks, np.int64), True, axis=1)
    if (short := np.flatnonzero(result.sum(axis=1) < masks.shape[1])).size:
        raise ValueError(f"--masks must hold each training sample's number once in a row, not again in row {short[0]}")
    return result


def _require_fitting(name: str, scores: NDArray[Any], masks: NDArray[np.bool_], truth: NDArray[Any]) -> None:
    """Checks that shapes fit, and finds arrays that do once they are transposed.

    Raises:
        ValueError: They do not.
    """
    shapes = {"--scores": scores.shape, "--masks": masks.shape, f"--{name}": truth.shape}
    sides = {"rows of --scores and columns of --masks, the training samples": (scores.shape[0], masks.shape[1]),
             f"columns of --scores and of --{name}, the queries": (scores.shape[1], truth.shape[1]),
             f"rows of --masks and of --{name}, the subsets": (masks.shape[0], truth.shape[0])}  # fmt: skip
    different = [f"{what}: {one} and {other}" for what, (one, other) in sides.items() if one != other]
    if different:
        flags = [f"--{name}", "--masks", "--scores"]
        attempts = itertools.chain.from_iterable(itertools.combinations(flags, count) for count in (1, 2, 3))
        turned = next((attempt for attempt in attempts if _fits(shapes, attempt)), ())
        advice = f"transpose {' and '.join(turned)}" if turned else f"they differ in the {different[0]}"
        raise ValueError(
            f"--scores, --masks and --{name} must have the shapes (n, m), (S, n) and (S, m), "
            f"not {scores.shape}, {masks.shape} and {truth.shape}; {advice}"
        )
    if not scores.size:
        raise ValueError(f"--scores must have at least 1 training sample and 1 query, not shape {scores.shape}")
    if len(masks) < 2:
        raise ValueError(f"--masks must have at least 2 subsets, not {len(masks)}")


def _fits(shapes: dict[str, tuple[int, ...]], turned: tuple[str, ...]) -> bool:
    """Tells if the shapes of scores, masks and truth fit once those `turned` are transposed."""
    scores, masks, truth = (shape[::-1] if flag in turned else shape for flag, shape in shapes.items())
    return (scores[0], scores[1], masks[0]) == (masks[1], truth[1], truth[0])


def _predictions(scores: NDArray[Any], masks: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums the scores of each subset, a block of training samples at a time.

    Returns:
        The sums (S, m), and for each query how far rounding alone may take two of them apart, (m,): a sum of n numbers
        in float64, in whatever order, is off by at most n/2 · 2^-52 times the sum of their magnitudes.

    Raises:
        ValueError: A score is not finite.
    """
    n, m = scores.shape
    total = np.zeros((len(masks), m))
    magnitudes = np.zeros(m)
    size = max(1, BLOCK_BYTES // (8 * (m + len(masks))))
    for start in range(0, n, size):
        block = np.array(scores[start : start + size], np.float64)
        _require_finite("--scores", block, start)
        total += masks[:, start : start + size].astype(np.float64) @ block
        magnitudes += np.abs(block).sum(axis=0)
    return total, n * np.finfo(np.float64).eps * magnitudes
