"""traker 0.3.2 itself, run with our projectors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs
from numpy.typing import NDArray
from projections import check, tolerance
from retrained import network, retrained

import trak_fast
from trak_fast.compat import traker as layer
from trak_fast.metrics import lds
from trak_fast.projection import reference

needs("trak")
import trak  # noqa: E402
import trak.projectors  # noqa: E402
import trak.traker  # noqa: E402

K = 128


def scores(save_dir: Path, seed: int, **options: Any) -> NDArray[np.float32]:
    """traker's loops, as its users write them."""
    data = retrained()
    traker = trak.TRAKer(
        model=network(), task="image_classification", train_set_size=len(data.train[1]), save_dir=str(save_dir),
        device="cpu", proj_dim=K, use_half_precision=False, projector_seed=seed, logging_level=100, **options,
    )  # fmt: skip
    for model_id, checkpoint in enumerate(data.checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch in zip(*(x.split(100) for x in data.train), strict=True):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(data.checkpoints):
        traker.start_scoring_checkpoint("test", checkpoint, model_id=model_id, num_targets=len(data.targets[1]))
        traker.score(batch=data.targets, num_samples=len(data.targets[1]))
    return np.array(traker.finalize_scores(exp_name="test"))


def quality(scores: NDArray[np.float32]) -> float:
    data = retrained()
    return lds(scores, data.masks, data.outputs).mean


def test_scores_are_as_good_as_with_traker_s_own_projector(tmp_path: Path) -> None:
    """The LDS of either projector scatters with its seed; means over seeds differ by less than 4 standard errors."""
    seeds = range(6)
    own = np.array([quality(scores(tmp_path / f"own{seed}", seed)) for seed in seeds])
    grad_dim = sum(parameter.numel() for parameter in network().parameters())
    ours = {
        kind: np.array(
            [
                quality(
                    scores(tmp_path / f"{kind}{seed}", seed, projector=trak_fast.Projector(grad_dim, K, seed, kind))
                )
                for seed in seeds
            ]
        )
        for kind in ("normal", "rademacher")
    }
    ours["sjlt"] = np.array(
        [
            quality(
                scores(tmp_path / f"sjlt{seed}", seed, projector=layer.BasicProjector(grad_dim, K, seed, "sjlt", "cpu"))
            )
            for seed in seeds
        ]
    )
    with layer.patch():
        ours["patched"] = np.array([quality(scores(tmp_path / f"patched{seed}", seed)) for seed in seeds])
    assert own.mean() > 0.1  # by chance 0 ± 0.02
    for values in ours.values():
        error = np.sqrt((own.var(ddof=1) + values.var(ddof=1)) / len(seeds))
        assert abs(values.mean() - own.mean()) < 4 * error
        assert 0.25 < values.std(ddof=1) / own.std(ddof=1) < 4


def test_projector_is_taken_as_it_is(tmp_path: Path) -> None:
    """The features that traker stores are those of the reference, divided by √D."""
    data = retrained()
    grad_dim = sum(parameter.numel() for parameter in network().parameters())
    traker = trak.TRAKer(
        model=network(), task="image_classification", train_set_size=40, save_dir=str(tmp_path), device="cpu",
        projector=trak_fast.Projector(grad_dim, K, seed=5), use_half_precision=False, logging_level=100,
    )  # fmt: skip
    traker.load_checkpoint(data.checkpoints[0], model_id=7)
    batch = [x[:40] for x in data.train]
    traker.featurize(batch=batch, num_samples=40)
    grads = traker.gradient_computer.compute_per_sample_grad(batch=batch)
    flat = torch.cat([g.detach().flatten(1) for g in grads.values()], 1)
    expected = reference.project(flat.double().numpy(), K, "rademacher", 5, 7) / np.sqrt(grad_dim)
    stored = torch.from_numpy(np.array(traker.saver.current_store["grads"]))
    check(stored, expected, tolerance(flat) / np.sqrt(grad_dim) + 1e-6 * np.abs(expected))
    traker.finalize_features()
    again = trak.TRAKer(  # the folder is taken up again: the same kind and size
        model=network(), task="image_classification", train_set_size=40, save_dir=str(tmp_path), device="cpu",
        projector=trak_fast.Projector(grad_dim, K, seed=5), use_half_precision=False, logging_level=100,
    )  # fmt: skip
    assert list(again.saver.model_ids) == [7]


def test_patch_reaches_names_that_were_imported_before_and_is_undone() -> None:
    names = ["BasicProjector", "CudaProjector", "ChunkedCudaProjector"]
    before = [getattr(trak.projectors, name) for name in names]
    with layer.patch() as patch:
        assert layer.patch() is patch
        for module in (trak.projectors, trak.traker):
            assert [getattr(module, name) for name in names] == [getattr(layer, name) for name in names]
        assert isinstance(layer.BasicProjector(5, 4, 0, "normal", "cpu"), trak.projectors.AbstractProjector)
    for module in (trak.projectors, trak.traker):
        assert [getattr(module, name) for name in names] == before


def test_projectors_keep_traker_s_signature() -> None:
    grads = {"w": torch.randn(5, 3, 4), "b": torch.randn(5)}
    flat = torch.cat([grads["w"].flatten(1), grads["b"].unsqueeze(1)], 1)
    dense = [kind for kind in layer.ProjectionType if kind != "sjlt"]
    for kind in (*dense, *trak.projectors.ProjectionType, "normal", "rademacher"):
        projector = layer.CudaProjector(
            grad_dim=13, proj_dim=20, seed=np.int64(-3), proj_type=kind, device="cpu", max_batch_size=32,
            dtype=torch.float16,
        )  # fmt: skip
        expected = trak_fast.project(flat, 20, proj_type=str(getattr(kind, "value", kind)), seed=2**64 - 3, model_id=1)
        for given in (grads, flat, flat.requires_grad_()):
            result = projector.project(given, model_id=np.int64(1))
            torch.testing.assert_close(result, expected)
            assert result.dtype == torch.float32
            assert not result.requires_grad
        flat = flat.detach()
        assert (projector.proj_dim, projector.grad_dim, projector.proj_type) == (20, 13, getattr(kind, "value", kind))
    assert not torch.equal(projector.project(flat, 0), projector.project(flat, 1))
    assert torch.equal(projector.project(flat, -1), projector.project(flat, 2**32 - 1))


@pytest.mark.parametrize("kind", ["sjlt", layer.ProjectionType.sjlt])
@pytest.mark.parametrize(("k", "nonzeros"), [(16, 1), (128, 1), (128, 4)])
def test_sjlt_is_as_large_as_the_dense_kinds(kind: str, k: int, nonzeros: int) -> None:
    """So that a ridge that is a number keeps its meaning: E‖Pg‖² = k ‖g‖²."""
    given = {} if nonzeros == 1 else {"nonzeros": nonzeros}
    projector = layer.BasicProjector(grad_dim=300, proj_dim=k, seed=-3, proj_type=kind, device="cpu", **given)
    P = reference.matrix("sjlt", 2**64 - 3, 7, range(k), range(300), k, nonzeros) * np.sqrt(k / nonzeros)
    grads, y = torch.randn(5, 300), torch.randn(4, k)
    close = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(projector.project(grads, 7), grads.double().numpy() @ P.T, **close)
    np.testing.assert_allclose(projector.adjoint(y, 7), y.double().numpy() @ P, **close)
    total = projector.accumulator(5, 7)
    for first in (0, 100, 200):
        total.add(grads[:, first : first + 100], offset=first)
    np.testing.assert_allclose(total.result(), grads.double().numpy() @ P.T, **close)
    chunks = [layer.BasicProjector(150, k, seed, kind, "cpu", **given) for seed in (1, 2)]
    chunked = layer.ChunkedCudaProjector(chunks, 150, [150, 150], 5, "cpu", torch.float32)
    seed = 0x9E3779B97F4A7C15 + 2
    P = reference.matrix("sjlt", seed, 0, range(k), range(300), k, nonzeros) * np.sqrt(k / nonzeros)
    np.testing.assert_allclose(chunked.project(grads, 0), grads.double().numpy() @ P.T, **close)


def test_chunks_become_one_projection() -> None:
    """As TRAKer makes it for a large model on CUDA, with seeds from numpy."""
    sizes = [12, 7]
    seeds = np.random.default_rng(0).integers(low=0, high=500, size=2)
    chunks = [
        layer.CudaProjector(
            grad_dim=size, proj_dim=20, seed=seed, proj_type=layer.ProjectionType.rademacher, max_batch_size=32,
            dtype=torch.float16, device="cpu",
        )
        for size, seed in zip(sizes, seeds, strict=True)
    ]  # fmt: skip
    projector = layer.ChunkedCudaProjector(chunks, 12, sizes, 32, "cpu", torch.float16)
    grads = {"w": torch.randn(5, 3, 4), "v": torch.randn(5, 6), "b": torch.randn(5)}
    flat = torch.cat([g.reshape(5, -1) for g in grads.values()], 1)
    seed = (int(seeds[0]) * 0x9E3779B97F4A7C15 + int(seeds[1])) % 2**64
    expected = reference.project(flat.double().numpy(), 20, "rademacher", seed, 3)
    result = projector.project(grads, model_id=3)
    check(result, expected, tolerance(flat))
    projector.free_memory()
    assert torch.equal(projector.project(grads, model_id=3), result)
    swapped = layer.ChunkedCudaProjector(chunks[::-1], 12, sizes[::-1], 32, "cpu", torch.float16)
    assert not torch.equal(swapped.project(grads, model_id=3), result)
