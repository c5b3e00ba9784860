"""Tasks against the definitions of f and Q, in decimal arithmetic of many digits."""

from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import softplus

from trak_fast import FunctionTask, TRAKer
from trak_fast.gradients import FunctionalGradientComputer, HookGradientComputer
from trak_fast.tasks import (
    ImageClassification,
    IterativeImageClassification,
    Regression,
    Task,
    TextClassification,
    margin,
    resolve_task,
)


def exact(logits: Tensor, label: int) -> tuple[float, float]:
    """Computes log p/(1 − p) and 1 − p by the definition of softmax."""
    with localcontext() as context:
        context.prec = 100
        context.Emin, context.Emax = -999999, 999999
        powers = [Decimal(x).exp() for x in logits.double().tolist()]
        others = sum(powers[:label] + powers[label + 1 :])
        return float((powers[label] / others).ln()), float(others / sum(powers))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2000, 2000, width=32), min_size=2, max_size=8),
    st.integers(0, 7),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_margin_and_weighting_are_the_definitions(values: list[float], label: int, dtype: torch.dtype) -> None:
    label %= len(values)
    logits = torch.tensor([values], dtype=dtype)
    f, q = exact(logits[0], label)
    result = margin(logits, torch.tensor([label]))
    eps = torch.finfo(result.dtype).eps
    # logsumexp of C terms: C + 3 roundings of numbers up to max|logit| + log C; then one subtraction
    error = (len(values) + 4) * eps * (2 * logits.abs().max().item() + 3)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(result.item() - f) <= error
    weighting = ImageClassification().get_out_to_loss_grad(nn.Identity(), {}, {}, [logits, torch.tensor([label])])
    # σ(−f) changes by a factor of at most exp(error); results below the smallest normal number may be flushed to 0
    assert abs(weighting.item() - q) <= 1.01 * (error + 8 * eps) * q + torch.finfo(result.dtype).tiny


def test_curvature_is_the_second_derivative_of_the_loss() -> None:
    """Classification's loss is −log p = softplus(−f); a task whose loss is of another kind has no curvature."""
    f = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(softplus(-f).sum(), f, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), f)
    torch.testing.assert_close(ImageClassification().get_loss_curvature(-first.detach()), second)
    assert not hasattr(Regression(), "get_loss_curvature")


def test_gradient_of_the_margin_is_exact_where_p_rounds_to_0_or_1() -> None:
    logits = torch.tensor([[1e4, 1.0, 2.0], [-1e4, 1.0, 2.0]], requires_grad=True)
    margin(logits, torch.tensor([0, 0])).sum().backward()
    others = torch.softmax(torch.tensor([1.0, 2.0], dtype=torch.float64), 0)
    expected = torch.cat([torch.ones(1), -others]).expand(2, 3)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-6, atol=0)


class Bag(nn.Module):
    """A sequence classifier with Hugging Face's arguments."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.words, self.types, self.wrapped = nn.Embedding(11, 4), nn.Embedding(2, 4), wrapped

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor | SimpleNamespace:
        logits = ((self.words(input_ids) + self.types(token_type_ids)) * attention_mask.unsqueeze(-1)).sum(1)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_text_batches_reach_the_model_by_name(wrapped: bool) -> None:
    torch.manual_seed(0)
    model = Bag(wrapped).double()
    ids, types = torch.randint(11, (3, 5)), torch.randint(2, (3, 5))
    mask, labels = torch.tensor([[1, 1, 1, 1, 0]] * 3), torch.tensor([0, 3, 1])
    weights = dict(model.named_parameters())
    # one word of another type and one masked out: swapped arguments change the sums
    logits = (model.words(ids[:, :4]) + model.types(types[:, :4])).sum(1)
    p = torch.softmax(logits, 1)[torch.arange(3), labels]
    task = TextClassification()
    for i in range(3):
        f = task.get_output(model, weights, {}, ids[i], types[i], mask[i], labels[i])
        assert f.shape == ()
        torch.testing.assert_close(f, torch.log(p[i] / (1 - p[i])), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        task.get_out_to_loss_grad(model, weights, {}, [ids, types, mask, labels]), (1 - p).detach(), rtol=1e-11, atol=0
    )


def test_text_batch_of_another_length_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"input_ids, token_type_ids, attention_mask, labels\), 4 tensors, or 3 without token_type_ids, not 2",
    ):
        TextClassification().get_out_to_loss_grad(Bag(False), {}, {}, [torch.zeros(1, 2), torch.zeros(1)])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), ValueError, r"C >= 2, not \(3, 1\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), ValueError, r"\(B, C\)"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "integers, not torch.float32"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool), TypeError, "integers, not torch.bool"),
        (
            torch.zeros(3, 2),
            torch.zeros(3, 1, dtype=torch.long),
            ValueError,
            r"labels must have shape \(B,\), .* not \(3, 1",
        ),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3), TypeError, "floating-point numbers, not torch.int64"),
        ((torch.zeros(3, 2),), torch.zeros(3), TypeError, "floating-point numbers, not a tuple of 1: Tensor"),
    ],
)
def test_bad_logits_and_labels_are_refused(
    logits: Tensor, labels: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        margin(logits, labels)


@pytest.mark.parametrize(
    ("labels", "given_range"), [([0, 2, 3], "0 to 3"), ([-1, 0, 1], "-1 to 1"), ([-100, 0, 2], "-100 to 2")]
)
@pytest.mark.parametrize("computer", [FunctionalGradientComputer, HookGradientComputer])
def test_labels_that_the_model_has_no_class_for_are_named(
    tmp_path: Path, labels: list[int], given_range: str, computer: Any
) -> None:
    """Under vmap too, where gather and scatter would take a negative index for one from the end, or stop a device."""
    model = nn.Linear(4, 3)
    batch = [torch.ones(3, 4), torch.tensor(labels)]
    message = rf"labels must be in \[0, 2\], as the model has 3 classes, not {given_range};"
    for call in (
        computer(model, ImageClassification()).compute_per_sample_grad,
        computer(model, ImageClassification()).compute_loss_grad,
    ):
        with pytest.raises(ValueError, match=message):
            call(batch)
    traker = TRAKer(model, "image_classification", 3, tmp_path, proj_dim=4, gradient_computer=computer, chunk_size=3)
    traker.load_checkpoint(model.state_dict(), 0)
    with pytest.raises(ValueError, match=message):
        traker.featurize(batch, num_samples=3)
    assert not traker.store.train(0).done.any()
    batch[1] = batch[1].clamp(0, 2)
    traker.featurize(batch, num_samples=3)
    assert traker.store.train(0).done.all()


class Answering(nn.Module):
    """A model that wraps its answer into something."""

    def __init__(self, wrap: Callable[[Tensor], object], size: int = 3) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, size), wrap

    def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
        return self.wrap(self.linear((args or tuple(kwargs.values()))[0]))


@pytest.mark.parametrize(
    ("wrap", "described"),
    [
        (lambda x: (x, x), "a tuple of 2: Tensor, Tensor"),
        (lambda x: {"out": x, "aux": x}, "a dict with the keys 'out', 'aux'"),
        (lambda x: {"logits": None}, "a dict with the keys 'logits'"),
        (lambda x: None, "a NoneType"),
    ],
)
@pytest.mark.parametrize("computer", [FunctionalGradientComputer, HookGradientComputer])
@pytest.mark.parametrize(
    ("task", "wanted"), [(ImageClassification(), r"logits \(B, C\)"), (Regression(), "one number a sample")]
)
def test_models_that_return_something_else_are_told(
    wrap: Callable[[Tensor], object], described: str, computer: Any, task: Task, wanted: str
) -> None:
    batch = [torch.ones(2, 4), torch.zeros(2, dtype=torch.long)]
    message = f"the model must return {wanted}.*, not {described}; .* function of your own, task="
    with pytest.raises(TypeError, match=message):
        computer(Answering(wrap), task).compute_per_sample_grad(batch)


def test_the_advice_for_models_that_return_something_else_works(tmp_path: Path) -> None:
    """A function of one's own takes the logits out of a tuple; its gradients are those of the bare logits."""
    torch.manual_seed(0)
    wrapped, bare = Answering(lambda x: (None, x)).double(), Answering(lambda x: x).double()
    bare.load_state_dict(wrapped.state_dict())
    batch = [torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))]
    task = FunctionTask(lambda model, x, y: margin(model(x[None])[1], y[None]))
    grads = FunctionalGradientComputer(wrapped, task).compute_per_sample_grad(batch)
    for name, value in FunctionalGradientComputer(bare, ImageClassification()).compute_per_sample_grad(batch).items():
        torch.testing.assert_close(grads[name], value)


def test_logits_are_found_in_objects_and_in_dicts() -> None:
    torch.manual_seed(0)
    batch = [torch.randn(5, 4), torch.randint(3, (5,))]
    model = Answering(lambda x: x)
    weights = dict(model.named_parameters())
    expected = margin(model.linear(batch[0]), batch[1])
    for wrap in (lambda x: SimpleNamespace(logits=x), lambda x: {"logits": x, "loss": None}):
        model.wrap = wrap
        torch.testing.assert_close(ImageClassification().get_outputs(model, weights, {}, batch), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_mean_the_same(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    expected = torch.tensor([4.0, 1.0]) - torch.tensor([[1.0, 2.0], [2.0, 4.0]]).logsumexp(1)
    torch.testing.assert_close(margin(logits, torch.tensor([2, 0], dtype=dtype)), expected)


def test_tasks_are_found_by_name_or_taken_as_they_are() -> None:
    class Own:
        def get_output(self) -> None: ...

        def get_out_to_loss_grad(self) -> None: ...

    own = Own()
    assert isinstance(resolve_task("image_classification"), ImageClassification)
    assert isinstance(resolve_task("text_classification"), TextClassification)
    assert resolve_task(own) is own  # type: ignore[arg-type,comparison-overlap]
    with pytest.raises(ValueError, match=r"'image_classification', .*, a Task or a function, not 'classification'"):
        resolve_task("classification")
    for wrong in (ImageClassification, object()):
        with pytest.raises(TypeError, match="get_output and get_out_to_loss_grad"):
            resolve_task(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract"):
        Task()  # type: ignore[abstract]


def linear() -> tuple[nn.Linear, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double(), [torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))]


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_regression(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    if len(shape) == 1:
        model = nn.Sequential(model, nn.Flatten(0))  # type: ignore[assignment]
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    computer = FunctionalGradientComputer(model, Regression())
    *_, weight, bias = computer.compute_per_sample_grad([x, y]).values()
    torch.testing.assert_close(weight, x.unsqueeze(1))
    torch.testing.assert_close(bias, torch.ones(7, 1, dtype=torch.float64))
    torch.testing.assert_close(computer.compute_loss_grad([x, y]), (y - model(x).view(shape)).view(7).detach())


def test_regression_of_several_numbers_is_refused() -> None:
    model, (x, _) = linear()
    with pytest.raises(ValueError, match=r"one number a sample, \(B,\) or \(B, 1\), not \(7, 3\)"):
        Regression().get_outputs(model, dict(model.named_parameters()), {}, [x, x])


def test_a_function_is_a_task(tmp_path: Path) -> None:
    """The function is classification's f, with the loss written in terms of f."""
    model, batch = linear()
    named = ImageClassification()

    def f(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return margin(model(x[None]), y[None])

    own = FunctionTask(f, loss=lambda output, x, y: softplus(-output))
    expected, computer = (FunctionalGradientComputer(model, task) for task in (named, own))
    for name, value in computer.compute_per_sample_grad(batch).items():
        torch.testing.assert_close(value, expected.compute_per_sample_grad(batch)[name])
    torch.testing.assert_close(computer.compute_loss_grad(batch), expected.compute_loss_grad(batch))
    traker = TRAKer(model, f, 7, tmp_path, proj_dim=4)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch, num_samples=7)
    assert (traker.store.train(0).weights == 1).all()  # minus the loss is f itself
    with pytest.raises(ValueError, match=r"task: stored '.*f', given 'ImageClassification'"):
        TRAKer(model, "image_classification", 7, tmp_path, proj_dim=4)


def test_a_task_with_a_loss_gets_its_weighting_by_autograd() -> None:
    class Squares(Task):
        def get_output(self, model, weights, buffers, x, y):  # type: ignore[no-untyped-def]
            return torch.func.functional_call(model, (weights, buffers), x[None])[0, 0]

        def loss(self, output: Tensor, *sample: Tensor) -> Tensor:
            return (output - sample[1]) ** 2 / 2

    model, (x, y) = linear()
    q = Squares().get_out_to_loss_grad(model, dict(model.named_parameters()), {}, [x, y])
    torch.testing.assert_close(q, y - model(x)[:, 0].detach())
    assert not q.requires_grad


def test_functions_that_return_no_number_are_refused() -> None:
    model, (x, y) = linear()
    task = FunctionTask(lambda model, x, y: model(x))
    with pytest.raises(ValueError, match=r"lambda> must return a tensor of one element, not \(3,\)"):
        task.get_output(model, dict(model.named_parameters()), {}, x[0], y[0])


def test_traker_s_iterative_gradient_computer_works(tmp_path: Path) -> None:
    computers = pytest.importorskip("trak.gradient_computers")
    model, batch = linear()
    features = []
    for folder, options in {
        "theirs": {"task": "iterative_image_classification", "gradient_computer": computers.IterativeGradientComputer},
        "ours": {"task": "iterative_image_classification"},
        "usual": {"task": "image_classification"},
    }.items():
        traker = TRAKer(model, train_set_size=7, save_dir=tmp_path / folder, proj_dim=0, **options)  # type: ignore[arg-type]
        traker.load_checkpoint(model.state_dict(), 0)
        traker.featurize(batch, num_samples=7)
        rows = traker.store.train(0)
        features.append(np.column_stack([rows.features, rows.weights]))
    np.testing.assert_allclose(features[0], features[2], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(features[1], features[2], rtol=1e-6, atol=1e-7)
    assert isinstance(resolve_task("iterative_image_classification"), IterativeImageClassification)
