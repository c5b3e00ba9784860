"""Draws docs/language-quality.svg and docs/language-bytes.svg from the results of language_quality.py.

python benchmarks/plot_language_quality.py benchmarks/results/NAME.json [--output docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

METHODS = {
    "trak_fast": "trak_fast, 16 KB",
    "EK-FAC": "EK-FAC (kronfluence)",
    "trak_fast without metric": "trak_fast without metric, k = 2048",
    "two-sided by layer, inverse": "two-sided by layer, inverse",
    "BM25": "BM25",
    "gradient cosine": "gradient cosine",
    "hidden states": "hidden states",
}
"""Methods in the order of the bars, and their names in the legend."""

COLORS = {"rademacher": "tab:green", "sjlt": "tab:blue", "two_sided": "tab:orange"}
STYLES = {"float32": "-o", "int8": "--s", "1bit": ":^"}
"""The color of each kind of projection, and the line of each way to store a number."""


def draw_methods(problems: dict[str, Any]) -> plt.Figure:
    """Draws the LDS of each method with one checkpoint, problem by problem, with standard errors and ceilings."""
    figure, axes = plt.subplots(figsize=(11, 3.6))
    width = 0.8 / len(METHODS)
    for number, (method, label) in enumerate(METHODS.items()):
        found = [problem["methods"][method]["one checkpoint"] for problem in problems.values()]
        places = [place + width * (number - len(METHODS) / 2 + 0.5) for place in range(len(found))]
        errors = [one["lds error"] for one in found]
        axes.bar(places, [one["lds"] for one in found], width, yerr=errors, label=label, error_kw={"linewidth": 0.7})
    for place, problem in enumerate(problems.values()):
        axes.hlines(problem["ceiling"], place - 0.45, place + 0.45, color="black", linewidth=1)
    names = [f"{name}\n(held out)" if problem["held out"] else name for name, problem in problems.items()]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("LDS, one checkpoint")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def draw_bytes(problems: dict[str, Any]) -> plt.Figure:
    """Draws the LDS over the bytes of a feature, in a panel for each problem."""
    problems = {name: problem for name, problem in problems.items() if "sizes" in problem}
    figure, panels = plt.subplots(1, len(problems), figsize=(11, 3.6), squeeze=False, sharex=True)
    for panel, (name, problem) in zip(panels.flat, problems.items(), strict=True):
        for kind, color in COLORS.items():
            for dtype, style in STYLES.items():
                rows = [row for row in problem["sizes"] if (row["kind"], row["dtype"]) == (kind, dtype)]
                label = f"{kind}, {dtype}"
                sizes = [row["bytes"] / 1024 for row in rows]
                panel.plot(sizes, [row["lds"] for row in rows], style, color=color, label=label, markersize=3)
        panel.set_xscale("log", base=2)
        panel.set_title(name, fontsize=9)
        panel.axvline(16, color="0.8", zorder=0)
        panel.set_xlabel("KB a document")
    panels[0][0].set_ylabel("LDS, one checkpoint")
    panels[0][0].legend(fontsize=6)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    problems = {name: result for name, result in results.items() if name != "machine"}
    plt.rcParams["svg.hashsalt"] = "trak_fast"
    for name, figure in (("quality", draw_methods(problems)), ("bytes", draw_bytes(problems))):
        figure.savefig(arguments.output / f"language-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
