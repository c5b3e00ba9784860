"""The page of a benchmark's results, with tables and plots, which needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from io import StringIO
from typing import NamedTuple

from ..webpage import INK, document, dress, one_line
from . import tables
from .case import Case
from .quality import CHECK_VECTORS
from .results import Results, Timing

AXES = {"batch": "gradients at a time, B", "grad_dim": "gradient size, D", "proj_dim": "projected size, k"}
LETTERS = {"batch": "B", "grad_dim": "D", "proj_dim": "k"}
LEAST_MEMORY = 1 / 16
"""MiB at which less memory is drawn, as a logarithmic axis has no 0."""
STYLE = """
.numbers { font-size: .85rem; } .numbers td, .numbers th { padding-right: 1rem; white-space: nowrap; }
.chart svg { width: 100%; height: auto; }
"""


class Plot(NamedTuple):
    """A plot on the page: its title, a text as HTML, and the plot itself as an SVG element."""

    title: str
    text: str
    svg: str


Points = list[tuple[float, float]]
Lines = dict[str, Points]
"""The points of each candidate, by its name."""


def page(results: Results) -> str:
    """Makes a page with the tables of the terminal and with plots; needs matplotlib."""
    timings = "".join(
        f"<h3>{escape(tables.case_text(case))}</h3>"
        f"{_html(tables.table(tables.TIMING_COLUMNS, tables.fastest_first(timings)))}"
        for case, timings in tables.grouped(results.measured).items()
    )
    checks = "".join(
        f"<h3>{escape(tables.check_text(case))}</h3>{_html(tables.table(tables.CHECK_COLUMNS, checked))}"
        for case, checked in tables.grouped(results.checked).items()
    )
    plots = "".join(
        f'<h2>{escape(plot.title)}</h2><p>{plot.text}</p><div class="chart">{plot.svg}</div>'
        for plot in _plots(results)
    )
    absent = "".join(f"<li>{escape(line)}</li>" for line in tables.absent(results))
    vectors = CHECK_VECTORS
    body = f"""<h1>Random projections, measured</h1>
<p>{escape(tables.machine(results))}. This machine at its best: {escape(tables.ceilings(results))}.</p>
{plots}
<h2>All timings</h2>
<p>A floor is the time that the shape's product takes at the rate of torch's product in the same dtype, or that its
gradients take to be read once, whichever is longer; “of floor” is its share of the median, and can pass 100 % where a
kernel goes around the dtype's rate. In the kind sjlt the product is that of the 4 entries of a column that are not 0;
sparse matrices under another kind have no floor. Times are of calls with flushed caches, in interleaved rounds; ¹ marks
a projection that was too slow for more than its first call. Extra memory is the peak above gradients and result.</p>
{timings}
<h2>What the results are worth</h2>
<p>Error: relative, against float64 with the same matrix. Distortion: root mean square over {vectors} random vectors and
their pairs; with independent entries √(2/k) for norms and 1/√k for inner products. Effective k is the one that
independent entries would need for the distortion of norms that was seen. Where the whole matrix was looked at, “k of
columns” is one over the mean squared correlation of two columns, and equal columns are pairs that are the same up to
sign (a processor looks at the first 4,096 columns). Same bits: the same call twice, and of a projection made anew.</p>
{checks}
{f"<h2>Not measured</h2><ul>{absent}</ul>" if absent else ""}
<footer>{escape(results.environment.machine.system)}, Python {results.environment.machine.python};
trak_fast {escape(results.environment.trak_fast["version"])}. All figures are in results.json.</footer>"""
    return document("Random projections, measured", body, STYLE)


def _html(cells: Sequence[Sequence[str]]) -> str:
    """Sets a table's cells as HTML."""
    head, *rows = cells
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table class="numbers"><tr>{top}</tr>\n{body}</table></div>'


def _plots(results: Results) -> list[Plot]:
    """Draws all plots that the timings suffice for."""
    timings = results.measured
    if not timings:
        return []
    plots = [_speed_plot(timings, axis) for axis in AXES]
    plots.append(_memory_plot(timings))
    plots.append(_roofline_plot(results))
    return [plot for plot in plots if plot is not None]


def _speed(timing: Timing) -> float:
    """Returns the speed in GFLOP/s."""
    return timing.flop_per_second / 1e9


def _speed_plot(timings: Sequence[Timing], axis: str) -> Plot | None:
    """Draws speed along one axis from the first case, if more than one place on it was measured."""
    first = timings[0].case
    along = _along(timings, axis, first)
    if _places(along, axis) < 2:
        return None
    others = [f"{letter} = {getattr(first, name):,}" for name, letter in LETTERS.items() if name != axis]
    text = f"{', '.join(others)}, {first.dtype}, {first.proj_type}. Higher is better."
    lines = {
        name: [(float(getattr(timing.case, axis)), _speed(timing)) for timing in line] for name, line in along.items()
    }
    return Plot(f"Speed against {AXES[axis]}", text, _chart(lines, AXES[axis], "GFLOP/s"))


def _memory_plot(timings: Sequence[Timing]) -> Plot | None:
    """Draws memory along D from the first case, if more than one D was measured."""
    lines: Lines = {}
    for name, line in _along(timings, "grad_dim", timings[0].case).items():
        for timing in line:
            if timing.memory_bytes is not None:
                point = (float(timing.case.grad_dim), max(LEAST_MEMORY, timing.memory_bytes / 2**20))
                lines.setdefault(name, []).append(point)
    if len({x for points in lines.values() for x, _ in points}) < 2:
        return None
    text = "Peak above gradients and result, of making the projection and the first call."
    return Plot("Memory", text, _chart(lines, AXES["grad_dim"], "MiB"))


def _roofline_plot(results: Results) -> Plot | None:
    """Draws the speed of each timing against its operations per byte, and the machine's roof."""
    ceilings = results.ceilings
    if ceilings is None:
        return None
    dtype = results.measured[0].case.dtype
    points: Lines = {}
    for timing in results.measured:
        case = timing.case
        if case.dtype == dtype and timing.of_floor is not None:
            intensity = case.flop / (case.gradient_bytes + 4 * case.batch * case.proj_dim)
            points.setdefault(timing.candidate, []).append((intensity, _speed(timing)))
    if not points:
        return None
    text = (
        "Each point is a timing: its operations for each byte of gradients and result, and the speed that was "
        "reached, for dense matrices and the first dtype. The grey line is the roof of torch's product."
    )
    left = min(x for line in points.values() for x, _ in line) / 2
    right = max(x for line in points.values() for x, _ in line) * 2
    rate = ceilings.flop_per_second[dtype]
    bandwidth = ceilings.copy_bytes_per_second
    corner = min(max(rate / bandwidth, left), right)
    roof = [(x, min(rate, bandwidth * x) / 1e9) for x in sorted({left, corner, right})]
    return Plot("Roofline", text, _chart(points, "operations per byte", "GFLOP/s", connected=False, roof=roof))


def _along(timings: Iterable[Timing], axis: str, base: Case) -> dict[str, list[Timing]]:
    """Groups by candidate the timings that differ from a case along one axis only, in the order of that axis."""
    lines: dict[str, list[Timing]] = {}
    for timing in timings:
        if replace(base, **{axis: getattr(timing.case, axis)}) == timing.case:
            lines.setdefault(timing.candidate, []).append(timing)
    return {name: sorted(line, key=lambda timing: int(getattr(timing.case, axis))) for name, line in lines.items()}


def _places(lines: Mapping[str, Sequence[Timing]], axis: str) -> int:
    """Counts the places along an axis at which something was measured."""
    return len({getattr(timing.case, axis) for line in lines.values() for timing in line})


def _chart(lines: Lines, x: str, y: str, *, connected: bool = True, roof: Sequence[tuple[float, float]] = ()) -> str:
    """Draws a chart with logarithmic axes, as an SVG element.

    Args:
        lines: Points of each candidate.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        connected: Connects the points of a candidate.
        roof: Points of a line that bounds all others.
    """
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
            *zip(*points, strict=True),
            color=colors(i % 10),
            marker="o",
            markersize=5,
            label=name,
            linewidth=2.2 if ours else 1.2,
            linestyle=("-" if ours else "--") if connected else "none",
        )
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
