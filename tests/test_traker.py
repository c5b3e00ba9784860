"""TRAK from end to end against its closed form, and what its driver refuses."""

import copy
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution import (
    CHECKPOINTS,
    EPS,
    SEED,
    TARGETS,
    TRAIN,
    ClosedForm,
    M,
    N,
    build,
    by_hand,
    from_gradients,
    network,
    projected,
    projected_sparsely,
    run,
)
from torch import Tensor, nn

from trak_fast.compat.traker import BasicProjector
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.metrics import mislabel_detection
from trak_fast.projection import Projector
from trak_fast.tasks import ImageClassification
from trak_fast.traker import TRAKer


@pytest.mark.parametrize("proj_dim", [8, N, 20, 60])
@pytest.mark.parametrize(
    ("lambda_reg", "curvature", "shrink"),
    [("auto", True, True), ("auto", False, True), ("auto", True, False), (0, True, True), (0.3, True, True)],
)
def test_scores_are_the_closed_form(
    tmp_path: Path, proj_dim: int, lambda_reg: float | str, curvature: bool, shrink: bool
) -> None:
    traker = build(tmp_path, proj_dim=proj_dim, lambda_reg=lambda_reg, curvature=curvature, shrink_weights=shrink)
    scores = run(traker)
    assert scores.shape == (N, M)
    assert scores.dtype == np.float32
    assert (np.load(tmp_path / "scores" / "test.npy") == scores).all()
    from_gradients(proj_dim, lambda_reg, curvature, shrink).check(scores)
    # the same once more from the stored features, whose rounding then plays no part: a much sharper bound
    parts = []
    for model_id in range(len(CHECKPOINTS)):
        train, targets = traker.store.train(model_id), traker.store.targets(model_id, "test")
        parts.append([a.astype(np.float64) for a in (train.weights, train.features, targets.features)])
    expected = ClosedForm(131, proj_dim, lambda_reg, [part[1] for part in parts], curvature, shrink)
    for part in parts:
        expected.add(*part)
    expected.check(scores)
    assert (expected.rho > 0.2) == (proj_dim >= 20)  # both branches of the ridge


def test_the_ridge_is_automatic_by_default_and_with_none(tmp_path: Path) -> None:
    scores = run(build(tmp_path))
    for lambda_reg in ("auto", None):
        assert (build(tmp_path, lambda_reg=lambda_reg).finalize_scores("test") == scores).all()
    assert not np.allclose(build(tmp_path, lambda_reg=0).finalize_scores("test"), scores, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [
        ("projector", Projector(131, 8, seed=99), "projector"),
        ("model", network(), "model"),
        ("task", "text_classification", "task"),
        ("gradient_computer", None, "gradient_computer"),
        ("store", None, "save_dir"),
        ("device", "cpu", "device"),
        ("proj_dim", 4, "proj_dim"),
        ("grad_dim", 4, "grad_wrt"),
        ("train_set_size", 4, "train_set_size"),
    ],
)
def test_attributes_that_features_depend_on_stay(tmp_path: Path, name: str, value: Any, argument: str) -> None:
    traker = build(tmp_path)
    before = getattr(traker, name)
    with pytest.raises(AttributeError, match=rf"{name} cannot be assigned.*TRAKer\(\.\.\., {argument}=\.\.\.\)"):
        setattr(traker, name, value)
    assert getattr(traker, name) is before
    assert traker.normalize_factor == np.sqrt(131)
    for free in ("scores", "logger", "notes"):
        setattr(traker, free, None)


def test_an_assigned_ridge_is_checked_as_the_constructor_s(tmp_path: Path) -> None:
    traker = build(tmp_path, lambda_reg=0.3)
    traker.lambda_reg = "auto"
    assert traker.lambda_reg is None
    for value in (-1, float("nan"), "large"):
        with pytest.raises(ValueError, match='lambda_reg must be "auto" or a number'):
            traker.lambda_reg = value
    assert traker.lambda_reg is None


@pytest.mark.parametrize("change", [{"lambda_reg": 0.3}, {"curvature": False}, {"normalize": True}])
def test_settings_of_scores_can_be_read_and_changed(tmp_path: Path, change: dict[str, Any]) -> None:
    traker = build(tmp_path)
    before = run(traker).copy()
    assert (traker.lambda_reg, traker.curvature, traker.shrink_weights, traker.normalize) == (None, True, True, False)
    for name, value in change.items():
        setattr(traker, name, value)
    scores = traker.finalize_scores("test")
    assert not np.array_equal(scores, before)
    assert np.array_equal(build(tmp_path, **change).finalize_scores("test"), scores)


@pytest.mark.parametrize("proj_dim", [8, 20])
@pytest.mark.parametrize("lambda_reg", ["auto", 0.3])
def test_automatic_scores_do_not_depend_on_the_scale_of_features(
    tmp_path: Path, proj_dim: int, lambda_reg: float | str
) -> None:
    class Scaled(Projector):
        def project(self, grads: Any, model_id: int = 0) -> Tensor:
            return 64 * super().project(grads, model_id)

    scores = run(build(tmp_path / "a", proj_dim=proj_dim, lambda_reg=lambda_reg))
    scaled = run(build(tmp_path / "b", projector=Scaled(131, proj_dim, seed=SEED), lambda_reg=lambda_reg))
    assert np.allclose(scaled, scores, rtol=1e-5) == (lambda_reg == "auto")


@pytest.mark.parametrize("proj_dim", [8, 20])
@pytest.mark.parametrize("lambda_reg", ["auto", 0.3])
def test_normalized_scores_are_those_of_features_of_length_1(
    tmp_path: Path, proj_dim: int, lambda_reg: float | str
) -> None:
    class Unit(Projector):
        def project(self, grads: Any, model_id: int = 0) -> Tensor:
            return torch.nn.functional.normalize(super().project(grads, model_id))

    options = {"proj_dim": proj_dim, "lambda_reg": lambda_reg}
    scores = run(build(tmp_path / "a", normalize=True, **options))
    expected = run(build(tmp_path / "b", projector=Unit(131, proj_dim, seed=SEED), **options))
    # those features were rounded to float32 once more
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("lambda_reg", ["auto", 0.3, math.inf])
def test_weights_can_be_left_out_of_scores_alone(tmp_path: Path, lambda_reg: float | str) -> None:
    traker = build(tmp_path, lambda_reg=lambda_reg, shrink_weights=False)
    scores = np.array(run(traker), np.float64)
    influence = traker.self_influence()
    traker.use_weights = False
    stored = [traker.store.train(i).weights for i in range(len(CHECKPOINTS))]
    weights = np.mean([np.array(x, np.float64) for x in stored], axis=0)
    found = np.array(traker.finalize_scores("test"))
    np.testing.assert_allclose(found * weights[:, None], scores, rtol=4 * EPS, atol=0)
    traker.shrink_weights = True  # there are none to move
    assert (np.array(traker.finalize_scores("test")) == found).all()
    assert (traker.self_influence() == influence).all()


def test_stored_features_are_projected_gradients(tmp_path: Path) -> None:
    traker = build(tmp_path)
    run(traker)
    for model_id, state in enumerate(CHECKPOINTS):
        gradients, weights = by_hand(state, TRAIN)
        expected, bound = projected(gradients, 8, model_id)
        rows = traker.store.train(model_id)
        assert (np.abs(rows.features - expected) <= bound).all()
        np.testing.assert_allclose(rows.weights, weights, rtol=2 * EPS)
        expected, bound = projected(by_hand(state, TARGETS)[0], 8, model_id)
        assert (np.abs(traker.store.targets(model_id, "test").features - expected) <= bound).all()


@pytest.mark.parametrize("nonzeros", [1, 2, None])
@pytest.mark.parametrize("lambda_reg", ["auto", 0, 0.3])
def test_sparse_features_have_the_scale_of_dense_ones(
    tmp_path: Path, lambda_reg: float | str, nonzeros: int | None
) -> None:
    """A ridge that is given as a number means the same for every kind."""
    traker = build(tmp_path, proj_type="sjlt", proj_dim=64, nonzeros=nonzeros, lambda_reg=lambda_reg)
    scores = run(traker)
    parts = []
    for model_id, state in enumerate(CHECKPOINTS):
        gradients, weights = by_hand(state, TRAIN)
        x, x_error = projected_sparsely(gradients, 64, model_id, nonzeros or 4)
        targets, targets_error = projected_sparsely(by_hand(state, TARGETS)[0], 64, model_id, nonzeros or 4)
        assert (np.abs(traker.store.train(model_id).features - x) <= x_error).all()
        assert (np.abs(traker.store.targets(model_id, "test").features - targets) <= targets_error).all()
        parts.append((weights, x, targets, float(np.linalg.norm(x_error)), float(np.linalg.norm(targets_error))))
    expected = ClosedForm(131, 64, lambda_reg, [part[1] for part in parts])
    for part in parts:
        expected.add(*part)
    expected.check(scores)


def test_sparse_projectors_of_either_scale_give_the_same_features(tmp_path: Path) -> None:
    rows = []
    for kind in (Projector, BasicProjector):
        traker = build(
            tmp_path,
            projector=kind(131, 64, SEED, "sjlt", "cpu", nonzeros=4),
            gradient_computer=FunctionalGradientComputer,
            load_from_save_dir=not rows,
        )
        traker.load_checkpoint(CHECKPOINTS[0], 0)
        traker.featurize(TRAIN, num_samples=N)
        rows.append(np.array(traker.store.train(0).features))
    assert (rows[0] == rows[1]).all()


@pytest.mark.parametrize("options", [{"proj_dim": 0}, {"proj_dim": 0, "grad_wrt": ["4.bias", "4.weight"]}])
def test_no_projection_keeps_the_gradients(tmp_path: Path, options: dict[str, Any]) -> None:
    traker = build(tmp_path, **options)
    run(traker)
    gradients = by_hand(CHECKPOINTS[1], TRAIN, options.get("grad_wrt"))[0]
    assert traker.proj_dim == traker.grad_dim == gradients.shape[1]
    np.testing.assert_allclose(traker.store.train(1).features, gradients, rtol=2 * EPS, atol=1e-12)


def test_a_subset_of_parameters_is_projected_as_a_gradient_of_its_own(tmp_path: Path) -> None:
    traker = build(tmp_path, grad_wrt=(name for name in ["4.bias", "4.weight"]))
    run(traker)
    expected, bound = projected(by_hand(CHECKPOINTS[0], TRAIN, ["4.weight", "4.bias"])[0], 8, 0)
    assert (np.abs(traker.store.train(0).features - expected) <= bound).all()


@pytest.mark.parametrize("frozen", [[], ["0.weight", "0.bias"]])
def test_by_default_parameters_that_require_gradients_are_attributed_and_counted(
    tmp_path: Path, frozen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    with caplog.at_level("INFO", "trak_fast"):
        traker = TRAKer(model, "image_classification", N, tmp_path / "some", proj_dim=0)
    assert caplog.messages == (
        ["gradients of 2 of 4 parameters, 27 of 131 numbers: those that require gradients (grad_wrt=['*'] takes all)"]
        if frozen
        else []
    )
    run(traker)
    gradients = by_hand(CHECKPOINTS[1], TRAIN, names)[0]
    np.testing.assert_allclose(traker.store.train(1).features, gradients, rtol=2 * EPS, atol=1e-12)
    everything = TRAKer(model, "image_classification", N, tmp_path / "all", proj_dim=0, grad_wrt=["*"])
    run(everything)
    gradients = by_hand(CHECKPOINTS[1], TRAIN)[0]
    np.testing.assert_allclose(everything.store.train(1).features, gradients, rtol=2 * EPS, atol=1e-12)


def test_features_do_not_depend_on_chunks_nor_on_the_mode_of_the_model(tmp_path: Path) -> None:
    whole, chunked = build(tmp_path / "a"), build(tmp_path / "b", chunk_size=2)
    chunked.model.train()
    run(whole)
    run(chunked)
    assert all(module.training for module in chunked.model.modules())
    for model_id, state in enumerate(CHECKPOINTS):
        _, bound = projected(by_hand(state, TRAIN)[0], 8, model_id)
        difference = whole.store.train(model_id).features - chunked.store.train(model_id).features
        assert (np.abs(difference) <= 2 * bound).all()


def test_gradients_of_one_chunk_are_gone_before_those_of_the_next_are_made(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    calls = []

    class Watching(FunctionalGradientComputer):
        def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
            calls.append(sum(reference() is not None for reference in alive))
            grads = super().compute_per_sample_grad(batch)
            alive[:] = [weakref.ref(value) for value in grads.values()]
            return grads

    run(build(tmp_path, gradient_computer=Watching, chunk_size=1))
    assert calls == [0] * (2 * (N + M))


def test_self_influence_is_the_diagonal_of_the_scores_of_the_training_set(tmp_path: Path) -> None:
    traker = build(tmp_path, shrink_weights=False)
    run(traker)
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("itself", state, model_id, num_targets=N)
        traker.score(TRAIN, num_samples=N)
    scores = traker.finalize_scores("itself")
    # both from the same features; scores end in float32 sums of 8 terms of either sign
    np.testing.assert_allclose(traker.self_influence(), scores.diagonal(), rtol=1e-4)
    alone = traker.self_influence([1])
    np.testing.assert_allclose(alone, traker.finalize_scores("itself", [1]).diagonal(), rtol=1e-4)
    assert not np.allclose(alone, traker.self_influence())
    np.testing.assert_array_equal(build(tmp_path).self_influence(), traker.self_influence())  # Q as it is


def test_self_influence_finds_flipped_labels(tmp_path: Path) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(200, 5, dtype=torch.float64)
    labels = (inputs @ torch.randn(5, 3, dtype=torch.float64)).argmax(1)
    flipped = torch.rand(200) < 0.1
    labels = torch.where(flipped, (labels + 1) % 3, labels)
    model = nn.Linear(5, 3).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(inputs), labels)
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    traker = TRAKer(model, "image_classification", 200, tmp_path, proj_dim=12)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize([inputs, labels], num_samples=200)
    traker.finalize_features()
    # a ranking by chance has an area of 1/2 with a standard deviation of √(201 / (12 · 20 · 180)) = 0.07
    assert mislabel_detection(traker.self_influence(), flipped.numpy()).auc > 0.5 + 5 * 0.07


class Identity:
    """A projector of traker's contract and no more, whose result requires grad."""

    proj_dim = 0
    proj_type = "na"
    freed = 0

    def project(self, grads: Any, model_id: int) -> Tensor:
        flat = torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)
        return (flat * (model_id + 1)).to(torch.float32).requires_grad_()

    def free_memory(self) -> None:
        self.freed += 1


def test_any_projector_and_task_of_traker_s_contract_work(tmp_path: Path) -> None:
    class Squared:
        def get_output(self, model: nn.Module, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            out = torch.func.functional_call(model, (weights, buffers), x.unsqueeze(0))
            return out[0, 0] ** 2

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: list[Tensor]) -> Tensor:
            return batch[0][:, :1]

    projector = Identity()
    traker = TRAKer(network(), Squared(), N, tmp_path, projector=projector)  # type: ignore[arg-type]
    traker.load_checkpoint(CHECKPOINTS[0], 3)
    traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()
    assert projector.freed == 1
    rows = traker.store.train(3)
    assert (rows.weights == TRAIN[0][:, 0].float().numpy()).all()
    model = network()
    model.load_state_dict(CHECKPOINTS[0])
    model.eval()
    for i in range(N):
        parts = torch.autograd.grad(model(TRAIN[0][i : i + 1])[0, 0] ** 2, list(model.parameters()))
        expected = 4 * torch.cat([part.reshape(-1) for part in parts])
        np.testing.assert_allclose(rows.features[i], expected, rtol=4 * EPS, atol=1e-12)


def test_numbers_of_a_projector_may_be_numpy_s(tmp_path: Path) -> None:
    class Numpy(Projector):
        pass

    projector = Numpy(131, 8, seed=SEED)
    vars(projector).update(proj_dim=np.int64(8), seed=np.uint32(SEED))
    expected = run(build(tmp_path / "a", projector=Numpy(131, 8, seed=SEED)))
    for _ in range(2):  # makes the folder, and opens it again
        traker = build(tmp_path / "b", projector=projector)
        assert (traker.proj_dim, type(traker.proj_dim)) == (8, int)
        assert (run(traker) == expected).all()


def test_gradient_computers_are_given_each_checkpoint(tmp_path: Path) -> None:
    class Copying(FunctionalGradientComputer):
        def load_model_params(self, model: nn.Module) -> None:
            super().load_model_params(copy.deepcopy(model).eval())

    copying = build(tmp_path / "a", gradient_computer=Copying)
    assert (run(copying) == run(build(tmp_path / "b", gradient_computer=FunctionalGradientComputer))).all()


@pytest.mark.parametrize("name", ["features", "weights"])
def test_features_and_weightings_of_another_shape_are_refused(tmp_path: Path, name: str) -> None:
    class Narrow(Identity):
        def project(self, grads: Any, model_id: int) -> Tensor:
            return super().project(grads, model_id)[:, :1]

    class Single(ImageClassification):
        def get_out_to_loss_grad(self, *arguments: Any) -> Tensor:
            return super().get_out_to_loss_grad(*arguments).mean()

    task, projector = (ImageClassification(), Narrow()) if name == "features" else (Single(), Identity())
    traker = TRAKer(network(), task, N, tmp_path, projector=projector)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(12,.*\), not "):
        traker.featurize(TRAIN, num_samples=N)
    assert not traker.store.train(0).done.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_seed": 6}, "seed: stored 5, given 6"),
        ({"proj_type": "normal"}, "proj_type: stored 'rademacher', given 'normal'"),
        ({"proj_dim": 9}, "proj_dim: stored 8, given 9"),
        ({"grad_wrt": ["0.weight"]}, "grad_dim: stored 131, given 96"),
        ({"train_set_size": 13}, "train_set_size: stored 12, given 13"),
        ({"task": "text_classification"}, "task: stored 'ImageClassification', given 'TextClassification'"),
        ({"model": network().float()}, r"parameters\[0\]: stored '0.weight torch.float64 \(8, 12\)', given '0.weight"),
    ],
)
def test_a_folder_of_other_features_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options = {"model": network(), "task": "image_classification", "train_set_size": N, "save_dir": tmp_path,
               "proj_dim": 8, "projector_seed": SEED}  # fmt: skip
    TRAKer(**options)
    for resume in (True, False):
        with pytest.raises(ValueError, match=message):
            TRAKer(**{**options, **change}, load_from_save_dir=resume)


def test_a_folder_of_another_sparse_matrix_is_refused(tmp_path: Path) -> None:
    options = {"model": network(), "task": "image_classification", "train_set_size": N, "save_dir": tmp_path,
               "proj_dim": 64, "proj_type": "sjlt"}  # fmt: skip
    TRAKer(**options)
    TRAKer(**options, nonzeros=4)  # the default
    with pytest.raises(ValueError, match="nonzeros: stored 4, given 2"):
        TRAKer(**options, nonzeros=2)
    with pytest.raises(
        ValueError, match=r"proj_type: stored 'sjlt', given 'rademacher'\n.*nonzeros: stored 4, given None"
    ):
        TRAKer(**{**options, "proj_type": "rademacher"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classification"}, "task must be one of 'image_classification'"),
        ({"train_set_size": 0}, r"train_set_size must be in \[1, 2\*\*48\], not 0"),
        ({"chunk_size": 0}, r"chunk_size must be in \[1, 2\*\*48\], not 0"),
        ({"lambda_reg": -0.1}, 'lambda_reg must be "auto" or a number >= 0 .math.inf: no inverse., not -0.1'),
        ({"lambda_reg": float("nan")}, 'lambda_reg must be "auto" or a number >= 0 .math.inf: no inverse., not nan'),
        ({"lambda_reg": "gcv"}, "lambda_reg must be .* not 'gcv'"),
        ({"saver": object}, "saver and score_computer are not supported"),
        ({"score_computer": object}, "saver and score_computer are not supported"),
        ({"grad_wrt": ["head"]}, "no parameter head"),
        ({"nonzeros": 4}, "nonzeros belongs to proj_type='sjlt'"),
        ({"proj_type": "sjlt", "proj_dim": 1000}, "proj_dim must be nonzeros times a power of two .*: 512 and 1024"),
        (
            {"proj_type": "sjlt", "proj_dim": 0, "nonzeros": 1},
            "nonzeros has no influence beside projector or proj_dim=0",
        ),
        (
            {"projector": Projector(131, 64, proj_type="sjlt"), "nonzeros": 1},
            "nonzeros has no influence beside projector",
        ),
        (
            {"projector": type("P", (), {"grad_dim": 130, "proj_dim": 8})()},
            "projector.grad_dim must be 131, .*, not 130",
        ),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {"model": network(), "task": "image_classification", "train_set_size": N, **options}
    with pytest.raises(ValueError, match=message):
        TRAKer(save_dir=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": dict(network().named_parameters())}, "model must be a torch.nn.Module, not dict"),
        ({"model": "resnet18"}, "model must be a torch.nn.Module, not str"),
        (
            {"gradient_computer": "hooks"},
            "gradient_computer must be a class, not 'hooks'; gradient_computer=trak_fast.HookG",
        ),
        (
            {"gradient_computer": FunctionalGradientComputer(network(), ImageClassification())},
            "gradient_computer must be a class, not <.*; gradient_computer=trak_fast.HookGradientComputer",
        ),
    ],
)
def test_options_of_wrong_types_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {"model": network(), "task": "image_classification", "train_set_size": N, **options}
    with pytest.raises(TypeError, match=message):
        TRAKer(save_dir=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({}, ValueError, "either inds or num_samples"),
        ({"inds": [0, 1], "num_samples": 2}, ValueError, "either inds or num_samples"),
        ({"num_samples": 3}, ValueError, r"batch has \[2, 2\] samples in its tensors, num_samples says 3"),
        ({"num_samples": -1}, ValueError, r"num_samples must be in \[0, 2\*\*48\], not -1"),
        ({"num_samples": 0}, ValueError, r"batch has \[2, 2\] samples in its tensors, num_samples says 0"),
        ({"inds": []}, ValueError, r"batch has \[2, 2\] samples in its tensors, inds says 0"),
        ({"inds": [0, 1, 2]}, ValueError, "inds says 3"),
        ({"inds": [0, N]}, ValueError, r"samples 0 to 12 are not all in \[0, 12\)"),
        ({"inds": [-1, 0]}, ValueError, "samples -1 to 0"),
        ({"inds": [4, 4]}, ValueError, "same number twice"),
        ({"inds": [0.0, 1.0]}, TypeError, "inds must be integers, not float64"),
        ({"inds": torch.tensor([True, False])}, TypeError, "inds must be integers, not bool"),
        ({"num_samples": 2, "batch": TRAIN[0][:2]}, TypeError, "sequence of tensors .* not a Tensor"),
        (
            {"num_samples": 2, "batch": [TRAIN[0][:2], [1, 2]]},
            TypeError,
            r"batch\[1\] must be a tensor \(B, ...\), not list; torch.as_tensor\(batch\[1\]\) is one",
        ),
        (
            {"num_samples": 2, "batch": [x[:2].numpy() for x in TRAIN]},
            TypeError,
            r"batch\[0\] must be .*, not numpy.ndarray; torch.from_numpy\(batch\[0\]\) is one",
        ),
        ({"num_samples": 2, "batch": [TRAIN[0][:2], None]}, TypeError, r"batch\[1\] must be .*, not NoneType$"),
        (
            {"num_samples": 2, "batch": {"image": TRAIN[0][:2], "label": TRAIN[1][:2]}},
            ValueError,
            r"batch must have the keys 'pixel_values', 'labels', not 'image', 'label'; add 'pixel_values'",
        ),
        ({"num_samples": 2, "batch": (x[:2] for x in TRAIN)}, TypeError, r"not generator; list\(batch\) may be one"),
        ({"num_samples": 2, "batch": None}, TypeError, "not NoneType$"),
        ({"num_samples": 2, "batch": []}, ValueError, "batch must hold the tensors of 2 samples, not be empty"),
        (
            {"num_samples": 1, "batch": [TRAIN[0][:1], TRAIN[1][0]]},
            ValueError,
            r"batch\[1\] must be .*, not one without dimensions; batch\[1\]\[None\] is one of one sample",
        ),
        ({"num_samples": 2, "batch": [TRAIN[0][:2], TRAIN[1][:3]]}, ValueError, r"batch has \[2, 3\] samples"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    tmp_path: Path, rows: dict[str, Any], error: type[Exception], message: str
) -> None:
    traker = build(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    arguments = {"batch": [x[:2] for x in TRAIN], **rows}
    with pytest.raises(error, match=message):
        traker.featurize(**arguments)
    assert not traker.store.train(0).done.any()


def test_an_empty_batch_changes_nothing(tmp_path: Path) -> None:
    """As a share of a loader's batches may be, in featurizing and scoring, and between batches that go on."""
    expected = run(build(tmp_path / "without")).copy()
    empty = [x[:0] for x in TRAIN]
    traker = build(tmp_path / "with")
    for model_id, state in enumerate(CHECKPOINTS):
        traker.load_checkpoint(state, model_id)
        traker.featurize(empty, num_samples=0)
        traker.featurize([x[:5] for x in TRAIN], num_samples=5)
        for nothing in (empty, []):
            traker.featurize(nothing, inds=[])
            traker.featurize(nothing, inds=torch.zeros(0, dtype=torch.int64))
            traker.featurize(nothing, num_samples=0)
        traker.featurize([x[5:] for x in TRAIN], num_samples=N - 5)
    traker.finalize_features()
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, num_targets=M)
        traker.score(empty, inds=[])
        traker.score(TARGETS, num_samples=M)
        traker.score(empty, num_samples=0)
    np.testing.assert_allclose(traker.finalize_scores("test"), expected, rtol=1e-5, atol=1e-7)


def test_more_samples_than_the_training_set_has_are_refused(tmp_path: Path) -> None:
    traker = build(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    with pytest.raises(ValueError, match=r"samples 12 to 13 are not all in \[0, 12\)"):
        traker.featurize([x[:2] for x in TRAIN], num_samples=2)


def featurized(save_dir: Path, samples: int = N) -> TRAKer:
    """Makes a run that has featurized the first samples of checkpoint 0."""
    traker = build(save_dir)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize([x[:samples] for x in TRAIN], num_samples=samples)
    return traker


@pytest.fixture
def finalized(tmp_path: Path) -> TRAKer:
    """Makes a run whose features of checkpoint 0 are final."""
    traker = featurized(tmp_path)
    traker.finalize_features()
    return traker


def test_features_need_a_checkpoint(tmp_path: Path) -> None:
    traker = build(tmp_path)
    with pytest.raises(RuntimeError, match="call load_checkpoint before featurize"):
        traker.featurize(TRAIN, num_samples=N)
    with pytest.raises(ValueError, match="no checkpoints"):
        traker.finalize_features()
    with pytest.raises(ValueError, match=r"model_ids \[0\] were never loaded"):
        traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=M)


def test_missing_samples_are_named(tmp_path: Path) -> None:
    traker = featurized(tmp_path, 5)
    with pytest.raises(ValueError, match=r"model_ids \[7\] were never loaded .* has \[0\]"):
        traker.finalize_features([0, 7])
    with pytest.raises(
        RuntimeError, match=r"7 of 12 training samples of model_id 0 are not featurized: 5, 6, 7, 8, 9, \.\.\."
    ):
        traker.finalize_features()


def test_scores_need_final_features(tmp_path: Path) -> None:
    traker = featurized(tmp_path, 5)
    for call in (
        traker.self_influence,
        lambda: traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=M),
    ):
        with pytest.raises(RuntimeError, match=r"model_ids \[0\] are not finalized; call finalize_features first"):
            call()
    with pytest.raises(RuntimeError, match="call load_checkpoint before featurize"):
        traker.featurize(TRAIN, num_samples=N)  # start_scoring_checkpoint ended it


def test_targets_need_an_experiment(finalized: TRAKer) -> None:
    with pytest.raises(RuntimeError, match="call start_scoring_checkpoint before score"):
        finalized.score(TARGETS, num_samples=M)
    with pytest.raises(ValueError, match="'test' has no targets for model_id 0"):
        finalized.finalize_scores("test")


def test_experiments_need_a_number_of_targets_the_same_weights_and_a_file_name(finalized: TRAKer) -> None:
    with pytest.raises(ValueError, match=r"num_targets must be in \[1, 2\*\*48\]"):
        finalized.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=0)
    with pytest.raises(ValueError, match=r"model_id 0 .* belong to other weights"):
        finalized.start_scoring_checkpoint("test", CHECKPOINTS[1], 0, num_targets=M)
    with pytest.raises(ValueError, match="exp_name must be a file name"):
        finalized.start_scoring_checkpoint("../test", CHECKPOINTS[0], 0, num_targets=M)


def test_scores_need_all_targets(finalized: TRAKer) -> None:
    finalized.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=M)
    finalized.score([x[:3] for x in TARGETS], num_samples=3)
    with pytest.raises(RuntimeError, match="1 of 4 targets of exp_name 'test' are not scored for model_id 0: 3"):
        finalized.finalize_scores("test")
    with pytest.raises(ValueError, match="'test' has no checkpoint with all its targets"):
        finalized.finalize_scores("test", allow_skip=True)
    finalized.score([x[3:] for x in TARGETS], num_samples=1)
    assert np.isfinite(finalized.finalize_scores("test")).all()


def test_checkpoints_need_a_number_and_keep_their_weights(finalized: TRAKer) -> None:
    for model_id in (-1, 2**32):
        with pytest.raises(ValueError, match=r"model_id must be in \[0, 2\*\*32 - 1\]"):
            finalized.load_checkpoint(CHECKPOINTS[0], model_id)
    with pytest.raises(TypeError, match=r"model_id must be an integer, not float \(1\.0\)"):
        finalized.load_checkpoint(CHECKPOINTS[0], 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model_id 0 .* belong to other weights"):
        finalized.load_checkpoint(CHECKPOINTS[1], 0)


def test_checkpoints_without_targets_are_skipped_only_on_demand(tmp_path: Path) -> None:
    traker = build(tmp_path)
    run(traker)
    traker.start_scoring_checkpoint("half", CHECKPOINTS[0], 0, num_targets=M)
    traker.score(TARGETS, num_samples=M)
    with pytest.raises(ValueError, match="'half' has no targets for model_id 1"):
        traker.finalize_scores("half")
    skipped = traker.finalize_scores("half", allow_skip=True)
    assert (skipped == traker.finalize_scores("test", model_ids=[0])).all()
    traker.start_scoring_checkpoint("half", CHECKPOINTS[1], 1, num_targets=M - 1)
    traker.score([x[1:] for x in TARGETS], num_samples=M - 1)
    with pytest.raises(ValueError, match=r"numbers of targets that differ: \[3, 4\]"):
        traker.finalize_scores("half")
