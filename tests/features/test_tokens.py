"""Features and scores of single tokens, against models that have weights of their own for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_sided_reference as definition
from language_models import LINEAR, B, Language, Scaled, T, gradients_by_token, texts
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_fast.features.streaming import GradientProjector
from trak_fast.gradients import HookGradientComputer
from trak_fast.projection import reference
from trak_fast.tasks import CausalLM
from trak_fast.traker import TRAKer

EPS = 2.0**-24
TERMS = 2000
"""Float32 operations on the way to a number, forward and backward pass included, at most."""

SEED, MODEL_ID, SIDE = 3, 2, 4


def untied_names() -> list[str]:
    return [*LINEAR[1:], "head.weight"]


def expected_tokens(
    model: Language, batch: list[Tensor], k: int, sketched: list[str], proj_type: str = "rademacher"
) -> NDArray[np.float64]:
    """Computes the features of tokens as the definition has them, (B, T, k); k=0: sketches side by side."""
    rows = []
    for sample in gradients_by_token(model, batch):
        numbers = definition.flattened([definition.blocks(token, sketched, SIDE, SEED, MODEL_ID) for token in sample])
        rows.append(reference.project(numbers, k, proj_type, SEED, MODEL_ID) if k else numbers)
    return np.stack(rows)


def require_close(found: Any, expected: NDArray[np.float64], axes: tuple[int, ...]) -> None:
    """Compares numbers up to rounding of the largest ones, in the norm along some axes."""
    error = np.sqrt(((np.asarray(found, np.float64) - expected) ** 2).sum(axes))
    size = np.sqrt((expected**2).sum(axes))
    assert (error <= TERMS * EPS * size).all()


@pytest.mark.parametrize(("k", "proj_type"), [(24, "rademacher"), (64, "sjlt"), (0, "rademacher")])
@pytest.mark.parametrize("tied", [True, False])
def test_features_of_tokens_are_those_of_weights_of_their_own(k: int, proj_type: str, tied: bool) -> None:
    model = Language(tied=tied)
    batch = texts()
    options = {} if k == 0 else {"proj_type": proj_type}
    projector = GradientProjector(
        model, "causal_lm", k, seed=SEED, sketch="two_sided", sketch_side=SIDE, per="token", **options
    )
    found = projector.project(batch, model_id=MODEL_ID)
    expected = expected_tokens(model, batch, k, LINEAR if tied else untied_names(), proj_type)
    assert found.shape == expected.shape
    require_close(found, expected, axes=(1, 2))


def test_features_of_tokens_add_up_to_those_of_samples() -> None:
    model = Language()
    batch = texts()
    options = {"seed": SEED, "sketch": "two_sided", "sketch_side": SIDE}
    tokens = GradientProjector(model, "causal_lm", 24, per="token", memory_budget=1, **options).project(batch)
    samples = GradientProjector(model, "causal_lm", 24, **options).project(batch)
    require_close(tokens.sum(1), samples.double().numpy(), axes=(1,))


def test_parameters_without_tokens_are_named() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh().mean(1))

    model = Pooled()
    batch = [torch.randn(B, T, 6), torch.randint(3, (B,))]
    every = GradientProjector(model, "image_classification", 8, sketch="two_sided", per="token")
    with pytest.raises(ValueError, match=r"the 7 tokens of a sample, not head\.weight, head\.bias; leave these"):
        every.project(batch)
    body = GradientProjector(model, "image_classification", 8, sketch="two_sided", per="token", grad_wrt=["body.*"])
    alone = GradientProjector(model, "image_classification", 8, sketch="two_sided", grad_wrt=["body.*"])
    require_close(body.project(batch).sum(1), alone.project(batch).double().numpy(), axes=(1,))


def test_layers_whose_rule_fails_have_no_tokens() -> None:
    projector = GradientProjector(Language(middle=Scaled), "causal_lm", 8, sketch="two_sided", per="token")
    with pytest.raises(ValueError, match=r"not middle\.weight, middle\.bias; leave these out with grad_wrt"):
        projector.project(texts())


def test_texts_padded_at_the_front_are_refused() -> None:
    model = Language()
    ids, mask = texts()
    mask[1] = mask[1].flip(0)
    tokens = GradientProjector(model, "causal_lm", 8, sketch="two_sided", per="token")
    with pytest.raises(ValueError, match="batch must be padded at the end, not at the front"):
        tokens.project([ids, mask])
    with pytest.raises(ValueError, match="batch must be padded at the end, not at the front"):
        GradientProjector(model, "causal_lm", 8).token_products([ids, mask], torch.ones(8))


def test_samples_that_change_each_other_have_no_tokens() -> None:
    class Coupled(Language):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = super().forward(input_ids, attention_mask)
            return logits + logits[:1, :1] * (len(logits) > 1)

    with pytest.raises(ValueError, match="samples of a batch change each other's results"):
        GradientProjector(Coupled(), "causal_lm", 8).token_products(texts(), torch.ones(8))


def test_features_of_tokens_need_sketches_and_batches() -> None:
    model = Language()
    with pytest.raises(ValueError, match='per must be "sample" with sketch="full"'):
        GradientProjector(model, "causal_lm", 8, per="token")
    with pytest.raises(ValueError, match="per must be"):
        GradientProjector(model, "causal_lm", 8, sketch="two_sided", per="word")
    with pytest.raises(ValueError, match="task must have get_outputs for per"):
        GradientProjector(model, lambda model, x: model(x)[0], 8, sketch="two_sided", per="token")


@pytest.mark.parametrize("memory_budget", [None, 1])
@pytest.mark.parametrize("sketch", ["full", "two_sided"])
@pytest.mark.parametrize(("k", "proj_type"), [(24, "rademacher"), (24, "normal"), (64, "sjlt")])
@pytest.mark.parametrize("tied", [True, False])
def test_products_of_tokens_follow_from_the_adjoint(
    sketch: str, k: int, proj_type: str, tied: bool, memory_budget: int | None
) -> None:
    model = Language(tied=tied)
    batch = texts()
    y = torch.randn(k, dtype=torch.float64) * 2.0**-150
    side = {"sketch_side": SIDE} if sketch == "two_sided" else {}
    projector = GradientProjector(
        model, "causal_lm", k, proj_type=proj_type, seed=SEED, sketch=sketch, memory_budget=memory_budget, **side
    )
    found = projector.token_products(batch, y, model_id=MODEL_ID)
    linear = LINEAR if tied else untied_names()
    tokens = expected_tokens(model, batch, k, [] if sketch == "full" else linear, proj_type)
    expected = tokens @ y.numpy()
    # sums of products with signs cancel: relative to the products of norms
    norms = np.linalg.norm(tokens, axis=2).max(1) * float(y.norm())
    assert (np.abs(found.numpy() - expected).max(1) <= TERMS * EPS * norms).all()
    assert not projector.singly


def checkpoints() -> list[dict[str, Tensor]]:
    return [Language(tied=False).state_dict() for _ in range(2)]


def run(traker: TRAKer, states: list[dict[str, Tensor]], batch: list[Tensor], targets: list[Tensor]) -> Any:
    """Featurizes and scores; returns the scores."""
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id, len(targets[0]))
        traker.score(targets, num_samples=len(targets[0]))
    return np.array(traker.finalize_scores("test"), np.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"proj_dim": 4},
        {"proj_dim": 4, "lambda_reg": 0},
        {"proj_dim": 64},
        {"proj_dim": 64, "lambda_reg": 0},
        {"proj_dim": 64, "lambda_reg": 0.1},
        {"proj_dim": 4, "normalize": True},
        {"proj_dim": 64, "normalize": True},
        {"proj_dim": 64, "proj_type": "sjlt", "curvature": False},
        {"proj_dim": 64, "sketch": "two_sided", "sketch_side": 4},
        {"proj_dim": 0, "sketch": "two_sided", "sketch_side": 2},
    ],
    ids=str,
)
def test_scores_of_tokens_add_up_to_the_scores(tmp_path: Path, options: dict[str, Any]) -> None:
    batch, targets = texts(), texts()
    states = checkpoints()
    traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path, projector_seed=SEED, **options)
    scores = run(traker, states, batch, targets)
    inds = [3, 0, 4]
    chosen = [x[inds] for x in batch]
    parts = np.zeros((3, T))
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        parts += traker.token_scores("test", 1, chosen, inds)
    # the inverse amplifies the rounding of features
    amplified = 1000 * TERMS * EPS if options.get("lambda_reg") == 0 else TERMS * EPS
    assert np.abs(parts.sum(1) - scores[inds, 1]).max() <= amplified * np.abs(scores[:, 1]).max()


def test_scores_of_tokens_are_those_of_the_closed_form(tmp_path: Path) -> None:
    batch, targets = texts(), texts()
    model = Language(tied=False)
    traker = TRAKer(model, "causal_lm", B, tmp_path, projector_seed=SEED, proj_dim=4, lambda_reg=1.0, metric=None)
    state = Language(tied=False).state_dict()
    run(traker, [state], batch, targets)
    found = traker.token_scores("test", 2, batch, range(B))

    model.load_state_dict(state)
    numbers = [definition.flattened(sample) for sample in gradients_by_token(model, batch)]
    tokens = np.stack([reference.project(rows, 4, "rademacher", SEED, 0) for rows in numbers])
    aim = definition.gradients_alone(model.double(), CausalLM(), [x[2:3] for x in targets])
    phi = reference.project(definition.flattened(aim), 4, "rademacher", SEED, 0)[0]
    X = tokens.sum(1)
    y = np.linalg.solve(X.T @ X + traker.grad_dim * np.eye(4), phi)
    weights = np.array(traker.store.train(0).weights, np.float64)
    expected = weights[:, None] * (tokens @ y)
    # (X'X + λI)⁻¹ is a contraction by 1/λ: the rounding of X and φ is amplified by at most ‖X‖²/λ
    amplified = 1 + np.linalg.norm(X, 2) ** 2 / traker.grad_dim
    sizes = weights * np.linalg.norm(tokens, axis=2).max(1) * np.linalg.norm(y)
    assert (np.abs(found - expected).max(1) <= amplified * TERMS * EPS * sizes).all()


def test_scores_of_tokens_refuse_what_they_cannot_tell(tmp_path: Path) -> None:
    batch, targets = texts(), texts()
    traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path, proj_dim=8, metric=None)
    states = checkpoints()
    with pytest.raises(RuntimeError, match="call load_checkpoint or start_scoring_checkpoint before token_scores"):
        traker.token_scores("test", 0, batch, range(B))
    run(traker, states, batch, targets)
    with pytest.raises(ValueError, match="target must be in"):
        traker.token_scores("test", B, batch, range(B))
    with pytest.raises(RuntimeError, match=r"model_id 1, which is loaded, must be one of model_ids \[0\]"):
        traker.token_scores("test", 0, batch, range(B), model_ids=[0])
    with pytest.raises(ValueError, match="samples"):
        traker.token_scores("test", 0, targets, range(B))
    hooks = TRAKer(Language(tied=False), "causal_lm", B, tmp_path, proj_dim=8, gradient_computer=HookGradientComputer)
    with pytest.raises(ValueError, match="gradient_computer and projector must be left out"):
        hooks.token_scores("test", 0, batch, range(B))
