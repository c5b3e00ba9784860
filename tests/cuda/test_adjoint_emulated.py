"""The CUDA adjoint without a GPU: tests of test_adjoint.py, on the emulated device."""

from collections.abc import Iterator

import pytest
from emulated import Device
from test_adjoint import test_high_columns, test_odd_shapes  # noqa: F401

from trak_fast.projection import kernels

pytestmark = [pytest.mark.compiles, pytest.mark.xdist_group("adjoint")]


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[Device]:
    """The emulated device, in the place of the compiled module."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_C", device)
        yield device
    assert device.count("mma bf16") > 0


@pytest.fixture
def isa() -> str:
    return "emulated"
