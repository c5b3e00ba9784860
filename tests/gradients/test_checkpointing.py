"""Reentrant activation checkpointing, which gives parameters no gradients unless an input of it requires them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hook_models import SumOfSines
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint

from trak_fast import GradientProjector, HookGradientComputer, project
from trak_fast.gradients.modes import differentiable

K = 64
Call = Callable[..., Any]


class Checkpointed(nn.Module):
    """A model that computes `inner` in a way of its own, checkpointed by its attribute `call`."""

    call: Call = staticmethod(lambda function, *args: function(*args))

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.inner, self.last = nn.Embedding(6, 6), *(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("table", torch.randn(6, 6))

    def bare(self, x: Tensor) -> Tensor:
        """Computes with the parameters of `inner`, without calling it."""
        return torch.tanh(functional.linear(x, self.inner.weight, self.inner.bias))


class OfBareParameters(Checkpointed):
    """Calls no module within the checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.bare, self.first(self.words(x))))


class Nested(Checkpointed):
    """Checkpoints within a checkpoint, and the same parameters outside."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.call(lambda x: x + self.call(self.bare, torch.tanh(self.first(x))), self.words(x))
        return self.last(x + self.inner(x))


class OfOneHot(Checkpointed):
    """Gives the checkpoint no numbers that follow from parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(lambda x: torch.tanh(self.inner(x)), functional.one_hot(x, 6).float()))


class OfTable(Checkpointed):
    """Gives it rows of a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.bare, self.call(lambda x: torch.tanh(self.inner(x)), self.table[x])))


class OfIndices(Checkpointed):
    """Gives it no floating-point numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(lambda x: self.bare(self.words(x)), x))


class OfConstants(Checkpointed):
    """Gives it the results of layers that are not differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(self.words(x))
        return self.last(self.call(lambda x: torch.tanh(self.inner(x)), x))


class OfDicts(Checkpointed):
    """Gives it tensors in a dict, and takes its results from lists in a dict, one of them as it was."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.words(x))
        found = self.call(lambda given: {"x": [self.bare(given["x"]), given["x"]], "name": "x"}, {"x": x})
        return self.last(found["x"][0] * found["x"][1])


class Pair(NamedTuple):
    """Two tensors."""

    first: Tensor
    second: Tensor


class OfNamed(Checkpointed):
    """Gives it tensors in a named tuple, and takes its results from an ordered dict."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.words(x))

        def compute(pair: Pair) -> OrderedDict[str, Pair]:
            return OrderedDict(pair=Pair(first=self.bare(pair.first), second=pair.second))

        pair = self.call(compute, Pair(first=x, second=x))["pair"]
        return self.last(pair.first * pair.second)


class OfLargest(Checkpointed):
    """Has it return what torch returns by names."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(lambda x: self.bare(x).max(-2), self.first(self.words(x)))[0])


class OfIntegers(Checkpointed):
    """Has it return integers too, and a part of no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        x, index = self.call(lambda x: (self.bare(x), x.argmax(-1)), self.first(self.words(x)))
        return self.last(self.call(torch.tanh, x) * index.unsqueeze(-1))


class Again(torch.autograd.Function):
    """Checkpointing by a function that is not torch's."""

    @staticmethod
    def forward(ctx: Any, function: Call, x: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(gradient)
        return None, x.grad


class OfAnother(Checkpointed):
    """Checkpoints a layer by that."""

    def forward(self, x: Tensor) -> Tensor:
        call = self.call if self.call is Checkpointed.call else Again.apply
        return self.last(call(lambda x: torch.tanh(self.inner(x)), self.first(self.words(x))))


class OfAnotherWithin(Checkpointed):
    """Checkpoints a layer by that within torch's checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        within = self.call if self.call is Checkpointed.call else Again.apply
        inner = self.call(lambda x: within(lambda x: torch.tanh(self.inner(x)), x), self.first(self.words(x)))
        return self.last(inner)


def reentrant(function: Call, *args: Any) -> Any:
    """Calls a function, checkpointed."""
    return checkpoint.checkpoint(function, *args, use_reentrant=True)


MODELS = [
    OfBareParameters, Nested, OfOneHot, OfTable, OfIndices, OfConstants, OfDicts, OfNamed, OfLargest, OfIntegers,
    OfAnother, OfAnotherWithin,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("grad_wrt", [["*"], ["inner.*"], ["last.*"], ["inner.weight", "last.*"]])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_without_checkpointing(
    kind: type[Checkpointed], grad_wrt: list[str], is_known: bool
) -> None:
    model, batch = kind(), [torch.randint(6, (5, 4))]
    projector = GradientProjector(model, SumOfSines(), K, grad_wrt=grad_wrt)
    hooks = HookGradientComputer(model, SumOfSines(), grad_wrt=grad_wrt)
    wanted = [parameter for name, parameter in model.named_parameters() if name in projector.columns]
    rows = []
    for sample in batch[0].split(1):
        model.zero_grad()
        model(sample).sin().sum().backward()
        found = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in wanted]
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    model.zero_grad()
    right = torch.stack(rows)
    if is_known:
        projector.project(batch)
        hooks.compute_per_sample_grad(batch)
    model.call = reentrant
    for _ in range(2):
        torch.testing.assert_close(projector.project(batch), project(right, K), rtol=1e-5, atol=1e-4)
        found = [gradient.flatten(1) for gradient in hooks.compute_per_sample_grad(batch).values()]
        torch.testing.assert_close(torch.cat(found, 1), right, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_in_other_threads_and_afterwards_is_torchs_own() -> None:
    model, x, found = nn.Linear(6, 6), torch.randn(5, 6), []

    def compute() -> None:
        found.append(reentrant(model, x).requires_grad)

    def fail() -> None:
        with differentiable(model), differentiable(model):
            compute()
            thread = threading.Thread(target=compute)
            thread.start()
            thread.join()
            raise ValueError("an error")

    before = checkpoint.CheckpointFunction
    with pytest.raises(ValueError, match="an error"):
        fail()
    compute()
    assert found == [True, False, False]
    assert checkpoint.CheckpointFunction is before
