"""The terminal: letters that it does not have, and readers that have gone."""

from __future__ import annotations

import codecs
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .failure import READER_GONE, Failure

IN_ASCII = {
    "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "±": "+/-", "√": "sqrt ", "≥": ">=", "≤": "<=", "≈": "~",
    "∞": "inf", "→": "->", "…": "...", "µ": "u", "μ": "u", "ε": "eps", "λ": "lambda", "φ": "phi", "τ": "tau",
    "¹": "(1)", "²": "^2", "³": "^3", "‘": "'", "’": "'", "“": '"', "”": '"', "●": "*",
}  # fmt: skip
"""Letters that messages have, and those to write where a terminal has only ASCII."""

ERRORS = "trak_fast.in_ascii"
"""The name of the way to encode them, for Python's codecs."""


def write_in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encodes one letter that the terminal's encoding lacks; the bytes of a file's name stay as they are.

    Returns:
        What is written in its place, and the place after it.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # a byte that could not be decoded
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    bare = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return IN_ASCII.get(letter) or bare or "?", error.start + 1


codecs.register_error(ERRORS, write_in_ascii)


def accept_any_letter() -> None:
    """Lets standard output and errors take any letter, unless the user has said what to do (PYTHONIOENCODING)."""
    for stream in (sys.stdout, sys.stderr):
        errors = getattr(stream, "errors", None)
        if errors in ("strict", "surrogateescape", "backslashreplace") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


@contextmanager
def _writing() -> Iterator[None]:
    """Turns errors of the output into failures, which commands do not take for those of their files.

    Raises:
        Failure: The output's reader has gone, as `head` goes, or its disk is full, for example.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise Failure("", READER_GONE) from error
    except OSError as error:
        raise Failure(f"cannot write the output: {error}") from error


def say(text: str, end: str = "\n") -> None:
    """Prints to standard output.

    Raises:
        Failure: The output cannot be written.
    """
    with _writing():
        print(text, end=end)


def flush() -> None:
    """Writes what is left of the output, if there is one.

    Raises:
        Failure: The output cannot be written.
    """
    with _writing():
        if sys.stdout is not None:
            sys.stdout.flush()


def discard() -> None:
    """Drops what cannot be written, which the interpreter would try again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with suppress(OSError):
                os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
