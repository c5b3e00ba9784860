"""Modules that are built for other machines, and the comparison of several of them."""

import importlib
import importlib.machinery
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trak_fast.projection import kernels

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


@pytest.fixture
def prebuild() -> ModuleType:
    return importlib.import_module("prebuild")


def test_a_python_that_is_not_there(prebuild: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prebuild.main(["--python", "python2.99", str(tmp_path / "module")])
    assert "--python is 'python2.99'" in capsys.readouterr().err
    assert not (tmp_path / "module").exists()


def test_modules_of_several_folders_are_several_modules(tmp_path: Path) -> None:
    """pybind11 gives the same module again for a name that it knows, whatever file is named."""
    gpu_variants = importlib.import_module("gpu_variants")
    for name in ("a/built", "b/built"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(kernels._C.__file__, tmp_path / name / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    modules = [gpu_variants.load_module(tmp_path / name) for name in ("a/built", "b/built")]
    assert len({id(module) for module in [*modules, kernels._C]}) == 3
    assert [Path(module.__file__).parents[1].name for module in modules] == ["a", "b"]
    assert modules[0].DEFINITION == kernels._C.DEFINITION
