"""K-FAC's metric of stacked experts, which pieces of one expert and whole gradients have in the same arrangement."""

from __future__ import annotations

import logging

import libraries
import pytest
import torch

libraries.needs("transformers")
from transformer_models import batch_of, new_model  # noqa: E402

from trak_fast import GradientProjector  # noqa: E402
from trak_fast.gradients.pieces import Whole  # noqa: E402

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_whitened_in_a_batch_as_they_are_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = new_model(name)
    batch = batch_of("causal_lm")
    matrices = [key for key, parameter in model.named_parameters() if parameter.ndim > 1]
    projector = GradientProjector(model, "causal_lm", 64, grad_wrt=matrices, metric="kfac")
    with caplog.at_level(logging.WARNING, "trak_fast"):
        projector.fit_metric(batch)
        together = projector.project(batch)
        alone = torch.cat([projector.project([x[i : i + 1] for x in batch]) for i in range(len(batch[0]))])
    assert caplog.messages == []
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 * together.abs().max().item())


def test_each_row_and_column_of_an_expert_has_its_factor() -> None:
    model = new_model("mixtral")
    projector = GradientProjector(model, "causal_lm", 64, grad_wrt=[EXPERTS], metric="kfac")
    projector.fit_metric(batch_of("causal_lm"))
    assert projector.metric is not None
    roots = projector.metric.state_dict()
    experts, height, width = model.get_parameter(EXPERTS).shape
    gradient = torch.randn(2, experts, height, width)
    left, right = roots[f"{EXPERTS}:left"], roots[f"{EXPERTS}:right"]
    expected = gradient * left.view(experts, height, 1) * right
    found = projector.metric.whitened(EXPERTS, Whole(gradient.flatten(2))).rows(0, experts)
    torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-6, atol=0)
