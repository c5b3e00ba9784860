"""Streamed features under the settings that users put models into."""

import torch
from torch import nn

from trak_fast.features.streaming import GradientProjector


def test_slices_of_a_double_precision_model_agree_with_the_check() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    batch = [torch.randn(4, 40, dtype=torch.float64), torch.randint(3, (4,))]
    projector = GradientProjector(model, "image_classification", 16, memory_budget=4 * 4 * 40)
    whole = GradientProjector(model, "image_classification", 16)
    features = projector.project(batch)
    torch.testing.assert_close(features, whole.project(batch), rtol=1e-5, atol=1e-5)
    assert not projector._ways
    assert projector.singly == whole.singly == frozenset()
