"""Stages of a pipeline in one process: the sum over stages, and what a stage cannot project."""

from collections.abc import Callable

import pytest
import torch
from sharded_models import SEED, TASK, Given, K, build, expected, samples
from torch import Tensor, nn

from trak_fast.features.streaming import GradientProjector


class Doubled(nn.Linear):
    """A linear layer in name alone: its weight has another gradient than one's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.weight.T


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Shifted(nn.Module):
    """Has a parameter that no layer in it has."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shift


def test_stages_with_the_whole_models_columns_add_up() -> None:
    model = build("untied")
    batch = samples(6)
    columns = GradientProjector(model, TASK, K).columns
    first, last = (
        nn.Sequential(model.embedding, model.blocks[0]),
        nn.Sequential(model.blocks[1], model.norm, model.head),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    projectors = [
        GradientProjector(
            part, TASK, K, seed=SEED, columns={n: columns[names[id(p)]] for n, p in part.named_parameters()}
        )
        for part in (first, last)
    ]
    with projectors[0].stage(6, 2) as early, projectors[1].stage(6, 2) as late:
        passed = [(first(part[0]), part) for part in zip(*(x.split(3) for x in batch), strict=True)]
        for hidden, part in passed:
            received = hidden.detach().requires_grad_()
            TASK.get_outputs(Given(last(received)), {}, {}, part).sum().backward()
            hidden.backward(received.grad)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    rows = expected(model, batch)
    errors = (early.features + late.features - rows).norm(dim=1)
    assert (errors <= 1e-5 * rows.norm(dim=1)).all()


def twice(model: nn.Module) -> None:
    for _ in range(2):
        model(torch.randn(4, 3)).sum().backward()


def once(model: nn.Module) -> None:
    (model(torch.randn(4, 3)) ** 2).sum().backward()


@pytest.mark.parametrize(
    ("model", "run", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2)), twice, "more than 1 micro-batches pass through the stage"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), lambda model: None, "1 micro-batches were to pass .*, not 0"),
        (lambda: nn.Sequential(nn.Linear(3, 2), Centred()), once, "samples of a batch change each other's results"),
        (lambda: nn.Sequential(Doubled(3, 2)), once, r"gradients of 0\.weight do not follow from the layers'"),
        (Shifted, once, "a stage must have parameters of layers alone, not shift"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), once, r"a stage must return a tensor \(4, \.\.\.\)"),
    ],
    ids=["too many passes", "too few passes", "coupled", "wrong rule", "of no layer", "no batch"],
)
def test_a_stage_refuses_what_it_cannot_project(
    model: Callable[[], nn.Module], run: Callable[[nn.Module], None], message: str
) -> None:
    part = model()
    projector = GradientProjector(part, TASK, K)
    with pytest.raises(RuntimeError, match=message), projector.stage(4):
        run(part)
    assert all(parameter.requires_grad for parameter in part.parameters())


def test_micro_batches_are_equal_parts_of_a_batch() -> None:
    projector = GradientProjector(nn.Sequential(nn.Linear(3, 2)), TASK, K)
    with (
        pytest.raises(ValueError, match="batch_size must be a multiple of micro_batches, 3, not 4"),
        projector.stage(4, 3),
    ):
        pass


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"weight": (0, 6)}, "columns must have all parameters, not lack bias"),
        ({"weight": (0, 5), "bias": (6, 2)}, r"columns of weight must be \(first, 6\).*not \(0, 5\)"),
        ({"weight": (0, 6), "bias": (5, 2)}, "columns must not overlap, as those of weight and bias do"),
        ({"weight": (-1, 6), "bias": (5, 2)}, r"columns of weight must be \(first, 6\).*not \(-1, 6\)"),
    ],
)
def test_columns_must_fit_the_parameters(columns: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientProjector(nn.Linear(3, 2), TASK, K, columns=columns)
