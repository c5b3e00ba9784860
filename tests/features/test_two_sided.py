"""Two-sided sketches against their definition: whole gradients of single samples, and matrices from the reference."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import two_sided_reference as definition
from language_models import LINEAR, B, Conv1D, Language, Scaled, T, texts
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_fast.features.streaming import GradientProjector
from trak_fast.features.two_sided import Layout, Sketch
from trak_fast.gradients import HookGradientComputer
from trak_fast.gradients.pieces import Lookup, Outer, Whole
from trak_fast.projection import reference
from trak_fast.tasks import CausalLM
from trak_fast.traker import TRAKer

EPS = 2.0**-24
GOLDEN = [
    line.split()
    for line in Path(__file__).with_name("two_sided_values.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def expected_features(
    model: nn.Module,
    batch: list[Tensor],
    sketched: list[str],
    *,
    side: int,
    k: int,
    proj_type: str = "rademacher",
    seed: int = 3,
    model_id: int = 2,
) -> NDArray[np.float64]:
    """Computes features as the definition has them."""
    return reference.project(
        expected_blocks(model, batch, sketched, side, seed, model_id), k, proj_type, seed, model_id
    )


def expected_blocks(
    model: nn.Module, batch: list[Tensor], sketched: list[str], side: int, seed: int, model_id: int
) -> NDArray[np.float64]:
    """Computes the numbers that are projected, from gradients in float64."""
    samples = definition.gradients_alone(copy.deepcopy(model).double(), CausalLM(), batch)
    return definition.flattened([definition.blocks(one, sketched, side, seed, model_id) for one in samples])


def require_close(found: Tensor, expected: NDArray[np.float64], terms: int = 2000) -> None:
    """Compares rows with those of a float32 sum of so many terms, none much larger than the sum of all."""
    error = np.linalg.norm(found.double().numpy() - expected, axis=1)
    assert (error <= terms * EPS * np.linalg.norm(expected, axis=1)).all()


def golden_gradient(height: int, width: int) -> NDArray[np.float64]:
    i, j = np.indices((height, width))
    return ((7 * i + 3 * j) % 11 - 5).astype(np.float64)


def test_the_reference_gives_the_golden_values() -> None:
    assert len(GOLDEN) > 10
    for fields in GOLDEN:
        seed, model_id, side, before, height, width, row, column = map(int, fields[:-1])
        gradient = golden_gradient(height, width)
        half = definition.one_side(gradient, 2**47 + before, side, seed, model_id)
        block = definition.one_side(half.T, 2**47 + before + height, side, seed, model_id).T
        assert block[row, column] == float(fields[-1])


def test_sketches_of_whole_gradients_have_the_golden_values() -> None:
    for fields in GOLDEN:
        seed, model_id, side, before, height, width, row, column = map(int, fields[:-1])
        sketch = Sketch(height=height, width=width, side=side, first=2**47 + before)
        gradient = torch.from_numpy(golden_gradient(height, width)).float()
        block = sketch.bind(seed, model_id, torch.device("cpu")).apply(Whole(gradient.unsqueeze(0)))
        assert block[0, row, column].item() == float(fields[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side", [2, 4, 16])
def test_sketches_of_factors_and_of_tables_are_those_of_whole_gradients(side: int, dtype: torch.dtype) -> None:
    # small integers, and a scale that both ways multiply by in the end, so that all sums are exact
    left = torch.randint(-3, 4, (B, T, 9)).to(dtype)
    right = torch.randint(-3, 4, (B, T, 12)).to(dtype)
    indices = torch.randint(9, (B, T))
    bound = Sketch(height=9, width=12, side=side, first=2**47 + 5).bind(1, 2, torch.device("cpu"))
    whole = torch.einsum("bth,btw->bhw", left.float(), right.float())
    read = torch.einsum("bth,btw->bhw", F.one_hot(indices, 9).float(), right.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer = bound.apply(Outer(left, right))
        table = bound.apply(Lookup(indices, right, 9))
    assert torch.equal(outer, bound.apply(Whole(whole)))
    assert torch.equal(table, bound.apply(Whole(read)))


def test_inner_products_of_sketches_are_right_on_average() -> None:
    a, b = torch.randn(2, 1, 9, 7)
    products = []
    for seed in range(2000):
        bound = Sketch(height=9, width=7, side=3, first=2**47).bind(seed, 0, torch.device("cpu"))
        products.append(float((bound.apply(Whole(a)) * bound.apply(Whole(b))).sum()))
    error = abs(np.mean(products) - float((a * b).sum()))
    assert error < 5 * np.std(products) / len(products) ** 0.5


@pytest.mark.parametrize(("proj_type", "k"), [("rademacher", 24), ("normal", 24), ("sjlt", 64)])
@pytest.mark.parametrize("tied", [True, False])
def test_features_are_those_of_the_definition(proj_type: str, k: int, tied: bool) -> None:
    model = Language(tied=tied)
    batch = texts()
    sketched = LINEAR if tied else [*LINEAR[1:], "head.weight"]
    projector = GradientProjector(model, "causal_lm", k, proj_type=proj_type, seed=3, sketch="two_sided", sketch_side=4)
    expected = expected_features(model, batch, sketched, side=4, k=k, proj_type=proj_type)
    require_close(projector.project(batch, model_id=2), expected)
    assert not projector.singly


def test_few_bytes_at_a_time_give_the_same_features() -> None:
    model = Language()
    batch = texts()
    projector = GradientProjector(model, "causal_lm", 24, seed=3, sketch="two_sided", sketch_side=4, memory_budget=1)
    require_close(projector.project(batch, model_id=2), expected_features(model, batch, LINEAR, side=4, k=24))


def test_layers_of_other_arithmetic_are_sketched_alike() -> None:
    model = Language(middle=Scaled)
    batch = texts()
    projector = GradientProjector(model, "causal_lm", 24, seed=3, sketch="two_sided", sketch_side=4)
    require_close(projector.project(batch, model_id=2), expected_features(model, batch, LINEAR, side=4, k=24))
    assert "middle.weight" in projector._ways  # its rule has failed the check


def test_samples_one_by_one_have_the_same_features(caplog: pytest.LogCaptureFixture) -> None:
    class Coupled(Language):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = super().forward(input_ids, attention_mask)
            return logits + logits[:1, :1] * (len(logits) > 1)

    model = Coupled()
    batch = texts()
    projector = GradientProjector(model, "causal_lm", 24, seed=3, sketch="two_sided", sketch_side=4)
    found = projector.project(batch, model_id=2)
    require_close(found, expected_features(model, batch, LINEAR, side=4, k=24))
    assert projector.singly == set(projector.selected)


def test_sides_that_are_long_enough_leave_gradients_as_they_are() -> None:
    model = Language()
    batch = texts()
    full = GradientProjector(model, "causal_lm", 24)
    sketched = GradientProjector(model, "causal_lm", 24, sketch="two_sided")
    assert sketched.sketched_dim == full.sketched_dim == full.grad_dim
    require_close(sketched.project(batch), full.project(batch).double().numpy())


def test_without_a_projection_sketches_stand_side_by_side() -> None:
    model = Language()
    batch = texts()
    projector = GradientProjector(model, "causal_lm", 0, seed=3, sketch="two_sided", sketch_side=4)
    expected = expected_blocks(model, batch, LINEAR, side=4, seed=3, model_id=2)
    found = projector.project(batch, model_id=2)
    assert found.shape == expected.shape == (B, projector.sketched_dim)
    require_close(found, expected)


def test_the_weights_of_linear_layers_alone_are_sketched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 9), Conv1D(9, 6))
    layout = Layout(model, dict(model.named_parameters()), 4)
    assert list(layout.sketches) == ["3.weight", "4.weight"]
    counts = {name: columns.count for name, columns in layout.columns.items()}
    assert counts == {
        "0.weight": 216,
        "0.bias": 8,
        "2.weight": 8,
        "2.bias": 8,
        "3.weight": 16,
        "3.bias": 9,
        "4.weight": 16,
        "4.bias": 6,
    }
    assert [layout.sketches[name].first - 2**47 for name in layout.sketches] == [0, 17]


def test_gradients_beyond_float32_are_sketched_by_their_multiples() -> None:
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    batch = [torch.randn(B, 12, dtype=torch.float64), torch.zeros(B)]
    projector = GradientProjector(model, "regression", 16, sketch="two_sided", sketch_side=4, grad_wrt=["0.*"])
    near = projector.features(batch, 0)
    with torch.no_grad():
        model[2].weight *= 2.0**150
    far = projector.features(batch, 0)
    require_close(far * 2.0**-150, near.double().numpy())


@pytest.mark.parametrize("proj_dim", [16, 0])
def test_traker_stores_sketched_features_and_refuses_those_of_another_side(tmp_path: Path, proj_dim: int) -> None:
    model = Language()
    batch = texts()

    def traker(side: int, seed: int = 4) -> TRAKer:
        return TRAKer(
            model,
            "causal_lm",
            B,
            tmp_path,
            proj_dim=proj_dim,
            projector_seed=seed,
            sketch="two_sided",
            sketch_side=side,
            metric=None,
        )

    first = traker(4)
    first.load_checkpoint(model.state_dict(), 0)
    first.featurize(batch, num_samples=B)
    projector = GradientProjector(model, "causal_lm", proj_dim, seed=4, sketch="two_sided", sketch_side=4)
    assert first.proj_dim == projector.proj_dim
    assert np.array_equal(first.store.train(0).features, projector.project(batch).numpy())
    assert first.grad_dim == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="sketch: stored 'two_sided 4', given 'two_sided 3'"):
        traker(3)
    with pytest.raises(ValueError, match="seed: stored 4, given 5"):
        traker(4, seed=5)


def test_traker_sketches_for_tasks_of_single_samples(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(B, 12)
    traker = TRAKer(model, lambda model, x: model(x[None])[0, 0], B, tmp_path, proj_dim=16, sketch="two_sided")
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize([inputs], num_samples=B)
    whole = TRAKer(model, lambda model, x: model(x[None])[0, 0], B, tmp_path / "full", proj_dim=16)
    whole.load_checkpoint(model.state_dict(), 0)
    whole.featurize([inputs], num_samples=B)
    # both sides of all layers are short enough to stay as they are
    expected = np.asarray(whole.store.train(0).features, np.float64)
    require_close(torch.from_numpy(np.array(traker.store.train(0).features)), expected)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    model = Language()
    with pytest.raises(ValueError, match="sketch must be"):
        GradientProjector(model, "causal_lm", 8, sketch="one_sided")
    with pytest.raises(ValueError, match=r'sketch_side must be None with sketch="full", not 4; add sketch="two_sided"'):
        GradientProjector(model, "causal_lm", 8, sketch_side=4)
    with pytest.raises(ValueError, match="sketch_side must be in"):
        GradientProjector(model, "causal_lm", 8, sketch="two_sided", sketch_side=0)
    with pytest.raises(ValueError, match="proj_dim must be"):
        GradientProjector(model, "causal_lm", 0)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="optimizer_state must be None"):
        GradientProjector(model, "causal_lm", 8, sketch="two_sided", optimizer_state=optimizer)
    with pytest.raises(ValueError, match="gradient_computer must be left out"):
        TRAKer(
            model,
            "causal_lm",
            B,
            tmp_path,
            gradient_computer=HookGradientComputer,
            sketch="two_sided",
        )
    assert not any(tmp_path.iterdir())
