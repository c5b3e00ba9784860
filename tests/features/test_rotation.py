"""The random rotation of features."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as hadamard_matrix

from trak_fast.features.rotation import Rotation, hadamard


def test_the_transform_is_that_of_hadamard_s_matrix() -> None:
    rows = torch.randn(3, 64, dtype=torch.float64)
    expected = rows @ torch.from_numpy(hadamard_matrix(64)).double() / 8
    torch.testing.assert_close(hadamard(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 100, 127, 1000])
def test_a_rotation_keeps_inner_products_and_can_be_reverted(size: int) -> None:
    rows = torch.randn(4, size, dtype=torch.float64)
    before = rows.clone()
    rotation = Rotation(size)
    turned = rotation.apply(rows)
    torch.testing.assert_close(turned @ turned.mT, rows @ rows.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotation.revert(turned), rows, rtol=1e-12, atol=1e-12)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("size", [64, 100, 127])
def test_one_number_is_spread_over_all(size: int) -> None:
    for place in (0, size // 2, size - 1):
        unit = torch.zeros(1, size, dtype=torch.float64)
        unit[0, place] = 1
        turned = Rotation(size).apply(unit).abs()
        # as of numbers from a normal distribution, 5 σ at most for one of 400
        assert turned.max() <= 5 / size**0.5
        assert (turned > 0.1 / size**0.5).double().mean() > 0.7
