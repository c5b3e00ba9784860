"""`trak-fast plan --model`: the prediction of `trak-fast lm --dry-run`, and flags of one kind of plans alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from libraries import needs
from model_folders import edit, save

from trak_fast.cli import main
from trak_fast.lm import forecast

needs("transformers")
needs("tokenizers")

NUMBERS = ["--params", "10", "--proj-dim", "8", "--samples", "9"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes a model and documents, and returns the flags that name them; the folder to work in is empty."""
    save("gpt2", tmp_path / "model")
    letters = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    edit(tmp_path / "model" / "tokenizer.json", pre_tokenizer=letters)
    lines = [json.dumps({"text": "abc" * (1 + i % 4)}) + "\n" for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "query.jsonl").write_text(lines[2])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return ["--train", str(tmp_path / "train.jsonl"), "--query", str(tmp_path / "query.jsonl")]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each step take a second, and the process begin with the prediction."""

    def second(call: Any) -> float:
        call()
        return 1.0

    monkeypatch.setattr(forecast, "_time", second)
    monkeypatch.setattr(forecast, "_seconds_of_process", lambda: 0.0)
    monkeypatch.setattr(forecast._Trial, "_memory", lambda self: 123)


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("method", [["--method", "cosine"], ["--batch-tokens", "32", "--max-tokens", "8"]])
def test_the_prediction_is_that_of_a_dry_run(
    method: list[str], files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", "../model", *files, *method, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(Path().iterdir())
    assert main(["lm", "../model", *files, *method, "--dry-run", "--json"]) == 0
    assert planned == json.loads(capsys.readouterr().out)
    assert planned["memory_bytes"] == {"peak": 123}
    steps = {name: seconds for name, seconds in planned["seconds"].items() if name != "total"}
    assert planned["seconds"]["total"] == pytest.approx(sum(steps.values()))


@pytest.mark.usefixtures("timed")
def test_the_same_lines_are_printed_but_for_the_folder(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "../model", *files, "--params", "linear"]) == 0
    planned = capsys.readouterr().out
    assert main(["lm", "../model", *files, "--params", "linear", "--dry-run", "--out", "run"]) == 0
    assert planned == capsys.readouterr().out.replace(" of disk in run/", " of disk")
    assert "12 documents" in planned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m", "--train", "t", "--samples", "9"], "--samples must be left out with --model"),
        (["--model", "m", "--train", "t", "--half", "--tokens", "0"], "--half, --tokens must be left out with --model"),
        (["--model", "m", "--train", "t", "--params", "1e9"], "--params must be names with --model"),
        (["--model", "m"], "--train must be given with --model"),
        ([*NUMBERS, "--train", "t"], "--train must be left out without --model"),
        ([*NUMBERS, "--batch-tokens", "0", "--method", "trak"], "--batch-tokens, --method must be left out without"),
        ([*NUMBERS, "--params", "10", "20"], "--params must be one number without --model, not several"),
        (["--samples", "9"], "--params, --proj-dim must be given, or --model and --train"),
    ],
)
def test_flags_of_the_other_kind_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_the_command_refuses_the_plan_refuses(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "../model", *files, "--method", "best"]) == 2
    assert "--method must be one of" in capsys.readouterr().err
    assert main(["plan", "--model", "../missing", *files]) == 2
    assert "missing" in capsys.readouterr().err
    assert not list(Path().iterdir())
