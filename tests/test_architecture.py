"""The rules that keep the parts apart: who may include or import whom, and what an import may do."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trak_fast

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "trak_fast"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
BACKENDS = ["amx", "avx512_bf16", "avx512", "avx2"]


def includes(path: Path) -> list[str]:
    """Returns what a C++ file includes, with its quotes or angle brackets."""
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]*[>"])', path.read_text(), re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Returns the absolute names of all modules, and names in modules, that a Python file imports anywhere."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def importers(module: str) -> set[str]:
    """Returns the project's Python files that import a module or something in it."""
    folders = [PACKAGE, ROOT / "tests", ROOT / "benchmarks"]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == module or name.startswith(module + ".") for name in imports(path))
    }


def test_the_definition_of_the_matrix_needs_only_cstdint() -> None:
    assert includes(CSRC / "random_matrix.h") == ["<cstdint>"]


def test_cpp_knows_neither_torch_nor_python() -> None:
    assert len(SOURCES) > 10
    foreign = re.compile(r"[<\"](torch|ATen|c10|Python\.h|pybind11|pyconfig|numpy|structmember)\b")
    users = {str(path.relative_to(CSRC)): [name for name in includes(path) if foreign.match(name)] for path in SOURCES}
    assert {path for path, names in users.items() if names} == {"bindings.cpp"}
    assert all("pybind11/" in name for name in users["bindings.cpp"])


def test_the_bindings_see_only_the_api() -> None:
    own = [name for name in includes(CSRC / "bindings.cpp") if name.startswith('"')]
    assert own == ['"trak_fast.h"']


@pytest.mark.parametrize(("side", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_processors_do_not_include_each_other(side: str, other: str) -> None:
    files = [path for path in SOURCES if path.is_relative_to(CSRC / side)]
    assert files
    for path in files:
        reached = [(path.parent / name[1:-1]).resolve() for name in includes(path) if name.startswith('"')]
        assert all(target.is_file() for target in reached), path
        assert not any(target.is_relative_to(CSRC / other) for target in reached), path


def test_only_the_kernels_module_imports_the_compiled_module() -> None:
    assert importers("trak_fast._C") == {"trak_fast/projection/kernels.py"}


ROOMS = {
    "store": {"scales"},
    "tasks": set(),
    "projection": {"arguments", "_C"},
    "gradients": {"tasks", "torch_files"},
    "scoring": {"scales", "store", "tasks"},
}
"""Folders that may import little else of the package -> what they may import."""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("trak_fast.")}
        assert rooms <= ROOMS[room] | {room}, path


def test_features_know_neither_the_disk_nor_scores() -> None:
    for path in (PACKAGE / "features").rglob("*.py"):
        assert not any(name.startswith(("trak_fast.store", "trak_fast.scoring")) for name in imports(path)), path


def test_only_commands_parse_arguments() -> None:
    users = {path for path in importers("argparse") if path.startswith("trak_fast/")}
    assert {path for path in users if not path.startswith("trak_fast/cli/")} == {"trak_fast/compat/__main__.py"}


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "projection": ["Accumulator", "Projector", "info", "matrix", "project", "project_adjoint"],
        "gradients": ["FunctionalGradientComputer"],
        "gradients_hooks": ["HookGradientComputer"],
        "scores": ["TopScores", "save_table"],
        "store": ["Store"],
        "task": ["BatchTask", "FunctionTask", "Task", "margin"],
        "tasks": ["CLIP", "CausalLM", "FunctionTask", "Task", "resolve_task"],
        "traker": ["TRAKer"],
        "cli": ["main"],
    }.items(),
)
def test_public_names_are_where_they_always_were(module: str, names: list[str]) -> None:
    found = importlib.import_module(f"trak_fast.{module}")
    assert getattr(trak_fast, module) is found  # `import trak_fast.scores`, then the whole name
    for name in names:
        assert getattr(found, name).__module__.startswith("trak_fast.")


def test_the_reference_imports_nothing_of_the_package() -> None:
    roots = {name.split(".")[0] for name in imports(PACKAGE / "projection" / "reference.py")}
    assert roots - set(sys.stdlib_module_names) == {"numpy"}


def test_the_package_does_not_import_its_compatibility_layers() -> None:
    users = importers("trak_fast.compat")
    assert not {path for path in users if path.startswith("trak_fast/") and not path.startswith("trak_fast/compat/")}


def test_import_is_silent_and_leaves_cuda_and_torch_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests/programs/import_everything.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_export_one_symbol(backend: str) -> None:
    """Another symbol, such as an inline function, could be linked into callers that run on processors without these
    instructions."""
    objects = sorted((ROOT / "build").glob(f"*/CMakeFiles/{backend}.dir/csrc/cpu/{backend}.cpp.o"))
    nm = shutil.which("nm")
    if not objects or nm is None:
        pytest.skip("needs the build folder and nm")
    for path in objects:
        symbols = subprocess.run([nm, "-g", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        assert len(symbols.splitlines()) == 1, symbols


RIDDLES = re.compile(r"(Of|What|How|Whether|Where|Why|Which|Who)\b")


def documentation(path: Path) -> list[str]:
    """Collects the docstrings of a file, those of constants included, and each entry of their sections."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            texts += [
                statement.value.value
                for statement in node.body
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                if isinstance(statement.value.value, str)
            ]
    return texts + [entry for text in texts for entry in re.findall(r"^ +[*\w]+: (.*)", text, re.MULTILINE)]


def test_documentation_opens_with_the_thing_itself() -> None:
    """ "The seconds of ..." rather than "How long ..." or "Of a call.": a reader meets the noun or the verb first."""
    files = [path for folder in ("trak_fast", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): text for path in files for text in documentation(path) if RIDDLES.match(text)}
    assert not found


def test_a_plan_is_a_job_then_rates_then_a_prediction() -> None:
    layers = ["job", "rates", "predict"]
    for place, layer in enumerate(layers):
        above = {f"trak_fast.plan.{name}" for name in layers[place + 1 :]}
        assert not above & imports(PACKAGE / "plan" / f"{layer}.py")
