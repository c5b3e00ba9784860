"""Results of a benchmark as text: tables for a terminal and for a README, with the units that suit their figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .case import Case
from .figures import case_of, measured
from .units import bytes_text, rate_text, seconds_text

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def _number(value: float | None, form: str = ".2g") -> str:
    return "–" if value is None else format(value, form)


TIMING_COLUMNS: tuple[Column, ...] = (
    ("projection", lambda entry: entry["candidate"]),
    ("median", lambda entry: seconds_text(entry["median"]) + ("" if entry["warm"] else " ¹")),
    ("middle half", lambda entry: f"{seconds_text(entry['low'])} – {seconds_text(entry['high'])}"),
    ("product", lambda entry: rate_text(entry["flop_per_second"], "FLOP/s")),
    ("gradients", lambda entry: rate_text(entry["gradient_bytes_per_second"], "B/s")),
    ("samples", lambda entry: rate_text(entry["samples_per_second"], "/s")),
    ("of floor", lambda entry: "–" if entry["of_floor"] is None else f"{entry['of_floor']:.1%}"),
    ("extra memory", lambda entry: bytes_text(entry["memory_bytes"])),
)
CHECK_COLUMNS: tuple[Column, ...] = (
    ("projection", lambda entry: entry["candidate"]),
    ("error", lambda entry: _number(entry["found"]["error"])),
    ("norms", lambda entry: f"{entry['found']['norm_distortion']:.2%}"),
    ("inner products", lambda entry: f"{entry['found']['inner_distortion']:.2%}"),
    ("effective k", lambda entry: _number(entry["found"]["effective_dim"], ".0f")),
    ("k of columns", lambda entry: _number(entry["found"]["column_dim"], ".0f")),
    ("equal columns", lambda entry: _number(entry["found"]["equal_columns"], "d")),
    ("same bits", lambda entry: "yes" if entry["found"]["repeatable"] and entry["found"]["remade"] else "no"),
)
COMPARE_COLUMNS: tuple[Column, ...] = (
    ("projection", lambda row: row["candidate"]),
    ("case", lambda row: case_text(case_of(row))),
    ("before", lambda row: seconds_text(row["before"])),
    ("after", lambda row: seconds_text(row["after"])),
    ("speed", lambda row: f"× {row['ratio']:.2f}"),
    ("", lambda row: row["verdict"]),
)


def case_text(case: Case) -> str:
    """A shape in words."""
    return f"B = {case.batch:,}, D = {case.grad_dim:,}, k = {case.proj_dim:,}, {case.dtype}, {case.proj_type}"


def table(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Cells, the head first."""
    return [[name for name, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def grouped(entries: Iterable[Mapping[str, Any]]) -> dict[Case, list[Mapping[str, Any]]]:
    """Entries by their shape."""
    groups: dict[Case, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(case_of(entry), []).append(entry)
    return groups


def fastest_first(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Timings in the order of their medians."""
    return sorted(entries, key=lambda entry: float(entry["median"]))


def good_checks(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The checks that have figures."""
    return [entry for entry in results["checks"] if entry["status"] == "ok"]


def absent(results: Mapping[str, Any]) -> list[str]:
    """What was not measured, and why."""
    lines = [f"{name}: {facts['error']}" for name, facts in results["candidates"].items() if facts["status"] != "found"]
    for kind in ("timings", "checks"):
        for entry in results[kind]:
            if entry["status"] != "ok":
                lines.append(f"{entry['candidate']}, {case_text(case_of(entry))}: {entry['error'].splitlines()[0]}")
    return lines


def ceilings(results: Mapping[str, Any]) -> str:
    """What the machine does at best."""
    best = results["ceilings"]
    if not best:
        return "not measured"
    rates = ", ".join(f"{dtype} {rate_text(rate, 'FLOP/s')}" for dtype, rate in best["flop_per_second"].items())
    return f"copy {rate_text(best['copy_bytes_per_second'], 'B/s')}; product: {rates}"


def terminal(results: Mapping[str, Any]) -> str:
    """All results as text."""
    parts = [f"{machine(results)}\n{ceilings(results)}"]
    for case, entries in grouped(measured(results)).items():
        parts.append(f"{case_text(case)}\n{aligned(table(TIMING_COLUMNS, fastest_first(entries)))}")
    if any(not entry["warm"] for entry in measured(results)):
        parts.append("¹ too slow for more than its first call")
    for case, entries in grouped(good_checks(results)).items():
        title = f"check: D = {case.grad_dim:,}, k = {case.proj_dim:,}, {case.dtype}, {case.proj_type}; "
        title += f"independent entries: norms {(2 / case.proj_dim) ** 0.5:.2%}, "
        title += f"inner products {case.proj_dim**-0.5:.2%}"
        parts.append(f"{title}\n{aligned(table(CHECK_COLUMNS, entries))}")
    if missing := absent(results):
        parts.append("not measured\n" + "\n".join(f"  {line}" for line in missing))
    if left := results["left"]:
        cases = ", ".join(f"{name} ({count})" for name, count in left.items())
        parts.append(
            f"no time for some cases of {cases}: the same command goes on here, a larger --budget goes further"
        )
    return "\n\n".join(parts)


def compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """`figures.compare` as text: what changed, and how much did not."""
    changed = sorted((row for row in rows if row["verdict"] in ("faster", "slower")), key=lambda row: row["ratio"])
    few = sum(row["verdict"] == "one sample" for row in rows)
    rest = f"{len(rows) - len(changed) - few} of {len(rows)} timings are the same within noise"
    rest += f", {few} have too few samples to tell" if few else ""
    return (aligned(table(COMPARE_COLUMNS, changed)) + "\n\n" if changed else "") + rest


def markdown(results: Mapping[str, Any]) -> str:
    """The table for a README: medians of the first case, every candidate."""
    groups = grouped(measured(results))
    if not groups:
        raise ValueError("the results hold no timing")
    case, entries = next(iter(groups.items()))
    ours = min(entry["median"] for entry in entries if entry["candidate"].startswith("trak_fast"))
    head = [f"{case_text(case)}", "median", "times as long as ours", "extra memory"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- |"]
    for entry in fastest_first(entries):
        cells = [entry["candidate"], seconds_text(entry["median"]), f"{entry['median'] / ours:.3g}"]
        lines.append(f"| {' | '.join([*cells, bytes_text(entry['memory_bytes'])])} |")
    return "\n".join(lines)


def replace_table(text: str, results: Mapping[str, Any]) -> str:
    """A README with the table between its markers made anew.

    Raises:
        ValueError: It has no markers `<!-- bench -->` and `<!-- /bench -->`.
    """
    pattern = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError("no lines <!-- bench --> and <!-- /bench --> to put the table between")
    return pattern.sub(lambda found: f"{found[1]}{markdown(results)}\n{found[2]}", text, count=1)


def machine(results: Mapping[str, Any]) -> str:
    """Where and when it was measured."""
    environment, settings = results["environment"], results["settings"]
    where = environment.get("device", environment["machine"])
    name = where.get("name") or f"{where['processor']}, {where['cores']} cores"
    return f"{name}, {settings['threads']} threads, torch {environment['torch']['version']}, {results['started'][:10]}"
