"""Streamed features against the projection of gradients from a loop of torch.autograd.grad over samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hook_models import CASES, LABELS, WORDS, images, words
from streamed import Largest
from torch import Tensor, nn

from trak_fast import GradientProjector, project
from trak_fast.features.checked import Coverage
from trak_fast.features.groups import group_by_length
from trak_fast.tasks import CausalLM, ImageClassification, Task

K = 64


def loop(model: nn.Module, task: Task, batch: list[Tensor]) -> dict[str, Tensor]:
    """Differentiates f of one sample after the other by autograd."""
    selected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    rows = []
    for sample in zip(*batch, strict=True):
        f = task.get_output(model, weights, buffers, *sample)
        rows.append(torch.autograd.grad(f, list(selected.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(selected, zip(*rows, strict=True), strict=True)}


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Returns ‖found − expected‖ / ‖expected‖ of each row."""
    difference = found.double() - expected.double()
    return difference.norm(dim=1) / expected.double().norm(dim=1)


class Language(nn.Module):
    """A model with tied embeddings, positions that all samples share, and norms."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
        mixed = (x * attention_mask.unsqueeze(2)).cumsum(1)
        return self.head(x + torch.tanh(self.body(self.norm(mixed))))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
def test_features_are_projections_of_the_gradients_of_samples_alone(case: str, kind: str) -> None:
    model, batch, task = CASES[case].make()
    model.eval()
    grads = loop(model, task, batch)
    projector = GradientProjector(model, task, K, proj_type=kind, seed=3)
    found = projector.project(batch, model_id=2)
    assert found.dtype == torch.float32
    expected = project(grads, K, proj_type=kind, seed=3, model_id=2)
    assert relative_errors(found, expected).max() < 1e-5
    assert torch.equal(found, projector.project(batch, model_id=2))
    assert projector.grad_dim == sum(p.numel() for p in model.parameters())
    first = 0
    for name, value in grads.items():
        assert projector.columns[name] == (first, value[0].numel())
        first += value[0].numel()


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_slices_of_any_size_add_up_to_the_same(budget: int) -> None:
    model, batch = Language().eval(), words()
    task = CausalLM()
    whole = GradientProjector(model, task, K).project(batch)
    sliced = GradientProjector(model, task, K, memory_budget=budget).project(batch)
    assert relative_errors(sliced, whole).max() < 1e-5


def test_no_tensor_is_larger_than_the_budget_and_the_parameters() -> None:
    """The gradients of 16 samples take 16 times the parameters; one slice takes the budget, the check one parameter."""
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, LABELS)).eval()
    batch = [torch.randn(16, 64), torch.randint(LABELS, (16,))]
    budget = 16 * 64 * 4 * 8  # eight rows of the larger layer
    projector = GradientProjector(model, "image_classification", K, memory_budget=budget)
    projector.project(batch)
    with Largest() as largest:
        projector.project(batch)
    assert largest.bytes <= max(budget, 512 * 64 * 4)


def test_a_weight_of_which_few_rows_are_read_is_not_formed() -> None:
    model = nn.Sequential(nn.Embedding(100_000, 8), nn.Flatten(), nn.Linear(24, LABELS)).eval()
    batch = [torch.randint(100_000, (4, 3)), torch.randint(LABELS, (4,))]
    batch[0][1] = batch[0][0] + 1  # rows next to each other
    batch[0][2, 1] = batch[0][2, 0]  # a row that is read twice
    projector = GradientProjector(model, "image_classification", K, memory_budget=4096)
    expected = project(loop(model, ImageClassification(), batch), K)
    assert relative_errors(projector.project(batch), expected).max() < 1e-5
    projector._unchecked = -1000  # a check differentiates the whole table
    with Largest() as largest:
        found = projector.project(batch)
    assert relative_errors(found, expected).max() < 1e-5
    assert largest.bytes <= 4096


def test_frozen_parameters_and_named_ones() -> None:
    model, batch = Language().eval(), words()
    model.body.weight.requires_grad_(False)
    found = GradientProjector(model, "causal_lm", K)
    assert "body.weight" not in found.columns
    assert relative_errors(found.project(batch), project(loop(model, CausalLM(), batch), K)).max() < 1e-5
    named = GradientProjector(model, "causal_lm", K, grad_wrt=["body.*"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.body.requires_grad_(True)
    assert relative_errors(named.project(batch), project(loop(model, CausalLM(), batch), K)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding_and_never_falls_back(dtype: torch.dtype, caplog: Any) -> None:
    model, batch = Language(64).eval().to(dtype), words()
    expected = project(loop(model, CausalLM(), batch), 256)
    projector = GradientProjector(model, "causal_lm", 256)
    assert relative_errors(projector.project(batch), expected).max() < 1e-2
    assert not projector.singly
    assert not caplog.records


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1.0, 1e30])
def test_gradients_of_any_scale_keep_their_digits(scale: float) -> None:
    class Scaled(ImageClassification):
        def get_outputs(self, *arguments: Any) -> Tensor:
            return super().get_outputs(*arguments) * scale

    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(6, LABELS)).eval(), [x.float() for x in images(6)]
    batch[1] = batch[1].long()
    expected = project(loop(model, ImageClassification(), batch), K).double() * scale
    features = GradientProjector(model, Scaled(), K).features(batch, 0)
    assert relative_errors(features, expected).max() < 1e-5


def test_texts_are_cut_and_grouped_and_keep_their_order() -> None:
    model = Language().eval()
    lengths = [3, 15, 2, 16, 3, 2]
    ids = torch.randint(WORDS, (6, 16))
    mask = (torch.arange(16) < torch.tensor(lengths).unsqueeze(1)).long()
    alone = [
        project(loop(model, CausalLM(), [ids[i : i + 1, :n], mask[i : i + 1, :n]]), K) for i, n in enumerate(lengths)
    ]
    seen: list[tuple[int, ...]] = []
    model.words.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    projector = GradientProjector(model, "causal_lm", K)
    assert relative_errors(projector.project([ids, mask]), torch.cat(alone)).max() < 1e-5
    seen.clear()
    projector._unchecked = -1000
    projector.project([ids, mask])
    assert sorted(seen) == [(2, 16), (4, 3)]


def test_groups_hold_each_sample_once_and_little_padding() -> None:
    lengths = torch.randint(1, 200, (64,))
    groups = group_by_length(lengths)
    assert torch.cat(groups).sort().values.tolist() == list(range(64))
    for group in groups:
        assert int(lengths[group].max()) * len(group) <= 2 * int(lengths[group].sum())
    assert len(group_by_length(torch.full((8,), 5))) == 1


def test_padding_that_changes_the_model_is_an_error() -> None:
    class Averaging(Language):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = super().forward(input_ids, attention_mask)
            return logits * logits.shape[1]

    batch = words()
    batch[1][:, 5:] = 0
    batch[1][0] = 1
    projector = GradientProjector(Averaging().eval(), "causal_lm", K)
    with pytest.raises(RuntimeError, match=r"padding changes the model's outputs.*attn_implementation='eager'"):
        projector.project(batch)


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Language().eval(), words()
    expected = GradientProjector(model, "causal_lm", K).project(batch)
    sizes: list[int] = []
    forward = Language.forward

    def limited(self: Language, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(Language, "forward", limited)
    assert relative_errors(GradientProjector(model, "causal_lm", K).project(batch), expected).max() < 1e-5
    assert max(sizes) == 5


def test_empty_batches_and_wrong_ones() -> None:
    projector = GradientProjector(Language().eval(), "causal_lm", K)
    ids = torch.randint(WORDS, (3, 7))
    assert projector.project([ids[:0], ids[:0]]).shape == (0, K)
    with pytest.raises(ValueError, match=r"batch must have one number of samples in all its tensors, not \[3, 2\]"):
        projector.project([ids, torch.ones(2, 7)])
    with pytest.raises(TypeError, match="batch must be a sequence of tensors"):
        projector.project(ids)
    named = projector.project({"attention_mask": torch.ones_like(ids), "input_ids": ids, "token_type_ids": ids})
    assert torch.equal(named, projector.project([ids, torch.ones_like(ids)]))


@pytest.mark.parametrize("name", ["proj_dim", "memory_budget", "seed"])
def test_numbers_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"`?{name}`? must be in"):
        GradientProjector(nn.Linear(2, 2), "image_classification", **({"proj_dim": 8} | {name: -1}))


def test_a_parameter_of_the_model_itself_is_differentiated_sample_by_sample() -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, LABELS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.scale)

    model, batch = Rooted().eval(), [torch.randn(5, 6), torch.randint(LABELS, (5,))]
    projector = GradientProjector(model, "image_classification", K)
    expected = project(loop(model, ImageClassification(), batch), K)
    assert math.isnan(projector.coverage.norm_by_layers)
    assert relative_errors(projector.project(batch), expected).max() < 1e-5
    assert projector.singly == {"scale"}
    assert projector.coverage.parameters == 1
    assert projector.coverage.by_layers == 28 / 34  # the head's 24 + 4 numbers, and the scale's 6
    grads = loop(model, ImageClassification(), batch)
    squares = {name: value.double().flatten(1).square().sum(1) for name, value in grads.items()}
    shares = (squares["head.weight"] + squares["head.bias"]) / sum(squares.values())
    assert min(abs(shares - projector.coverage.norm_by_layers)) < 1e-5  # of the sample that was compared


def test_coverage_counts_what_is_left_out() -> None:
    model, batch = Language().eval(), words()
    projector = GradientProjector(model, "causal_lm", K, grad_wrt=["body.*"])
    projector.project(batch)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert projector.coverage == Coverage(parameters=(12 * 12 + 12) / everything, by_layers=1.0, norm_by_layers=1.0)


def test_slices_of_a_double_precision_model_agree_with_the_check() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, LABELS)).double()
    batch = [torch.randn(4, 40, dtype=torch.float64), torch.randint(LABELS, (4,))]
    projector = GradientProjector(model, "image_classification", K, memory_budget=4 * 4 * 40)
    whole = GradientProjector(model, "image_classification", K)
    features = projector.project(batch)
    torch.testing.assert_close(features, whole.project(batch), rtol=1e-5, atol=1e-5)
    assert not projector._ways
    assert projector.singly == whole.singly == frozenset()


class Centred(nn.Module):
    """A model that subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x - x.mean(0) + 1)


def test_a_sample_alone_says_nothing_about_the_batches_after_it() -> None:
    model = Centred()
    batch = [torch.randn(6, 4), torch.randint(LABELS, (6,))]
    projector = GradientProjector(model, "image_classification", K)
    alone = torch.cat([projector.project([x[i : i + 1] for x in batch]) for i in range(6)])
    fresh = GradientProjector(model, "image_classification", K)
    fresh.project([x[:1] for x in batch])
    assert relative_errors(fresh.project(batch), alone).max() <= 1e-5


def test_four_samples_of_the_first_batch_are_compared_in_one_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, LABELS)).eval()
    batch = [torch.randn(8, 4), torch.randint(LABELS, (8,))]
    projector = GradientProjector(model, "image_classification", K)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda layer, inputs: sizes.append(len(inputs[0]) * torch.is_grad_enabled()))
    projector.project(batch)
    differentiated = [size for size in sizes if size]
    assert sorted(differentiated) == [1, 1, 1, 1, 8]
    sizes.clear()
    projector.project(batch)
    assert sizes == [8]


class Cubed(torch.autograd.Function):
    """A function of the kind that torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubedScale(nn.Module):
    """A layer without a rule that computes by such a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return Cubed.apply(x * self.scale)


def test_layers_without_a_rule_may_have_functions_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 6), CubedScale(), nn.Linear(6, LABELS))
    batch = [torch.randn(5, 4), torch.randint(LABELS, (5,))]
    projector = GradientProjector(model, "image_classification", K)
    expected = project(loop(model, ImageClassification(), batch), K)
    assert relative_errors(projector.project(batch), expected).max() < 1e-5
    assert projector.singly == frozenset()
