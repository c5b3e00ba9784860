"""The module of the package sjlt: against the reference, and in the place of a module of that name."""

import copy
import io
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from trak_fast.compat import sjlt as layer
from trak_fast.compat.sjlt import SJLTProjection
from trak_fast.projection import reference


def matrix(module: SJLTProjection) -> np.ndarray:
    k, D, c = module.proj_dim, module.original_dim, module.c
    P = reference.matrix("sjlt", module.seed, 0, range(k), range(D), k, c)
    return P.astype(np.float64) / np.sqrt(c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "c"), [(16, 1), (128, 4), (64, 2), (128, 8)])
def test_projection_and_transpose(k: int, c: int, dtype: torch.dtype) -> None:
    module = SJLTProjection(300, k, c, seed=2**64 - 5)
    S = matrix(module)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    for given, apply, expected in (
        (torch.randn(5, 300).to(dtype), module, S.T),
        (torch.randn(300, 5).to(dtype).T, module, S.T),
        (torch.randn(4, k).to(dtype), module.transpose, S),
        (torch.randn(4, k).to(dtype).requires_grad_(), module.transpose, S),
    ):
        result = apply(given)
        assert result.dtype == dtype
        assert not result.requires_grad
        exact = given.detach().double().numpy() @ expected
        np.testing.assert_allclose(result.double().numpy(), exact, rtol=rounding, atol=2e-5)
        assert torch.equal(apply(given), result)
    assert module.get_compression_ratio() == 300 / k
    assert module.get_sparsity_ratio() == np.mean(S == 0)
    assert (module.normalization_factor, module.device) == (1 / np.sqrt(c), torch.device("cpu"))


def test_norms_are_kept() -> None:
    """‖Sx‖²/‖x‖² over 400 matrices: mean 1 within 5 standard errors, which are at most √(2/k/400)."""
    x = torch.randn(1, 500)
    for c in (1, 4):
        ratios = [float(SJLTProjection(500, 64, c)(x).square().sum() / x.square().sum()) for _ in range(400)]
        assert abs(np.mean(ratios) - 1) < 5 * np.sqrt(2 / 64 / 400)


def test_seeds_are_drawn_as_torch_s_numbers_are() -> None:
    torch.manual_seed(3)
    first, second = SJLTProjection(100, 16), SJLTProjection(100, 16)
    torch.manual_seed(3)
    assert SJLTProjection(100, 16).seed == first.seed != second.seed
    state = torch.get_rng_state()
    given = SJLTProjection(100, 16, seed=np.int64(first.seed))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 100)
    assert torch.equal(given(x), first(x))
    assert not torch.equal(second(x), first(x))


def test_torch_s_default_device_does_not_matter() -> None:
    torch.manual_seed(5)
    expected = SJLTProjection(100, 64, device="cpu").seed
    torch.manual_seed(5)
    with torch.device("meta"):
        assert SJLTProjection(100, 64, device="cpu").seed == expected


def test_the_matrix_is_in_the_state() -> None:
    first, other = (SJLTProjection(100, 64, 4, seed=seed) for seed in (2**64 - 1, 2))
    x = torch.randn(3, 100)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), first(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        first.load_state_dict({})
    for wrong in (SJLTProjection(99, 64, 4), SJLTProjection(100, 64, 2)):
        with pytest.raises(ValueError, match=r"must be that of the state_dict, (100|4), not (99|2)"):
            wrong.load_state_dict(first.state_dict())


def test_a_module_of_that_name_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sjlt 0.1.7 is built, with a user who has imported its class before."""
    own, core, user = type("SJLTProjection", (), {}), types.ModuleType("sjlt.core"), types.ModuleType("user")
    module = types.ModuleType("sjlt")
    module.SJLTProjection = core.SJLTProjection = user.Projection = own  # type: ignore[attr-defined]
    for each in (module, core, user):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    with layer.patch() as patch:
        assert layer.patch() is patch
        assert module.SJLTProjection is core.SJLTProjection is user.Projection is SJLTProjection
        projection = user.Projection(1024, 128, 4, threads=512, fixed_blocks=84, device="cpu")
        assert projection(torch.randn(100, 1024)).shape == (100, 128)
    assert module.SJLTProjection is core.SJLTProjection is user.Projection is own


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"c": 3}, ValueError, "c must be one of 1, 2, 4, 8, not 3"),
        ({"c": 16}, ValueError, "c must be one of 1, 2, 4, 8, not 16"),
        ({"c": 2.0}, TypeError, "c must be an integer, not float"),
        ({"proj_dim": 100}, ValueError, "not 100; near it with nonzeros=1: 64 and 128; the dense kinds take any"),
        ({"proj_dim": 0}, ValueError, "proj_dim must be in"),
        ({"original_dim": 0}, ValueError, "original_dim must be in"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": "1"}, TypeError, "seed must be an integer, not str"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SJLTProjection(**{"original_dim": 300, "proj_dim": 64, **arguments})


def test_inputs_that_are_refused() -> None:
    module = SJLTProjection(300, 64)
    with pytest.raises(ValueError, match="grads has 299 columns, but grad_dim is 300"):
        module(torch.zeros(2, 299))
    with pytest.raises(ValueError, match="two dimensions"):
        module(torch.zeros(300))
    with pytest.raises(ValueError, match="y has 63 columns, but proj_dim is 64"):
        module.transpose(torch.zeros(2, 63))
    with pytest.raises(ValueError, match="two dimensions"):
        module.transpose(torch.zeros(64))
    for apply in (module, module.transpose):
        with pytest.raises(TypeError, match="must be a tensor, not ndarray"):
            apply(np.zeros((2, 300)))
        with pytest.raises(TypeError, match="must have one of the dtypes"):
            apply(torch.zeros(2, 300, dtype=torch.int64))
    for name in ("rand_indices", "rand_signs"):
        with pytest.raises(AttributeError, match=rf"has no {name}: it stores no matrix\. .*compat\.dattri\.patch"):
            getattr(module, name)


def test_modules_are_compiled_whole() -> None:
    module = SJLTProjection(300, 64, 4, seed=1)
    x, y = torch.randn(5, 300), torch.randn(5, 64)
    for apply, given in ((module, x), (module.transpose, y)):
        compiled = torch.compile(apply, fullgraph=True, backend="eager")
        assert torch.equal(compiled(given), apply(given))
