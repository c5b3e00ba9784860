"""Replaces a library's names in all modules that have imported them, and puts them back; fits numbers that callers of
other libraries pass to ours."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, SupportsIndex

from ..arguments import integer
from ..projection.checks import BLOCK_ROWS, DEFAULT_NONZEROS, MAX_ROWS, NONZEROS, SPARSE


class Patch:
    """A set of names that are replaced until `undo()`, or until the end of a `with` block."""

    def __init__(self, module: ModuleType, replacements: Mapping[str, Any]) -> None:
        """Replaces names of `module`, and the same objects under any name in modules that have imported them."""
        self.originals = {name: getattr(module, name) for name in replacements}
        self._changed: list[tuple[dict[str, Any], str, Any]] = []
        new = {id(self.originals[name]): replacement for name, replacement in replacements.items()}
        for user in list(sys.modules.values()):
            if not isinstance(user, ModuleType) or user.__name__.startswith("trak_fast."):
                continue
            names = vars(user)
            for name, value in list(names.items()):
                if id(value) in new:
                    self._changed.append((names, name, value))
                    names[name] = new[id(value)]

    @property
    def active(self) -> bool:
        """True until the names are put back."""
        return bool(self._changed)

    def undo(self) -> None:
        """Puts back the objects that were replaced."""
        for names, name, value in self._changed:
            names[name] = value
        self._changed.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def bits(name: str, value: SupportsIndex, width: int) -> int:
    """Returns the low `width` bits of an integer: callers of other libraries pass negative and long ones.

    Raises:
        TypeError: `value` is no integer.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__} ({value!r})")
    return operator.index(value) % (1 << width)


def fitting_nonzeros(proj_dim: SupportsIndex) -> int:
    """Returns the entries of a column of the sparse kind for k = `proj_dim`, for callers that know no such number.

    Returns:
        The default, 4, for k from 64 to 2^22; fewer for smaller k, and 8 for 2^23.

    Raises:
        ValueError: k fits no number.
        TypeError: `proj_dim` is no integer.
    """
    rows = integer("proj_dim", proj_dim, 1, MAX_ROWS)
    low, high = BLOCK_ROWS
    if rows & (rows - 1) == 0:
        for number in (DEFAULT_NONZEROS, 2, 1, 8):
            if low * number <= rows <= high * number:
                return number
    below = 1 << (rows.bit_length() - 1)
    nearest = sorted({min(max(size, low), high * NONZEROS[-1]) for size in (below, 2 * below)})
    raise ValueError(
        f"proj_dim must be a power of two in [{low}, 2**23] for proj_type={SPARSE!r}, not {rows}; "
        f"{' and '.join(map(str, nearest))} {'is' if len(nearest) == 1 else 'are'} nearest, "
        "and the kinds 'rademacher' and 'normal' take any"
    )
