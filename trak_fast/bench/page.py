"""Results of a benchmark as text for a terminal, as a table for a README, and as a page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

from ..webpage import INK, document, dress, one_line
from .candidates import Case
from .figures import case_of, measured

Column = tuple[str, Callable[[Mapping[str, Any]], str]]

AXES = (("batch", "gradients at a time, B"), ("grad_dim", "gradient size, D"), ("proj_dim", "projected size, k"))

STYLE = """
.numbers { font-size: .85rem; } .numbers td, .numbers th { padding-right: 1rem; white-space: nowrap; }
.chart svg { width: 100%; height: auto; }
"""


def seconds_text(value: float) -> str:
    """A time with three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def bytes_text(value: float | None) -> str:
    """A size with a binary unit."""
    if value is None:
        return "?"
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def rate_text(value: float, unit: str) -> str:
    """A rate with a decimal prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


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


def _grouped(entries: Iterable[Mapping[str, Any]]) -> dict[Case, list[Mapping[str, Any]]]:
    groups: dict[Case, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(case_of(entry), []).append(entry)
    return groups


def _fastest_first(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(entries, key=lambda entry: float(entry["median"]))


def _good_checks(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in results["checks"] if entry["status"] == "ok"]


def _absent(results: Mapping[str, Any]) -> list[str]:
    """What was not measured, and why."""
    lines = [f"{name}: {facts['error']}" for name, facts in results["candidates"].items() if facts["status"] != "found"]
    for kind in ("timings", "checks"):
        for entry in results[kind]:
            if entry["status"] != "ok":
                lines.append(f"{entry['candidate']}, {case_text(case_of(entry))}: {entry['error'].splitlines()[0]}")
    return lines


def _ceilings(results: Mapping[str, Any]) -> str:
    ceilings = results["ceilings"]
    if not ceilings:
        return "not measured"
    rates = ", ".join(f"{dtype} {rate_text(rate, 'FLOP/s')}" for dtype, rate in ceilings["flop_per_second"].items())
    return f"copy {rate_text(ceilings['copy_bytes_per_second'], 'B/s')}; product: {rates}"


def terminal(results: Mapping[str, Any]) -> str:
    """All results as text."""
    parts = [f"{_machine(results)}\n{_ceilings(results)}"]
    for case, entries in _grouped(measured(results)).items():
        parts.append(f"{case_text(case)}\n{aligned(table(TIMING_COLUMNS, _fastest_first(entries)))}")
    if any(not entry["warm"] for entry in measured(results)):
        parts.append("¹ too slow for more than its first call")
    for case, entries in _grouped(_good_checks(results)).items():
        title = f"check: D = {case.grad_dim:,}, k = {case.proj_dim:,}, {case.dtype}, {case.proj_type}; "
        title += f"independent entries: norms {(2 / case.proj_dim) ** 0.5:.2%}, "
        title += f"inner products {case.proj_dim**-0.5:.2%}"
        parts.append(f"{title}\n{aligned(table(CHECK_COLUMNS, entries))}")
    if absent := _absent(results):
        parts.append("not measured\n" + "\n".join(f"  {line}" for line in absent))
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
    groups = _grouped(measured(results))
    if not groups:
        raise ValueError("the results hold no timing")
    case, entries = next(iter(groups.items()))
    ours = min(entry["median"] for entry in entries if entry["candidate"].startswith("trak_fast"))
    head = [f"{case_text(case)}", "median", "times as long as ours", "extra memory"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- |"]
    for entry in _fastest_first(entries):
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


def _machine(results: Mapping[str, Any]) -> str:
    environment, settings = results["environment"], results["settings"]
    where = environment.get("device", environment["machine"])
    name = where.get("name") or f"{where['processor']}, {where['cores']} cores"
    return f"{name}, {settings['threads']} threads, torch {environment['torch']['version']}, {results['started'][:10]}"


def page(results: Mapping[str, Any]) -> str:
    """A page with the same tables and with plots; needs matplotlib."""
    timings = "".join(
        f"<h3>{escape(case_text(case))}</h3>{_html(table(TIMING_COLUMNS, _fastest_first(entries)))}"
        for case, entries in _grouped(measured(results)).items()
    )
    checks = "".join(
        f"<h3>{escape(f'D = {case.grad_dim:,}, k = {case.proj_dim:,}, {case.dtype}, {case.proj_type}')}</h3>"
        f"{_html(table(CHECK_COLUMNS, entries))}"
        for case, entries in _grouped(_good_checks(results)).items()
    )
    plots = "".join(
        f'<h2>{escape(title)}</h2><p>{text}</p><div class="chart">{svg}</div>' for title, text, svg in _plots(results)
    )
    absent = "".join(f"<li>{escape(line)}</li>" for line in _absent(results))
    body = f"""<h1>Random projections, measured</h1>
<p>{escape(_machine(results))}. This machine at its best: {escape(_ceilings(results))}.</p>
{plots}
<h2>All timings</h2>
<p>A floor is the time that the shape's product takes at the rate of torch's product in the same dtype, or that its
gradients take to be read once, whichever is longer; “of floor” is its share of the median, and can pass 100 % where a
kernel goes around the dtype's rate; sparse matrices, whose product does less, have none. Times are of calls with
flushed caches, in interleaved rounds; ¹ marks a projection that was too slow for more than its first call.
Extra memory is the peak above gradients and result.</p>
{timings}
<h2>What the results are worth</h2>
<p>Error: relative, against float64 with the same matrix. Distortion: root mean square over {256} random vectors and
their pairs; with independent entries √(2/k) for norms and 1/√k for inner products. Effective k is the one that
independent entries would need for the distortion of norms that was seen. Where the whole matrix was looked at, “k of
columns” is one over the mean squared correlation of two columns, and equal columns are pairs that are the same up to
sign (a processor looks at the first 4,096 columns). Same bits: the same call twice, and of a projection made anew.</p>
{checks}
{f"<h2>Not measured</h2><ul>{absent}</ul>" if absent else ""}
<footer>{escape(results["environment"]["machine"]["system"])}, Python {results["environment"]["machine"]["python"]};
trak_fast {escape(results["environment"]["trak_fast"]["version"])}. All figures are in results.json.</footer>"""
    return document("Random projections, measured", body, STYLE)


def _html(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = cells
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table class="numbers"><tr>{top}</tr>\n{body}</table></div>'


def _plots(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, text and SVG of each plot."""
    entries = measured(results)
    if not entries:
        return []
    first = case_of(entries[0])
    plots = []
    speed: Callable[[Mapping[str, Any]], float] = lambda entry: entry["flop_per_second"] / 1e9  # noqa: E731
    for axis, label in AXES:
        lines = _along(entries, axis, first)
        if len({x for points in lines.values() for x, _ in points}) > 1:
            others = [
                f"{letter} = {getattr(first, name):,}"
                for name, letter in (("batch", "B"), ("grad_dim", "D"), ("proj_dim", "k"))
                if name != axis
            ]
            text = f"{', '.join(others)}, {first.dtype}, {first.proj_type}. Higher is better."
            values = {name: [(x, speed(entry)) for x, entry in points] for name, points in lines.items()}
            plots.append((f"Speed against {label}", text, _lines(values, label, "GFLOP/s")))
    memory = {
        name: [
            (x, max(1 / 16, entry["memory_bytes"] / 2**20)) for x, entry in points if entry["memory_bytes"] is not None
        ]
        for name, points in _along(entries, "grad_dim", first).items()
    }
    if len({x for line in memory.values() for x, _ in line}) > 1:
        text = "Peak above gradients and result, of making the projection and the first call."
        plots.append(("Memory", text, _lines({n: p for n, p in memory.items() if p}, "gradient size, D", "MiB")))
    if ceilings := results["ceilings"]:
        text = (
            "Each point is a timing: its operations for each byte of gradients and result, and the speed that was "
            "reached, for dense matrices and the first dtype. The grey line is the roof of torch's product."
        )
        points: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            case = case_of(entry)
            if case.dtype == first.dtype and entry["of_floor"] is not None:
                x = case.flop / (case.gradient_bytes + 4 * case.batch * case.proj_dim)
                points.setdefault(entry["candidate"], []).append((x, speed(entry)))
        if points:
            ends = [min(x for line in points.values() for x, _ in line) / 2]
            ends.append(max(x for line in points.values() for x, _ in line) * 2)
            rate, bandwidth = ceilings["flop_per_second"][first.dtype], ceilings["copy_bytes_per_second"]
            corners = sorted({*ends, min(max(rate / bandwidth, ends[0]), ends[1])})
            roof = [(x, min(rate, bandwidth * x) / 1e9) for x in corners]
            plots.append(("Roofline", text, _lines(points, "operations per byte", "GFLOP/s", False, roof)))
    return plots


def _along(
    entries: Iterable[Mapping[str, Any]], axis: str, base: Case
) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Of each candidate, the timings that differ from a case along one axis only."""
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    fixed = {name: value for name, value in base.asdict().items() if name != axis}
    for entry in entries:
        if {name: value for name, value in entry["case"].items() if name != axis} == fixed:
            lines.setdefault(entry["candidate"], []).append((entry["case"][axis], entry))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    connected: bool = True,
    roof: Sequence[tuple[float, float]] = (),
) -> str:
    """A chart with logarithmic axes, as an SVG element."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    if roof:
        axes.plot(*zip(*roof, strict=True), color=INK, linewidth=3, alpha=0.5, label="roof")
    colors = matplotlib.colormaps["tab10"]
    for i, (name, points) in enumerate(lines.items()):
        ours = name.startswith("trak_fast")
        axes.plot(
            *zip(*points, strict=True), color=colors(i % 10), marker="o", markersize=5, label=name,
            linewidth=2.2 if ours else 1.2, linestyle=("-" if ours else "--") if connected else "none",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color=INK, alpha=0.2)
    dress(axes, x, y)
    figure.legend(loc="outside right center", frameon=False, fontsize=8, labelcolor=INK)
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trak_fast", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return one_line(text[text.index("<svg") :])
