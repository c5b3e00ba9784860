"""Failures of a command: the sentence that the user sees, and the exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OUTSIDE_WORLD = 1
"""Exit status after a failure of files, memory, devices or missing packages."""
WRONG_ARGUMENT = 2
"""Exit status after a refused argument; argparse uses the same."""
INTERRUPTED = 130
"""Exit status after an interruption from the keyboard, as shells report it."""
READER_GONE = 141
"""Exit status where the reader of the output has gone, as shells report the signal that ends other programs then."""


class Failure(Exception):
    """The end of a command that cannot do as asked.

    Attributes:
        message: A sentence for the user; empty if there is nobody to tell.
        status: The exit status.
    """

    def __init__(self, message: str, status: int = OUTSIDE_WORLD) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


@contextmanager
def checking_arguments() -> Iterator[None]:
    """Turns an argument's refusal in the block into a failure.

    Raises:
        Failure: The block refused an argument by TypeError or ValueError.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise Failure(str(error), WRONG_ARGUMENT) from error
