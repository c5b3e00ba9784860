"""The emulated CUDA device itself: the cases of tests/emulator/self_test.cpp."""

import re
import subprocess

import pytest
from emulated import ROOT, build

pytestmark = pytest.mark.compiles
CASES = re.findall(r'^ +\{"(\w+)",', (ROOT / "tests" / "emulator" / "self_test.cpp").read_text(), re.MULTILINE)


def test_the_list_of_cases_is_whole() -> None:
    listed = subprocess.run([build() / "emulator_self_test"], capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    done = subprocess.run([build() / "emulator_self_test", case], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
