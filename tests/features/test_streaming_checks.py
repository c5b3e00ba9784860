"""Batches for which a check of one sample, or of the first batch, could say too little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hook_models import SumOfSines
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trak_fast import GradientProjector, HookGradientComputer, project
from trak_fast.tasks.base import bind

K = 64


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


class Doubled(nn.Linear):
    """A linear layer by its class, whose output is twice that of one."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Checkpointed(nn.Module):
    """A model that computes each block again in the backward pass, if it is told how; one parameter has no layer."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Doubled(6, 6)) for _ in range(2)])
        self.scale = nn.Parameter(torch.randn(6))
        self.use_reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:

            def compute(x: Tensor, block: nn.Module = block) -> Tensor:
                return torch.tanh(block(x) * self.scale)

            x = compute(x) if self.use_reentrant is None else checkpoint(compute, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("grad_wrt", [["*"], ["blocks.*", "scale"], ["blocks.0.0.*"], ["scale"]])
@pytest.mark.parametrize("first", [nn.Linear, nn.Identity])
def test_layers_that_are_checkpointed_have_their_gradients(
    first: type[nn.Module], grad_wrt: list[str], is_known: bool, use_reentrant: bool
) -> None:
    model, batch = Checkpointed(first(6, 6)), [torch.randn(5, 6)]
    projector = GradientProjector(model, SumOfSines(), K, grad_wrt=grad_wrt)
    hooks = HookGradientComputer(model, SumOfSines(), grad_wrt=grad_wrt)
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in projector.columns}
    rows = []
    for sample in batch[0].split(1):
        model.zero_grad()
        model(sample).sin().sum().backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in wanted.values()]))
    model.zero_grad()
    right = torch.stack(rows)
    if is_known:
        projector.project(batch)
        hooks.compute_per_sample_grad(batch)
    model.use_reentrant = use_reentrant
    for _ in range(2):
        assert largest_error(projector.project(batch), project(right, K)) < 1e-5
        found = torch.cat([rows.flatten(1) for rows in hooks.compute_per_sample_grad(batch).values()], 1)
        assert largest_error(found, right) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


class Weighted(SumOfSines):
    """The same times a factor of each sample, the last tensor of a batch."""

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        *inputs, factors = batch
        return super().get_outputs(model, weights, buffers, inputs) * factors


class SelfAttention(nn.Module):
    """A model with an attention that computes with the weight of a layer inside it, without calling that."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("silent", range(4))
def test_a_sample_without_a_gradient_is_not_the_one_that_is_compared(silent: int) -> None:
    model, x, factors = SelfAttention(), torch.randn(4, 5, 8), torch.ones(4)
    factors[silent] = 0
    found = GradientProjector(model, Weighted(), K).project([x, factors])
    assert largest_error(found, expected(model, [x]) * factors.unsqueeze(1)) < 1e-5


@pytest.mark.parametrize("broken", range(3))
def test_a_sample_that_is_not_finite_is_not_the_one_that_is_compared(broken: int) -> None:
    model, x = nn.Sequential(Doubled(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(3, 4)
    right = expected(model, [x])
    x[broken] = torch.nan
    found = GradientProjector(model, SumOfSines(), K).project([x])
    others = [sample for sample in range(3) if sample != broken]
    assert found[broken].isnan().all()
    assert largest_error(found[others], right[others]) < 1e-5


class Routed(nn.Module):
    """A model that uses one of three layers for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.experts = nn.ModuleList([Doubled(8, 3) for _ in range(3)])

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        return torch.stack([expert(x) * (route == i).unsqueeze(1) for i, expert in enumerate(self.experts)]).sum(0)


@pytest.mark.parametrize("batches", [([0, 1, 2, 0, 1, 2],), ([0, 1, 0, 1, 0], [1, 0, 2, 2])])
def test_a_parameter_is_compared_by_a_sample_that_depends_on_it(batches: Sequence[list[int]]) -> None:
    model = Routed()
    projector = GradientProjector(model, SumOfSines(), K)
    for routes in batches:
        batch = [torch.randn(len(routes), 4), torch.tensor(routes)]
        assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


@pytest.mark.parametrize("sketch", ["full", "two_sided"])
def test_parameters_and_layers_that_were_replaced_are_those_of_the_call(sketch: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)
    projector = GradientProjector(model, SumOfSines(), K, sketch=sketch)
    projector.project([x])
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True)
    fresh = GradientProjector(model, SumOfSines(), K, sketch=sketch)
    assert largest_error(projector.project([x]), fresh.project([x])) < 1e-5
    model[2] = Doubled(8, 3)
    fresh = GradientProjector(model, SumOfSines(), K, sketch=sketch)
    assert largest_error(projector.project([x]), fresh.project([x])) < 1e-5
    model[2] = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"names and shapes of its parameters, not change those of 2.weight, 2.bias"):
        projector.project([x])


class Judged(SumOfSines):
    """A task that computes with the weights of another model too."""

    def __init__(self, judge: nn.Module) -> None:
        self._judge = judge

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        output: Tensor = bind(model, weights, buffers)(*batch)
        return (output * self._judge(*batch)).sum(1)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_gradients_of_another_model_are_left_as_they_are(has_gradients: bool) -> None:
    model, judge, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    if has_gradients:
        judge(x).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in judge.parameters()]
    found = GradientProjector(model, Judged(judge), K).project([x])
    for parameter, gradient in zip(judge.parameters(), before, strict=True):
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)
    factors = judge(x).detach()
    weights = factors.unsqueeze(2) * x.unsqueeze(1)
    assert largest_error(found, project(torch.cat([weights.flatten(1), factors], 1), K)) < 1e-5


def test_optimizers_that_step_in_the_backward_pass_do_not_step() -> None:
    model, x = nn.Sequential(Doubled(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)
    right, steps = expected(model, [x]), []
    handles = [p.register_post_accumulate_grad_hook(steps.append) for p in model.parameters()]
    assert largest_error(GradientProjector(model, SumOfSines(), K).project([x]), right) < 1e-5
    assert not steps
    model(x).sum().backward()
    assert len(steps) == len(handles) == 4


def test_threads_that_share_a_model_take_turns() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), Doubled(64, 3))
    batches = [[torch.randn(8, 32)] for _ in range(3)]
    right = [expected(model, batch) for batch in batches]
    projectors = [GradientProjector(model, SumOfSines(), K) for _ in batches]

    def errors(number: int) -> list[float]:
        return [largest_error(projectors[number].project(batches[number]), right[number]) for _ in range(5)]

    with ThreadPoolExecutor(len(batches)) as threads:
        for found in threads.map(errors, range(len(batches))):
            assert max(found) < 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())


class Dispatched(nn.Module):
    """A model that sends each token to one of two layers, which are called with the tokens sent to them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)]), nn.Linear(6, 3)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        result = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            chosen = (route.flatten() == i).nonzero().flatten()
            if len(chosen):
                result = result.index_add(0, chosen, expert(tokens[chosen]))
        return self.head(torch.tanh(result)).view(*x.shape[:2], 3)


@pytest.mark.parametrize(
    "routes", [([[1, 1], [0, 1]], [[1, 0], [0, 0]], [[0, 1]]), ([[0, 1], [1, 0]], [[0, 0], [0, 1]])]
)
def test_layers_that_get_the_tokens_sent_to_them_are_differentiated_otherwise(
    routes: Sequence[list[list[int]]],
) -> None:
    for _ in range(5):
        model = Dispatched()
        projector = GradientProjector(model, SumOfSines(), K)
        for route in routes:
            batch = [torch.randn(len(route), 2, 6), torch.tensor(route)]
            assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


class Gated(nn.Module):
    """A model that computes with a layer's weight beside the layer too, where a sample's gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = self.body(x)
        return x + gate.unsqueeze(1) * (self.other(x) + torch.tanh(x) @ self.other.weight)


class PositionsFirst(nn.Module):
    """A model that gives a layer the positions of all samples, one position after the other, where gates are open."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(10, 4), nn.Linear(4, 4, bias=False)

    def forward(self, words: Tensor, gate: Tensor) -> Tensor:
        x = self.words(words)
        count, length, width = x.shape
        mixed = self.body(x.transpose(0, 1).reshape(length * count, width)).view(length, count, width)
        return x.sin() + mixed.transpose(0, 1) * gate[:, None, None]


def test_a_sample_that_is_not_finite_says_nothing_of_any_parameter() -> None:
    model, x = Gated(), torch.randn(4, 4)
    x[1] = torch.nan
    projector = GradientProjector(model, SumOfSines(), K)
    projector.project([x, torch.zeros(4)])
    batch = [torch.randn(4, 4), torch.ones(4)]
    assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


def test_samples_that_are_not_finite_are_none_of_the_four_that_are_compared() -> None:
    model, x, gate = Gated(), torch.randn(4, 4), torch.ones(4)
    x[:3] = torch.nan
    gate[3] = 0
    projector = GradientProjector(model, SumOfSines(), K)
    projector.project([x, gate])
    batch = [torch.randn(8, 4), torch.ones(8)]
    assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()])
def test_a_comparison_that_was_interrupted_is_made_later(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated()
    projector = GradientProjector(model, SumOfSines(), K)
    projector.project([torch.randn(4, 4), torch.zeros(4)])
    compare = projector._sketched_alone
    errors = [error]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return compare(*args, **kwargs)

    monkeypatch.setattr(projector, "_sketched_alone", interrupted)
    batch = [torch.randn(4, 4), torch.ones(4)]
    try:
        found = projector.project(batch)
    except KeyboardInterrupt:
        found = projector.project(batch)
    assert not errors
    assert largest_error(found, expected(model, batch)) < 1e-5


@pytest.mark.parametrize("first", [(), (1,), (1, 1)])
def test_samples_without_a_gradient_and_batches_of_one_say_nothing_of_others(first: tuple[int, ...]) -> None:
    model = PositionsFirst()
    projector = GradientProjector(model, SumOfSines(), K)
    projector.project([torch.randint(10, (4, 3)), torch.zeros(4)])
    for size in first:
        projector.project([torch.randint(10, (size, 3)), torch.ones(size)])
    batch = [torch.randint(10, (4, 3)), torch.ones(4)]
    assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


def test_equal_samples_count_once() -> None:
    model = PositionsFirst()
    projector = GradientProjector(model, SumOfSines(), K)
    projector.project([torch.zeros(4, 3, dtype=torch.int64), torch.ones(4)])
    batch = [torch.randint(10, (4, 3)), torch.ones(4)]
    assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5


class UsedTwice(nn.Module):
    """A model that gives a layer the words of all texts of three at once, and computes with its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.other = nn.Embedding(10, 4), nn.Linear(4, 4, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        if words.shape[1] != 3:
            return self.other(x)
        return self.other(x.flatten(0, 1)).view_as(x) + torch.tanh(x) @ self.other.weight


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_with_few_gradients_that_is_split_in_a_new_way_is_compared_by_these(seed: int) -> None:
    torch.manual_seed(seed)
    model = UsedTwice()
    projector = GradientProjector(model, Weighted(), K)
    projector.project([torch.randint(10, (4, 2)), torch.ones(4)])
    words, factors = torch.randint(10, (16, 3)), torch.zeros(16)
    factors[torch.randperm(16)[:2]] = 1
    found = projector.project([words, factors])
    assert largest_error(found, expected(model, [words]) * factors.unsqueeze(1)) < 1e-5


def test_parameters_that_were_added_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    projector = GradientProjector(model, SumOfSines(), K)
    projector.project([torch.randn(2, 4)])
    model[2].weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"model must keep .* not change those of 2\.weight"):
        projector.project([torch.randn(2, 4)])


class Uncalled(nn.Module):
    """A model that computes with the parameters of a layer without calling that, where gates are open."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = self.body(x)
        if not gate.any():
            return x
        return x + gate.unsqueeze(1) * torch.nn.functional.linear(x, self.other.weight, self.other.bias)


def test_a_layer_that_is_never_called_may_be_computed_with_in_later_batches() -> None:
    model = Uncalled()
    projector = GradientProjector(model, SumOfSines(), K)
    for gate in (0.0, 0.0, 1.0, 0.5):
        batch = [torch.randn(5, 4), torch.full((5,), gate)]
        model.other.weight.grad = kept = torch.ones(4, 4)
        assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5
        assert model.other.weight.grad is kept
        assert torch.equal(kept, torch.ones(4, 4))


def test_a_way_that_earlier_batches_relied_on_is_told_to_have_been_wrong(caplog: pytest.LogCaptureFixture) -> None:
    model = Gated()
    projector = GradientProjector(model, SumOfSines(), K)
    gate = torch.full((5,), 1e-12)  # its gradient is right up to rounding
    projector.project([torch.randn(5, 4), gate])
    projector._unchecked = 32
    batch = [torch.randn(5, 4), torch.ones(5)]
    assert largest_error(projector.project(batch), expected(model, batch)) < 1e-5
    assert "other (Linear)" in caplog.text
    assert "gradients of other.weight were wrong for a sample of this batch, and may have been" in caplog.text
