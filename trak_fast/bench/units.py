"""Times, sizes and rates as text, with the units that suit them."""

from __future__ import annotations


def seconds_text(value: float) -> str:
    """Formats a time with three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def bytes_text(value: float | None) -> str:
    """Formats a size with a binary unit; None is "?"."""
    if value is None:
        return "?"
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def rate_text(value: float, unit: str) -> str:
    """Formats a rate with a decimal prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
