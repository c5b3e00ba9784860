"""The files of `trak-fast demo`: pictures, results.json, arrays.npz and a page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from ..webpage import INK, document, dress
from .results import HEADLINE, Agreement, Arrays, Example, FlippedLabels, Ranking, Results

BLUE = "#3b82d0"
ORANGE = "#d97a1d"
STAGES = {
    "train": "Train the nets",
    "gradients": "Gradient of each image",
    "project": "Project the gradients",
    "store features": "Write features to disk",
    "solve and score": "Solve and score",
    "retrain": "Retrain on random halves",
    "evaluate": "Evaluate",
    "the rest": "The rest",
}
STYLE = """
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; margin: 1.75rem 0; }
.facts div { background: var(--fill); border-radius: .5rem; padding: .9rem 1rem; color: var(--soft);
  font-size: .85rem; line-height: 1.4; }
.facts b { display: block; font-size: 1.6rem; font-weight: 600; color: var(--text); line-height: 1.3; }
.digits { width: 100%; }
.digits th { padding: .25rem; }
.digits td { padding: .5rem .2rem; vertical-align: top; border-top: 1px solid var(--line); }
.digits .gap { padding-left: 1rem; }
figure { margin: 0; width: 4.5rem; font-size: .8rem; line-height: 1.3; color: var(--soft); }
figure img { display: block; width: 4.5rem; height: 4.5rem; image-rendering: pixelated; border: 2px solid var(--line);
  border-radius: .25rem; margin-bottom: .2rem; }
figure b { color: var(--text); }
figure.flipped img { border-color: var(--red); }
.red, figure.flipped b { color: var(--red); }
.times { width: 100%; max-width: 46rem; }
.times td:last-child { width: 45%; padding-right: 0; }
.bar { height: .7rem; min-width: 1px; border-radius: .2rem; background: var(--soft); opacity: .6; }
.times .project { font-weight: 600; }
.project .bar { background: var(--blue); opacity: 1; }
"""


class Line(NamedTuple):
    """A ranking with its name and color."""

    label: str
    color: str
    ranking: Ranking


def _rankings(found: FlippedLabels) -> list[Line]:
    """Lists the rankings that are compared, TRAK's first."""
    return [
        Line("TRAK, score of an image for itself", BLUE, found.self_influence),
        Line("loss of the nets", ORANGE, found.loss),
    ]


def write(folder: Path, results: Results, arrays: Arrays) -> None:
    """Writes a run's results.

    Args:
        folder: The folder to make; it gets index.html, results.json, arrays.npz, and pictures/ with those of the page.
        results: The figures.
        arrays: The arrays that they come from.
    """
    pictures = {"flipped-labels": _png(_detection_chart(results)), "lds": _png(_lds_chart(results.lds, arrays))}
    for row, example in enumerate(results.examples):
        pictures[f"example-{row}-test"] = _digit(arrays.test_images[example.test_image, 0])
        for column, shown in example.columns().items():
            for place, image in enumerate(shown):
                pictures[f"example-{row}-{column}-{place}"] = _digit(arrays.images[image.train_image, 0])
    (folder / "pictures").mkdir(parents=True)
    for name, png in pictures.items():
        (folder / "pictures" / f"{name}.png").write_bytes(png)
    (folder / "results.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    np.savez_compressed(folder / "arrays.npz", allow_pickle=False, **arrays._asdict())
    (folder / "index.html").write_text(_page(results, pictures), encoding="utf-8")


def summary(results: Results) -> str:
    """Puts the main figures of a run into a few lines of text."""
    found = results.flipped_labels
    lds = results.lds
    seconds = results.timings.seconds
    projection = results.timings.projection
    return "\n".join(
        [
            f"{results.settings.checkpoints} nets of {results.grad_dim:,} parameters trained on "
            f"{results.train_images:,} digits, {results.flipped_images} of them with a flipped label; "
            f"{results.test_accuracy:.1%} of {results.test_images} test images right",
            f"flipped labels  {found.self_influence.found[HEADLINE]:.0%} found in the first 5% of the TRAK ranking "
            f"(by loss {found.loss.found[HEADLINE]:.0%}, in random order 5%)",
            f"LDS             {lds.mean:.3f}, 95% interval {_interval(lds.interval_95)}, by chance within "
            f"{_interval(lds.chance_95)}; {lds.nets} nets retrained on {lds.subsets} halves",
            f"projection      {seconds['project']:.2f} s of {seconds['total']:.1f} s, {projection.share:.1%}: "
            f"{projection.gradient_entries_per_second:.3g} gradient entries/s, "
            f"{projection.flop_per_second / 1e9:,.0f} GFLOP/s",
        ]
    )


def _interval(bounds: tuple[float, float]) -> str:
    """Puts an interval into words."""
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}".replace("-", "−")


def _digit(pixels: NDArray[np.float32]) -> bytes:
    """Draws an image (8, 8) as a PNG of as many pixels, dark on white."""
    buffer = BytesIO()
    imsave(buffer, pixels, format="png", cmap="gray_r", vmin=0, vmax=1)
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    """Draws a chart as a PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()


def _label(axes: Axes, title: str, x: str, y: str = "") -> None:
    """Gives a chart its title and labels."""
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.locator_params(nbins=6)
    dress(axes, x, y)


def _detection_chart(results: Results) -> Figure:
    """Plots the share of flipped labels found against that of images inspected: in full, and the start of it."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    share = results.flipped_images / results.train_images
    rankings = _rankings(results.flipped_labels)
    for axes, limit in zip(figure.subplots(1, 2, sharey=True), (1.0, 3 * share), strict=True):
        axes.plot([0, 100], [0, 100], color=INK, linestyle=":", label="random order")
        for line in reversed(rankings):
            curve = 100 * np.array(line.ranking.curve)
            axes.plot(np.linspace(0, 100, len(curve)), curve, color=line.color, linewidth=1.8, label=line.label)
        axes.set_xlim(0, 100 * limit)
        axes.set_ylim(0, 102)
        _label(axes, "All images" if limit == 1 else "The first of them", "images inspected, %")
    figure.axes[0].set_ylabel("flipped labels found, %", color=INK)
    return figure


def _lds_chart(lds: Agreement, arrays: Arrays) -> Figure:
    """Plots the prediction for one test image, the median one, beside the correlations of all."""
    per_target = np.array(lds.per_target)
    target = int(np.argsort(per_target, kind="stable")[len(per_target) // 2])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    one, all_targets = figure.subplots(1, 2)
    predicted = arrays.masks.astype(np.float64) @ arrays.scores[:, target]
    one.scatter(predicted, arrays.outputs[:, target], s=12, color=BLUE, alpha=0.8, linewidths=0)
    _label(
        one, f"One test image, correlation {per_target[target]:.2f}", "predicted from the scores", "after retraining"
    )
    all_targets.hist(per_target, bins=np.linspace(-1, 1, 41), color=BLUE, alpha=0.8)
    all_targets.axvline(lds.mean, color=ORANGE, linewidth=1.8)
    _label(all_targets, f"All test images, mean {lds.mean:.2f}", "rank correlation", "test images")
    return figure


def _page(results: Results, pictures: Mapping[str, bytes]) -> str:
    """Makes the page around the pictures."""
    settings = results.settings
    found = results.flipped_labels
    lds = results.lds
    seconds = results.timings.seconds
    projection = results.timings.projection
    machine = escape(results.timings.machine)
    half = len(results.examples) // 2
    rows = "".join(_ranking(line) for line in _rankings(found))
    random_order = _ranking(Line("random order", INK, Ranking(auc=0.5, found=found.inspected, curve=[])))
    body = f"""<h1>Which training images explain an answer?</h1>
<p>{settings.checkpoints} small convolutional nets ({results.grad_dim:,} parameters each) were trained on
{results.train_images:,} images of handwritten digits. {results.flipped_images} of these images were given a wrong
label on purpose. TRAK then scored how much each training image helps or harms the nets on each of
{results.test_images} test images, of which they get {results.test_accuracy:.1%} right.</p>
<div class="facts">
<div><b>{found.self_influence.found[HEADLINE]:.0%}</b>of flipped labels found by inspecting 5% of the images</div>
<div><b>{lds.mean:.2f}</b>correlation of predicted and real effects of leaving images out (LDS)</div>
<div><b>{projection.share:.1%}</b>of the time went into projecting gradients</div>
<div><b>{seconds["total"]:.0f} s</b>for everything, {lds.nets} retrained nets included</div>
</div>

<h2>What helped, what harmed</h2>
<p>Each row is a test image with the {len(results.examples[0].helpful)} training images that help the nets most to
get it right, and those that harm most. Numbers in bold are labels; <span class="red">red</span> marks training images
whose label was flipped. The first {half} test images are those that the nets are
least sure of, the others were drawn at random.</p>
<div class="scroll"><table class="digits">
<tr><th>test</th><th colspan="5" class="gap">most helpful</th><th colspan="5" class="gap">most harmful</th></tr>
{"".join(_example(row, example, pictures) for row, example in enumerate(results.examples))}</table></div>

<h2>Finding the flipped labels</h2>
<p>A wrong label is hard to learn from other images, so such an image has a high TRAK score for itself. Here the
training images are inspected in the order of that score, and, to compare, in the order of the nets' loss on them and
in random order. The sooner a curve reaches the top, the better.</p>
{_image("flipped-labels", pictures, "Share of flipped labels found against share of images inspected", "chart")}
<div class="scroll"><table class="numbers">
<tr><th>flipped labels found after inspecting</th>{"".join(f"<th>{share:.0%}</th>" for share in found.inspected)}
<th>area under ROC</th></tr>
{rows}
{random_order}
</table></div>

<h2>Do the scores predict what retraining does?</h2>
<p>{lds.nets} nets were trained again from the start, {settings.nets_per_subset} on each of {lds.subsets}
random halves of the training images. For a test image, the scores of the images in a half add up to a prediction of
how well these nets do on it. The linear datamodeling score (LDS) is the rank correlation of predictions and real
outputs, averaged over test images: 1 is perfect, 0 is no better than chance.</p>
{_image("lds", pictures, "Predicted and real outputs of one test image; correlations of all test images", "chart")}
<div class="scroll"><table class="numbers">
<tr><th>LDS</th><th>mean</th><th>95% interval</th></tr>
<tr><td>TRAK (bootstrap over halves and test images)</td><td>{lds.mean:.3f}</td>
<td>{_interval(lds.interval_95)}</td></tr>
<tr><td>similarity of pixels, negative where labels differ</td><td>{lds.pixel_similarity:.3f}</td><td></td></tr>
<tr><td>chance (halves exchanged at random)</td><td>0</td><td>{_interval(lds.chance_95)}</td></tr>
</table></div>

<h2>Where the time went</h2>
<p>The projection takes {results.grad_dim:,} gradient entries of an image to {settings.proj_dim:,} random sums of
them. It took in {projection.gradient_entries_per_second / 1e6:,.0f} million gradient entries a second, which are
{projection.flop_per_second / 1e9:,.0f} billion additions and multiplications; its random matrix is never stored.</p>
<table class="numbers times">
{"".join(_stage(name, label, seconds) for name, label in STAGES.items())}</table>
<footer>seed {settings.seed}, {machine}. Every figure of this page is in results.json, the scores
and retrained outputs in arrays.npz.</footer>"""
    return document("trak-fast demo", body, STYLE)


def _image(name: str, pictures: Mapping[str, bytes], text: str, style: str = "") -> str:
    """Embeds a picture, with a text for those who do not see it."""
    data = base64.b64encode(pictures[name]).decode()
    return f'<img class="{style}" alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _example(row: int, example: Example, pictures: Mapping[str, bytes]) -> str:
    """Makes the row of a test image in the table of examples."""
    verdict = "" if example.predicted == example.label else f"<br>nets say {example.predicted}"
    picture = _image(f"example-{row}-test", pictures, f"a {example.label}")
    cells = [f"<td><figure>{picture}<b>{example.label}</b>{verdict}</figure></td>"]
    for column, shown in example.columns().items():
        for place, image in enumerate(shown):
            caption = f"<b>{image.label}</b>" + (f", really {image.true_label}" if image.flipped else "")
            picture = _image(f"example-{row}-{column}-{place}", pictures, f"a {image.true_label}")
            gap = "" if place else "gap"
            flipped = "flipped" if image.flipped else ""
            cells.append(f'<td class="{gap}"><figure class="{flipped}">{picture}{caption}</figure></td>')
    return f"<tr>{''.join(cells)}</tr>\n"


def _ranking(line: Line) -> str:
    """Makes the row of a ranking in the table of flipped labels."""
    found = "".join(f"<td>{share:.0%}</td>" for share in line.ranking.found)
    name = f'<span style="color: {line.color}">●</span> {line.label}'
    return f"<tr><td>{name}</td>{found}<td>{line.ranking.auc:.4f}</td></tr>\n"


def _stage(name: str, label: str, seconds: Mapping[str, float]) -> str:
    """Makes the row of a stage in the table of times."""
    share = seconds[name] / seconds["total"]
    return (
        f'<tr class="{name}"><td>{label}</td><td>{seconds[name]:.2f} s</td><td>{share:.1%}</td>'
        f'<td><div class="bar" style="width: {share:.2%}"></div></td></tr>\n'
    )
