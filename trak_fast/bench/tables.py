"""Results of a benchmark as text: tables for a terminal and for a page, with the units that suit their figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from ..projection.checks import SPARSE
from .case import Case
from .figures import Change
from .results import Absent, Check, Omission, Results, Timing
from .units import bytes_text, rate_text, seconds_text

Row = TypeVar("Row")
Entry = TypeVar("Entry", Timing, Check)
Column = tuple[str, Callable[[Row], str]]
"""A column's head, and the text of a row's cell."""


def _number(value: float | None, form: str = ".2g") -> str:
    """Formats a number, or a dash if there is none."""
    return "–" if value is None else format(value, form)


TIMING_COLUMNS: tuple[Column[Timing], ...] = (
    ("projection", lambda timing: timing.candidate),
    ("median", lambda timing: seconds_text(timing.median) + ("" if timing.warm else " ¹")),
    ("middle half", lambda timing: f"{seconds_text(timing.low)} – {seconds_text(timing.high)}"),
    ("product", lambda timing: rate_text(timing.flop_per_second, "FLOP/s")),
    ("gradients", lambda timing: rate_text(timing.gradient_bytes_per_second, "B/s")),
    ("samples", lambda timing: rate_text(timing.samples_per_second, "/s")),
    ("of floor", lambda timing: _number(timing.of_floor, ".1%")),
    ("extra memory", lambda timing: bytes_text(timing.memory_bytes)),
)
CHECK_COLUMNS: tuple[Column[Check], ...] = (
    ("projection", lambda check: check.candidate),
    ("error", lambda check: _number(check.found.error)),
    ("norms", lambda check: f"{check.found.norm_distortion:.2%}"),
    ("inner products", lambda check: f"{check.found.inner_distortion:.2%}"),
    ("effective k", lambda check: _number(check.found.effective_dim, ".0f")),
    ("k of columns", lambda check: _number(check.found.column_dim, ".0f")),
    ("equal columns", lambda check: _number(check.found.equal_columns, "d")),
    ("same bits", lambda check: "yes" if check.found.repeatable and check.found.remade else "no"),
)
CHANGE_COLUMNS: tuple[Column[Change], ...] = (
    ("projection", lambda change: change.candidate),
    ("case", lambda change: case_text(change.case)),
    ("before", lambda change: seconds_text(change.before)),
    ("after", lambda change: seconds_text(change.after)),
    ("speed", lambda change: f"× {change.ratio:.2f}"),
    ("", lambda change: change.verdict),
)


def case_text(case: Case) -> str:
    """Puts a timed shape into words."""
    return f"B = {case.batch:,}, {check_text(case)}"


def check_text(case: Case) -> str:
    """Puts a checked shape into words: its batch does not count."""
    return f"D = {case.grad_dim:,}, k = {case.proj_dim:,}, {case.dtype}, {case.proj_type}"


def table(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> list[list[str]]:
    """Makes the cells of a table, the head first."""
    return [[name for name, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Sets cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def grouped(entries: Iterable[Entry]) -> dict[Case, list[Entry]]:
    """Groups entries by their shape."""
    groups: dict[Case, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.case, []).append(entry)
    return groups


def fastest_first(timings: Iterable[Timing]) -> list[Timing]:
    """Sorts timings by their medians."""
    return sorted(timings, key=lambda timing: timing.median)


def absent(results: Results) -> list[str]:
    """Lists all that was not measured, with the reasons."""
    lines = [f"{name}: {facts.error}" for name, facts in results.candidates.items() if isinstance(facts, Absent)]
    groups: dict[tuple[str, str, Case | None], list[Omission]] = {}
    for omission in results.omissions:
        first_line = omission.error.partition("\n")[0]
        alone = omission.case if omission.status == "failed" else None
        groups.setdefault((omission.candidate, first_line, alone), []).append(omission)
    for (name, reason, _), found in groups.items():
        cases = case_text(found[0].case) if len({omission.case for omission in found}) == 1 else f"{len(found)} cases"
        lines.append(f"{name}, {cases}: {reason}")
    return lines


def sparse_timing(case: Case, timings: Iterable[Timing]) -> Timing | None:
    """Returns our fastest timing with the sparse kind at the shape of a case of another kind, or None."""
    sparse = replace(case, proj_type=SPARSE)
    ours = [timing for timing in timings if timing.case == sparse and timing.candidate.startswith("trak_fast ")]
    return None if sparse == case else min(ours, key=lambda timing: timing.median, default=None)


def ceilings(results: Results) -> str:
    """Puts the machine's best rates into words."""
    best = results.ceilings
    if best is None:
        return "not measured"
    rates = ", ".join(f"{dtype} {rate_text(rate, 'FLOP/s')}" for dtype, rate in best.flop_per_second.items())
    return f"copy {rate_text(best.copy_bytes_per_second, 'B/s')}; product: {rates}"


def terminal(results: Results) -> str:
    """Sets all results as text."""
    parts = [f"{machine(results)}\n{ceilings(results)}"]
    for case, timings in grouped(results.measured).items():
        lines = [case_text(case), aligned(table(TIMING_COLUMNS, fastest_first(timings)))]
        if (sparse := sparse_timing(case, results.measured)) is not None:
            ratio = min(timing.median for timing in timings) / sparse.median
            lines.append(
                f"{sparse.candidate} with {SPARSE} takes {seconds_text(sparse.median)}; the fastest of the above "
                f"takes {ratio:.3g} times as long"
            )
        parts.append("\n".join(lines))
    if not all(timing.warm for timing in results.measured):
        parts.append("¹ too slow for more than its first call")
    for case, checks in grouped(results.checked).items():
        title = (
            f"check: {check_text(case)}; independent entries: norms {(2 / case.proj_dim) ** 0.5:.2%}, "
            f"inner products {case.proj_dim**-0.5:.2%}"
        )
        parts.append(f"{title}\n{aligned(table(CHECK_COLUMNS, checks))}")
    if missing := absent(results):
        parts.append("not measured\n" + "\n".join(f"  {line}" for line in missing))
    if results.left:
        cases = ", ".join(f"{name} ({count})" for name, count in results.left.items())
        parts.append(
            f"no time for some cases of {cases}: the same command goes on here, a larger --budget goes further"
        )
    return "\n\n".join(parts)


def compared(changes: Sequence[Change]) -> str:
    """Sets changes as text: those beyond noise in a table, and the number of the others."""
    changed = sorted(
        (change for change in changes if change.verdict in ("faster", "slower")), key=lambda change: change.ratio
    )
    few = sum(change.verdict == "one sample" for change in changes)
    rest = f"{len(changes) - len(changed) - few} of {len(changes)} timings are the same within noise"
    rest += f", {few} have too few samples to tell" if few else ""
    return (aligned(table(CHANGE_COLUMNS, changed)) + "\n\n" if changed else "") + rest


def markdown(results: Results) -> str:
    """Makes the table for a page: medians of the first case, every candidate, and ours with the sparse kind.

    Raises:
        ValueError: There is no timing, or none of ours at that case.
    """
    groups = grouped(results.measured)
    if not groups:
        raise ValueError("the results hold no timing")
    case, timings = next(iter(groups.items()))
    ours = min(timing.median for timing in timings if timing.candidate.startswith("trak_fast"))
    head = [f"{case_text(case)}", "median", "times as long as ours", "extra memory"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- |"]
    if (sparse := sparse_timing(case, results.measured)) is not None:
        timings = [*timings, replace(sparse, candidate=f"{sparse.candidate}, {SPARSE}")]
    for timing in fastest_first(timings):
        cells = [
            timing.candidate,
            seconds_text(timing.median),
            f"{timing.median / ours:.3g}",
            bytes_text(timing.memory_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_table(text: str, results: Results) -> str:
    """Replaces the table between the markers of a page.

    Raises:
        ValueError: The text has no markers `<!-- bench -->` and `<!-- /bench -->`.
    """
    pattern = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError("no lines <!-- bench --> and <!-- /bench --> to put the table between")
    return pattern.sub(lambda found: f"{found[1]}{markdown(results)}\n{found[2]}", text, count=1)


def machine(results: Results) -> str:
    """Puts place and time of the measurements into words."""
    environment = results.environment
    if environment.device is not None:
        name = environment.device.name
    else:
        name = f"{environment.machine.processor}, {environment.machine.cores} cores"
    threads = f"{results.settings.threads} threads"
    return f"{name}, {threads}, torch {environment.torch.version}, {results.started[:10]}"
