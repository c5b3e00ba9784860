"""bergson 2.5's own gradients, projected with our `project_global`."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import needs
from projections import check, tolerance
from torch import Tensor

from trak_fast.compat import bergson as layer
from trak_fast.projection import reference

needs("bergson.hessians.apply_hessian")
import bergson.collector.collector as collector  # noqa: E402
import bergson.hessians.apply_hessian as apply_hessian  # noqa: E402
import datasets  # noqa: E402
from bergson.collector.in_memory_collector import InMemoryCollector  # noqa: E402
from bergson.config.config import IndexConfig  # noqa: E402
from bergson.gradients import GradientProcessor, OuterProductGradients  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # bergson's libraries about each other

KINDS = ["normal", "rademacher"]
NAME = "model.layers.0.mlp.up_proj/single/seed42"


def scaled_matrix(D: int, m: int, kind: str, scale: str, name: str = NAME) -> tuple[np.ndarray, np.ndarray]:
    """The matrix (m, D), and what bergson divides each of its rows by."""
    seed, model_id = layer.matrix_of(name)
    R = reference.matrix(kind, seed, model_id, range(m), range(D)).astype(np.float64)
    return R, np.linalg.norm(R, axis=1) if scale == "row_norm" else np.full(m, math.sqrt(m))


def expected(flat: Tensor, m: int, kind: str, scale: str, name: str = NAME) -> np.ndarray:
    R, norms = scaled_matrix(flat.shape[1], m, kind, scale, name)
    return flat.double().numpy() @ R.T / norms


def check_features(result: Tensor, flat: Tensor, kind: str, scale: str) -> None:
    """Within the bound of helpers/projections.py, which holds also where bfloat16 terms are multiplied."""
    m = result.shape[1]
    _, norms = scaled_matrix(flat.shape[1], m, kind, scale)
    errors = np.abs(result.double().numpy() - expected(flat, m, kind, scale))
    assert np.all(errors <= tolerance(flat) / norms), (errors * norms / tolerance(flat)).max()


@pytest.mark.parametrize("scale", ["jl", "row_norm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_a_module(kind: str, scale: str, dtype: torch.dtype) -> None:
    grads = torch.randn(6, 900).to(dtype)
    result = layer.project_global(NAME, grads, 48, kind, scale)
    assert (result.shape, result.dtype) == ((6, 48), torch.float32)
    check_features(result, grads, kind, scale)


def outer_products() -> dict[str, OuterProductGradients]:
    tokens = OuterProductGradients(g=torch.randn(7, 12), a=torch.randn(7, 9))
    examples = OuterProductGradients(g=torch.randn(5, 4, 12), a=torch.randn(5, 4, 9))
    column = torch.nn.functional.one_hot(torch.tensor(8), 9).float()
    return {
        "tokens": tokens,
        "examples": examples,
        "with a bias": replace(examples, bias=torch.randn(5, 12), bias_col=column),
        "normalized": replace(tokens, bias=torch.randn(7, 12), bias_col=column, divisor=torch.rand(12, 9) + 0.5),
    }


@pytest.mark.parametrize("slab", [1, 100, 1 << 26])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", outer_products())
def test_outer_products_in_slabs(case: str, kind: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    grads = outer_products()[case]
    monkeypatch.setattr(layer, "_SLAB", slab)
    result = layer.project_global(NAME, grads, 40, kind)
    check_features(result, grads.materialize().flatten(1), kind, "jl")


def test_bergson_s_collection_of_a_language_model(tmp_path: Path) -> None:
    """Its hooks on a small Llama: the global features are the sum of what the reference makes of each module."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    tokens = np.random.default_rng(0).integers(0, 50, (8, 12))
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist()})
    (tmp_path / "run.part").mkdir()

    def collect(projection_dim: int, target: str) -> dict[str, Tensor]:
        config = IndexConfig(run_path=str(tmp_path / "run"), projection_dim=projection_dim)
        processor = GradientProcessor(
            projection_dim=projection_dim or None, projection_target=target, projection_seed=7
        )
        hooks = InMemoryCollector(model=model.base_model, data=data, cfg=config, processor=processor)
        computer = collector.CollectorComputer(
            model=model, data=data, collector=hooks, batches=[[0, 1, 2], [3], [4, 5, 6, 7]], cfg=config
        )
        computer.run_with_collector_hooks()
        return hooks.gradients

    modules = collect(0, "per_module")
    assert len(modules) == 14
    own = collect(500, "global")["gradients"]
    before = collector.project_global
    with layer.patch():
        assert collector.project_global is apply_hessian.project_global is layer.project_global
        ours = collect(500, "global")["gradients"]
    assert collector.project_global is apply_hessian.project_global is before
    total = sum(
        expected(grads.reshape(8, -1), 500, "rademacher", "jl", f"{name}/single/seed7")
        for name, grads in modules.items()
    )
    bound = sum(tolerance(grads.reshape(8, -1)) for grads in modules.values()) / math.sqrt(500)
    check(ours, total, bound + 1e-6 * np.abs(total).max())
    exact = sum(grads.reshape(8, -1).double().square().sum(1) for grads in modules.values())
    for features in (own, ours):
        assert torch.all((features.double().square().sum(1) / exact - 1).abs() < 5 * math.sqrt(2 / 500))


@pytest.mark.parametrize("scale", ["jl", "row_norm"])
@pytest.mark.parametrize(("columns", "m"), [(900, 64), (16, 16), (5, 64), (2000, 16)])
def test_sjlt_beside_bergson_s_kinds(columns: int, m: int, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without an entry stay 0; with norms of rows, others are divided by theirs."""
    monkeypatch.setattr(layer, "_SLAB", 7 * 100)
    grads = OuterProductGradients(g=torch.randn(4, 1, columns), a=torch.ones(4, 1, 1))
    flat = grads.materialize().flatten(1)
    nonzeros = 4 if m == 64 else 1
    seed, model_id = layer.matrix_of(NAME)
    R = reference.matrix("sjlt", seed, model_id, range(m), range(columns), m, nonzeros).astype(np.float64)
    norms = np.linalg.norm(R, axis=1)
    divisors = np.where(norms == 0, 1, norms) if scale == "row_norm" else np.sqrt(nonzeros)
    for given in (flat, grads):
        result = layer.project_global(NAME, given, m, "sjlt", scale)
        np.testing.assert_allclose(result.numpy(), flat.double().numpy() @ R.T / divisors, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_kept_as_well_as_with_bergson_s_matrix(kind: str) -> None:
    """‖Rg‖²/‖g‖² over many gradients: mean 1 and standard deviation √(2/m), both within 5 standard errors."""
    m, count = 64, 2000
    grads = torch.randn(1, 800)
    ratios = {
        name: np.array(
            [
                float((project(f"module{n}/single", grads, m, kind) ** 2).sum() / grads.square().sum())
                for n in range(count)
            ]
        )
        for name, project in [("ours", layer.project_global), ("bergson's", collector.project_global)]
    }
    spread = math.sqrt(2 / m)
    for values in ratios.values():
        assert abs(values.mean() - 1) < 5 * spread / math.sqrt(count)
        assert abs(values.std() / spread - 1) < 5 * math.sqrt((1 + 12 / m) / (2 * count))  # χ² has some excess kurtosis


def test_identifiers_name_matrices() -> None:
    grads = torch.randn(2, 100)
    results = [layer.project_global(name, grads, 10) for name in ("a/single", "b/single", "a/left", "a/single/seed1")]
    for n, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:n])
    with pytest.raises(ValueError, match="projection_scale must be one of 'jl', 'row_norm', not 'none'"):
        layer.project_global("a", grads, 10, projection_scale="none")
    with pytest.raises(ValueError, match="proj_type must be one of 'rademacher', 'normal', 'sjlt', not 'sparse'"):
        layer.project_global("a", grads, 10, "sparse")
