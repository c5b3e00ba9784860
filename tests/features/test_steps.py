"""Features of Adam's steps against steps by plain code of the gradients of samples alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hook_models import LABELS, WORDS, words
from torch import Tensor, nn

from trak_fast import GradientProjector, HookGradientComputer, Task, TRAKer, project
from trak_fast.tasks import CausalLM, ImageClassification

K = 64


class Language(nn.Module):
    """A model with tied embeddings, a layer that is called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.places = nn.Embedding(16, 12)
        self.body = nn.Linear(12, 12)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
        x = torch.tanh(self.body(torch.tanh(self.body(x)))) * attention_mask.unsqueeze(2)
        return self.head(x.cumsum(1))


class Rooted(nn.Module):
    """A classifier with a parameter of its own, which is differentiated sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


def trained(model: nn.Module, task: Task, batch: list[Tensor]) -> torch.optim.Optimizer:
    """Trains a few steps, in which every parameter has gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        f = task.get_outputs(model, {}, {}, batch)  # type: ignore[attr-defined]
        spread = sum((parameter * torch.randn_like(parameter)).sum() for parameter in model.parameters())
        (spread - f.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def steps(model: nn.Module, task: Task, batch: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Computes −Γ(−Q ∇f) of one sample after the other in float64 from autograd's gradients."""
    parameters = dict(model.named_parameters())
    rows = []
    for sample in zip(*batch, strict=True):
        f = task.get_output(model, parameters, {}, *sample)
        q = task.get_weightings(f.detach().reshape(1), [x[None] for x in sample])[0]
        grads = torch.autograd.grad(f, list(parameters.values()), allow_unused=True, materialize_grads=True)
        row = []
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            state = optimizer.state[parameter]
            loss_grad = -q.double() * grad.double()
            mean = 0.9 * state["exp_avg"].double() + 0.1 * loss_grad
            square = 0.999 * state["exp_avg_sq"].double() + 0.001 * loss_grad.square()
            row.append(-mean / (square.sqrt() + 1e-8))
        rows.append(row)
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("build", [Language, Rooted])
def test_features_are_projections_of_the_steps_of_samples_alone(build: Any, budget: int | None, kind: str) -> None:
    model: nn.Module = build()
    task: Task = CausalLM() if build is Language else ImageClassification()
    batch = words() if build is Language else [torch.randn(5, 6), torch.randint(LABELS, (5,))]
    optimizer = trained(model, task, batch)
    model.eval()
    expected = project(steps(model, task, batch, optimizer), K, proj_type=kind)
    for state in (optimizer, copy.deepcopy(optimizer.state_dict())):
        projector = GradientProjector(model, task, K, proj_type=kind, memory_budget=budget, optimizer_state=state)
        found = projector.project(batch)
        error = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 1e-5
        assert (projector.compute_loss_grad(batch) == 1).all()
        assert projector.singly == ({"scale"} if build is Rooted else set())
    assert projector.describe()["preconditioner"] == "adam"


def test_without_moments_gradients_are_as_they_are_again() -> None:
    model, batch = Language(), words()
    optimizer = trained(model, CausalLM(), batch)
    plain = GradientProjector(model, "causal_lm", K)
    changing = GradientProjector(model, "causal_lm", K, optimizer_state=optimizer)
    assert not torch.equal(changing.project(batch), plain.project(batch))
    changing.precondition(None)
    assert torch.equal(changing.project(batch), plain.project(batch))
    assert changing.describe()["preconditioner"] is None


def test_moments_of_another_model_are_refused() -> None:
    other = Rooted()
    optimizer = trained(other, ImageClassification(), [torch.randn(5, 6), torch.randint(LABELS, (5,))])
    with pytest.raises(ValueError, match="optimizer_state"):
        GradientProjector(Language(), "causal_lm", K, optimizer_state=optimizer.state_dict())


def test_traker_takes_steps_of_training_samples_alone_and_keeps_checkpoints_apart(tmp_path: Path) -> None:
    model, batch = Language(), words()
    optimizer = trained(model, CausalLM(), batch)
    state = copy.deepcopy(optimizer.state_dict())
    checkpoint = copy.deepcopy(model.state_dict())

    def opened(folder: Path, optimizer_state: Any) -> TRAKer:
        return TRAKer(model, "causal_lm", 5, folder, proj_dim=K, optimizer_state=optimizer_state)

    traker = opened(tmp_path, {0: state})
    traker.load_checkpoint(checkpoint, 0)
    traker.featurize(batch, num_samples=5)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", checkpoint, 0, 5)
    traker.score(batch, num_samples=5)
    train = traker.store.train(0)
    expected = project(steps(model.eval(), CausalLM(), batch, optimizer), K).numpy()
    np.testing.assert_allclose(train.features, expected, rtol=0, atol=1e-5 * np.linalg.norm(expected))
    assert (np.array(train.weights) == 1).all()
    plain = GradientProjector(model, "causal_lm", K).project(batch).numpy()
    targets = traker.store.targets(0, "test").features
    np.testing.assert_allclose(targets, plain, rtol=0, atol=1e-5 * np.linalg.norm(plain))
    with pytest.raises(ValueError, match="optimizer_state must be None for token_scores"):
        traker.token_scores("test", 0, batch, range(5))
    with pytest.raises(ValueError, match="optimizer_state must have a state for model_id 1, not only for 0"):
        traker.load_checkpoint(checkpoint, 1)
    with pytest.raises(ValueError, match="preconditioner: stored 'adam', given None"):
        opened(tmp_path, None)
    other = copy.deepcopy(state)
    other["state"][0]["exp_avg"] *= 2
    with pytest.raises(ValueError, match="belong to other weights"):
        opened(tmp_path, other).load_checkpoint(checkpoint, 0)


@pytest.mark.parametrize("options", [{"gradient_computer": HookGradientComputer}, {"proj_dim": 0}])
def test_traker_refuses_steps_of_whole_gradients(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Rooted()
    optimizer = trained(model, ImageClassification(), [torch.randn(5, 6), torch.randint(LABELS, (5,))])
    with pytest.raises(ValueError, match="optimizer_state must be None unless gradients are projected layer by layer"):
        TRAKer(model, "image_classification", 5, tmp_path, optimizer_state=optimizer, **options)
    with pytest.raises(ValueError, match='optimizer_state must be None with sketch="two_sided"'):
        TRAKer(model, "image_classification", 5, tmp_path, optimizer_state=optimizer, sketch="two_sided")
