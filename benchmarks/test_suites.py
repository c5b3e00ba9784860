"""Benchmarks to watch while the code changes: kernels, packing, featurizing, solving and top-k scores.

    pytest -n 0 benchmarks/test_suites.py [--benchmark-save NAME] [--benchmark-compare]

Needs pytest-benchmark, which times nothing in pytest's workers. Every case checks its result before it is timed, so a
fast wrong answer is a failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trak_fast
from trak_fast.gradients import FunctionalGradientComputer, HookGradientComputer
from trak_fast.projection import reference
from trak_fast.scales import joined
from trak_fast.scoring import solver
from trak_fast.scoring.gram import gram_matrix

pytest.importorskip("pytest_benchmark")

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
ISAS = trak_fast.info()["instruction_sets"]
K = 1024


def synchronized(call: Any, device: str) -> Any:
    """Makes a call that returns only when its work on the device is done."""

    def run() -> Any:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def expected(grads: torch.Tensor, kind: str) -> torch.Tensor:
    """Computes the first eight projected values from the definition."""
    entries = reference.matrix(kind, 0, 0, range(8), range(grads.shape[1]))
    return grads.double().cpu() @ torch.from_numpy(entries).double().T


def check(result: torch.Tensor, grads: torch.Tensor, kind: str) -> None:
    """Compares a result with float64, within the rounding of float32 sums."""
    wanted = expected(grads, kind)
    assert float((result[:, :8].double().cpu() - wanted).norm() / wanted.norm()) < 2e-5


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_cpu(benchmark: Any, monkeypatch: pytest.MonkeyPatch, isa: str, batch: int, kind: str) -> None:
    """Projects bfloat16 gradients with each instruction set."""
    benchmark.group = f"kernel, {kind}, B = {batch}"
    monkeypatch.setenv("TRAK_FAST_ISA", isa)
    grads = torch.randn(batch, 1 << 15).bfloat16()
    check(benchmark(trak_fast.project, grads, K, proj_type=kind), grads, kind)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("device", [CUDA])
def test_kernel_cuda(benchmark: Any, device: str, batch: int, kind: str) -> None:
    """Projects bfloat16 gradients on a CUDA device."""
    benchmark.group = f"kernel, {kind}, B = {batch}"
    grads = torch.randn(batch, 1 << 20, device=device).bfloat16()
    project = synchronized(lambda: trak_fast.project(grads, K, proj_type=kind), device)
    check(benchmark(project), grads, kind)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second", "tensors of layers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_packing(benchmark: Any, dtype: str, layout: str) -> None:
    """Projects gradients to few numbers, so that most of the time goes into reading and packing them."""
    benchmark.group = f"packing, {dtype}"
    flat = torch.randn(64, 1 << 17).to(getattr(torch, dtype))
    grads: Any = flat
    if layout == "transposed":
        grads = flat.T.contiguous().T
    elif layout == "every second":
        grads = torch.stack([flat, flat], -1)[..., 0]
    elif layout == "tensors of layers":
        grads = {str(i): part for i, part in enumerate(flat.split(1000, 1))}
    check(benchmark(trak_fast.project, grads, 16), flat, "rademacher")


@pytest.mark.parametrize("computer", [None, FunctionalGradientComputer, HookGradientComputer])
def test_featurize(benchmark: Any, tmp_path: Path, computer: Any) -> None:
    """Takes a batch to its rows on disk: gradients, projection, weightings, X'X."""
    benchmark.group = "featurize"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    batch = [torch.randn(32, 64), torch.randint(10, (32,))]
    options: dict[str, Any] = {"proj_dim": K, "logging_level": 40, "load_from_save_dir": False}
    options |= {"gradient_computer": computer}
    size = 32 * 4096
    traker = trak_fast.TRAKer(model, "image_classification", size, tmp_path, **options)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    done = 0

    def featurize() -> None:
        nonlocal done
        traker.featurize(batch, num_samples=32)
        done += 32

    benchmark.pedantic(featurize, rounds=40, warmup_rounds=2)
    rows = traker.store.train(0)
    assert int(rows.done.sum()) == done
    images, labels = (x[:4] for x in batch)
    features = torch.from_numpy(np.array(rows.features[done - 32 :][:4]))
    check(features, margin_gradients(model, images, labels), "rademacher")


def margin_gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes gradients (B, D) sample by sample, of the label's logit minus the logsumexp of the other logits."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        logits = model(image)
        others = torch.cat([logits[:label], logits[label + 1 :]])
        gradient = torch.autograd.grad(logits[label] - others.logsumexp(0), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(rows)


@pytest.mark.parametrize(("samples", "width"), [(8192, K), (512, K)])
def test_solve(benchmark: Any, samples: int, width: int) -> None:
    """Computes X'X, its factor, and the coefficients of 64 targets."""
    benchmark.group = "solve"
    rng = np.random.default_rng(0)
    features, targets = (rng.standard_normal((rows, width), dtype=np.float32) for rows in (samples, 64))
    x = features.astype(np.float64)
    ridge = float((x**2).sum()) / samples

    def solve() -> torch.Tensor:
        gram = gram_matrix(features, torch.device("cpu"))
        return joined(solver.Solver(features, gram, ridge).solve(targets))

    result = benchmark(solve).numpy()
    wanted = np.linalg.solve(x.T @ x + ridge * np.eye(width), targets.astype(np.float64).T)
    np.testing.assert_allclose(result, wanted if samples >= width else x @ wanted, atol=1e-4 * np.abs(wanted).max())


def test_top_scores(benchmark: Any, tmp_path: Path) -> None:
    """Computes the 100 highest scores of each target, without the score matrix."""
    benchmark.group = "top-k"
    torch.manual_seed(0)
    model = nn.Linear(32, 10).eval()
    samples = 4096
    targets = 64
    traker = trak_fast.TRAKer(model, "image_classification", samples, tmp_path, proj_dim=256, logging_level=40)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize([torch.randn(samples, 32), torch.randint(10, (samples,))], num_samples=samples)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), model_id=0, num_targets=targets)
    traker.score([torch.randn(targets, 32), torch.randint(10, (targets,))], num_samples=targets)
    top = benchmark(lambda: traker.top_scores("test", 100))
    scores = np.sort(np.asarray(traker.finalize_scores("test")), axis=0)[::-1][:100].T
    np.testing.assert_allclose(top.scores, scores, rtol=1e-4, atol=1e-6 * np.abs(scores).max())
