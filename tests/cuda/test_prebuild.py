"""Modules that are built for other machines, and the comparison of several of them."""

import importlib
import importlib.machinery
import os
import shutil
import sys
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
    assert "--python must be the name or the path of a program, not 'python2.99'" in capsys.readouterr().err
    assert not (tmp_path / "module").exists()


@pytest.mark.parametrize(("options", "bounded"), [([], "ON"), (["--normal"], "OFF")])
def test_cmake_is_told_what_to_build(
    prebuild: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], bounded: str
) -> None:
    folder, seen = tmp_path / "module", tmp_path / "seen"
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "cmake").write_text(f'#!/bin/sh\necho "$@" >> {seen}\ntouch {folder}/_C{suffix}\n')
    (programs / "cmake").chmod(0o755)
    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(programs / "python"))  # programs beside it come before those in PATH
    monkeypatch.setenv("PATH", os.environ["PATH"])
    assert prebuild.main(["--python", python, "--architecture", "86", *options, str(folder)]) == 0
    configured, built = seen.read_text().splitlines()
    for variable in (
        "TRAK_FAST_CUDA=ON",
        "TRAK_FAST_CUDA_ARCHITECTURES=86",
        f"TRAK_FAST_BOUNDED_WAIT={bounded}",
        f"Python_EXECUTABLE={python}",
        f"CMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
    ):
        assert f"-D{variable} " in configured
    assert built.startswith("--build ")
    assert prebuild.find_module(folder) == folder / f"_C{suffix}"


def test_a_folder_without_the_module_says_what_it_has(prebuild: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "_C.cpython-27-other.so").write_text("")
    with pytest.raises(ValueError, match=r"holds _C\.cpython-27-other\.so, not _C\..*: prebuild\.py --python python3"):
        prebuild.find_module(tmp_path)


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
