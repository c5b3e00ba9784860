"""The command line: its output, and its messages when it cannot do as asked."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import trak_fast
from trak_fast.bench import runner, tables
from trak_fast.bench.process import WorkerError
from trak_fast.cli import main, terminal
from trak_fast.demo import digits
from trak_fast.demo import run as demo
from trak_fast.plan import rates


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
        ([], "one of lm, demo, bench, plan, lds, info"),
        (["--yaml"], "a command is required"),
        (["attribute"], "attribute"),
        (["info", "--yaml"], "--yaml"),
    ],
)
def test_unknown_commands_and_flags_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


REQUIRED = {"demo": [], "bench": [], "plan": ["--params", "10", "--proj-dim", "8", "--samples", "9"]}
INTEGERS = {  # and the least and the largest value of each
    "demo": {
        "--proj-dim": (1, 2**32), "--checkpoints": (1, 1000), "--subsets": (2, 100_000), "--nets-per-subset": (1, 1000),
        "--epochs": (1, 10_000), "--train-size": (256, 1785), "--test-size": (12, 450), "--seed": (0, 2**32 - 1),
        "--threads": (1, 1024),
    },
    "bench": {
        "--batches": (1, 2**32), "--grad-dims": (1, 2**48), "--proj-dims": (1, 2**32), "--check-dims": (1, 2**48),
        "--check-proj-dim": (1, 2**32), "--threads": (1, 1024),
    },
    "plan": {
        "--params": (1, 2**48), "--proj-dim": (1, 2**32), "--samples": (1, 2**48), "--targets": (0, 2**48),
        "--checkpoints": (1, 2**32), "--batch": (1, 2**32), "--tokens": (1, 2**48), "--processes": (1, 2**32),
    },
}  # fmt: skip
FEW = {"plan": {"--nonzeros": "1, 2, 4, 8"}}
"""Integers of which only a few are taken."""

REALS = {
    "demo": {"--flipped": ("0", "0.51")}, "bench": {"--budget": ("0", "1e8")}, "plan": {"--gradient-seconds": ("1e10",)}
}  # fmt: skip
CHOICES = {
    "bench": {
        "--device": "cpu, cuda",
        "--dtypes": "float32, bfloat16, float16",
        "--proj-types": "rademacher, normal, sjlt",
    },
    "plan": {
        "--device": "cpu, cuda",
        "--dtype": "float32, bfloat16, float16",
        "--proj-type": "rademacher, normal, sjlt",
    },
}
NOT_FINITE = ("nan", "inf", "-1e400", "1" + "0" * 400)


def wrong_arguments() -> Iterator[tuple[str, str, str, str]]:
    """Command, flag, wrong value, and the expression that the end of the message matches."""
    for command, flags in INTEGERS.items():
        for flag, (low, high) in flags.items():
            for value in (low - 1, -1, high + 1, 10**30):
                yield command, flag, str(value), rf"in \[{low}, [0-9* -]+\], not {value}"
            for text in (*NOT_FINITE, "1.5", "many", ""):
                yield command, flag, text, r"an integer, not (str|float) \(.+\)"
    for command, few in FEW.items():
        for flag, allowed in few.items():
            for value in (0, -1, 3, 10**30):
                yield command, flag, str(value), rf"one of {allowed}, not {value}"
            for text in (*NOT_FINITE, "1.5", "many", ""):
                yield command, flag, text, r"an integer, not (str|float) \(.+\)"
    for command, reals in REALS.items():
        for flag, values in reals.items():
            for text in (*values, "-1", *NOT_FINITE):
                yield command, flag, text, r"in [(\[]\S+, \S+\], not \S+"
            yield command, flag, "many", r"a number, not str \('many'\)"
    for command, choices in CHOICES.items():
        for flag, allowed in choices.items():
            for text in ("zzz", ""):
                yield command, flag, text, re.escape(f"one of {str(allowed.split(', '))[1:-1]}, not {text!r}")
    yield "bench", "--only", "zzz", r"part of one of 'trak_fast .+', .*'scikit-learn sparse', not 'zzz'"


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Makes the commands fail the test where they begin to work, and looks for files that they wrote."""
    for module, name in ((demo, "run"), (runner.Run, "run"), (rates, "calibrate")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("ran"))
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "flag", "value", "allowed"), list(wrong_arguments()))
def test_every_flag_refuses_wrong_values(
    command: str, flag: str, value: str, allowed: str, nothing_runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *REQUIRED[command], f"{flag}={value}"]) == 2
    name = flag.removeprefix("--").replace("-", "_")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"trak-fast: error: {name} must be {allowed}\n", captured.err)


def test_no_flag_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """The switches, the files and the help have no wrong values; files that are missing or no results come below."""
    without = {"--help", "--json", "--full", "--half", "--output", "--compare", "--bench", "--only"}
    for command in REQUIRED:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out.partition("runs of trak-fast lm:")[0]  # whose flags have tests of their own
        flags = set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)) - without
        assert flags == {*INTEGERS[command], *FEW.get(command, {}), *REALS[command], *CHOICES.get(command, {})}


@pytest.mark.parametrize("command", ["bench", "plan"])
def test_a_device_that_is_not_there(
    command: str, nothing_runs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, *REQUIRED[command], "--device", "cuda"]) == 2
    error = "trak-fast: error: device must be 'cpu' where torch finds no CUDA device, not 'cuda'\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("command", ["bench", "plan"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: .*No such file"),
        (b"", "cannot read"),
        (b"\xff\x00", "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b"[1]", "holds no results of trak-fast bench"),
        (b'{"format": 2, "timings": []}', "holds no results of trak-fast bench"),
        (b'{"format": 1, "timings": 5}', "holds no results of trak-fast bench"),
        (b'{"format": 1, "timings": [], "checks": []}', "holds no results of trak-fast bench"),
    ],
)
def test_files_that_hold_no_results(
    command: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    options = ["--bench", str(path)] if command == "plan" else ["--compare", str(path), str(path)]
    assert main([command, *REQUIRED[command], *options]) == 1
    assert re.fullmatch(f"trak-fast: error: .*{message}.*\n", capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == ([] if content is None else [path])


@pytest.mark.parametrize("command", ["demo", "bench"])
@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/nowhere"])
def test_output_that_cannot_be_written(
    command: str,
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    restore_threads: None,
) -> None:
    monkeypatch.setattr(demo, "load_data", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(runner.Run, "run", lambda *_: pytest.fail("ran"))
    (tmp_path / "taken").write_text("")
    assert main([command, "--output", str(tmp_path / place)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch("trak-fast: error: cannot write to the output folder: .+\n", error)
    assert str(tmp_path / place) in error
    assert (tmp_path / "taken").read_text() == ""


def test_a_folder_whose_disk_cannot_be_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def calibrate(_: object) -> None:
        raise PermissionError(13, "Permission denied", "here")

    monkeypatch.setattr(rates, "calibrate", calibrate)
    assert main(["plan", *REQUIRED["plan"]]) == 1
    error = "trak-fast: error: cannot time the disk of this folder: [Errno 13] Permission denied: 'here'\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WorkerError("took longer than 120 s"), "the measurements ended early: took longer than 120 s"),
        (OSError("No space left"), "cannot write to the output folder: No space left"),
    ],
)
def test_a_benchmark_that_fails_later(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr(runner.Run, "run", run)
    assert main(["bench", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"trak-fast: error: {message}\n"


@pytest.mark.parametrize(
    "error", [MemoryError("3 GiB"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", "--threads", "1"]) == 1
    assert capsys.readouterr().err == f"trak-fast: error: this machine has too little memory: {error}\n"


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


class Terminal(io.TextIOWrapper):
    """An output with an encoding."""

    def __init__(self, encoding: str, errors: str = "strict") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors=errors, newline="")

    def content(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("ascii", "strict", b"2 x 3 >= sqrt 2 - 1.2 us +/- e ?"),
        ("ascii", "surrogateescape", b"2 x 3 >= sqrt 2 - 1.2 us +/- e ?"),
        ("latin-1", "strict", b"2 \xd7 3 >= sqrt 2 - 1.2 us \xb1 \xe9 ?"),
        ("utf-8", "strict", "2 × 3 ≥ √2 − 1.2 µs ± é 字".encode()),
        ("ascii", "xmlcharrefreplace", b"2 &#215; 3 &#8805; &#8730;2 &#8722; 1.2 &#181;s &#177; &#233; &#23383;"),
    ],
)
def test_a_terminal_gets_the_letters_that_it_has(
    encoding: str, errors: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "2 × 3 ≥ √2 − 1.2 µs ± é 字"
    terminal_ = Terminal(encoding, errors)
    monkeypatch.setattr(trak_fast, "info", lambda: {"version": text})
    monkeypatch.setattr(sys, "stdout", terminal_)
    assert main(["info"]) == 0
    assert terminal_.content().split(None, 1)[1].rstrip(b"\n") == written.replace(
        b"1.2 us", b"1.2 \xb5s" if encoding == "latin-1" else b"1.2 us"
    )


def test_bytes_of_file_names_reach_the_terminal_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_ = Terminal("ascii")
    monkeypatch.setattr(trak_fast, "info", lambda: {"version": b"a\xff\xe9 b".decode("utf-8", "surrogateescape")})
    monkeypatch.setattr(sys, "stdout", terminal_)
    assert main(["info"]) == 0
    assert terminal_.content().endswith(b"a\xff\xe9 b\n")


def test_all_letters_of_the_output_have_others_in_ascii() -> None:
    folder = Path(trak_fast.__file__).parent
    files = [
        folder / name
        for name in ("plan/predict.py", "bench/tables.py", "bench/units.py", "demo/page.py", "bench/runner.py")
    ]
    letters = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                letters |= {letter for letter in node.value if not letter.isascii()}
    assert letters >= {"×", "±", "√", "–", "¹"}
    missing = letters - set(terminal.IN_ASCII)
    assert not missing


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"]])
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trak_fast", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_reader_that_goes_while_a_command_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The error of a pipe is not taken for one of the folder that results are written to."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    def show(_: object) -> str:
        monkeypatch.setattr(sys, "stdout", Gone())
        return "table"

    monkeypatch.setattr(runner.Run, "run", lambda _: None)
    monkeypatch.setattr(tables, "terminal", show)
    assert main(["bench", "--output", str(tmp_path)]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("buffered", [True, False])
def test_a_closed_output_and_a_full_one(buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-m", "trak_fast", "info"]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(shell, stderr=subprocess.PIPE, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
    message = b"trak-fast: error: cannot write the output: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)
