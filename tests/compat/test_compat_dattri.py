"""dattri 0.3 itself, run with our projection."""

from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import needs
from numpy.typing import NDArray
from projections import check, tolerance
from retrained import network, retrained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trak_fast.compat import dattri as layer
from trak_fast.metrics import lds
from trak_fast.projection import reference

needs("dattri.algorithm.trak")
import dattri.algorithm.trak  # noqa: E402
import dattri.func.projection  # noqa: E402
from dattri.task import AttributionTask  # noqa: E402

K = 128


def scores(folder: Path, seed: int, proj_type: str = "normal") -> NDArray[np.float32]:
    """dattri's TRAK, as its documentation has it."""
    data, model = retrained(), network()
    files = []
    for number, checkpoint in enumerate(data.checkpoints):
        files.append(str(folder / f"{number}.pt"))
        torch.save(checkpoint, files[-1])

    def loss(params: dict[str, Tensor], sample: tuple[Tensor, Tensor]) -> Tensor:
        image, label = sample
        output = torch.func.functional_call(model, params, image.unsqueeze(0))
        return nn.functional.cross_entropy(output, label.unsqueeze(0))

    def logit(params: dict[str, Tensor], sample: tuple[Tensor, Tensor]) -> Tensor:
        p = torch.exp(-loss(params, sample))
        return torch.log(p / (1 - p))

    def probability(params: dict[str, Tensor], sample: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-loss(params, sample))

    attributor = dattri.algorithm.trak.TRAKAttributor(
        task=AttributionTask(loss_func=logit, model=model, checkpoints=files),
        correct_probability_func=probability,
        projector_kwargs={
            "proj_dim": K,
            "proj_max_batch_size": 32,
            "proj_seed": seed,
            "device": "cpu",
            "proj_type": proj_type,
        },
        device="cpu",
        regularization=1e-3,
    )
    attributor.cache(DataLoader(TensorDataset(*data.train), batch_size=100))
    with torch.no_grad():
        result = attributor.attribute(DataLoader(TensorDataset(*data.targets), batch_size=100))
    return result.numpy()


def test_scores_are_as_good_as_with_dattri_s_own_projector(tmp_path: Path) -> None:
    """The LDS of either projector scatters with its seed; means over seeds differ by less than 4 standard errors."""
    data, seeds = retrained(), range(4)
    own = np.array([lds(scores(tmp_path, seed), data.masks, data.outputs).mean for seed in seeds])
    before = dattri.func.projection.random_project
    with layer.patch():
        assert dattri.algorithm.trak.random_project is layer.random_project
        ours = {
            kind: np.array([lds(scores(tmp_path, seed, kind), data.masks, data.outputs).mean for seed in seeds])
            for kind in ("normal", "sjlt")
        }
    assert dattri.algorithm.trak.random_project is before is dattri.func.projection.random_project
    assert own.mean() > 0.1
    for values in ours.values():
        assert not np.array_equal(own, values)
        assert abs(values.mean() - own.mean()) < 4 * np.sqrt((own.var(ddof=1) + values.var(ddof=1)) / len(seeds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("proj_type", ["normal", "rademacher"])
def test_random_project(proj_type: str, dtype: torch.dtype) -> None:
    features = {"w": torch.randn(5, 7, 9).to(dtype), "b": torch.randn(5).to(dtype), "v": torch.randn(5, 3).to(dtype)}
    flat = torch.cat([f.reshape(5, -1) for f in features.values()], 1)
    exact = reference.project(flat.double().numpy(), 40, proj_type, 2**64 - 3, 2) / 40**0.5
    bound = tolerance(flat) / 40**0.5
    for given in (features, flat):
        project = layer.random_project(given, 5, 40, 16, proj_seed=-3, proj_type=proj_type, device="cpu")
        result = project(given, ensemble_id=2)
        assert (result.shape, result.dtype) == ((5, 40), dtype)
        rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
        assert np.all(np.abs(result.double().numpy() - exact) <= rounding * np.abs(exact) + bound)
        assert not torch.equal(project(given), result)  # ensemble 0


FEATURES = {"w": (5, 7, 9), "b": (5,), "v": (5, 3)}  # 67 columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "nonzeros"), [(16, 1), (32, 2), (64, 4), (512, 4)])
def test_sjlt_has_as_many_entries_as_fit(k: int, nonzeros: int, dtype: torch.dtype) -> None:
    features = {name: torch.randn(shape).to(dtype) for name, shape in FEATURES.items()}
    flat = torch.cat([f.reshape(5, -1) for f in features.values()], 1)
    P = reference.matrix("sjlt", 2**64 - 3, 2, range(k), range(67), k, nonzeros) / np.sqrt(nonzeros)
    exact = flat.double().numpy() @ P.T
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    kinds = dattri.func.projection.ProjectionType
    for given in (features, flat):
        for project in (
            layer.random_project(given, 5, k, 16, proj_seed=-3, proj_type="sjlt"),
            layer.make_random_projector([63, 1, 3], 5, k, 16, torch.device("cpu"), -3).project,  # the default
            layer.make_random_projector([67], 5, k, 16, "cpu", -3, kinds.sjlt).project,
        ):
            result = project(given, 2)
            assert result.dtype == dtype
            np.testing.assert_allclose(result.double().numpy(), exact, rtol=rounding, atol=2e-5)


@pytest.mark.parametrize(("name", "kept"), [("grass", 64), ("grass_2", 32), ("grass_100", 67)])
def test_grass_is_sjlt_of_some_columns(name: str, kept: int) -> None:
    """The matrix, seen by the identity: columns that are all 0, and those of a smaller sparse matrix in their order."""
    project = layer.random_project(torch.zeros(67, 67), 67, 16, 32, proj_seed=-3, proj_type=name)
    matrices = [project(torch.eye(67), ensemble).T.numpy() for ensemble in range(2)]
    for ensemble, found in enumerate(matrices):
        expected = reference.matrix("sjlt", 2**64 - 3, ensemble, range(16), range(kept), 16, 1)
        np.testing.assert_array_equal(found[:, found.any(axis=0)], expected)
    assert kept == 67 or not np.array_equal(matrices[0] == 0, matrices[1] == 0)
    again = layer.random_project(torch.zeros(5, 67), 5, 16, 32, proj_seed=-3, proj_type=name)
    features = {name: torch.randn(shape) for name, shape in FEATURES.items()}
    flat = torch.cat([f.reshape(5, -1) for f in features.values()], 1)
    for given in (features, flat):
        np.testing.assert_allclose(again(given, 1).numpy(), flat.numpy() @ matrices[1].T, rtol=0, atol=1e-5)
    mixed = {"first": flat[:, :60].half(), "second": flat[:, 60:]}
    result, wide = again(mixed, 1), again(torch.cat([mixed["first"].float(), mixed["second"]], 1), 1)
    assert torch.equal(result, wide.half())  # the dtype of the first, as for the other kinds
    with pytest.raises(ValueError, match="grads has 66 columns, but grad_dim is 67"):
        again(flat[:, 1:])


def test_grass_keeps_every_column_as_often() -> None:
    """Each of 100 columns is one of 64 kept ones, in 400 ensembles: within 5 standard deviations of 256."""
    project = layer.random_project(torch.zeros(100, 100), 100, 16, 32, proj_type="grass")
    counts = sum((project(torch.eye(100), ensemble) != 0).any(1).double() for ensemble in range(400))
    assert abs(counts - 256).max() < 5 * np.sqrt(400 * 0.64 * 0.36)


def test_grass_of_a_large_model_draws_no_more_than_it_keeps() -> None:
    """dattri permutes all columns, which would take 8 TB here."""
    ones = torch.ones(2, 1).expand(2, 10**12)
    result = layer.random_project(ones, 2, 64, 32, proj_type="grass_8")(ones)
    P = reference.matrix("sjlt", 0, 0, range(64), range(512), 64, 4) / 2
    np.testing.assert_allclose(result.numpy(), np.tile(P.sum(1), (2, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sjlt", 1000), r"proj_dim must be a power of two in \[16, 2\*\*23\] .* not 1000; 512 and 1024 are nearest"),
        (("sjlt", 5), "not 5; 16 is nearest, and the kinds 'rademacher' and 'normal' take any"),
        (("grass", 40), "not 40; 32 and 64 are nearest"),
        (("grass_0", 64), "grass_multiplier must be at least 1, not 0"),
        (("grass_x", 64), "proj_type must be 'grass' or 'grass_N' with an integer N, not 'grass_x'"),
        (("grass_\uff12", 64), "with an integer N, not 'grass_\uff12'"),
    ],
)
def test_sparse_kinds_that_are_refused(options: tuple[str, int], message: str) -> None:
    kind, k = options
    with pytest.raises(ValueError, match=message):
        layer.random_project(torch.zeros(5, 50), 5, k, 32, proj_type=kind)
    if message.endswith("nearest"):
        layer.random_project(torch.zeros(5, 50), 5, int(message.split()[-3]), 32, proj_type=kind)


def test_make_random_projector_as_dattri_calls_it() -> None:
    kinds = dattri.func.projection.ProjectionType
    projector = layer.make_random_projector(
        [30, 20], 5, 40, 32, torch.device("cpu"), proj_seed=np.int64(4), proj_type=kinds.rademacher, dtype=torch.float32
    )
    x = torch.randn(5, 50)
    expected = reference.project(x.double().numpy(), 40, "rademacher", 4, 1) / 40**0.5
    result = projector.project(x, 1)
    check(result, expected, tolerance(x) / 40**0.5 + 1e-6 * np.abs(expected))
    projector.free_memory()
    assert torch.equal(projector.project(x, ensemble_id=1), result)
    assert (projector.feature_dim, projector.proj_dim, projector.device) == (50, 40, torch.device("cpu"))


def test_other_kinds_are_dattri_s_own() -> None:
    x = torch.randn(5, 50)
    for patched in (False, True):
        own = dattri.func.projection.random_project(x, 5, 10, 32, 0, "random_mask")(x)
        if patched:
            with layer.patch():
                result = dattri.func.projection.random_project(x, 5, 10, 32, 0, "random_mask")(x)
                with pytest.raises(ValueError, match="Invalid proj_type"):
                    dattri.func.projection.random_project(x, 5, 10, 32, 0, "dense")
        else:
            result = layer.random_project(x, 5, 10, 32, 0, "random_mask")(x)
        assert torch.equal(result, own)
        assert set(result.flatten().tolist()) <= set(x.flatten().tolist())


def test_making_a_projector_makes_no_matrix() -> None:
    """dattri's TRAK makes one for each batch; here it would have 4e15 entries."""
    features = torch.zeros(1, 1).expand(32, 10**12)
    project = layer.random_project(features, 32, 4096, 32)
    with pytest.raises(ValueError, match="grads has 5 columns, but grad_dim is 1000000000000"):
        project(features[:, :5])
