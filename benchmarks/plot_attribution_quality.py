"""Draws docs/choosing-k.svg and docs/choosing-ridge.svg from the results of attribution_quality.py.

python benchmarks/plot_attribution_quality.py benchmarks/results/NAME.json [--output docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

COLORS = {1: "tab:blue", 5: "tab:orange", 10: "tab:green"}
"""The color of each number of checkpoints."""


def finish(figure: plt.Figure, results: list[Any], label: str) -> None:
    """Gives the panel of each scenario a title, and the axes their names."""
    for panel, result in zip(figure.axes, results, strict=True):
        panel.set_title(result["scenario"], fontsize=9)
        panel.set_xlabel(label)
    figure.axes[0].set_ylabel("LDS")
    figure.axes[0].legend(fontsize=6)
    figure.tight_layout()


def over_k(results: list[Any]) -> plt.Figure:
    """Plots the LDS of trak_fast's default and of traker's over k, in a panel for each scenario."""
    figure, panels = plt.subplots(1, len(results), figsize=(2.6 * len(results), 2.8), squeeze=False, sharex=True)
    for panel, result in zip(panels[0], results, strict=True):
        for checkpoints in sorted({cell["checkpoints"] for cell in result["cells"]}):
            cells = [cell for cell in result["cells"] if cell["checkpoints"] == checkpoints]
            for kind, style in (("auto", "-o"), ("traker", ":x")):
                points = [(cell["k"], cell["lds"][kind]) for cell in cells if cell["lds"][kind] is not None]
                label = f"{'trak_fast' if kind == 'auto' else 'traker 0.3.2'}, C = {checkpoints}"
                panel.plot(*zip(*points, strict=True), style, color=COLORS[checkpoints], markersize=4, label=label)
        panel.axvline(result["train_size"], color="0.8", zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    finish(figure, results, "k")
    return figure


def over_ridge(results: list[Any], k: int) -> plt.Figure:
    """Plots the LDS over fixed ridges, with the automatic ridge as a dot, in a panel for each scenario."""
    figure, panels = plt.subplots(1, len(results), figsize=(2.6 * len(results), 2.8), squeeze=False, sharex=True)
    for panel, result in zip(panels[0], results, strict=True):
        for cell in result["cells"]:
            if cell["k"] != k:
                continue
            color = COLORS[cell["checkpoints"]]
            path = [(float(kind[6:]), lds) for kind, lds in cell["lds"].items() if kind.startswith("ridge ")]
            panel.plot(*zip(*sorted(path), strict=True), color=color, label=f"C = {cell['checkpoints']}")
            panel.plot(cell["auto_factor"], cell["lds"]["auto"], "o", color=color)
        panel.set_xscale("log")
    finish(figure, results, "λ / mean ‖φ‖²")
    return figure


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="default: the first four")
    parser.add_argument("--proj-dim", type=int, default=2048, metavar="K", help="k of the second figure")
    arguments = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "trak_fast"  # the same file from the same figures
    results = json.loads(arguments.results.read_text())["results"]
    chosen = arguments.scenarios or [result["scenario"] for result in results[:4]]
    results = [result for result in results if result["scenario"] in chosen]
    for name, figure in (("k", over_k(results)), ("ridge", over_ridge(results, arguments.proj_dim))):
        figure.savefig(arguments.output / f"choosing-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
