"""Per-sample gradients against a loop over samples of torch.autograd.grad, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak_fast.gradients import (
    FunctionalGradientComputer,
    HookGradientComputer,
    evaluation_mode,
    select_parameters,
)
from trak_fast.tasks import ImageClassification

IMAGES, LABELS = (3, 2, 6, 6), 4


def convolutional() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, LABELS)
    )
    # as after training: statistics that differ from any batch's
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


class Tied(nn.Module):
    """Two layers with one weight, and a parameter that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, LABELS)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(5))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x.flatten(1)))) * self.scale)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x.flatten(1, 2)).mean(1))


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Computes ∇f of each sample, with f written out as log p/(1 − p) and autograd's own graph."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for image, label in zip(images, labels, strict=True):
        p = torch.softmax(model(image.unsqueeze(0)), 1)[0, label]
        rows.append(torch.autograd.grad(torch.log(p / (1 - p)), parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("build", [convolutional, Tied, Attention])
def test_gradients_are_those_of_a_loop(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().double()
    images, labels = torch.randn(IMAGES, dtype=torch.float64), torch.randint(LABELS, IMAGES[:1])
    with evaluation_mode(model):
        expected = loop(model, images, labels)
        grads = FunctionalGradientComputer(model, ImageClassification()).compute_per_sample_grad([images, labels])
    assert list(grads) == list(expected)
    for name, value in grads.items():
        assert not value.requires_grad
        # both in float64: sums of at most a few thousand terms, in another order
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


def test_only_the_chosen_parameters_are_differentiated() -> None:
    class NotDifferentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise AssertionError("differentiated")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(72, 5, dtype=torch.float64), nn.Linear(5, LABELS, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x.flatten(1), NotDifferentiable.apply(self.body.weight), self.body.bias))

    model = Model()
    batch = [torch.randn(IMAGES, dtype=torch.float64), torch.randint(LABELS, IMAGES[:1])]
    computer = FunctionalGradientComputer(model, ImageClassification(), grad_wrt=["head.bias", "head.weight"])
    grads = computer.compute_per_sample_grad(batch)
    assert list(grads) == ["head.weight", "head.bias"]
    hidden = F.linear(batch[0].flatten(1), 2 * model.body.weight, model.body.bias)
    expected = loop(model.head, hidden.detach(), batch[1])
    torch.testing.assert_close(grads["head.weight"], expected["weight"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grads["head.bias"], expected["bias"], rtol=1e-9, atol=1e-11)
    with pytest.raises(AssertionError, match="differentiated"):
        FunctionalGradientComputer(model, ImageClassification()).compute_per_sample_grad(batch)


def test_new_parameters_are_used_after_loading_them() -> None:
    torch.manual_seed(1)
    first, second = Tied().double(), Tied().double()
    batch = [torch.randn(IMAGES, dtype=torch.float64), torch.randint(LABELS, IMAGES[:1])]
    computer = FunctionalGradientComputer(first, ImageClassification(), grad_wrt=["head.weight"])
    computer.load_model_params(second)
    grads = computer.compute_per_sample_grad(batch)
    torch.testing.assert_close(grads["head.weight"], loop(second, *batch)["head.weight"], rtol=1e-9, atol=1e-11)


def test_random_operations_that_stay_active_are_an_error() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x.flatten(1)))

    batch = [torch.randn(IMAGES), torch.randint(LABELS, IMAGES[:1])]
    with pytest.raises(RuntimeError, match="random"):
        FunctionalGradientComputer(Noisy(72, LABELS), ImageClassification()).compute_per_sample_grad(batch)


def test_evaluation_mode_gives_each_module_its_own_mode_back() -> None:
    model = convolutional()
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert set(before) == {True, False}
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="input"), evaluation_mode(model):
        model(torch.zeros(1))
    assert [module.training for module in model.modules()] == before


def test_parameters_come_in_the_order_of_the_model() -> None:
    model = convolutional()
    names = ["5.bias", "0.weight", "1.weight"]
    assert list(select_parameters(model, names)) == ["0.weight", "1.weight", "5.bias"]
    assert list(select_parameters(model, iter(names))) == ["0.weight", "1.weight", "5.bias"]
    assert list(select_parameters(model)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["5.*"], ["5.weight", "5.bias"]),
        (["*.bias"], ["0.bias", "1.bias", "5.bias"]),
        (["*.bias", "0.[vw]*"], ["0.weight", "0.bias", "1.bias", "5.bias"]),
        (["?.weight", "1.bias"], ["0.weight", "1.weight", "1.bias", "5.weight"]),
    ],
)
def test_parameters_are_chosen_by_patterns(patterns: list[str], names: list[str]) -> None:
    assert list(select_parameters(convolutional(), patterns)) == names


@pytest.mark.parametrize(
    ("grad_wrt", "error", "message"),
    [
        (["5.bias", "head"], ValueError, "no parameter head; it has 0.weight, .*, 6 in all"),
        (["*.bias", "head.*"], ValueError, r"no parameter head\.\*; it has"),
        (["5.BIAS"], ValueError, r"no parameter 5\.BIAS"),
        ([], ValueError, "grad_wrt must name at least one parameter, not none"),
        ("5.bias", TypeError, "not the string '5.bias'"),
    ],
)
def test_bad_choices_of_parameters_are_refused(grad_wrt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_parameters(convolutional(), grad_wrt)


class Mixed(nn.Module):
    """A model with numbers of every kind: quantised, frozen, trained."""

    def __init__(self) -> None:
        super().__init__()
        self.quantised = nn.Parameter(torch.randint(-9, 9, (LABELS, 6), dtype=torch.int8), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(LABELS, 6, dtype=torch.float64), requires_grad=False)
        self.trained = nn.Parameter(torch.randn(LABELS, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.quantised.double() * 0.1 + self.frozen * self.trained).T


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, HookGradientComputer])
@pytest.mark.parametrize("names", [["trained"], ["frozen"], ["*"]])
def test_gradients_of_models_with_integer_parameters(computer: Any, names: list[str]) -> None:
    """For f = W x with W = 0.1 Q + F ∘ T the gradients of F and T are T and F times that of W, which autograd gives."""
    torch.manual_seed(0)
    model = Mixed()
    x, labels = torch.randn(3, 6, dtype=torch.float64), torch.randint(LABELS, (3,))
    whole = nn.Linear(6, LABELS, bias=False, dtype=torch.float64)
    weight = model.quantised.double() * 0.1 + model.frozen * model.trained
    whole.load_state_dict({"weight": weight.detach()})
    slope = loop(whole, x, labels)["weight"]
    expected = {"frozen": slope * model.trained.detach(), "trained": slope * model.frozen}
    grads = computer(model, ImageClassification(), grad_wrt=names).compute_per_sample_grad([x, labels])
    assert list(grads) == [name for name in expected if names in (["*"], [name])]
    for name, value in grads.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, HookGradientComputer])
def test_by_default_what_requires_gradients_is_differentiated(computer: Any) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    model.first.requires_grad_(False)
    batch = [torch.randn(IMAGES, dtype=torch.float64), torch.randint(LABELS, IMAGES[:1])]
    grads = computer(model, ImageClassification()).compute_per_sample_grad(batch)
    model.requires_grad_(True)
    expected = loop(model, *batch)
    assert list(grads) == [name for name in expected if not name.startswith("first.")]
    for name, value in grads.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


class Many(nn.Module):
    """A model of 40 frozen parameters, whose names a message cannot all have."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ParameterList(nn.Parameter(torch.ones(1), requires_grad=False) for _ in range(40))


def spectral() -> nn.Module:
    model = nn.Module()
    model.spectrum = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model.head = nn.Linear(2, 2)
    return model


def integers() -> nn.Module:
    return nn.ParameterDict({"q": nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)})


@pytest.mark.parametrize(
    ("build", "grad_wrt", "message"),
    [
        (
            Mixed,
            None,
            r"^grad_wrt must be given .* \(quantised torch.int8\); grad_wrt=\[.*those that require them: trained$",
        ),
        (
            Mixed,
            ["trained", "quantised"],
            "^grad_wrt must name parameters of floating-point .*, not quantised torch.int8;",
        ),
        (Mixed, ["quant*"], "^grad_wrt must fit parameters of floating-point numbers, not only quantised torch.int8"),
        (integers, ["*"], "^grad_wrt must fit parameters of floating-point numbers, not only q torch.uint8"),
        (Many, None, r"^grad_wrt must be given where none of the model's 40 .*; grad_wrt=\['\*'\] takes all"),
        (Many, ["head"], "no parameter head; it has items.0, .*, items.9 and 30 more, 40 in all"),
        (spectral, None, r"must be real, not complex \(spectrum torch.complex64\); .*torch.view_as_real"),
        (spectral, ["*"], r"must be real, not complex \(spectrum torch.complex64\); .* with grad_wrt"),
        (lambda: nn.LazyLinear(2), None, r"not lazy ones \(weight, bias\); run it on a batch once"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)),
            None,
            r"not lazy ones \(1.running_mean",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_without_real_gradients_are_named(
    build: Callable[[], nn.Module], grad_wrt: list[str] | None, message: str
) -> None:
    for take in (
        select_parameters,
        lambda *args: FunctionalGradientComputer(args[0], ImageClassification(), grad_wrt=args[1]),
    ):
        with pytest.raises(ValueError, match=message):
            take(build(), grad_wrt)


def test_the_advice_for_complex_and_integer_parameters_works() -> None:
    assert list(select_parameters(spectral(), ["head.*"])) == ["head.weight", "head.bias"]
    model = Mixed()
    assert list(select_parameters(model, [name for name, p in model.named_parameters() if p.requires_grad])) == [
        "trained"
    ]
    assert len(select_parameters(Many(), ["*"])) == 40


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no parameters"):
        select_parameters(nn.ReLU())
