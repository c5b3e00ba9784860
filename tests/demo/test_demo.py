"""The demonstration, end to end at a small size, its figures recomputed by plain code from the arrays it stores."""

import base64
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy.stats import hypergeom, rankdata, spearmanr
from sklearn.datasets import load_digits

from trak_fast.demo import digits
from trak_fast.demo import run as demo

N, M, CHECKPOINTS, SUBSETS, FLIPPED, PROJ_DIM = 400, 60, 2, 40, 20, 512
SMALL = {
    "--train-size": N, "--test-size": M, "--checkpoints": CHECKPOINTS, "--subsets": SUBSETS, "--nets-per-subset": 1,
    "--flipped": FLIPPED / N, "--epochs": 30, "--proj-dim": PROJ_DIM, "--seed": 3, "--threads": 1,
}  # fmt: skip


class Run(NamedTuple):
    folder: Path
    results: dict[str, Any]
    arrays: dict[str, np.ndarray]
    stdout: str


def settings(**changes: Any) -> digits.Settings:
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in SMALL.items() if name != "--threads"}
    return digits.Settings(**{**values, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs of the same command, as a user starts it, where any warning is an error."""
    runs = []
    for folder in (tmp_path_factory.mktemp("demo") / "new" / "folder", tmp_path_factory.mktemp("again")):
        options = [str(word) for pair in SMALL.items() for word in pair]
        command = [sys.executable, "-W", "error", "-m", "trak_fast", "demo", "--output", str(folder), *options]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        with np.load(folder / "arrays.npz") as arrays:
            results = json.loads((folder / "results.json").read_text())
            runs.append(Run(folder, results, dict(arrays), process.stdout))
    return runs


@pytest.fixture(scope="module")
def run(runs: list[Run]) -> Run:
    return runs[0]


def test_is_repeatable_times_aside(runs: list[Run]) -> None:
    first, second = (copy.deepcopy(run.results) for run in runs)
    for results in (first, second):
        del results["timings"]
    assert first == second
    assert runs[0].arrays.keys() == runs[1].arrays.keys()
    for name, array in runs[0].arrays.items():
        np.testing.assert_array_equal(array, runs[1].arrays[name], err_msg=name)


def test_writes_these_files_only(run: Run) -> None:
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    tiles = ["test", *(f"{kind}-{place}" for kind in ("helpful", "harmful") for place in range(5))]
    pictures = {"flipped-labels", "lds", *(f"example-{row}-{tile}" for row in range(6) for tile in tiles)}
    assert files == {"index.html", "results.json", "arrays.npz", *(f"pictures/{name}.png" for name in pictures)}


def test_data_are_the_digits_with_some_training_labels_flipped(run: Run) -> None:
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    known = {image.tobytes(): label for image, label in zip(images, digits.target, strict=True)}
    arrays = run.arrays
    train, test = ([image.tobytes() for image in arrays[name]] for name in ("images", "test_images"))
    assert (len(train), len(test)) == (N, M)
    assert not set(train) & set(test)
    assert [known[image] for image in train] == arrays["true_labels"].tolist()
    assert [known[image] for image in test] == arrays["test_labels"].tolist()
    np.testing.assert_array_equal(arrays["flipped"], arrays["labels"] != arrays["true_labels"])
    assert arrays["flipped"].sum() == run.results["flipped_images"] == FLIPPED
    assert set(arrays["labels"].tolist()) == set(range(10))


@pytest.mark.parametrize("name", ["self_influence", "loss"])
def test_rankings_find_flipped_labels_far_beyond_chance(run: Run, name: str) -> None:
    order = sorted(range(N), key=lambda i: -run.arrays[name][i])
    hits = np.cumsum([run.arrays["flipped"][i] for i in order])
    # of FLIPPED images drawn at random, as many flipped ones or more are found with this probability
    assert hypergeom.sf(hits[FLIPPED - 1] - 1, N, FLIPPED, FLIPPED) < 1e-9
    reported = run.results["flipped_labels"]
    np.testing.assert_allclose(reported[name]["curve"], np.concatenate([[0], hits]) / FLIPPED)
    budgets = [round(share * N) for share in reported["inspected"]]
    np.testing.assert_allclose(reported[name]["found"], [hits[budget - 1] / FLIPPED for budget in budgets])
    place = {i: rank for rank, i in enumerate(order)}
    flipped = np.flatnonzero(run.arrays["flipped"])
    won = sum(place[f] < place[i] for f in flipped for i in range(N) if not run.arrays["flipped"][i])
    assert reported[name]["auc"] == pytest.approx(won / (FLIPPED * (N - FLIPPED)))


def test_lds_is_that_of_the_stored_arrays_and_far_beyond_chance(run: Run) -> None:
    scores, masks, outputs = (run.arrays[name] for name in ("scores", "masks", "outputs"))
    assert scores.shape == (N, M)
    assert outputs.shape == (SUBSETS, M)
    predicted = np.array([[sum(scores[mask, j].astype(float)) for j in range(M)] for mask in masks])
    per_target = [spearmanr(predicted[:, j], outputs[:, j]).statistic for j in range(M)]
    np.testing.assert_allclose(run.results["lds"]["per_target"], per_target, atol=1e-12)
    assert run.results["lds"]["mean"] == pytest.approx(np.mean(per_target))

    # exchanged subsets say what chance gives; both sides have ranks without ties, so Spearman is Pearson of ranks
    rng = np.random.default_rng(0)
    a, b = (rankdata(x, axis=0) - (SUBSETS + 1) / 2 for x in (predicted, outputs))
    norm = (a**2).sum(0)
    chance = [((a * b[rng.permutation(SUBSETS)]).sum(0) / norm).mean() for _ in range(1000)]
    assert np.mean(per_target) > 6 * np.std(chance)  # the mean of chance is 0
    low, high = run.results["lds"]["interval_95"]
    assert 0 < low < np.mean(per_target) < high < 1
    assert low > run.results["lds"]["chance_95"][1]
    assert run.results["lds"]["nets"] == SUBSETS


def test_subsets_are_distinct_halves(run: Run) -> None:
    masks = run.arrays["masks"]
    assert masks.shape == (SUBSETS, N)
    assert set(masks.sum(1).tolist()) == {N // 2}
    assert len({mask.tobytes() for mask in masks}) == SUBSETS


def test_examples_are_the_extremes_of_the_scores(run: Run) -> None:
    scores, arrays = run.arrays["scores"], run.arrays
    examples = run.results["examples"]
    assert len({example["test_image"] for example in examples}) == 6
    for example in examples:
        column = scores[:, example["test_image"]].tolist()
        ranked = sorted(column, reverse=True)
        assert example["label"] == arrays["test_labels"][example["test_image"]]
        assert [shown["score"] for shown in example["helpful"]] == ranked[:5]
        assert [shown["score"] for shown in example["harmful"]] == ranked[: -5 - 1 : -1]
        for shown in (*example["helpful"], *example["harmful"]):
            i = shown["train_image"]
            assert shown["score"] == column[i]
            facts = [arrays[name][i] for name in ("labels", "true_labels", "flipped")]
            assert [shown["label"], shown["true_label"], shown["flipped"]] == facts


def test_timings_add_up_and_give_the_throughput(run: Run) -> None:
    seconds = dict(run.results["timings"]["seconds"])
    total = seconds.pop("total")
    assert min(seconds.values()) > 0
    assert total == pytest.approx(sum(seconds.values()))
    grad_dim = (1 * 9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 16 + 1) * 64 + (64 + 1) * 10
    assert run.results["grad_dim"] == grad_dim
    entries = CHECKPOINTS * (N + M) * grad_dim
    projection = run.results["timings"]["projection"]
    assert projection["share"] == pytest.approx(seconds["project"] / total)
    assert projection["gradient_entries_per_second"] * seconds["project"] == pytest.approx(entries)
    assert projection["flop_per_second"] * seconds["project"] == pytest.approx(2 * entries * PROJ_DIM)


class Page(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_page_needs_no_other_file_and_shows_every_picture(run: Run) -> None:
    text = (run.folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"href", "srcset", "data"} & {name for name, _ in page.attributes}
    for reference in ("://", "url(", "@import"):
        assert reference not in text
    sources = [value for name, value in page.attributes if name == "src"]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    shown = sorted(base64.b64decode(source.removeprefix(prefix), validate=True) for source in sources)
    assert shown == sorted(file.read_bytes() for file in (run.folder / "pictures").glob("*.png"))
    flipped = sum(image["flipped"] for e in run.results["examples"] for image in (*e["helpful"], *e["harmful"]))
    assert page.attributes.count(("class", "flipped")) == flipped > 0


def test_pictures_of_digits_are_their_pixels(run: Run) -> None:
    def check(name: str, image: np.ndarray) -> None:
        picture = imread(run.folder / "pictures" / f"{name}.png")
        assert picture.shape == (8, 8, 4)
        for channel in range(3):  # dark ink on white; two roundings to 1/255, of the color map and of the file
            np.testing.assert_allclose(picture[:, :, channel], 1 - image[0], atol=1.01 / 255)

    for row, example in enumerate(run.results["examples"]):
        check(f"example-{row}-test", run.arrays["test_images"][example["test_image"]])
        for kind in ("helpful", "harmful"):
            for place, shown in enumerate(example[kind]):
                check(f"example-{row}-{kind}-{place}", run.arrays["images"][shown["train_image"]])


def test_charts_are_drawn(run: Run) -> None:
    for name in ("flipped-labels", "lds"):
        picture = imread(run.folder / "pictures" / f"{name}.png")
        blue = (picture[:, :, 2] > picture[:, :, 0] + 0.2) & (picture[:, :, 3] > 0.5)
        assert min(picture.shape[:2]) > 400
        assert blue.sum() > 1000  # the curve of TRAK, its points and bars
        assert picture[0, 0, 3] == 0  # transparent, for a light and a dark page


def test_page_and_summary_state_the_figures(run: Run) -> None:
    text = (run.folder / "index.html").read_text(encoding="utf-8")
    lds, share = run.results["lds"], run.results["timings"]["projection"]["share"]
    found = run.results["flipped_labels"]["self_influence"]["found"][2]
    for figure in (f"{lds['mean']:.3f}", f"{found:.0%}", f"{share:.1%}"):
        assert figure in text
        assert figure in run.stdout
    assert f"{lds['pixel_similarity']:.3f}" in text
    assert str(run.folder.resolve() / "index.html") in run.stdout


def test_outputs_are_log_odds_of_the_right_class() -> None:
    logits = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    labels = torch.tensor([0, 9, 3, 3, 7])
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    p = torch.stack([p[:, i, label] for i, label in enumerate(labels)], dim=1)
    torch.testing.assert_close(digits.margins(logits, labels), (p / (1 - p)).log(), rtol=1e-9, atol=1e-9)


def test_pixel_similarity_is_the_signed_cosine_of_centered_images() -> None:
    data = digits.load_data(settings(), np.random.default_rng(0))
    center = data.images.double().mean(0)
    similarity = digits.pixel_similarity(data)
    assert similarity.shape == (N, M)
    for i, j in ((0, 0), (17, 5), (399, 59)):
        a, b = (data.images[i].double() - center).flatten(), (data.test_images[j].double() - center).flatten()
        cosine = a @ b / (a.norm() * b.norm())
        expected = cosine if data.labels[i] == data.test_labels[j] else -cosine
        assert similarity[i, j] == pytest.approx(expected.item(), abs=64 * 2**-23)  # float32 sums of 64 products


def test_clock_counts_a_stage_within_another_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now)
    clock = demo.Clock()
    with clock("outer"):
        now += 1
        for _ in range(2):
            with clock("middle"):
                now += 10
                with clock("inner"):
                    now += 100
        now += 2
    with clock("inner"):
        now += 1000
    assert clock.seconds == {"inner": 1200, "middle": 20, "outer": 3}


def test_a_failed_run_leaves_an_earlier_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("earlier")

    def fail(data: digits.Data, nets: Any, settings: Any, folder: Path, clock: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "features").write_text("half of them")
        raise RuntimeError("stopped here")

    monkeypatch.setattr(demo, "attribute", fail)
    with pytest.raises(RuntimeError, match="stopped here"):
        demo.run(tmp_path, settings(epochs=1))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "earlier"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("blocked", ["", "pictures"])
def test_output_that_cannot_be_written_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    output = tmp_path / "output"
    if blocked:
        output.mkdir()
    (output / blocked).write_text("a file")
    monkeypatch.setattr(demo, "load_data", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(OSError, match="output"):
        demo.run(output, settings())
    assert (output / blocked).read_text() == "a file"
