"""Gradients layer by layer against a loop of torch.autograd.grad over samples, and against torch.func's."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak_fast import HookGradientComputer, TRAKer
from trak_fast.gradients import FunctionalGradientComputer, evaluation_mode
from trak_fast.gradients.layers import RULES, RULES_BY_NAME, rule_of
from trak_fast.tasks import CausalLM, ImageClassification, Task

B, LABELS, WORDS = 5, 4, 11


def images(*shape: int) -> list[Tensor]:
    return [torch.randn(B, *shape, dtype=torch.float64), torch.randint(LABELS, (B,))]


def convolutions() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (2, 1), dilation=(1, 2), bias=False), nn.GroupNorm(2, 4), nn.Flatten(2),
        nn.Conv1d(4, 3, 2, padding="valid"), nn.Tanh(), nn.Flatten(), nn.LazyLinear(LABELS),
    )  # fmt: skip
    batch = images(4, 7, 8)
    model(batch[0].float())
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model, batch


def volumes() -> tuple[nn.Module, list[Tensor]]:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, LABELS)), images(1, 3, 3, 3)


class Attention(nn.Module):
    """Multi-head attention by linear layers, with a layer norm over two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.head = nn.LayerNorm((4, 6)), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 3)).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + attended)).mean(1)


class Encoder(nn.Module):
    """PyTorch's own layer, in which two parameters belong to no layer that hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[:, 0])


class Shared(nn.Module):
    """A layer called twice, two layers with one weight, a parameter of the model itself and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale, self.unused, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(2, 2), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x)))) * self.scale
        return self.head(self.second(torch.tanh(self.first(x))))


class SequenceFirst(nn.Module):
    """Layers whose inputs have the batch in their second dimension, as many of the first as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.body(x.transpose(0, 1)))).sum(0))


class ChangedInput(nn.Module):
    """The input of a layer is changed in place after the call, which autograd refuses too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, LABELS), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        before = self.body(x)
        return before + self.head(x.mul_(2))


class Tied(nn.Module):
    """A language model whose last layer uses the embedding's weight outside of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 6, padding_idx=0), nn.Embedding(7, 6)
        self.body, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]).expand(input_ids.shape))
        x = torch.tanh(self.norm(self.body(x * attention_mask.unsqueeze(2))))
        return self.decode(x.cumsum(1))

    def decode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.words.weight)


class Conv1D(nn.Module):
    """A linear layer as transformers' GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class OwnRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(size)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class OtherRMSNorm(OwnRMSNorm):
    """Has the name, but does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.exp() * x


class ScaleRMSNorm(nn.Module):
    """Has the name, but its parameter has another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


class OtherLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.weight.T**2


class Transformer(nn.Module):
    """Layers of transformers' kinds: positions in a batch of one, an attention whose key bias changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 6), nn.Embedding(7, 6)
        self.before, self.after, self.other = OwnRMSNorm(6), nn.RMSNorm(6), OtherRMSNorm(6)
        self.inner, self.outer = Conv1D(18, 6), OtherLinear(6, 6)
        self.key, self.head = nn.Linear(6, 6), nn.Linear(6, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]).unsqueeze(0))
        q, k, v = self.inner(self.before(x)).chunk(3, 2)
        attended = F.scaled_dot_product_attention(q, self.key(k), v, is_causal=True)
        return self.head(self.after(x + self.outer(self.other(attended))))


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, WORDS)

    def decode(self, x: Tensor) -> Tensor:
        return self.head(x)


def words() -> list[Tensor]:
    mask = torch.ones(B, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return [torch.randint(WORDS, (B, 7)), mask]


def built(model: nn.Module, batch: list[Tensor], task: Task) -> tuple[nn.Module, list[Tensor], Task]:
    return model.double(), batch, task


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, list[Tensor], Task]], set[str]]] = {
    # with the parameters that no layer explains
    "convolutions": (lambda: built(*convolutions(), ImageClassification()), set()),
    "volumes": (lambda: built(*volumes(), ImageClassification()), set()),
    "attention": (lambda: built(Attention(), images(4, 6), ImageClassification()), set()),
    "encoder": (
        lambda: built(Encoder(), images(4, 6), ImageClassification()),
        {f"layer.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
    ),
    "shared": (lambda: built(Shared(), images(6), ImageClassification()), {"scale"}),
    "sequence first": (
        lambda: built(SequenceFirst(), images(B, 3), ImageClassification()),
        {"body.weight", "body.bias", "norm.weight", "norm.bias"},
    ),
    "tied": (lambda: built(Tied(), words(), CausalLM()), {"words.weight"}),
    "transformer": (
        lambda: built(Transformer(), words(), CausalLM()),
        {"other.weight", "outer.weight"},
    ),
    "embedding": (lambda: built(Untied(), words(), CausalLM()), set()),
}


def loop(model: nn.Module, task: Task, batch: list[Tensor]) -> dict[str, Tensor]:
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
    build, per_sample = CASES[case]
    model, batch, task = build()
    hooks, functional = HookGradientComputer(model, task), FunctionalGradientComputer(model, task)
    with evaluation_mode(model):
        expected = loop(model, task, batch)
        for _ in range(2):  # what the first batch is compared with is not computed for the second
            grads = hooks.compute_per_sample_grad(batch)
            assert list(grads) == list(expected)
            for name, value in grads.items():
                assert not value.requires_grad
                # both in float64: sums of at most a few thousand terms, in another order
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
        vectorised = functional.compute_per_sample_grad(batch)
        for name, value in grads.items():
            torch.testing.assert_close(value, vectorised[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(hooks.compute_loss_grad(batch), functional.compute_loss_grad(batch))
    assert hooks._per_sample == per_sample  # everything else came from its layer
    assert not any(module._forward_hooks for module in model.modules())


def test_other_batch_sizes_after_the_first() -> None:
    torch.manual_seed(0)
    model, batch, task = CASES["sequence first"][0]()
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
    model, batch, task = CASES["shared"][0]()
    expected = loop(model, task, batch)
    for names in (["head.*"], ["first.weight", "scale"], ["*.bias"]):
        computer = HookGradientComputer(model, task, grad_wrt=names)
        grads = computer.compute_per_sample_grad(batch)
        assert list(grads) == list(FunctionalGradientComputer(model, task, grad_wrt=names).selected)
        for name, value in grads.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


class Opaque(torch.autograd.Function):
    """A square that torch.func cannot transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Untransformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Opaque.apply(self.body(x)))


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
    first, batch, task = CASES["attention"][0]()
    second, _, _ = CASES["attention"][0]()
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
