"""Fixtures that several test files use: golden values, instruction sets, thread counts."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # pytest's workers, and what they start, share the cores

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("attribution", "emulated", "interrupted", "model_folders", "projections")

from projections import ISAS  # noqa: E402 (its assertions explain themselves when they fail)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds the generators, so that a test's numbers depend neither on the run nor on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def helpers_in_processes() -> Iterator[None]:
    """Lets the processes that tests start import tests/helpers, as pytest does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("helpers")), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, list[list[str]]]:
    """Reads golden_values.txt: keyword -> the fields of each of its lines."""
    facts = defaultdict(list)
    for line in Path(__file__).with_name("golden_values.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            keyword, *fields = line.split()
            facts[keyword].append(fields)
    return facts


@pytest.fixture
def rng() -> np.random.Generator:
    """Makes a generator that starts anew in each test."""
    return np.random.default_rng(0)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces each instruction set of this machine in turn, or the one that the environment names."""
    monkeypatch.setenv("TRAK_FAST_ISA", request.param)
    return request.param


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
