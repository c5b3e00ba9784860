"""setup.py's decision about the CUDA part, and the version, which is written down in one place."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import trak_fast

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("trak_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bare(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as PATH, on a machine without any CUDA."""
    monkeypatch.setattr(setup, "USUAL_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TRAK_FAST_CUDA", "TRAK_FAST_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_program(path: Path, output: str, status: int = 0) -> str:
    """Writes a program that prints a text and ends with a status; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_suffix(".txt")
    text.write_text(output)
    path.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <'{text}'\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def write_nvcc(path: Path, version: str) -> str:
    """Writes a program that says the version of a CUDA compiler."""
    return write_program(path, f"nvcc: NVIDIA (R) Cuda compiler driver\nCuda tools, release {version}, V{version}.1\n")


H100 = ((9, 0), 580)
A100 = ((8, 0), 580)
V100 = ((7, 0), 580)
OLD_DRIVER = ((9, 0), 535)
CUDA_13 = (13, 0)


@pytest.mark.parametrize(
    ("variables", "gpus", "cuda", "architectures", "reason"),
    [
        ({}, [], CUDA_13, "", "no GPU was found"),
        ({}, [H100], CUDA_13, "90a", "a GPU of 90a"),
        ({}, [H100], None, "90a", "a GPU of 90a"),
        ({}, [H100, A100, H100], CUDA_13, "80;90a", "a GPU of 80 and 90a"),
        ({}, [V100], CUDA_13, "", "older than compute capability 8.0"),
        ({}, [V100, A100], CUDA_13, "80", "a GPU of 80"),
        ({}, [OLD_DRIVER], None, "", "driver 535 needs a compiler of CUDA 12.8 to 12.9"),
        ({}, [OLD_DRIVER], CUDA_13, "", "driver 535 needs a compiler of CUDA 12.8 to 12.9"),
        ({}, [H100, OLD_DRIVER], CUDA_13, "", "driver 535 needs a compiler of CUDA 12.8 to 12.9"),
        ({}, [OLD_DRIVER], (12, 9), "90a", "a GPU of 90a"),
        ({}, [((8, 0), 470)], (12, 9), "", "driver 470 needs a compiler of CUDA 12.8 to 12.9"),
        ({}, [V100, ((8, 0), 470)], (12, 9), "", "driver 470 needs a compiler of CUDA 12.8 to 12.9"),
        ({"TRAK_FAST_CUDA_ARCHITECTURES": "90a"}, [OLD_DRIVER], CUDA_13, "90a", "TRAK_FAST_CUDA_ARCHITECTURES=90a"),
        ({"TRAK_FAST_CUDA": "OFF"}, [H100], CUDA_13, "", "TRAK_FAST_CUDA=OFF"),
        ({"TRAK_FAST_CUDA": "off", "TRAK_FAST_CUDA_ARCHITECTURES": "all"}, [H100], CUDA_13, "", "TRAK_FAST_CUDA=OFF"),
        ({"TRAK_FAST_CUDA": "ON"}, [], None, "all", "TRAK_FAST_CUDA=ON"),
        ({"TRAK_FAST_CUDA": "ON"}, [H100], CUDA_13, "90a", "a GPU of 90a"),
        ({"TRAK_FAST_CUDA": "ON"}, [V100], CUDA_13, "all", "TRAK_FAST_CUDA=ON"),
        ({"TRAK_FAST_CUDA_ARCHITECTURES": "all"}, [H100], CUDA_13, "all", "TRAK_FAST_CUDA_ARCHITECTURES=all"),
        ({"TRAK_FAST_CUDA_ARCHITECTURES": "90a, 120"}, [], CUDA_13, "90a;120", "TRAK_FAST_CUDA_ARCHITECTURES=90a;120"),
        ({"TRAK_FAST_CUDA": "AUTO", "TRAK_FAST_CUDA_ARCHITECTURES": ""}, [], CUDA_13, "", "no GPU was found"),
    ],
)
def test_the_cuda_part_is_for_the_gpus_found_unless_it_is_asked_for(
    setup: ModuleType,
    variables: dict[str, str],
    gpus: list[tuple[tuple[int, int], int]],
    cuda: tuple[int, int] | None,
    architectures: str,
    reason: str,
) -> None:
    compiler = setup.Compiler("nvcc", cuda) if cuda else None

    def find(environment: object, for_gpus: list[Any]) -> Any:
        return compiler if cuda and setup.suits(cuda, for_gpus) else None

    decided = setup.decide_cuda_part(variables, [setup.Gpu(*gpu) for gpu in gpus], find)
    assert decided.architectures == architectures
    assert reason in decided.reason
    assert decided.compiler is (compiler if architectures else None)


@pytest.mark.parametrize("variables", [{}, {"TRAK_FAST_CUDA": "OFF"}], ids=["no GPU", "off"])
def test_no_compiler_is_asked_for_where_none_is_needed(setup: ModuleType, variables: dict[str, str]) -> None:
    def find(environment: object, gpus: object) -> None:
        raise AssertionError

    assert not setup.decide_cuda_part(variables, [], find).architectures


@pytest.mark.parametrize(
    ("capability", "known", "architecture"),
    [
        ((9, 0), (75, 80, 90, 100, 120), "90a"),
        ((10, 3), (80, 90, 100, 120), "100"),
        ((12, 1), (80, 90, 100, 120), "120"),
        ((12, 1), (80, 90, 100, 103, 120, 121), "121"),
        ((13, 0), (80, 90, 100, 120), "120"),
        ((8, 7), (80, 86, 87, 89), "87"),
        ((10, 3), (), "103"),
    ],
)
def test_a_gpu_gets_the_newest_architecture_that_its_compiler_knows(
    setup: ModuleType, capability: tuple[int, int], known: tuple[int, ...], architecture: str
) -> None:
    compiler = setup.Compiler("nvcc", CUDA_13, known)
    assert setup.architectures_of([setup.Gpu(capability, 580)], compiler) == [architecture]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TRAK_FAST_CUDA": "yes"}, "TRAK_FAST_CUDA must be AUTO, ON or OFF, not 'yes'"),
        ({"TRAK_FAST_CUDA_ARCHITECTURES": "hopper"}, "must be all or a list such as \"90a;120\", not 'hopper'"),
        ({"TRAK_FAST_CUDA_ARCHITECTURES": "9.0"}, "must be all or a list such as \"90a;120\", not '9.0'"),
    ],
)
def test_values_that_are_not_allowed_are_refused(setup: ModuleType, variables: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup.decide_cuda_part(variables, [], setup.find_compiler)


def test_the_part_is_refused_that_the_driver_cannot_run(setup: ModuleType) -> None:
    with pytest.raises(
        SystemExit, match=r"wanted \(TRAK_FAST_CUDA=ON\), but driver 535 needs a compiler of CUDA 12\.8"
    ):
        setup.decide_cuda_part({"TRAK_FAST_CUDA": "ON"}, [setup.Gpu(*OLD_DRIVER)], lambda environment, gpus: None)


def test_gpus_are_those_that_the_driver_lists(setup: ModuleType, bare: Path) -> None:
    find = setup.find_gpus.__wrapped__  # without its cache
    assert find() == []
    write_program(bare / "nvidia-smi", "9.0, 580.65.06\n12.0, 580.65.06\n[N/A], 580.65.06\n")
    assert find() == [((9, 0), 580), ((12, 0), 580)]
    write_program(bare / "nvidia-smi", "9.0, 580.65.06\n", status=9)
    assert find() == []
    write_program(bare / "nvidia-smi", "NVIDIA-SMI has failed because it could not reach the driver\n")
    assert find() == []


def test_the_first_compiler_that_is_new_enough_is_taken(
    setup: ModuleType, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.find_compiler(os.environ, []) is None
    from_pip = write_nvcc(tmp_path / "packages" / "nvidia" / "cu13" / "bin" / "nvcc", "13.0")
    assert setup.find_compiler(os.environ, []) == (from_pip, (13, 0), ())
    usual = write_nvcc(tmp_path / "cuda" / "bin" / "nvcc", "12.8")
    assert setup.find_compiler(os.environ, []) == (usual, (12, 8), ())
    write_nvcc(bare / "nvcc", "12.6")  # too old
    assert setup.find_compiler(os.environ, []) == (usual, (12, 8), ())
    on_path = write_nvcc(bare / "nvcc", "13.2")
    assert setup.find_compiler(os.environ, [setup.Gpu(*OLD_DRIVER)]) == (usual, (12, 8), ())
    assert setup.find_compiler(os.environ, []) == (on_path, (13, 2), ())
    monkeypatch.setenv("CUDACXX", usual)
    assert setup.find_compiler(os.environ, []) == (usual, (12, 8), ())


def test_a_named_compiler_must_run_and_be_new_enough(
    setup: ModuleType, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(bare / "nvcc", "13.0")
    monkeypatch.setenv("CUDACXX", write_nvcc(tmp_path / "old" / "nvcc", "11.8"))
    with pytest.raises(SystemExit, match=r"must name an nvcc of CUDA 12\.8 or newer, but .*nvcc is of CUDA 11\.8"):
        setup.find_compiler(os.environ, [])
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"but .*none does not run"):
        setup.find_compiler(os.environ, [])
    monkeypatch.setenv("CUDACXX", write_nvcc(tmp_path / "new" / "nvcc", "13.0"))
    with pytest.raises(
        SystemExit, match=r"12\.8 or newer, and driver 535 must run what it makes, but .* is of CUDA 13\.0"
    ):
        setup.find_compiler(os.environ, [setup.Gpu(*OLD_DRIVER)])


def test_pip_brings_the_compiler_where_it_is_wanted_and_missing(
    setup: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.list_requirements() == []
    monkeypatch.setattr(setup, "find_gpus", lambda: [setup.Gpu(*H100)])
    assert setup.list_requirements() == [setup.COMPILER_PACKAGES]
    monkeypatch.setenv("TRAK_FAST_CUDA", "OFF")
    assert setup.list_requirements() == []
    monkeypatch.setenv("TRAK_FAST_CUDA", "ON")
    write_nvcc(bare / "nvcc", "13.0")
    assert setup.list_requirements() == []
    assert f'cuda = ["{setup.COMPILER_PACKAGES}"]' in PYPROJECT


def test_the_version_is_that_of_pyproject() -> None:
    version = re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
    assert version is not None
    assert trak_fast.__version__ == trak_fast.info()["version"] == version[1]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version[1]
