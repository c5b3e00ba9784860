"""Results of a benchmark as a page with tables and plots, which needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

from ..webpage import INK, document, dress, one_line
from . import tables
from .case import Case
from .figures import case_of, measured

AXES = (("batch", "gradients at a time, B"), ("grad_dim", "gradient size, D"), ("proj_dim", "projected size, k"))
STYLE = """
.numbers { font-size: .85rem; } .numbers td, .numbers th { padding-right: 1rem; white-space: nowrap; }
.chart svg { width: 100%; height: auto; }
"""


def page(results: Mapping[str, Any]) -> str:
    """A page with the same tables and with plots; needs matplotlib."""
    timings = "".join(
        f"<h3>{escape(tables.case_text(case))}</h3>"
        f"{_html(tables.table(tables.TIMING_COLUMNS, tables.fastest_first(entries)))}"
        for case, entries in tables.grouped(measured(results)).items()
    )
    checks = "".join(
        f"<h3>{escape(f'D = {case.grad_dim:,}, k = {case.proj_dim:,}, {case.dtype}, {case.proj_type}')}</h3>"
        f"{_html(tables.table(tables.CHECK_COLUMNS, entries))}"
        for case, entries in tables.grouped(tables.good_checks(results)).items()
    )
    plots = "".join(
        f'<h2>{escape(title)}</h2><p>{text}</p><div class="chart">{svg}</div>' for title, text, svg in _plots(results)
    )
    absent = "".join(f"<li>{escape(line)}</li>" for line in tables.absent(results))
    body = f"""<h1>Random projections, measured</h1>
<p>{escape(tables.machine(results))}. This machine at its best: {escape(tables.ceilings(results))}.</p>
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
