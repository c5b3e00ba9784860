"""Gradients, f and Q of a sample depend on this sample alone, whatever a model does to batches, buffers and inputs."""

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from streamed import StreamedGradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trak_fast import FunctionTask, HookGradientComputer
from trak_fast.gradients import FunctionalGradientComputer, evaluation_mode, layers
from trak_fast.gradients.base import ParameterGradients
from trak_fast.tasks import BatchTask, ImageClassification, Task

COMPUTERS = [FunctionalGradientComputer, HookGradientComputer, StreamedGradients]
LABELS = 3


def loop(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Differentiates log p/(1 − p) of one sample after the other, each by a fresh copy of the model."""
    rows: list[list[Tensor]] = []
    for image, *rest, label in zip(*batch, strict=True):
        fresh = copy.deepcopy(model).eval()
        p = torch.softmax(fresh(image[None].clone(), *[x[None].clone() for x in rest]), 1)[0, label]
        f = torch.log(p / (1 - p))
        parameters = list(fresh.parameters())
        grads = torch.autograd.grad(f, parameters, allow_unused=True) if f.requires_grad else [None] * len(parameters)
        rows.append(
            [torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip(parameters, grads, strict=True)]
        )
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def weightings(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Computes 1 − p of one sample after the other, each by a model of its own."""
    rows = []
    for image, *rest, label in zip(*batch, strict=True):
        fresh = copy.deepcopy(model).eval()
        rows.append(1 - torch.softmax(fresh(image[None].clone(), *[x[None].clone() for x in rest]), 1)[0, label])
    return torch.stack(rows).detach()


class BatchStatistics(nn.Module):
    """Subtracts the mean of the batch, through which no gradient flows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        return self.head(x - x.mean(0, keepdim=True).detach() / 2)


class NormOfBatch(nn.Module):
    """A batch norm without running statistics, over channels of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, :, None].repeat(1, 1, 2)[:, :4] * torch.arange(1.0, 3)).flatten(1))


class Permuted(nn.Module):
    """Sorts the samples of a batch, and puts them back in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.argsort(x[:, 0])
        return self.head(torch.tanh(self.body(x[order])))[torch.argsort(order)]


class Gate(nn.Module):
    """One number for all samples, from a context whose leading dimension is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.gate, self.head = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 1), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.gate(self.context).sum()


class Repeated(nn.Module):
    """Makes positions once and repeats them for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(2, 3), nn.Linear(3, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(2)[None])
        return self.head(torch.tanh(x.view(-1, 2, 3) + places.repeat(len(x), 1, 1))).mean(1)


class Flattened(nn.Module):
    """Every layer sees steps, and none samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.reshape(-1, 3)))).view(len(x), -1, LABELS).mean(1)


class ByKeyword(nn.Module):
    """Calls a norm by a keyword of its own, and one that hands on its input beside its output."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(6)), 1e-3

        def forward(self, hidden_states: Tensor) -> Any:
            return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.eps)

    def __init__(self) -> None:
        super().__init__()
        two = type("TwoRMSNorm", (self.Norm,), {"forward": lambda norm, x: (ByKeyword.Norm.forward(norm, x), x)})
        self.first, self.second = type("OneRMSNorm", (self.Norm,), {})(), two()
        self.head = nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        out, residual = self.second(self.first(hidden_states=x))
        return self.head(out + residual)


class Checkpointed(nn.Module):
    """Computes a block again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: torch.tanh(self.block(torch.tanh(x))), self.body(x), use_reentrant=False)
        return self.head(x)


class InPlace(nn.Module):
    """Changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.sub_(0.5).div_(0.25))


class Counting(nn.Module):
    """Counts its calls in a buffer, by which it scales its output."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, LABELS)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x) * self.calls


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words((x > 0).long().cumsum(1) % 5).mean(1))


class Constant(nn.Module):
    """Has a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :LABELS]


class Recurrent(nn.Module):
    """Packs sequences by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        packed = nn.utils.rnn.pack_padded_sequence(x.view(-1, 3, 2), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.body(packed)[1][0])


class GradientOfBatch(nn.Module):
    """Divides gradients by the size of the batch, on their way back."""

    class Mean(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / len(grad)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.Mean.apply(self.body(x))))


class Growing(nn.Module):
    """Makes a table in a buffer, and says in an attribute how long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.length = nn.Linear(6, LABELS), 2
        self.register_buffer("table", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.length < 6:
            self.length = 6
            self.table = torch.linspace(0, 1, 6, dtype=x.dtype)
        return self.head(x + self.table)


class Stateful(nn.Module):
    """Keeps what it has seen: a number, a mask, a list and a tensor, by which later outputs would change."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls, self.seen = nn.Linear(6, LABELS), 1.0, []
        self.mask: Tensor | None = None
        self.sum = torch.ones(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls *= 2
        self.seen.append(1)
        self.mask = torch.ones(6, dtype=x.dtype) if self.mask is None else 2 * self.mask
        self.sum.add_(1)
        return self.head(x) * self.calls * len(self.seen) * self.mask.mean() * self.sum.mean()


class Positions(nn.Module):
    """Adds embeddings of positions that have no dimension for samples, or one of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Embedding(2, 3), nn.Embedding(2, 3), nn.Linear(3, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(2)
        return self.head(torch.tanh(x.view(-1, 2, 3) + self.first(places) + self.second(places[None]))).mean(1)


MODELS = [BatchStatistics, NormOfBatch, Permuted, Gate, Repeated, Flattened, ByKeyword, Checkpointed, InPlace, Counting]
MODELS += [Words, Constant, Recurrent, GradientOfBatch, Growing, Stateful, Positions]
ONLY_BY_HOOKS = [Checkpointed, Words, Recurrent, Stateful]
"""The models that torch.func cannot take."""


def batch_of(count: int) -> list[Tensor]:
    return [torch.randn(count, 6, dtype=torch.float64), torch.randint(LABELS, (count,))]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_gradients_and_weightings_are_those_of_samples_alone(
    build: Callable[[], nn.Module], computer: type[ParameterGradients]
) -> None:
    torch.manual_seed(0)
    model = build().double()
    state = copy.deepcopy(model.state_dict())
    gradients = computer(model, ImageClassification())
    for count in (5, 1, 8):
        batch = batch_of(count)
        given = [x.clone() for x in batch]
        expected = loop(model, batch)
        with evaluation_mode(model):
            if computer is FunctionalGradientComputer and build in ONLY_BY_HOOKS:
                with pytest.raises(
                    RuntimeError, match=r"gradient_computer=trak_fast\.HookGradientComputer does without"
                ):
                    gradients.compute_per_sample_grad(batch)
                return
            grads = gradients.compute_per_sample_grad(batch)
            q = gradients.compute_loss_grad(batch)
            again = gradients.compute_loss_grad(batch)
        assert list(grads) == list(expected)
        for name, value in grads.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(q, weightings(model, batch), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(again, q, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(x, y) for x, y in zip(batch, given, strict=True))
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    if build is Positions and isinstance(gradients, HookGradientComputer):
        assert gradients.singly == set()  # positions need no batches of one


class Noisy(nn.Module):
    """Forgets to ask if it is in training."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.noise = nn.Linear(6, 32), nn.Linear(32, LABELS), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.noise(torch.relu(self.body(x))))


class Remembering:
    """A noise that depends on the calls before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Rarely(nn.Module):
    """A noise by a generator of its own that seldom has an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.generator.random() < 0.1 else x


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("noise", [F.dropout, lambda x: x * random.random(), Remembering()])
@pytest.mark.parametrize("batched", [True, False])
def test_random_outputs_are_refused(
    computer: type[ParameterGradients], noise: Callable[[Tensor], Tensor], batched: bool
) -> None:
    task = ImageClassification() if batched else FunctionTask(lambda model, x, y: model(x[None])[0].gather(0, y[None]))
    model = Noisy(noise).double()
    with evaluation_mode(model), pytest.raises(RuntimeError, match="random") as caught:
        computer(model, task).compute_per_sample_grad(batch_of(8))
    assert "HookGradientComputer" not in str(caught.value)  # which refuses it too


@pytest.mark.parametrize("computer", COMPUTERS)
def test_rare_noise_by_a_generator_of_the_model_is_refused(computer: type[ParameterGradients]) -> None:
    gradients = computer(Noisy(Rarely()).double(), ImageClassification())

    def compute_many() -> None:
        for _ in range(100):
            gradients.compute_per_sample_grad(batch_of(4))

    with pytest.raises(RuntimeError, match="random"):
        compute_many()


class Large(BatchTask):
    """f is large beside all that it depends on."""

    def get_outputs(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        return 1e5 + torch.func.functional_call(model, (weights, buffers), batch[0]).sum(1)


def test_statistics_of_a_batch_beside_a_large_output_are_found() -> None:
    torch.manual_seed(0)
    model, batch = BatchStatistics(), [torch.randn(8, 6)]
    grads = HookGradientComputer(model, Large()).compute_per_sample_grad(batch)
    for i in range(8):
        f = model(batch[0][i : i + 1]).sum()
        expected = torch.autograd.grad(f, model.head.weight)[0]
        torch.testing.assert_close(grads["head.weight"][i], expected, rtol=1e-5, atol=1e-6)


def test_noise_beside_a_large_output_is_refused() -> None:
    with pytest.raises(RuntimeError, match="random"):
        HookGradientComputer(Noisy(F.dropout), Large()).compute_per_sample_grad([torch.randn(8, 6)])


def test_random_numbers_without_effect_are_no_obstacle() -> None:
    model = Noisy(lambda x: x if torch.rand(()) > 2 else x + 0 * torch.rand_like(x)).double()
    batch = batch_of(4)
    expected = loop(model, batch)
    for name, value in HookGradientComputer(model, ImageClassification()).compute_per_sample_grad(batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


def exchanged(rule: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Makes a rule that exchanges two samples."""

    def gradients(layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> dict[str, Tensor]:
        grads = rule(layer, inputs, output_grads)
        order = torch.arange(len(inputs))
        order[[1, 2]] = order[[2, 1]]
        return {name: value[order] for name, value in grads.items()}

    return gradients


def scaled(rule: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Makes a rule that is wrong by a thousandth, for one sample."""

    def gradients(layer: nn.Module, inputs: Tensor, output_grads: Tensor) -> dict[str, Tensor]:
        grads = rule(layer, inputs, output_grads)
        factors = torch.ones(len(inputs), dtype=inputs.dtype)
        factors[-1] = 1.001
        return {name: value * factors.view(-1, *[1] * (value.ndim - 1)) for name, value in grads.items()}

    return gradients


@pytest.mark.parametrize("fault", [exchanged, scaled])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rule_that_fails_later_is_noticed_in_each_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Callable[..., Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, LABELS)).to(dtype)
    computer = HookGradientComputer(model, ImageClassification())
    right = layers.RULES[nn.Linear]
    batches = [[x.to(dtype) if x.is_floating_point() else x for x in batch_of(8)] for _ in range(3)]
    computer.compute_per_sample_grad(batches[0])
    assert computer.singly == set()
    wrong = layers.Rule(fault(right.gradients))
    computer._layers = {
        layer: type(known)(wrong if layer is model[0] else right, known.names)
        for layer, known in computer._layers.items()
    }
    with caplog.at_level(logging.WARNING):
        for batch in batches[1:]:
            expected = loop(model, batch)
            for name, value in computer.compute_per_sample_grad(batch).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert computer.singly == {"0.weight", "0.bias"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert "0 (Linear)" in caplog.text
    computer.load_model_params(model)
    assert computer.singly == {"0.weight", "0.bias"}  # at the next checkpoint too


class Summed(BatchTask):
    """f of any scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_outputs(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        return self.scale * torch.func.functional_call(model, (weights, buffers), batch[0]).sum(1)


@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
def test_the_check_holds_at_any_scale(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, LABELS))
    computer = HookGradientComputer(model, Summed(scale))
    batch = [torch.randn(8, 6)]
    computer.compute_per_sample_grad(batch)
    assert computer.singly == set()
    right = layers.RULES[nn.Linear]
    computer._layers[model[0]] = type(computer._layers[model[0]])(
        layers.Rule(exchanged(right.gradients)), {"weight": "0.weight", "bias": "0.bias"}
    )
    grads = computer.compute_per_sample_grad(batch)
    assert computer.singly == {"0.weight", "0.bias"}
    for i in range(8):
        f = scale * model(batch[0][i : i + 1]).sum()
        torch.testing.assert_close(grads["0.bias"][i], torch.autograd.grad(f, model[0].bias)[0], rtol=1e-5, atol=0)


def test_a_model_that_does_not_bear_hooks_is_computed_sample_by_sample(caplog: pytest.LogCaptureFixture) -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    class Strict(nn.Module):
        """Wants the very tensor that its layer has made."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Keeping(6, 8), nn.Linear(8, LABELS)

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            if out is not self.body.kept:
                raise LookupError("another tensor")
            return self.head(torch.tanh(out))

    torch.manual_seed(0)
    model, batch = Strict().double(), batch_of(4)
    computer = HookGradientComputer(model, ImageClassification())
    for _ in range(2):
        grads = computer.compute_per_sample_grad(batch)
    model.body.kept = None  # which keeps copies from being made
    for name, value in grads.items():
        torch.testing.assert_close(value, loop(model, batch)[name], rtol=1e-9, atol=1e-11)
    assert caplog.text.count("layers cannot be differentiated in a batch (another tensor); each sample is") == 1


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_makes_no_layer_fall_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), *[Block(32) for _ in range(6)], nn.Flatten(), nn.Linear(512, 4))
    model = model.to(dtype)
    computer = HookGradientComputer(model, ImageClassification())
    for _ in range(5):
        computer.compute_per_sample_grad([torch.randint(50, (24, 16)), torch.randint(4, (24,))])
    assert computer.singly == set()


def test_hooks_change_no_number_and_no_shape() -> None:
    """Negative zeros stay negative, and what all samples share keeps its leading dimension of 1."""

    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.places, self.head = nn.Linear(6, 6), nn.Embedding(1, 6), nn.Linear(6, LABELS)

        def forward(self, x: Tensor) -> Tensor:
            body, places = self.body(x), self.places(torch.arange(1)[None])[:, 0]
            seen.extend([body.detach().clone(), places.detach().clone()])
            return self.head(torch.tanh(body + places))

    torch.manual_seed(0)
    model = Watching()
    with torch.no_grad():
        model.body.weight[:3] = 0
        model.body.bias[:3] = -0.0
    batch = [torch.randn(4, 6), torch.randint(LABELS, (4,))]
    model(batch[0].abs().neg())
    plain = seen[:]
    seen.clear()
    HookGradientComputer(model, ImageClassification()).compute_per_sample_grad([batch[0].abs().neg(), batch[1]])
    for before, after in zip(plain, seen[:2], strict=True):
        assert before.shape == after.shape
        assert torch.equal(before.view(torch.int32), after.view(torch.int32))


def test_a_sample_that_is_not_finite_spoils_no_other_and_no_later_batch() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, LABELS)).double(), batch_of(6)
    computer = HookGradientComputer(model, ImageClassification())
    broken = [batch[0].clone(), batch[1]]
    broken[0][2] = torch.nan
    expected = loop(model, batch)
    for given in (broken, batch):
        for name, value in computer.compute_per_sample_grad(given).items():
            rows = torch.arange(6) != 2 if given is broken else torch.ones(6, dtype=torch.bool)
            torch.testing.assert_close(value[rows], expected[name][rows], rtol=1e-9, atol=1e-11)
    assert computer.singly == set()


def test_weightings_of_a_task_s_own_do_not_depend_on_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    class Relative(BatchTask):
        """Compares with the largest output of the batch."""

        def get_outputs(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.func.functional_call(model, (weights, buffers), batch[0]).sum(1)

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            outputs = self.get_outputs(model, weights, buffers, batch)
            return outputs / outputs.abs().max()

    torch.manual_seed(0)
    model, (x, _) = nn.Linear(6, 2).double(), batch_of(5)
    for computer in COMPUTERS:
        gradients = computer(model, Relative())
        for _ in range(2):
            gradients.compute_per_sample_grad([x])
            torch.testing.assert_close(gradients.compute_loss_grad([x]), model(x).sum(1).sign().detach())
    assert caplog.text.count("WARNING") == len(COMPUTERS)  # once for each computer


def test_weightings_follow_the_batch_and_the_parameters_as_they_are() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(6, LABELS).double(), batch_of(4)
    for computer in COMPUTERS:
        gradients = computer(model, ImageClassification())
        gradients.compute_per_sample_grad(batch)
        batch[0] += 1
        torch.testing.assert_close(gradients.compute_loss_grad(batch), weightings(model, batch))
        gradients.compute_per_sample_grad(batch)
        with torch.no_grad():
            model.weight.mul_(2)
        torch.testing.assert_close(gradients.compute_loss_grad(batch), weightings(model, batch))
        gradients.compute_per_sample_grad(batch)
        other = batch_of(4)
        torch.testing.assert_close(gradients.compute_loss_grad(other), weightings(model, other))


def test_evaluation_mode_calls_no_method_of_the_model() -> None:
    class Merging(nn.Linear):
        """Changes its weight as the mode changes, as layers of low rank do."""

        def train(self, mode: bool = True) -> "Merging":
            self.weight.data += 1
            return super().train(mode)

    model = nn.Sequential(Merging(6, 3), nn.Dropout())
    before = model[0].weight.clone()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model[0].weight, before)
    assert all(module.training for module in model.modules())
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_a_mistake_in_the_batch_is_told_as_the_model_tells_it(computer: type[ParameterGradients]) -> None:
    model = nn.Linear(6, LABELS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        computer(model, ImageClassification()).compute_per_sample_grad([torch.randn(4, 5), torch.zeros(4).long()])
    assert "HookGradientComputer" not in str(caught.value)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_the_caller_s_modes_do_not_matter(computer: type[ParameterGradients]) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, LABELS)).double(), batch_of(4)
    model[0].weight.requires_grad_(False)
    expected = loop(model.requires_grad_(), batch)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    gradients = computer(model, ImageClassification(), grad_wrt=["*"])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            inside = [x.clone() for x in batch]
            for name, value in gradients.compute_per_sample_grad(inside).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
            gradients.compute_loss_grad(inside)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("computer", COMPUTERS)
def test_no_weights_are_taken_from_a_cache(computer: type[ParameterGradients]) -> None:
    torch.manual_seed(0)
    batch = [torch.randn(6, 6), torch.randint(LABELS, (6,))]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, LABELS))
    other = {name: x + 0.1 for name, x in model.state_dict().items()}
    gradients = computer(model, ImageClassification())
    with torch.autocast("cpu", torch.bfloat16):
        gradients.compute_per_sample_grad(batch)
        model.load_state_dict(other)
        gradients.load_model_params(model)
        grads = gradients.compute_per_sample_grad(batch)
    for name, value in loop(model, batch).items():
        torch.testing.assert_close(grads[name], value, rtol=0.1, atol=0.03 * value.abs().max().item())

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, LABELS))).double()
    batch = batch_of(4)
    gradients = computer(model, ImageClassification())
    with nn.utils.parametrize.cached():
        with torch.no_grad():
            model(batch[0])
        grads = gradients.compute_per_sample_grad(batch)
    for name, value in loop(model, batch).items():
        torch.testing.assert_close(grads[name], value, rtol=1e-9, atol=1e-11)


def test_samples_that_change_each_other_late_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Brightest(nn.Module):
        """Divides by the largest number of the batch, which is 1 in most batches."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, LABELS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x / x.amax())

    torch.manual_seed(0)
    model, computer = Brightest().double(), None
    computer = HookGradientComputer(model, ImageClassification())
    bright, dark = batch_of(8), batch_of(8)
    bright[0] = bright[0].clamp(max=1).index_fill(1, torch.tensor([0]), 1.0)
    for batch in (bright, dark):
        for name, value in computer.compute_per_sample_grad(batch).items():
            torch.testing.assert_close(value, loop(model, batch)[name], rtol=1e-9, atol=1e-11)
    assert "The 8 samples that came before in batches may be wrong: featurize them again" in caplog.text


def test_a_task_may_differentiate_by_itself() -> None:
    def slope(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x[None]).sum(), x, create_graph=True)[0].sum()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(3, 1, dtype=torch.float64)
    task: Task = FunctionTask(slope, loss=lambda f, x: f**2 / 2)
    computer = HookGradientComputer(model, task)
    grads = computer.compute_per_sample_grad([x])
    q = computer.compute_loss_grad([x])
    for i in range(3):
        # f = Σ v tanh'(w x + b) w in closed form
        first, second = model[0], model[2]
        f = (
            second.weight[0] * (1 - torch.tanh(first.weight[:, 0] * x[i] + first.bias) ** 2) * first.weight[:, 0]
        ).sum()
        torch.testing.assert_close(q[i], -f.detach())
        expected = torch.autograd.grad(f, first.weight)[0]
        torch.testing.assert_close(grads["0.weight"][i], expected, rtol=1e-9, atol=1e-12)
