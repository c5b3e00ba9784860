"""The documentation: its code runs, and prints what the pages say; its links lead somewhere."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import warm
from libraries import needs

import trak_fast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


@pytest.mark.parametrize("page", ["first-run.md", "own-task.md", "language-models.md"])
def test_pages_of_one_script(tmp_path: Path, page: str) -> None:
    if page == "language-models.md":
        needs("transformers")
    found = blocks(page)
    assert len(found) > 4
    printed = execute([sys.executable, "-W", "error", "-c", script_of(found)], tmp_path)
    assert {language for language, _ in found} == {"python", "text"}
    assert_alike(printed, "…\n" + "".join(content + "…\n" for language, content in found if language == "text"))


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


FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
OUTSIDE_THE_SITE = [
    page for page in ("README.md", "CHANGELOG.md", "benchmarks/results/NOTES.md") if (ROOT / page).exists()
]
PAGES = OUTSIDE_THE_SITE + sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))


def prose(text: str) -> str:
    """Returns a page without its blocks of code."""
    return FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """Makes the anchors of a page's headings, as code hosts do: letters in lower case, numbers and hyphens.

    On the site names that are documented from their docstrings have anchors too.
    """
    found = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names = itertools.chain([anchor], (f"{anchor}-{i}" for i in itertools.count(1)))
        found.add(next(name for name in names if name not in found))
    return found


def broken_links(text: str, page: Path) -> list[str]:
    """Lists the links of a page that lead to no file and to no heading; of those into the web, the ill-formed ones."""
    broken = []
    for link in LINK.findall(prose(text)):
        url = urlsplit(link)
        target = page.parent / unquote(url.path)
        if url.scheme:
            leads = url.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+", url.netloc)
        elif url.fragment:
            other = text if not url.path else target.read_text() if target.is_file() else ""
            leads = unquote(url.fragment) in anchors(other)
        else:
            leads = target.resolve().is_relative_to(ROOT) and target.exists()
        if not leads:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    """`mkdocs build --strict` knows the site's pages alone, and not how they are read in a checkout."""
    assert not broken_links((ROOT / page).read_text(), ROOT / page)


def test_broken_links_are_found() -> None:
    text = "# A b: c\n# A b: c\n[1](#a-b-c) [2](#a-b-c-1) [3](docs/choosing.md#λ-from-the-features) [4](https://a.b/c)"
    assert not broken_links(text, ROOT / "page.md")
    broken = ["#a-b-c-2", "no.md", "no.md#none", "README.md#none", "https://a", "ftp://a.b", ".."]
    assert broken_links(text + "".join(f"[x]({link})" for link in broken), ROOT / "page.md") == broken


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_the_project_exist(page: str) -> None:
    """Pages name files that are not on the site by their paths. Those of another commit are called so, and NAME is a
    place for any name."""
    text = re.sub(r"commit \w+'s\s`[^`]*`", "", prose((ROOT / page).read_text()))
    code = " ".join(re.findall(r"`([^`]*)`", text))
    paths = re.findall(r"(?<![\w/])(?:benchmarks|csrc|docs|tests|trak_fast)/[\w./-]*", code)
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


def test_every_public_name_has_its_documentation_on_the_site() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: trak_fast\.(\w+)$", pages, re.MULTILINE)
    assert {name for name in trak_fast.__all__ if name != "__version__"} <= set(documented)
