"""The benchmark's figures against values by hand, its tables and page, and the file of its results."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trak_fast.bench import figures, page, quality, tables, units, worker
from trak_fast.bench.case import Case
from trak_fast.bench.environment import Device, Environment, Machine, TorchBuild
from trak_fast.bench.results import (
    Absent,
    Ceilings,
    Check,
    FirstCall,
    Omission,
    Present,
    Quality,
    Results,
    Timing,
    load,
    save,
)
from trak_fast.bench.settings import defaults

CASE = Case(32, 1000, 100, "float32", "rademacher", "cpu")
SPARSE_CASE = dataclasses.replace(CASE, proj_type="sjlt")
CEILINGS = Ceilings(1e9, {"float32": 1e11, "bfloat16": 1e13, "float16": 1e11})


def timing(name: str, rounds: list[list[float]], case: Case = CASE) -> Timing:
    return figures.summarize(name, case, FirstCall(0.0, rounds[0][0], 3 << 20), rounds, CEILINGS)


def results(*timings: Timing) -> Results:
    case = Case(1, 650, 512, "float32", "rademacher", "cpu")
    found = Quality(
        repeatable=True, remade=True, error=2.5e-7, matrix="reference", column_dim=511.0, equal_columns=3,
        norm_distortion=0.0625, inner_distortion=0.0442, effective_dim=512.0,
    )  # fmt: skip
    return Results(
        started="2026-01-02T03:04:05+00:00", finished=True, left={}, seconds=1.0,
        settings=dataclasses.replace(defaults("cpu"), threads=2),
        environment=Environment(
            machine=Machine("Linux", "3.11", "a <fast> one", 2, 1 << 30), trak_fast={"version": "0.1"},
            torch=TorchBuild("2.9", None, ""), variables={},
        ),
        ceilings=CEILINGS, candidates={"fast_jl": Absent("missing", "no <such> thing")}, timings=list(timings),
        checks=[Check("trak_fast amx", case, 0.5, found)],
    )  # fmt: skip


def test_rates_by_hand() -> None:
    summary = timing("a", [[0.1, 0.2], [0.3, 0.4, 0.5]])
    assert summary.median == 0.3
    assert (summary.low, summary.high) == (0.2, 0.4)
    assert summary.flop_per_second == pytest.approx(2 * 32 * 1000 * 100 / 0.3)
    assert summary.gradient_bytes_per_second == pytest.approx(128_000 / 0.3)
    assert summary.samples_per_second == pytest.approx(32 / 0.3)
    assert summary.warm


def test_a_timing_without_rounds_is_its_first_call() -> None:
    cold = figures.summarize("a", CASE, FirstCall(0.5, 2.0, None), [], None)
    assert (cold.warm, cold.rounds, cold.median) == (False, [[2.0]], 2.0)
    assert cold.floor_seconds is cold.of_floor is None
    assert figures.with_floor(cold, CEILINGS).of_floor == pytest.approx(figures.floor_seconds(CASE, CEILINGS) / 2)


def test_floor_by_hand() -> None:
    moved = 32 * 1000 * 4 + 32 * 100 * 4
    assert figures.floor_seconds(CASE, CEILINGS) == pytest.approx(moved / 1e9)  # 141 µs, where the product takes 64
    larger = Case(32, 1000, 1000, "float32", "normal", "cpu")
    assert figures.floor_seconds(larger, CEILINGS) == pytest.approx(2 * 32 * 1000 * 1000 / 1e11)
    half = Case(32, 1000, 1000, "bfloat16", "normal", "cpu")
    assert figures.floor_seconds(half, CEILINGS) == pytest.approx((32 * 1000 * 2 + 32 * 1000 * 4) / 1e9)
    entry = timing("a", [[1e-3]])
    assert entry.of_floor == pytest.approx(moved / 1e9 / 1e-3)
    sparse = timing("a", [[1e-3]], SPARSE_CASE)
    assert not sparse.dense
    assert sparse.flop_per_second == pytest.approx(2 * 32 * 1000 * 4 / 1e-3)
    assert sparse.of_floor == pytest.approx(moved / 1e9 / 1e-3)


def test_the_better_ceiling_counts() -> None:
    found = Ceilings(2e9, {"float32": 9e10, "bfloat16": 2e13, "float16": 1e11})
    assert figures.better(None, found) == found
    assert figures.better(CEILINGS, found) == Ceilings(2e9, {"float32": 1e11, "bfloat16": 2e13, "float16": 1e11})


def test_changes_beyond_noise() -> None:
    other = Case(64, 1000, 100, "float32", "rademacher", "cpu")
    before = results(
        timing("faster", [[1.0], [1.1], [0.9]]),
        timing("slower", [[1.0], [1.1], [0.9]]),
        timing("noisy", [[1.0], [2.0], [0.5]]),
        timing("hardly", [[1.0], [1.0], [1.0]]),
        timing("once", [[1.0]]),
        timing("gone", [[1.0], [1.0]]),
        timing("elsewhere", [[1.0], [1.0]]),
    )
    after = results(
        timing("faster", [[0.5], [0.55], [0.45]]),
        timing("slower", [[1.5], [1.6], [1.4]]),
        timing("noisy", [[0.8], [0.8], [0.8]]),
        timing("hardly", [[1.04], [1.04], [1.04]]),
        timing("once", [[0.1], [0.1]]),
        timing("elsewhere", [[1.0], [1.0]], other),
    )
    changes = {change.candidate: change for change in figures.compare(before, after)}
    assert {name: change.verdict for name, change in changes.items()} == {
        "faster": "faster", "slower": "slower", "noisy": "same", "hardly": "same", "once": "one sample",
    }  # fmt: skip
    assert changes["faster"].ratio == pytest.approx(2)
    text = tables.compared(list(changes.values()))
    assert re.search(r"slower +B = 32, D = 1,000, .* 1 s +1.5 s +× 0.67 +slower", text)
    assert re.search(r"faster .* 1 s +500 ms +× 2.00 +faster", text)
    assert text.endswith("2 of 5 timings are the same within noise, 1 have too few samples to tell")


def test_a_slow_stretch_is_no_change() -> None:
    """Many samples of few rounds must not count as independent ones."""
    before = results(timing("a", [[1.0] * 5, [1.0] * 5, [1.5] * 5]))
    after = results(timing("a", [[1.2] * 5, [1.2] * 5, [1.25] * 5]))
    assert figures.compare(before, after)[0].verdict == "same"


def test_units() -> None:
    assert [units.seconds_text(value) for value in (12.34, 0.01234, 1.234e-5, 1.2e-9)] == [
        "12.3 s", "12.3 ms", "12.3 µs", "1.2 ns",
    ]  # fmt: skip
    assert [units.bytes_text(value) for value in (None, 5, 1536, 3 << 20, 5 << 30)] == [
        "?", "5 B", "1.5 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip
    assert units.rate_text(2.5e12, "FLOP/s") == "2.5 TFLOP/s"


def test_table_of_the_terminal() -> None:
    text = tables.terminal(results(timing("slow one", [[0.2]]), timing("trak_fast amx", [[0.1, 0.1], [0.1]])))
    lines = text.splitlines()
    assert "copy 1 GB/s; product: float32 100 GFLOP/s, bfloat16 10 TFLOP/s" in lines[1]
    ours, other = (next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("trak_fast", "slow"))
    assert ours < other  # the fastest first
    assert re.fullmatch(
        r"trak_fast amx +100 ms +100 ms – 100 ms +64 MFLOP/s +1.28 MB/s +320 /s +0.1% +3.0 MiB", lines[ours]
    )
    assert re.search(r"trak_fast amx +2.5e-07 +6.25% +4.42% +512 +511 +3 +yes", text)
    assert "independent entries: norms 6.25%, inner products 4.42%" in text
    assert "fast_jl: no <such> thing" in text


def test_the_sparse_kind_stands_beside_the_others() -> None:
    ours = [timing("trak_fast amx", [[0.1]]), timing("trak_fast amx", [[0.02]], SPARSE_CASE)]
    slower = [timing("trak_fast avx2", [[0.03]], SPARSE_CASE), timing("sjlt", [[0.001]], SPARSE_CASE)]
    whole = results(*ours, timing("slow", [[0.2]]), *slower)
    text = tables.terminal(whole)
    assert text.count("trak_fast amx with sjlt takes 20 ms; the fastest of the above takes 5 times as long") == 1
    assert "| trak_fast amx, sjlt | 20 ms | 0.2 | 3.0 MiB |\n| trak_fast amx | 100 ms | 1 |" in tables.markdown(whole)
    assert "with sjlt" not in tables.terminal(results(ours[0], slower[1]))


def test_cases_that_are_not_for_a_candidate_are_one_line() -> None:
    reason = "it does not have kind sjlt, but rademacher, normal"
    other = dataclasses.replace(SPARSE_CASE, batch=1)
    whole = results(timing("trak_fast amx", [[0.1]]))
    whole.timings += [Omission("a", case, "skipped", reason) for case in (SPARSE_CASE, other)]
    whole.timings += [Omission("b", case, "failed", "out of luck\nmore") for case in (SPARSE_CASE, other)]
    whole.checks += [Omission("a", other, "skipped", reason), Omission("a", CASE, "skipped", "no memory")]
    assert tables.absent(whole) == [
        "fast_jl: no <such> thing",
        f"a, 3 cases: {reason}",
        "b, B = 32, D = 1,000, k = 100, float32, sjlt: out of luck",
        "b, B = 1, D = 1,000, k = 100, float32, sjlt: out of luck",
        "a, B = 32, D = 1,000, k = 100, float32, rademacher: no memory",
    ]


def test_page() -> None:
    larger = Case(32, 4000, 100, "float32", "rademacher", "cpu")
    html = page.page(
        results(timing("trak_fast amx", [[0.1]]), timing("trak_fast amx", [[0.3]], larger), timing("slow", [[0.2]]))
    )
    assert html.count("<svg") == html.count("</svg>") == 3  # against D, memory, roofline
    assert "Speed against gradient size, D" in html
    assert "no &lt;such&gt; thing" in html
    assert "a &lt;fast&gt; one" in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r'(src|href)="(?!#|data:)', html.replace("http://www.w3.org", ""))
    assert "<td>300 ms</td>" in html


def test_table_for_a_page() -> None:
    measured = results(timing("trak_fast amx", [[0.1]]), timing("slow", [[2.0]]))
    text = tables.replace_table("# A\n<!-- bench -->\nold\n<!-- /bench -->\nend\n", measured)
    assert text == (
        "# A\n<!-- bench -->\n"
        "| B = 32, D = 1,000, k = 100, float32, rademacher | median | times as long as ours | extra memory |\n"
        "| --- | --- | --- | --- |\n| trak_fast amx | 100 ms | 1 | 3.0 MiB |\n| slow | 2 s | 20 | 3.0 MiB |\n"
        "<!-- /bench -->\nend\n"
    )
    with pytest.raises(ValueError, match="<!-- bench -->"):
        tables.replace_table("# A\n", measured)


def test_distortion_by_hand() -> None:
    grads = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    projected = torch.tensor([[3.0 * 1.1**0.5, 0.0], [0.4, (0.9 * 4 - 0.16) ** 0.5]], dtype=torch.float64)
    found = quality.distortion(grads, projected)
    assert found.norms == pytest.approx(0.1)
    assert found.effective_dim == pytest.approx(200)
    assert found.inner_products == pytest.approx(3 * 1.1**0.5 * 0.4 / 6)


def test_columns_by_hand() -> None:
    half = 2**-0.5
    columns = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [half, half]], dtype=torch.float64)
    for block in (1, 2, 1024):
        found = quality.columns(columns, block)
        assert found.equal_columns == 1
        assert found.column_dim == pytest.approx(3 / (1 + 0.5 + 0.5), rel=1e-6)


def test_peak_memory_sees_what_was_freed() -> None:
    memory = worker.PeakMemory("cpu")
    torch.ones(48 << 18)  # 48 MiB
    peak = memory.bytes()
    if peak is None:
        pytest.skip("this system does not tell")
    assert 46 << 20 < peak < 64 << 20


REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = sorted((REPOSITORY / "benchmarks" / "results").glob("*-bench.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_are_read_and_written_byte_for_byte(path: Path, tmp_path: Path) -> None:
    save(tmp_path / "again.json", load(path))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_pages_follow_from_the_results(path: Path) -> None:
    """All but the plots, which are as the version of matplotlib draws them."""

    def without_plots(html: str) -> list[str]:
        return re.sub("<svg.*?</svg>", "", html, flags=re.DOTALL).splitlines()

    published = path.with_suffix(".html").read_text(encoding="utf-8")
    assert without_plots(page.page(load(path))) == without_plots(published)


def test_the_table_of_the_page_about_speed_follows_from_published_results() -> None:
    text = (REPOSITORY / "docs" / "speed.md").read_text()
    assert any(tables.replace_table(text, load(path)) == text for path in PUBLISHED)


def every_entry() -> Results:
    """Results with an entry of each type, on a GPU that this machine need not have."""
    whole = results(timing("a", [[0.1, 0.2], [0.3]]), timing("sparse", [[1.0]], SPARSE_CASE))
    whole.timings.append(Omission("b", CASE, "failed", "RuntimeError: out of luck"))
    whole.checks.append(Omission("b", CASE, "skipped", "it does not have dtype float32, but float16"))
    whole.candidates |= {"a": Present("1.0", 10, 0.5), "b": Absent("failed", "ValueError")}
    whole.left = {"a": 3}
    whole.settings = dataclasses.replace(whole.settings, device="cuda", only=("a", "b"))
    whole.environment = dataclasses.replace(whole.environment, device=Device("H100", "9.0", 80 << 30, 132))
    return whole


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    for whole in (results(), every_entry(), dataclasses.replace(every_entry(), ceilings=None)):
        save(tmp_path / "results.json", whole)
        assert load(tmp_path / "results.json") == whole


def changed(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """Makes a function that sets a value deep in an object."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("format", to=2),
        changed("format", to=None),
        changed("unknown", to=1),
        changed("seconds", to="1"),
        changed("finished", to=1),
        changed("left", to=[]),
        changed("left", "a", to=1.5),
        changed("settings", to=None),
        changed("settings", "batches", to=4),
        changed("settings", "batches", to=[0]),
        changed("settings", "threads", to=True),
        changed("environment", "machine", to={}),
        changed("ceilings", "flop_per_second", "float32", to=None),
        changed("candidates", "a", "status", to="missing"),
        changed("candidates", "a", "version", to=1),
        changed("timings", to={"a": 1}),
        changed("timings", 0, to=3),
        changed("timings", 0, "status", to="failed"),
        changed("timings", 0, "rounds", to=[]),
        changed("timings", 0, "rounds", to=[[]]),
        changed("timings", 0, "median", to=0),
        changed("timings", 0, "case", "batch", to="32"),
        changed("timings", 0, "extra", to=1),
        changed("checks", 0, "found", to={}),
        lambda content: content.pop("checks"),
        lambda content: content["timings"][0].pop("median"),
        lambda content: content["timings"][0].pop("status"),
    ],
)
def test_other_files_are_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(path, every_entry())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results.json holds no results of trak-fast bench \(format 1\)"):
        load(path)
