"""Batches for which a check of one sample, or of the first batch, could say too little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from trak_fast import GradientProjector, project
from trak_fast.tasks.base import BatchTask, bind

K = 64


class SumOfSines(BatchTask):
    """The sum of the sines of all that a model returns for a sample."""

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        output: Tensor = bind(model, weights, buffers)(*batch)
        return output.flatten(1).sin().sum(1)


def expected(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Projects the gradients of one sample after the other by autograd, (B, K)."""
    rows = []
    for sample in range(len(batch[0])):
        f = model(*[x[sample : sample + 1] for x in batch]).sin().sum()
        gradients = torch.autograd.grad(f, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return project(torch.stack(rows), K)


def largest_error(found: Tensor, right: Tensor) -> float:
    """Returns the largest difference, relative to the largest entry."""
    return float((found - right).abs().max() / right.abs().max())


class InChunks(nn.Module):
    """A model that takes two samples at a time, by layers in a container, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        body, head = self.layers
        parts = [torch.tanh(body(part)) for part in x.split(2)]
        return head(torch.cat(parts))


@pytest.mark.parametrize("sizes", [(1, 5), (2, 5), (1, 2, 5, 4)])
def test_the_way_after_a_rule_that_does_not_fit_is_checked(sizes: tuple[int, ...]) -> None:
    model = InChunks()
    projector = GradientProjector(model, SumOfSines(), K)
    for size in sizes:
        batch = [torch.randn(size, 5, 6)]
        assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


class Tabled(nn.Module):
    """A layer without a rule that is given a table of positions, which samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x @ self.weight * table


class Positioned(nn.Module):
    """A model with such a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Tabled(), nn.Linear(6, 3)
        self.register_buffer("table", torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x, self.table[: x.shape[1]])))


def test_a_table_with_as_many_rows_as_samples_is_shared_all_the_same() -> None:
    model = Positioned()
    projector = GradientProjector(model, SumOfSines(), K)
    for size, length in ((4, 6), (6, 6), (5, 5)):
        batch = [torch.randn(size, length, 6)]
        assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


class Unpadded(nn.Module):
    """A model whose layers get the tokens of all samples one after the other, without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = self.head(torch.tanh(self.body(x[mask])))
        return tokens.new_zeros(*mask.shape, 3).index_put((mask,), tokens)


def test_samples_with_other_numbers_of_rows_are_checked_again() -> None:
    model = Unpadded()
    projector = GradientProjector(model, SumOfSines(), K)
    for lengths in ((4, 4), (5, 3), (2, 6)):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        batch = [torch.randn(*mask.shape, 6), mask]
        assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5
