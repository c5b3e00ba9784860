"""Checks of arguments, with one grammar for refusals: "`name` must be <what is allowed>, not <what was given>"."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt
from torch import Tensor

Indices = Sequence[int] | npt.NDArray[np.integer] | Tensor


def integer(name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """Checks an integer of any type that has `__index__`, and returns it as a Python integer.

    Args:
        name: The argument's name, for messages.
        value: The value that was given.
        low: The smallest allowed value.
        high: The largest allowed value; None: any.

    Raises:
        TypeError: `value` is no integer; booleans are none.
        ValueError: `value` is out of range.
    """
    if type(value) is int:
        number = value
    else:
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, not {_given(value)}")
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, not {_given(value)}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {_interval(low, high)}, not {number}")
    return number


def one_of(name: str, value: SupportsIndex, allowed: Sequence[int]) -> int:
    """Checks an integer that must be one of a few, and returns it as a Python integer.

    Raises:
        TypeError: `value` is no integer.
        ValueError: `value` is none of `allowed`.
    """
    number = integer(name, value, -(2**63))
    if number not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {number}")
    return number


def real(name: str, value: SupportsFloat, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """Checks a finite number, and returns it as a float.

    Args:
        name: The argument's name, for messages.
        value: The value that was given.
        low: The smallest allowed value.
        high: The largest allowed value.
        above: Excludes `low` itself.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is out of range, infinite or not a number.
    """
    if isinstance(value, (bool, np.bool_, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {_given(value)}")
    number = float(value)
    if not low <= number <= high or math.isinf(number) or (above and number == low):
        if math.isinf(high):
            allowed = f"{'above' if above else 'at least'} {low:g}"
        else:
            allowed = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {allowed}, not {number:g}")
    return number


def choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """Checks that a string is one of those allowed, and returns it.

    Raises:
        TypeError: `value` is no string.
        ValueError: `value` is none of `allowed`.
    """
    if isinstance(value, str):
        if value in allowed:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    raise TypeError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {_given(value)}")


def indexes(name: str, values: Indices, end: int) -> npt.NDArray[np.uint64]:
    """Checks a sequence of integers in [0, end), and returns it as an array.

    Raises:
        TypeError: `values` is not one-dimensional, or holds something other than integers.
        ValueError: A value is out of range.
    """
    array: npt.NDArray[Any] = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, dtype=np.uint64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be a one-dimensional sequence of integers, not {array.dtype} of shape {array.shape}"
        )
    for value in (int(array.min()), int(array.max())):
        integer(name, value, 0, end - 1)
    return np.ascontiguousarray(array, dtype=np.uint64)


def row_numbers(
    batch: Sequence[Tensor], inds: Indices | None, num_samples: int | None, following: int, num_rows: int
) -> tuple[npt.NDArray[np.intp], int]:
    """Numbers the rows that a batch goes to.

    Args:
        batch: Tensors (B, ...).
        inds: (B,) the rows, or None.
        num_samples: B, or None; one of these two is given.
        following: The first row, where `num_samples` is given.
        num_rows: The number of rows that exist.

    Returns:
        (B,) the rows, and the row after the last one where `num_samples` is given, else `following`.

    Raises:
        TypeError: `batch` holds something other than tensors, or `inds` something other than integers.
        ValueError: Numbers are missing, out of range, given twice, or not as many as the batch's samples, or `batch`
            has samples but no tensors.
    """
    _check_batch(batch)
    if (inds is None) == (num_samples is None):
        raise ValueError("give either inds or num_samples")
    if num_samples is not None:
        rows = np.arange(following, following + integer("num_samples", num_samples, 0, 2**48))
        following += len(rows)
    else:
        rows = np.asarray(inds.cpu() if isinstance(inds, Tensor) else inds).reshape(-1)
        if rows.size and not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(f"inds must be integers, not {rows.dtype}")
    if any(len(x) != len(rows) for x in batch):
        raise ValueError(
            f"batch has {[len(x) for x in batch]} samples in its tensors, "
            f"{'inds' if num_samples is None else 'num_samples'} says {len(rows)}"
        )
    if rows.size and not len(batch):
        raise ValueError(f"batch must hold the tensors of {rows.size} samples, not be empty")
    if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:
        again = "; num_samples goes on from the last call: to run a loop again, load the checkpoint again first"
        raise ValueError(
            f"samples {rows.min()} to {rows.max()} are not all in [0, {num_rows}){'' if num_samples is None else again}"
        )
    if len(np.unique(rows)) != len(rows):
        raise ValueError("inds has the same number twice")
    return rows.astype(np.intp), following


def checked_batch(batch: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns a batch of tensors, once they are found to have as many samples each.

    Raises:
        TypeError: It is something else; the message says how to make it one.
        ValueError: There is no tensor, or one has no dimensions or another number of samples.
    """
    _check_batch(batch)
    if not len(batch):
        raise ValueError("batch must hold the tensors of samples, not be empty")
    if len({len(x) for x in batch}) > 1:
        raise ValueError(f"batch must have one number of samples in all its tensors, not {[len(x) for x in batch]}")
    return batch


def _check_batch(batch: Sequence[Tensor]) -> None:
    """Checks that a batch is a sequence of tensors with dimensions.

    Raises:
        TypeError: It is something else; the message says how to make it one.
        ValueError: A tensor has no dimensions.
    """
    wanted = "a sequence of tensors (B, ...) in the order that the task takes them"
    if isinstance(batch, Tensor):
        raise TypeError(f"batch must be {wanted}, not a Tensor; [batch] is one, if the task takes no other")
    if keys := getattr(batch, "keys", None):  # such as the BatchEncoding of a tokenizer, which is no Mapping
        names = list(map(str, keys()))
        raise TypeError(
            f"batch must be {wanted}, not {type(batch).__name__}; give [batch[name] for name in (...)] with the task's "
            f"of its keys {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        )
    if not hasattr(batch, "__getitem__") or not hasattr(batch, "__len__"):
        fix = "; list(batch) may be one" if hasattr(batch, "__iter__") else ""
        raise TypeError(f"batch must be {wanted}, not {type(batch).__name__}{fix}")
    for place, item in enumerate(batch):
        if not isinstance(item, Tensor):
            function = "from_numpy" if isinstance(item, np.ndarray) else "as_tensor"
            fix = "" if item is None else f"; torch.{function}(batch[{place}]) is one, if it holds numbers"
            raise TypeError(f"batch[{place}] must be a tensor (B, ...), not {_named(item)}{fix}")
        if item.ndim == 0:
            raise ValueError(
                f"batch[{place}] must be a tensor (B, ...), not one without dimensions; batch[{place}][None] is one of "
                "one sample"
            )


def _named(value: object) -> str:
    """Returns the name of a value's type, with that of its library where it is no built-in type."""
    root, name = type(value).__module__.split(".")[0], type(value).__qualname__
    return name if root == "builtins" else f"{root}.{name}"


def _given(value: object) -> str:
    """Returns a value of a wrong type as text, with the type."""
    return f"{type(value).__name__} ({value!r})"


def _interval(low: int, high: int | None) -> str:
    """Returns the allowed values as text."""
    if high is None:
        return f"at least {low}"
    return f"in [{low}, {_power(high)}]"


def _power(number: int) -> str:
    """Returns a number as text: 2**48, 2**64 - 1, or its digits where it is small or no such power."""
    for text, power in ((f"2**{number.bit_length() - 1}", number), (f"2**{number.bit_length()} - 1", number + 1)):
        if power >= 2**17 and power & (power - 1) == 0:
            return text
    return str(number)
