"""Models trained together against the same models trained one at a time by a loop written out here."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trak_fast import retraining
from trak_fast.retraining import Recipe, forward, random_subsets, retrained_outputs, state_dict, train

N = 90
RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.2, momentum=0.5, weight_decay=0.01)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)


def masks(count: int) -> np.ndarray:
    return random_subsets(N, count, seed=3, share=0.6)


@pytest.mark.parametrize("build", [plain, with_buffers])
def test_models_trained_at_once_are_those_trained_one_at_a_time(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "MODELS_AT_ONCE", 2)
    x, y = data()
    subsets = masks(3)
    together = train(build, (x, y), subsets, RECIPE, 5)
    assert together["0.weight"].shape == (3, 8, 6)
    assert not any(tensor.requires_grad for tensor in together.values())

    steps = 54 // 16
    for part, seed in enumerate(np.random.SeedSequence(5).spawn(2)):
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(mask) for mask in subsets[2 * part : 2 * part + 2]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**32)))
            models = [build().double().train() for _ in members]
        start = [{name: w.clone() for name, w in model.state_dict().items()} for model in models]
        velocities = [{name: torch.zeros_like(w) for name, w in model.named_parameters()} for model in models]
        for epoch in range(2):
            orders = rng.permuted(np.stack(members), axis=1)
            for model, velocity, order in zip(models, velocities, orders, strict=True):
                for i in range(steps):
                    batch = order[i * 16 : (i + 1) * 16]
                    model.zero_grad()
                    F.cross_entropy(model(x[batch].double()), y[batch]).backward()
                    rate = 0.2 * min(1, 1.25 * (1 - (epoch + i / steps) / 2))
                    with torch.no_grad():
                        for name, w in model.named_parameters():
                            assert w.grad is not None
                            velocity[name] = 0.5 * velocity[name] + w.grad + 0.01 * w
                            w -= rate * velocity[name]
        for i, model in enumerate(models):
            for name, w in model.state_dict().items():
                ours = state_dict(together, 2 * part + i)[name]
                if name.endswith("num_batches_tracked"):
                    assert ours == w == 2 * steps
                    continue
                moved = (w - start[i][name]).norm() + 1e-3
                # float32 keeps each of 6 steps to some hundred roundings of 6e-8 of the sums that make up a gradient
                assert (ours - w).norm() < 1e-4 * moved, name
            outputs = model.eval()(x.double())
            stacked = forward(build, together, x)
            assert stacked.shape == (3, N, 3)
            torch.testing.assert_close(stacked[2 * part + i].double(), outputs, rtol=1e-3, atol=1e-4)


def test_another_loss_takes_the_other_tensors_of_a_batch() -> None:
    def build() -> nn.Module:
        return nn.Linear(6, 1)

    def loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (weight * (output.squeeze(1) - target) ** 2).mean()

    x, _ = data()
    truth = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])
    target, weight = x @ truth, torch.ones(N)
    target[: N // 2], weight[: N // 2] = 100.0, 0.0  # the half that has no weight is wrong
    recipe = Recipe(epochs=200, batch_size=30, learning_rate=0.05, weight_decay=0)
    models = train(build, (x, target, weight), np.ones((2, N), bool), recipe, 0, loss=loss)
    torch.testing.assert_close(models["weight"], truth.expand(2, 1, 6), rtol=1e-3, atol=1e-3)


def test_random_subsets_are_distinct_and_of_one_size() -> None:
    subsets = random_subsets(40, 50, seed=1, share=0.25)
    assert (subsets.sum(1) == 10).all()
    assert len({mask.tobytes() for mask in subsets}) == 50
    assert (subsets == random_subsets(40, 50, seed=1, share=0.25)).all()
    assert (subsets != random_subsets(40, 50, seed=2, share=0.25)).any()
    # each sample is in a quarter of them: 12.5 with a standard deviation of 3.1
    assert subsets.sum(0).min() > 0
    assert subsets.sum(0).max() < 12.5 + 5 * 3.1
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share must leave 1 to 39 of 40 samples in"):
            random_subsets(40, 2, seed=0, share=share)


def test_retrained_outputs_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "MODELS_AT_ONCE", 2)
    x, y = data()
    calls = []

    def evaluate(models: dict[str, Tensor]) -> Tensor:
        calls.append(len(models["0.weight"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(plain, models, x[:4])[:, :, 0]

    def outputs(seed: int = 0, folder: Path | None = tmp_path) -> np.ndarray:
        return retrained_outputs(plain, (x, y), masks(3), evaluate, RECIPE, seed, models_per_subset=2, save_dir=folder)

    with pytest.raises(KeyboardInterrupt):
        outputs()
    resumed = outputs()
    assert calls == [2, 2, 2, 2]  # the two finished parts are not trained again
    assert resumed.shape == (3, 4)
    np.testing.assert_array_equal(resumed, outputs(folder=None))
    assert len(calls) == 7
    assert (outputs(seed=1) != resumed).any()  # what is stored for another seed is not taken
    assert len(calls) == 10
    # the mean of the two models of each subset, from the files' raw outputs
    assert not list(tmp_path.glob(".*"))


def test_models_of_a_subset_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "MODELS_AT_ONCE", 4)
    x, y = data()
    numbers = iter(range(100))

    def evaluate(models: dict[str, Tensor]) -> Tensor:
        return torch.tensor([[float(next(numbers))] for _ in models["0.weight"]])

    outputs = retrained_outputs(plain, (x, y), masks(3), evaluate, RECIPE, 0, models_per_subset=3)
    assert outputs.tolist() == [[1.0], [4.0], [7.0]]  # of 0 1 2, 3 4 5, 6 7 8


def test_what_does_not_fit_is_refused() -> None:
    everything: Any
    for everything, error, message in [
        (np.ones((2, N)), TypeError, "masks must be bool, not float64"),
        (np.ones((2, N - 1), bool), ValueError, rf"masks must have shape \(S, {N}\), as data has, not \(2, {N - 1}\)"),
        (
            np.arange(N) < np.array([[40], [41]]),
            ValueError,
            "masks must have equally many samples in each subset, not 40 to 41",
        ),
        (np.tile(np.arange(N) < 15, (2, 1)), ValueError, "at least one batch of 16 samples in each subset, not 15"),
    ]:
        with pytest.raises(error, match=message):
            train(plain, data(), everything, RECIPE, 0)
    with pytest.raises(ValueError, match="epochs must be at least 1, not 0"):
        Recipe(epochs=0)
    with pytest.raises(ValueError, match="learning_rate must be at least 0, not nan"):
        Recipe(learning_rate=float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_in_half_precision_are_told_apart(tmp_path: Path, dtype: torch.dtype) -> None:
    """NumPy has no bfloat16. What is stored for the data is taken again, and not for data that differ by one number."""
    x, y = data()
    trained = []

    def evaluate(models: dict[str, Tensor]) -> Tensor:
        trained.append(models["0.weight"].double())
        return models["0.bias"]

    def outputs(x: Tensor) -> np.ndarray:
        build = lambda: plain().to(dtype)  # noqa: E731
        return retrained_outputs(build, (x, y), masks(2), evaluate, RECIPE, 0, save_dir=tmp_path)

    x = x.to(dtype)
    first = outputs(x)
    expected = train(lambda: plain().to(dtype), (x, y), masks(2), RECIPE, [0, 0])
    np.testing.assert_array_equal(first, expected["0.bias"].double())
    assert torch.equal(trained[0], expected["0.weight"].double())
    np.testing.assert_array_equal(outputs(x.clone()), first)
    assert len(trained) == 1
    other = x.clone()
    other[3, 2] += 1
    outputs(other)
    assert len(trained) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_parts_that_were_stored_before_are_found() -> None:
    """The names of the files depend on the bytes and NumPy's name of each dtype."""
    x, y = data()
    expected = hashlib.sha256(json.dumps([asdict(RECIPE), 0, retraining.MODELS_AT_ONCE]).encode())
    for array in (x.numpy(), y.numpy(), masks(2)):
        expected.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    assert retraining._key((x, y), masks(2), RECIPE, 0) == expected.hexdigest()[:16]


def test_numbers_of_subsets_and_models_are_checked() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        random_subsets(10, 0, seed=0)
    with pytest.raises(ValueError, match="num_samples must be at least 2, not 1"):
        random_subsets(1, 3, seed=0)
    with pytest.raises(ValueError, match="models_per_subset must be at least 1, not 0"):
        retrained_outputs(plain, data(), masks(2), lambda models: models["0.bias"], RECIPE, 0, models_per_subset=0)
