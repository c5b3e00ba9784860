"""A model with an optimizer that has stepped, and the moments found for it against the optimizer's own table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from trak_fast.gradients import select_parameters
from trak_fast.gradients.adam import AdamMoments

State = dict[str, Any]


class Block(nn.Module):
    """Layers of one shape between norms, so that parameters in the wrong order would fit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)


def network() -> nn.Module:
    """Builds an embedding, a block, a convolution whose moments are channels_last, and a tied head."""
    model = nn.Sequential()
    model.words, model.block, model.convolution = nn.Embedding(7, 4), Block(), nn.Conv2d(1, 2, (2, 3))
    model.convolution.to(memory_format=torch.channels_last)
    model.head = nn.Linear(4, 7, bias=False)
    model.head.weight = model.words.weight
    return model


class Wrapper(nn.Module):
    """Puts a name before the model's names, as wrappers do."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        setattr(self, name, model)


def step(optimizer: Optimizer, times: int = 3) -> None:
    """Steps with random gradients in all the optimizer's parameters."""
    for _ in range(times):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def trained(make: Callable[..., Optimizer] = AdamW, **options: Any) -> tuple[nn.Module, Optimizer]:
    """Builds a model and an optimizer of all its parameters in one group, and steps."""
    model = network()
    optimizer = make(model.parameters(), **options)
    step(optimizer)
    return model, optimizer


def assert_moments(found: AdamMoments, model: nn.Module, optimizer: Optimizer, names: list[str] | None = None) -> None:
    """Checks that each parameter has its own moments, from the optimizer's table by object, whose values all differ."""
    selected = select_parameters(model, names)
    assert list(found._moments) == list(selected)
    for name, parameter in selected.items():
        own = optimizer.state[parameter]
        for value, key in ((found._moments[name].mean, "exp_avg"), (found._moments[name].square, "exp_avg_sq")):
            torch.testing.assert_close(value, own[key].flatten(), rtol=0, atol=0, msg=f"{key} of {name}")


def moments(optimizer_state: Any, model: nn.Module, names: list[str] | None = None) -> AdamMoments:
    """Finds the moments of parameters that names or patterns select."""
    return AdamMoments.from_optimizer_state(optimizer_state, model, select_parameters(model, names))
