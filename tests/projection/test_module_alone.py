"""The program that checks a compiled module without torch, here with the module of this processor."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trak_fast.projection import kernels

ROOT = Path(__file__).resolve().parents[2]
FILES = ["tests/programs/module_alone.py", "tests/golden_values.txt", "trak_fast/projection/reference.py"]


def run(root: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program of a folder with the module that these tests use."""
    assert kernels._C.__file__ is not None
    command = [sys.executable, root / FILES[0], kernels._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_module_and_reference_agree() -> None:
    done = run(ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "100 projections and 333452 matrix entries agree with the reference\n"


@pytest.mark.parametrize(
    ("change", "to", "complaint"),
    [
        ("0xD2511F53", "0xD2511F55", "block rademacher"),  # a constant of Philox: all entries
        ("(words[:, 0] | np.uint64(1))", "words[:, 0]", "Matrix(kind='sjlt'"),  # entries that have no golden values
    ],
)
def test_difference_is_an_error(tmp_path: Path, change: str, to: str, complaint: str) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    reference = tmp_path / FILES[2]
    text = reference.read_text()
    assert text.count(change) == 1
    reference.write_text(text.replace(change, to))
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"the module and the reference differ: {complaint}" in done.stderr
