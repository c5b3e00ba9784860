"""The CUDA projection, where there is a device: the same matrix, and sums within float32 rounding."""

import numpy as np
import pytest
import torch
from test_projection import KINDS, check, tolerance

import trak_fast
from trak_fast import reference

pytestmark = pytest.mark.gpu
OFFSET = 2**41 - 300


@pytest.mark.parametrize("proj_type", KINDS)
def test_one_hot_gradients_give_the_columns_of_the_matrix(proj_type: str) -> None:
    grads = torch.eye(600, device="cuda")
    y = trak_fast.project(grads, 4100, proj_type=proj_type, seed=2**40 + 1, model_id=3, offset=OFFSET)
    columns = OFFSET + np.arange(600, dtype=np.uint64)
    expected = reference.matrix(proj_type, 2**40 + 1, 3, np.arange(4100), columns).T
    assert torch.equal(y.cpu(), torch.from_numpy(np.ascontiguousarray(expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("proj_type", KINDS)
def test_sums(proj_type: str, dtype: torch.dtype) -> None:
    grads = torch.randn(33, 9000, dtype=torch.float64).to("cuda", dtype)
    y = trak_fast.project({"a": grads[:, :700].reshape(33, 7, 100), "b": grads[:, 700:]}, 100, proj_type=proj_type)
    expected = reference.project(grads.cpu().double().numpy(), 100, proj_type, 0, 0, 0)
    check(y.cpu(), expected, tolerance(grads.cpu()))
