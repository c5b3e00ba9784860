"""K-FAC's metric against plain float64 code: factors by hooks, one sample at a time, and explicit inverses."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import two_sided_reference as definition
from language_models import WORDS, B, Conv1D, Language, T, texts
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_fast import GradientProjector, TRAKer
from trak_fast.features import metric
from trak_fast.features.metric import Metric, matrices_of, vocabulary_of
from trak_fast.gradients.pieces import Outer, Whole
from trak_fast.store.tensors import read_tensors, write_tensors
from trak_fast.tasks import CausalLM

EPS = 2.0**-24
TERMS = 2000
MATRICES = ["words.weight", "up.weight", "middle.weight", "few.weight", "down.weight", "head.weight"]


def drawn_batches(model: Language, batch: Sequence[Tensor]) -> list[list[Tensor]]:
    """Draws labels as the metric does."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    uniform = [torch.rand(batch[0].shape, generator=generator) for _ in range(metric.DRAWS)]
    return [CausalLM().draw_labels(model, weights, {}, batch, numbers) for numbers in uniform]


def factors_alone(model: Language, sample: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Computes the factors of a sample's gradient of minus its loss: tokens by (N, height), (N, width)."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, inputs: Tensor, output: Tensor) -> None:
        output.retain_grad()
        kept[name] = (inputs.detach(), output)

    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D, nn.Embedding))
    }
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: keep(name, inputs[0], output))
        for name, layer in layers.items()
    ]
    tokens, mask, labels = sample
    logits = model(tokens, mask)[0, :-1]
    wanted = labels[0, 1:]
    (-F.cross_entropy(logits, wanted, ignore_index=-100)).backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (inputs, output) in kept.items():
        assert output.grad is not None
        grads = output.grad[0]
        if isinstance(layers[name], nn.Embedding):
            left, right = F.one_hot(inputs[0], WORDS).double(), grads
        elif isinstance(layers[name], Conv1D):
            left, right = inputs[0], grads
        else:
            left, right = grads, inputs[0]
        used = left.any(1) & right.any(1)
        found[f"{name}.weight"] = left[used], right[used]
    return found


def damped_inverse(moment: NDArray[np.float64], by_entry: bool, damping: float) -> NDArray[np.float64]:
    """Inverts a second moment, or its diagonal, plus a multiple of its mean."""
    if by_entry:
        moment = np.diag(np.diag(moment))
    return np.linalg.inv(moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment)))


def expected_products(model: Language, batch: Sequence[Tensor], tied: bool) -> NDArray[np.float64]:
    """Computes inner products of the gradients of f in the metric that is made of the same samples, (B, B)."""
    moments: dict[str, list[Any]] = {}
    samples = 0
    for drawn in drawn_batches(model, batch):
        for i in range(len(drawn[0])):
            samples += 1
            for name, (left, right) in factors_alone(model, [x[i : i + 1] for x in drawn]).items():
                own = moments.setdefault(name, [0.0, 0.0, 0])
                own[0] = own[0] + (left.mT @ left).numpy()
                own[1] = own[1] + (right.mT @ right).numpy()
                own[2] += len(left)
    if tied:  # both uses of the matrix, each with its share of the squares
        uses = [moments.pop("head.weight"), moments.pop("words.weight")]
        left = sum(x[0] * np.trace(x[1]) / x[2] for x in uses)
        right = sum(x[1] * np.trace(x[0]) / x[2] for x in uses)
        moments["words.weight"] = [left, right, sum(np.trace(x[0]) * np.trace(x[1]) / x[2] for x in uses)]
    gradients = definition.gradients_alone(model, CausalLM(), batch)
    kernels = {}
    for name, (left, right, count) in moments.items():
        is_vocabulary = name in ("words.weight", "head.weight")
        damping = metric.VOCABULARY_DAMPING if is_vocabulary else metric.LAYERS_DAMPING
        rows = damped_inverse(left, is_vocabulary, damping) * count * samples
        columns = damped_inverse(right, False, damping)
        own = np.stack([gradient[name] for gradient in gradients])
        kernels[name] = np.einsum("ihw,hk,jkl,lw->ij", own, rows, own, columns)
    tokens = sum(k for name, k in kernels.items() if name in ("words.weight", "head.weight"))
    layers = sum(k for name, k in kernels.items() if name not in ("words.weight", "head.weight"))
    return tokens + layers * metric.LAYERS_SHARE * np.trace(tokens) / np.trace(layers)


def made(tied: bool) -> tuple[Language, list[Tensor]]:
    torch.manual_seed(3)
    return Language(tied=tied), texts()


@pytest.mark.parametrize("tied", [False, True])
def test_products_are_those_of_the_inverse_of_the_factors_moments(tied: bool) -> None:
    model, batch = made(tied)
    names = [name for name in MATRICES if not (tied and name == "head.weight")]
    projector = GradientProjector(model, "causal_lm", 16, grad_wrt=names, metric="kfac")
    projector.fit_metric(batch)
    found = np.stack([projector.exact_products([x[i : i + 1] for x in batch], batch).numpy() for i in range(B)])
    expected = expected_products(copy.deepcopy(model).double(), batch, tied)
    sizes = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # the inverse amplifies the rounding of moments by the damping
    assert (np.abs(found - expected) <= TERMS * EPS / metric.LAYERS_DAMPING * sizes).all()
    assert np.abs(found - expected).max() < 0.01 * np.abs(found - np.trace(expected) / B).max()


def test_features_are_projections_of_gradients_in_the_metric() -> None:
    """Over many seeds the mean of φ·φ'/k is the inner product, with the error that ±1 have."""
    model, batch = made(tied=False)
    names = matrices_of(model, [name for name, _ in model.named_parameters()])
    assert names == MATRICES
    products = []
    for seed in range(30):
        projector = GradientProjector(model, "causal_lm", 256, seed=seed, grad_wrt=names, metric="kfac")
        features = projector.project(batch).double()
        products.append((features @ features.mT / 256).numpy())
    exact = np.stack([projector.exact_products([x[i : i + 1] for x in batch], batch).numpy() for i in range(B)])
    sizes = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    # the variance of a product of projections is at most 2 ‖g‖²‖h‖²/k
    assert (np.abs(np.mean(products, axis=0) - exact) <= 5 * math.sqrt(2 / 256 / 30) * sizes).all()


@pytest.mark.parametrize("side", [8, 512])
def test_whole_gradients_are_whitened_as_their_factors_are(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the factors' moments have several blocks, of which the last is padded."""
    monkeypatch.setattr(metric, "BLOCK_SIDE", side)
    model, batch = made(tied=False)
    projector = GradientProjector(model, "causal_lm", 16, grad_wrt=MATRICES, metric="kfac")
    projector.fit_metric(batch)
    assert projector.metric is not None
    for name in ("up.weight", "middle.weight", "down.weight", "words.weight"):
        height, width = model.get_parameter(name).shape
        left, right = torch.randn(2, 3, height), torch.randn(2, 3, width)
        by_factors = projector.metric.whitened(name, Outer(left, right)).rows(0, height)
        whole = projector.metric.whitened(name, Whole(torch.einsum("bth,btw->bhw", left, right)))
        torch.testing.assert_close(
            by_factors, whole.rows(0, height), rtol=1e-3, atol=1e-3 * by_factors.abs().max().item()
        )


def test_blocks_of_moments_are_inverted_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "BLOCK_SIDE", 4)
    rows = torch.randn(50, 10, dtype=torch.float64)
    moment = metric._second_moment(rows, blocks=3)
    root = metric._inverse_root(moment, 10, damping=0.1)
    added = 0.1 * rows.square().sum(0).mean()
    whitened = metric._product(rows.float().unsqueeze(0), root)[0].double()
    expected = torch.zeros(50, 50, dtype=torch.float64)
    for low in range(0, 10, 4):
        part = rows[:, low : low + 4]
        inverse = torch.linalg.inv(part.mT @ part + added * torch.eye(part.shape[1]))
        expected += part @ inverse @ part.mT
    torch.testing.assert_close(whitened @ whitened.mT, expected, rtol=1e-4, atol=1e-4)


def test_the_metric_survives_its_state_dict(tmp_path: Path) -> None:
    model, batch = made(tied=True)
    projector = GradientProjector(model, "causal_lm", 16, metric="kfac", grad_wrt=MATRICES[:-1])
    projector.fit_metric(batch)
    assert projector.metric is not None
    torch.save(projector.metric.state_dict(), tmp_path / "metric.pt")
    first = projector.project(batch)
    projector.metric = Metric.from_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    assert projector.metric.names == set(MATRICES[:-1])
    assert torch.equal(projector.project(batch), first)


def test_checkpoints_keep_the_metric_of_their_first_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is started again, with batches of another size, goes on in the metric that is stored."""
    model, batch = made(tied=False)
    state = copy.deepcopy(model.state_dict())
    for start, folder in ((0, "whole"), (2, "again")):
        traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / folder, proj_dim=64)
        traker.load_checkpoint(state, 0)
        traker.featurize([x[:2] for x in batch], inds=[0, 1])
        if start:
            del traker
            traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / folder, proj_dim=64)
            traker.load_checkpoint(state, 0)
            caplog.clear()
            traker.fit_metric(batch)  # is there already
            assert "is made of" not in caplog.text
        else:
            assert "is made of 2 samples" in caplog.text
        traker.featurize([x[2:] for x in batch], inds=[2, 3, 4])
    stored = [np.load(tmp_path / folder / "checkpoint_0/train/features.npy") for folder in ("whole", "again")]
    np.testing.assert_array_equal(stored[0], stored[1])
    other = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / "other", proj_dim=64)
    other.load_checkpoint(state, 0)
    caplog.clear()
    other.fit_metric(batch)
    assert "is made of" not in caplog.text  # of all there are
    other.featurize(batch, inds=range(B))
    assert not np.allclose(np.load(tmp_path / "other/checkpoint_0/train/features.npy"), stored[0])


def test_scores_by_default_are_products_in_the_metric(tmp_path: Path) -> None:
    model, batch = made(tied=False)
    targets = texts()
    state = copy.deepcopy(model.state_dict())
    traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path, proj_dim=4096, proj_type="rademacher")
    traker.load_checkpoint(state, 0)
    traker.featurize(batch, num_samples=B)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", state, 0, num_targets=B)
    traker.score(targets, num_samples=B)
    scores = np.array(traker.finalize_scores("test"))
    features = np.array(traker.store.train(0).features, np.float64)
    aims = np.array(traker.store.targets(0, "test").features, np.float64)
    weights = np.array(traker.store.train(0).weights, np.float64)
    expected = weights[:, None] * (features @ aims.T) / (features**2).sum(1).mean()
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_defaults_with_a_metric(tmp_path: Path) -> None:
    traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / "default")
    assert list(traker.gradient_computer.selected) == MATRICES
    assert traker.projector.proj_type == "sjlt"
    assert (traker.proj_dim, traker.store.store_dtype) == (1024, "float32")  # of 825 numbers of a gradient
    for lambda_reg, store_dtype in (("auto", "1bit"), (math.inf, "1bit"), (0.1, "int8")):
        folder = tmp_path / f"{lambda_reg}"
        large = TRAKer(Language(tied=False), "causal_lm", B, folder, proj_dim=16384, lambda_reg=lambda_reg)
        assert (large.projector.proj_type, large.store.store_dtype) == ("sjlt", store_dtype)
    plain = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / "plain", metric=None)
    assert (plain.proj_dim, plain.projector.proj_type) == (2048, "rademacher")
    assert len(plain.gradient_computer.selected) == 11
    layers = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / "layers", grad_wrt=["up.*"])
    assert (layers.proj_dim, layers.projector.proj_type) == (2048, "rademacher")
    assert list(layers.gradient_computer.selected) == ["up.weight", "up.bias"]
    half = TRAKer(Language(tied=False), "causal_lm", B, tmp_path / "half", proj_dim=32, use_half_precision=True)
    assert half.projector.proj_type == "rademacher"


def test_vocabularies_are_the_rows_of_the_largest_embedding() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, 4)
            self.places = nn.Embedding(T, 4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, WORDS)

    model = Model()
    assert vocabulary_of(model) == WORDS
    names = [name for name, _ in model.named_parameters()]
    assert matrices_of(model, names) == ["words.weight", "head.weight"]
    assert vocabulary_of(nn.Linear(2, 3)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "adam"}, "metric must be"),
        ({"metric": "kfac", "proj_dim": 0}, "metric must be None"),
        ({"store_dtype": "int4"}, "store_dtype must be"),
        ({"store_dtype": "int8", "use_half_precision": True}, 'store_dtype must be "float16"'),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TRAKer(Language(), "causal_lm", B, tmp_path, **options)


def test_a_metric_is_for_tasks_that_draw_labels() -> None:
    with pytest.raises(ValueError, match="without draw_labels such as ImageClassification"):
        GradientProjector(nn.Linear(3, 2), "image_classification", 8, metric="kfac")
    projector = GradientProjector(Language(), "causal_lm", 8)
    with pytest.raises(ValueError, match='metric must be "kfac" for fit_metric'):
        projector.fit_metric(texts())


def test_a_checkpoint_whose_metric_is_gone_or_damaged_is_refused(tmp_path: Path) -> None:
    model, batch = made(tied=False)
    state = copy.deepcopy(model.state_dict())

    def opened() -> TRAKer:
        return TRAKer(Language(tied=False), "causal_lm", B, tmp_path, proj_dim=64)

    traker = opened()
    traker.load_checkpoint(state, 0)
    traker.featurize([x[:3] for x in batch], inds=[0, 1, 2])
    path = tmp_path / "checkpoint_0" / "metric.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"metric.safetensors is damaged: featurize again"):
        opened().load_checkpoint(state, 0)
    path.unlink()
    with pytest.raises(ValueError, match=r"metric.safetensors is missing: featurize again"):
        opened().load_checkpoint(state, 0)
    path.write_bytes(content)
    write_tensors(path, read_tensors(path).tensors, {"checkpoint": "another"})
    with pytest.raises(ValueError, match=r"metric of another checkpoint"):
        opened().load_checkpoint(state, 0)
    path.write_bytes(content)
    traker = opened()
    traker.load_checkpoint(state, 0)
    traker.featurize([x[3:] for x in batch], inds=[3, 4])
    traker.finalize_features()
    path.unlink()
    with pytest.raises(ValueError, match=r"metric.safetensors is missing"):
        opened().start_scoring_checkpoint("test", state, 0, num_targets=1)


def test_the_metric_does_not_depend_on_the_samples_at_a_time() -> None:
    model, batch = made(tied=True)
    states = []
    for chunk_size in (None, 1, 2):
        projector = GradientProjector(model, "causal_lm", 16, grad_wrt=MATRICES[:-1], metric="kfac")
        projector.fit_metric(batch, chunk_size)
        assert projector.metric is not None
        states.append(projector.metric.state_dict())
    for state in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item())


def test_metrics_of_nothing_and_of_own_labels_are_refused(tmp_path: Path) -> None:
    class Own(CausalLM):
        """A task with labels of its own."""

        def labels(self, named: Any) -> Tensor:
            return super().labels({name: x for name, x in named.items() if name != "labels"})

    model, batch = made(tied=False)
    with pytest.raises(ValueError, match=r"Own.labels must give the labels of a batch for a metric"):
        GradientProjector(model, Own(), 16, metric="kfac").fit_metric(batch)
    unlabelled = [*batch, torch.full((B, T), -100)]
    with pytest.raises(ValueError, match="samples that a metric is made of must have gradients other than 0"):
        GradientProjector(model, "causal_lm", 16, metric="kfac").fit_metric(unlabelled)
    with pytest.raises(ValueError, match="metric must be None with optimizer_state"):
        TRAKer(model, "causal_lm", B, tmp_path, metric="kfac", optimizer_state={"state": {}, "param_groups": []})


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_the_scale_of_the_loss_does_not_matter(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(tied=False)
    plain = CausalLM.get_outputs
    kernels = []
    for factor in (1.0, scale):
        monkeypatch.setattr(CausalLM, "get_outputs", lambda self, *rest, factor=factor: plain(self, *rest) * factor)
        projector = GradientProjector(model, "causal_lm", 16, grad_wrt=MATRICES, metric="kfac")
        monkeypatch.setattr(CausalLM, "get_weightings", lambda self, outputs, batch: torch.ones_like(outputs))
        projector.fit_metric(batch)
        rows = [projector.exact_products([x[i : i + 1] for x in batch], batch).numpy() for i in range(B)]
        kernels.append(np.stack(rows))
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-3, atol=1e-4 * np.abs(kernels[0]).max())


def test_a_batch_that_is_refused_leaves_no_metric(tmp_path: Path) -> None:
    model, batch = made(tied=False)
    state = copy.deepcopy(model.state_dict())
    traker = TRAKer(Language(tied=False), "causal_lm", B, tmp_path, proj_dim=64)
    traker.load_checkpoint(state, 0)
    with pytest.raises(ValueError, match="samples 0 to 10 are not all in"):
        traker.featurize([x[:2] for x in batch], inds=[0, B + 5])
    assert not (tmp_path / "checkpoint_0" / "metric.safetensors").exists()
    other = copy.deepcopy(state)
    other["few.weight"] = other["few.weight"] + 1
    traker.featurize([x[:2] for x in batch], inds=[0, 1])
    with pytest.raises(ValueError, match="other weights"):
        traker.load_checkpoint(other, 0)
    with pytest.raises(RuntimeError, match="call load_checkpoint before fit_metric"):
        traker.fit_metric(batch)


def test_models_that_name_their_words_or_share_them_are_understood() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(64, 4)
            self.words = nn.Embedding(WORDS, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.words

    assert vocabulary_of(Named()) == WORDS
    shared = nn.Sequential(nn.Embedding(64, 4), nn.Embedding(WORDS, 4), nn.Linear(4, WORDS))
    assert vocabulary_of(shared) == WORDS
