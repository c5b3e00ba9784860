"""The documentation's code: it runs, and prints what the pages say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from libraries import needs

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """Finds the languages and contents of a page's code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def script_of(found: list[tuple[str, str]]) -> str:
    """Joins the Python blocks."""
    return "\n".join(content for language, content in found if language == "python")


def execute(command: list[str], folder: Path, python: str = sys.executable) -> str:
    """Runs a command that finds this `python`, and what is installed beside the usual one; returns what it printed."""
    path = os.pathsep.join([*(str(Path(program).parent) for program in (python, sys.executable)), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["first-run.md", "own-task.md", "language-models.md"])
def test_pages_of_one_script(tmp_path: Path, page: str) -> None:
    if page == "language-models.md":
        needs("transformers")
    found = blocks(page)
    assert len(found) > 4
    printed = execute([sys.executable, "-W", "error", "-c", script_of(found)], tmp_path)
    for language, content in found:
        assert language in ("python", "text")
        if language == "text":
            assert content in printed


def test_the_page_about_evaluation(tmp_path: Path) -> None:
    """The Python blocks are one script, whose files the commands read."""
    found = blocks("evaluate.md")
    execute([sys.executable, "-W", "error", "-c", script_of(found)], tmp_path)
    commands = [shlex.split(content) for language, content in found if language == "bash"]
    texts = [content for language, content in found if language == "text"]
    assert len(commands) == 1
    for (program, *words), text in zip(commands, texts, strict=True):
        assert program == "trak-fast"
        assert execute([sys.executable, "-m", "trak_fast", *words], tmp_path) == text


NUMBER = re.compile(r"[+-]?\d+\.\d+")


def assert_alike(printed: str, text: str) -> None:
    """Compares what was printed with a page's text.

    A line of dots stands for any lines, the prediction of a run's needs for any other, and numbers with a point may
    differ by 0.1 or a tenth of them, as models do that were trained on different processors.
    """
    pattern = ""
    for line in text.splitlines(keepends=True):
        if line == "…\n":
            pattern += "(?:.*\n)*"
        elif line.startswith("needs"):
            pattern += "needs .*\n"
        else:
            pattern += f"({NUMBER.pattern})".join(re.escape(part) for part in NUMBER.split(line))
    found = re.fullmatch(pattern, printed)
    assert found, f"{printed}\n--- is not ---\n{text}"
    shown = [float(number) for line in text.splitlines() if line[:5] != "needs" for number in NUMBER.findall(line)]
    assert [float(number) for number in found.groups()] == pytest.approx(shown, abs=0.1, rel=0.1)


@pytest.mark.parametrize("page", ["trace.md", "select.md", "clean.md"])
def test_pages_about_commands_of_language_models(tmp_path: Path, page: str) -> None:
    """Blocks run one after the other; a text is what was printed since the text before."""
    needs("transformers")
    if page == "select.md":
        needs("peft")
    printed = ""
    for language, content in blocks(page):
        if language == "text":
            assert_alike(printed, content)
            printed = ""
        elif language == "python":
            printed += execute([sys.executable, "-W", "error", "-c", content], tmp_path)
        else:
            assert language == "bash"
            command = 'trak-fast() { python -m trak_fast "$@"; }\n' + content
            printed += execute(["bash", "-euc", command], tmp_path)
    assert not printed


@pytest.mark.parametrize("library", ["faiss", "pyarrow"])
def test_the_page_about_export(tmp_path: Path, library: str) -> None:
    """Each library's block needs the first one, not that of the other library."""
    needs(library)
    first, printed, *others = blocks("export.md")
    start = next(i for i, (_, content) in enumerate(others) if f"import {library}" in content)
    found = [first, printed, *others[start : start + 2]]
    output = execute([sys.executable, "-W", "error", "-c", script_of(found)], tmp_path)
    assert output == "".join(content for language, content in found if language == "text")


def test_the_page_about_clusters(tmp_path: Path) -> None:
    """Python blocks add to attribute.py, or to the file that their first line names; commands run one after the other.

    All ways give the same answer.
    """
    answers = []
    for language, content in blocks("cluster.md"):
        if language == "python":
            named = re.match(r"# (\w+\.py)\n", content)
            with (tmp_path / (named[1] if named else "attribute.py")).open("a") as file:
                file.write(content)
        else:
            assert language == "bash"
            printed = execute(["bash", "-euc", content], tmp_path, warm.python())
            answers += re.findall(r"best training sample of the first target: (\d+)", printed)
    assert len(answers) == 6  # of two ranks, of two times one process, and of two ranks with a sharded model
    assert len(set(answers)) == 1
