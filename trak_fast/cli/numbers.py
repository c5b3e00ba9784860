"""Numbers on the command line."""

from __future__ import annotations

MOST_THREADS = 1024
"""Processor threads that may be asked for; far more of them end the process instead of helping it."""


def number(text: str) -> int | float | str:
    """Reads a number, also in the form 1.3e9.

    Returns:
        An integer if the value is whole, else a float. Text that is no number is returned as it is: the check of the
        argument, which knows its name and range, refuses it.
    """
    try:
        value = float(text)
    except ValueError:
        return text
    if not value.is_integer():
        return value
    return int(text) if text.isdigit() else int(value)  # digits have more of them than a float
