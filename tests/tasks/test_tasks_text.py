"""Language modelling against probabilities written out token by token, in float64."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.tasks import CausalLM, CausalLMPerToken, MaskedLM, MaskedLMPerToken, Seq2SeqLM, Task

WORDS, LENGTH = 9, 6
IDS = torch.tensor([[3, 1, 4, 1, 5, 0], [2, 7, 1, 8, 2, 8], [0, 0, 6, 6, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])  # padded right, not, left
LABELS = torch.tensor([[-100, 1, -100, 2, -100, -100], [5, -100, -100, -100, -100, 3], [-100] * 3 + [4, -100, -100]])


class Model(nn.Module):
    """Logits that depend on the place, its word and the words before it."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.words, self.head, self.wrapped = nn.Embedding(WORDS, 5), nn.Linear(5, WORDS), wrapped

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = (self.words(input_ids) * attention_mask.unsqueeze(2)).cumsum(1)
        logits = self.head(torch.tanh(x))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def probability(model: Model, row: int, place: int, token: int) -> Tensor:
    """The probability of `token` by the logits at `place`."""
    return torch.softmax(model(IDS[row : row + 1], MASK[row : row + 1])[0, place], 0)[token]


def check(task: Task, model: Model, batch: list[Tensor], tokens: list[list[tuple[int, int]]]) -> None:
    """Checks f and Q of sequences whose predicted tokens are known as (place of the logits, token)."""
    weights = dict(model.named_parameters())
    q = task.get_out_to_loss_grad(model, weights, {}, batch)
    grads = FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    for row, places in enumerate(tokens):
        p = math.prod(probability(model, row, *place) for place in places) ** (1 / len(places))
        assert isinstance(p, Tensor)
        f = task.get_output(model, weights, {}, *(x[row] for x in batch))
        expected = torch.log(p / (1 - p))
        torch.testing.assert_close(f, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(q[row], 1 - p.detach(), rtol=1e-11, atol=0)
        # Q ∇f is what training follows: minus the gradient of the mean cross-entropy
        loss = -sum(probability(model, row, *place).log() for place in places) / len(places)
        slope = torch.autograd.grad(loss, model.head.weight)[0]
        torch.testing.assert_close(q[row] * grads["head.weight"][row], -slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrapped", [False, True])
def test_causal_sequences(model: Model, wrapped: bool) -> None:
    model.wrapped = False
    tokens = [
        [(0, 1), (1, 4), (2, 1), (3, 5)],  # nothing is predicted for the padding
        [(0, 7), (1, 1), (2, 8), (3, 2), (4, 8)],
        [(2, 6), (3, 2), (4, 1)],  # nor the first word from it
    ]
    if wrapped:
        wrapping = Model(wrapped=True).double()
        wrapping.load_state_dict(model.state_dict())
        weights = dict(model.named_parameters())
        torch.testing.assert_close(
            CausalLM().get_outputs(wrapping, weights, {}, [IDS, MASK]),
            CausalLM().get_outputs(model, weights, {}, [IDS, MASK]),
        )
    else:
        check(CausalLM(), model, [IDS, MASK], tokens)


def test_causal_sequences_with_labels(model: Model) -> None:
    """Labels say which tokens are predicted; those of padding, and of the first token behind it, never are."""
    labels = torch.tensor([[-100, 1, -100, 7, 5, 0], [2, -100, 1, -100, -100, 8], [0, 0, 6, -100, 2, 1]])
    check(CausalLM(), model, [IDS, MASK, labels], [[(0, 1), (2, 7), (3, 5)], [(1, 1), (4, 8)], [(3, 2), (4, 1)]])


class Translator(nn.Module):
    """An encoder and a decoder: the logits depend on the words that the mask keeps and on the labels so far."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        read = (self.words(input_ids) * attention_mask.unsqueeze(2)).sum(1, keepdim=True)
        before = nn.functional.pad(labels.clamp(min=0), (1, 0))[:, :-1]
        return SimpleNamespace(logits=self.head(torch.tanh(read + self.words(before).cumsum(1))))


def test_outputs_of_another_length_than_inputs() -> None:
    model = Translator().double()
    labels = torch.tensor([[4, 3, -100], [1, -100, -100], [2, 0, 8]])
    weights = dict(model.named_parameters())
    task = Seq2SeqLM()
    f = task.get_outputs(model, weights, {}, [IDS, MASK, labels])
    logits = model(IDS, MASK, labels).logits
    for row in range(3):
        places = (labels[row] >= 0).nonzero().flatten().tolist()
        p = math.prod(torch.softmax(logits[row, t], 0)[labels[row, t]] for t in places) ** (1 / len(places))
        torch.testing.assert_close(f[row], torch.log(p / (1 - p)), rtol=1e-11, atol=1e-11)
    grads = FunctionalGradientComputer(model, task).compute_per_sample_grad([IDS, MASK, labels])
    for row in range(3):
        slope = torch.autograd.grad(f[row], model.head.weight, retain_graph=True)[0]
        torch.testing.assert_close(grads["head.weight"][row], slope, rtol=1e-10, atol=1e-12)


def test_logits_of_an_output_must_be_as_many_as_its_labels() -> None:
    class Short(Translator):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(input_ids, attention_mask, labels).logits[:, 1:])

    model = Short()
    with pytest.raises(ValueError, match=r"one row for each of the \(3, 6\) tokens, not \(3, 5, 9\)"):
        Seq2SeqLM().get_outputs(model, dict(model.named_parameters()), {}, [IDS[:, :4], MASK[:, :4], LABELS])


def test_samples_without_predicted_tokens_are_logged_once(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    weights = dict(model.named_parameters())
    task = MaskedLM()
    task.get_out_to_loss_grad(model, weights, {}, [IDS, MASK, LABELS])
    assert not caplog.records
    labels = torch.where(torch.tensor([[True], [False], [True]]), -100, LABELS)
    for _ in range(2):
        q = task.get_out_to_loss_grad(model, weights, {}, [IDS, MASK, labels])
        assert (q == 0).tolist() == [True, False, True]
    assert [record.getMessage()[:38] for record in caplog.records] == ["some samples have no predicted token ("]
    assert "_warned" not in task.get_settings()


def test_causal_tokens(model: Model) -> None:
    check(CausalLMPerToken(), model, [IDS, MASK, torch.tensor([4, 1, 3])], [[(3, 5)], [(0, 7)], [(2, 6)]])


def test_masked_sequences(model: Model) -> None:
    check(MaskedLM(), model, [IDS, MASK, LABELS], [[(1, 1), (3, 2)], [(0, 5), (5, 3)], [(3, 4)]])


def test_masked_tokens(model: Model) -> None:
    positions = torch.tensor([3, 5, 3])
    check(MaskedLMPerToken(), model, [IDS, MASK, LABELS, positions], [[(3, 2)], [(5, 3)], [(3, 4)]])


def test_a_sequence_without_predicted_tokens_has_no_gradient(model: Model) -> None:
    batch = [IDS[:1], MASK[:1], torch.full((1, LENGTH), -100)]
    grads = FunctionalGradientComputer(model, MaskedLM()).compute_per_sample_grad(batch)
    assert all((value == 0).all() for value in grads.values())
    assert MaskedLM().get_out_to_loss_grad(model, dict(model.named_parameters()), {}, batch).item() == 0


def test_probabilities_close_to_1_keep_their_accuracy() -> None:
    class Sure(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return nn.functional.one_hot(input_ids.roll(-1, 1), WORDS).to(torch.float32) * 60

    # each token's p is 1/(1 + 8 exp(−60)), which float32 rounds to 1
    others = 8 * math.exp(-60)
    batch = [IDS[1:2], MASK[1:2]]
    assert CausalLM().get_output(Sure(), {}, {}, IDS[1], MASK[1]).item() == pytest.approx(-math.log(others), rel=1e-6)
    q = CausalLM().get_out_to_loss_grad(Sure(), {}, {}, batch)
    assert q.item() == pytest.approx(others, rel=1e-4)


def test_batches_of_another_length_are_refused(model: Model) -> None:
    message = r"CausalLM: batch must be \(input_ids, attention_mask, labels\), 3 tensors, or 2 without labels, not 4$"
    with pytest.raises(ValueError, match=message):
        CausalLM().get_outputs(model, {}, {}, [IDS, MASK, LABELS, LABELS])
    with pytest.raises(
        ValueError, match=r"MaskedLM: batch must be \(input_ids, attention_mask, labels\), 3 tensors, not 2$"
    ):
        MaskedLM().get_outputs(model, {}, {}, [IDS, MASK])


@pytest.mark.parametrize("task", [CausalLM(), MaskedLM()])
def test_labels_of_another_shape_are_refused(model: Model, task: Task) -> None:
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids, \(3, 6\), not \(3, 5\)"):
        task.get_out_to_loss_grad(model, dict(model.named_parameters()), {}, [IDS, MASK, LABELS[:, :5]])
    with pytest.raises(ValueError, match=r"labels must have shape \(B, T\), not \(3,\)"):
        Seq2SeqLM().get_outputs(model, {}, {}, [IDS, MASK, LABELS[:, 0]])


def test_logits_of_another_shape_are_refused(model: Model) -> None:
    class Pooled(Model):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask)[:, 0]

    class Pair(Model):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(input_ids, attention_mask), input_ids

    for other, error, message in [
        (Pooled(), ValueError, r"logits of shape \(B, T, V\), .* \(3, 6\) tokens, not \(3, 9\)"),
        (Pair(), TypeError, r"must return logits \(B, T, V\).*, not a tuple of 2: Tensor, Tensor"),
    ]:
        with pytest.raises(error, match=message):
            CausalLM().get_outputs(other, dict(other.named_parameters()), {}, [IDS, MASK])


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        (MaskedLM(), [IDS, MASK, LABELS.clamp(max=1) - 2], r"labels must be in \[0, 8\], .* 9 classes, not -102 to -1"),
        (
            MaskedLM(),
            [IDS, MASK, torch.where(LABELS == 5, WORDS, LABELS)],
            r"labels must be in \[0, 8\], .* not 0 to 9",
        ),
        (
            CausalLMPerToken(),
            [IDS, MASK, torch.tensor([0, 1, 5])],
            r"position must be in \[1, 5\], .* 6 tokens, not 0 to 5",
        ),
        (
            MaskedLMPerToken(),
            [IDS, MASK, LABELS, torch.tensor([-1, 1, 3])],
            r"position must be in \[0, 5\], .* not -1 to 3",
        ),
    ],
)
def test_labels_and_positions_out_of_range_are_named(
    model: Model, task: Task, batch: list[Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    with pytest.raises(ValueError, match=message):
        task.get_out_to_loss_grad(model, dict(model.named_parameters()), {}, batch)


@pytest.mark.parametrize("task", [CausalLM(), MaskedLM()], ids=["causal", "masked"])
def test_drawn_labels_have_the_model_s_distribution_where_tokens_are_predicted(task: Task, model: Model) -> None:
    batch = [IDS, MASK, LABELS]
    count = 2000
    uniform = torch.rand(count, *IDS.shape)
    drawn = [task.draw_labels(model, {}, {}, batch, numbers) for numbers in uniform]
    for tokens, mask, labels in drawn[:3]:
        assert torch.equal(labels != -100, task.draw_labels(model, {}, {}, batch, uniform[-1])[2] != -100)
        assert torch.equal(tokens[2, :4], IDS[2, 2:])  # moved to the front
        assert torch.equal(mask[2], torch.tensor([1, 1, 1, 1, 0, 0]))
    # row 0: the masked tokens are 1 and 3; a causal model predicts them from the places before
    shift = 1 if isinstance(task, CausalLM) else 0
    for place in (1, 3):
        found = torch.stack([labels[0, place] for _, _, labels in drawn]).bincount(minlength=WORDS).double() / count
        expected = torch.stack([probability(model, 0, place - shift, token) for token in range(WORDS)]).detach()
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()
    alone = task.draw_labels(model, {}, {}, [x[1:2] for x in batch], uniform[0, 1:2])
    assert torch.equal(alone[2], drawn[0][2][1:2])


def test_only_tasks_whose_labels_are_no_inputs_draw_them() -> None:
    assert not any(hasattr(task, "draw_labels") for task in (Seq2SeqLM(), CausalLMPerToken(), MaskedLMPerToken()))
