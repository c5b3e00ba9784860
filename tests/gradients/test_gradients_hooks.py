"""Gradients layer by layer against a loop of torch.autograd.grad over samples, and against torch.func's."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hook_models import (
    CASES,
    B,
    ChangedInput,
    Conv1D,
    OtherLinear,
    OwnRMSNorm,
    ScaleRMSNorm,
    Untransformable,
    images,
)
from streamed import StreamedGradients
from torch import Tensor, nn

from trak_fast import HookGradientComputer, TRAKer
from trak_fast.gradients import FunctionalGradientComputer, evaluation_mode
from trak_fast.gradients.layers import RULES, RULES_BY_NAME, rule_of
from trak_fast.tasks import ImageClassification, Task


def loop(model: nn.Module, task: Task, batch: list[Tensor]) -> dict[str, Tensor]:
    """Differentiates f of one sample after the other by autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for sample in zip(*batch, strict=True):
        f = task.get_output(model, dict(zip(names, parameters, strict=True)), dict(model.named_buffers()), *sample)
        rows.append(torch.autograd.grad(f, parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_loop_and_of_torch_func(case: str) -> None:
    torch.manual_seed(0)
    model, batch, task = CASES[case].make()
    hooks, functional = HookGradientComputer(model, task), FunctionalGradientComputer(model, task)
    streamed = StreamedGradients(model, task)
    with evaluation_mode(model):
        expected = loop(model, task, batch)
        for computer in (hooks, streamed, hooks, streamed):
            grads = computer.compute_per_sample_grad(batch)
            assert list(grads) == list(expected)
            for name, value in grads.items():
                assert not value.requires_grad
                # both in float64: sums of at most a few thousand terms, in another order
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
        vectorised = functional.compute_per_sample_grad(batch)
        for name, value in grads.items():
            torch.testing.assert_close(value, vectorised[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(hooks.compute_loss_grad(batch), functional.compute_loss_grad(batch))
    assert hooks.singly == CASES[case].per_sample  # everything else came from its layer
    assert streamed.singly <= CASES[case].per_sample
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_other_batch_sizes_after_the_first() -> None:
    torch.manual_seed(0)
    model, batch, task = CASES["sequence first"].make()
    computer = HookGradientComputer(model, task)
    for count in (1, 3, 5):  # with one sample of one step, layers look fine
        part = [batch[0][:count, :1] if count == 1 else batch[0][:count], batch[1][:count]]
        expected = loop(model, task, part)
        for name, value in computer.compute_per_sample_grad(part).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


def test_inputs_that_were_changed_are_an_error() -> None:
    model, batch = ChangedInput().double(), images(6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        HookGradientComputer(model, ImageClassification()).compute_per_sample_grad(batch)


def test_only_the_chosen_parameters_are_computed() -> None:
    torch.manual_seed(0)
    model, batch, task = CASES["shared"].make()
    expected = loop(model, task, batch)
    for names in (["head.*"], ["first.weight", "scale"], ["*.bias"]):
        computer = HookGradientComputer(model, task, grad_wrt=names)
        grads = computer.compute_per_sample_grad(batch)
        assert list(grads) == list(FunctionalGradientComputer(model, task, grad_wrt=names).selected)
        for name, value in grads.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


def test_models_that_torch_func_cannot_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, batch = Untransformable().double(), images(6)
    with pytest.raises(RuntimeError, match=r"gradient_computer=trak_fast\.HookGradientComputer"):
        FunctionalGradientComputer(model, ImageClassification()).compute_per_sample_grad(batch)
    with caplog.at_level(logging.WARNING):
        traker = TRAKer(model, "image_classification", B, tmp_path, proj_dim=0, gradient_computer=HookGradientComputer)
        traker.load_checkpoint(model.state_dict(), 0)
        traker.featurize(batch, num_samples=B)
    expected = torch.cat([g.flatten(1) for g in loop(model, ImageClassification(), batch).values()], 1)
    np.testing.assert_allclose(traker.store.train(0).features, expected, rtol=2.0**-22, atol=1e-12)
    assert not caplog.records


def test_tasks_without_an_output_for_batches() -> None:
    class Norm(Task):
        def get_output(self, model: nn.Module, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(model, (weights, buffers), x.unsqueeze(0)).square().sum()

    torch.manual_seed(0)
    model, batch = Untransformable().double(), images(6)
    expected = loop(model, Norm(), batch)
    for name, value in HookGradientComputer(model, Norm()).compute_per_sample_grad(batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


def test_each_checkpoint_s_parameters_are_used() -> None:
    torch.manual_seed(0)
    first, batch, task = CASES["attention"].make()
    second, _, _ = CASES["attention"].make()
    computer = HookGradientComputer(first, task)
    computer.compute_per_sample_grad(batch)
    computer.load_model_params(second)
    expected = loop(second, task, batch)
    for name, value in computer.compute_per_sample_grad(batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("layer", "row"),
    [
        (nn.Linear(2, 2), nn.Linear),
        (OtherLinear(2, 2), nn.Linear),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear),
        (Conv1D(2, 2), "Conv1D"),
        (type("Conv1D", (nn.Conv1d,), {})(2, 2, 2), nn.Conv1d),
        (OwnRMSNorm(2), "*RMSNorm"),
        (type("OwnRMSNorm", (nn.LayerNorm,), {})(2), nn.LayerNorm),
    ],
)
def test_a_rule_is_found_by_class_then_by_base_class_then_by_name(layer: nn.Module, row: type | str) -> None:
    assert rule_of(layer) is (RULES_BY_NAME[row] if isinstance(row, str) else RULES[row])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(2, 2, max_norm=1.0),
        nn.Embedding(2, 2, scale_grad_by_freq=True),
        nn.Embedding(2, 2, sparse=True),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.ConvTranspose1d(2, 2, 2),
        nn.Bilinear(2, 2, 2),
        ScaleRMSNorm(),
    ],
)
def test_layers_that_no_rule_covers_are_left_to_autograd(layer: nn.Module) -> None:
    assert rule_of(layer) is None
