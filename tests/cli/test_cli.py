"""The command line: what it prints, and what it says when it can't do as asked."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import trak_fast
from trak_fast.cli import main
from trak_fast.demo import digits
from trak_fast.demo import run as demo


def test_module_and_version() -> None:
    command = [sys.executable, "-W", "error", "-m", "trak_fast", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == f"trak-fast {version('trak_fast')}\n"
    assert process.stderr == ""


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == trak_fast.info()


def test_info_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"version": "1.2", "instruction_sets": ["one", "two"], "cuda_version": None, "cuda_devices": []}
    monkeypatch.setattr(trak_fast, "info", lambda: facts)
    assert main(["info"]) == 0
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [(name, value.strip()) for name, value in lines] == [
        ("version", "1.2"), ("instruction sets", "one, two"), ("cuda version", "none"), ("cuda devices", "none"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["attribute"], "attribute"),
        (["info", "--yaml"], "--yaml"),
        (["demo", "--subsets", "many"], "--subsets: invalid int value: 'many'"),
        (["demo", "--subsets", "1"], "subsets must be in [2, 100000], not 1"),
        (["demo", "--proj-dim", "0"], "proj_dim must be in [1, 4294967296], not 0"),
        (["demo", "--checkpoints", "0"], "checkpoints must be in [1, 1000], not 0"),
        (["demo", "--nets-per-subset", "0"], "nets_per_subset must be in [1, 1000], not 0"),
        (["demo", "--epochs", "0"], "epochs must be in [1, 10000], not 0"),
        (["demo", "--seed", "-1"], "seed must be in [0, 4294967295], not -1"),
        (["demo", "--train-size", "1797"], "train_size must be in [256, 1787], not 1797"),
        (["demo", "--test-size", "451"], "test_size must be in [12, 450], not 451"),
        (["demo", "--flipped", "0"], "flipped must be in [1/1347, 0.5], not 0.0"),
        (["demo", "--flipped", "nan"], "flipped must be in [1/1347, 0.5], not nan"),
        (["demo", "--threads", "0"], "threads must be at least 1, not 0"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, restore_threads: None) -> None:
    seen = []

    def run(output: str, settings: digits.Settings) -> None:
        seen.append((output, settings, torch.get_num_threads()))
        raise OSError("enough")

    monkeypatch.setattr(demo, "run", run)
    values = {
        "seed": 7, "proj_dim": 6, "checkpoints": 5, "subsets": 4, "nets_per_subset": 3, "flipped": 0.25, "epochs": 2,
        "train_size": 300, "test_size": 20,
    }  # fmt: skip
    options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["demo", "--output", "there", "--threads", "1", *options]) == 1
    assert seen == [("there", digits.Settings(**values), 1)]


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], restore_threads: None) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--output", str(tmp_path / "taken")]) == 1
    error = capsys.readouterr().err
    assert "cannot write to the output folder" in error
    assert str(tmp_path / "taken") in error


def test_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_packages_are_named_and_info_works(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # an import of it now fails
    for name in ("demo", "demo.run", "demo.page", "demo.digits"):
        monkeypatch.delitem(sys.modules, f"trak_fast.{name}", raising=False)
    monkeypatch.delattr(trak_fast, "demo", raising=False)
    assert main(["info"]) == 0
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert f"needs {missing}" in error
    assert "pip install scikit-learn matplotlib" in error
