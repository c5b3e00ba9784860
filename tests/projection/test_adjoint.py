"""The adjoint P'y against a float64 product with the reference matrix.

The bound is that of helpers/projections.py, with rows of P in the place of columns: n = k products are added in
float32, their sum stays below 6 ‖y‖, and each of the n roundings is at most 2^-24 of a partial sum, so all together at
most 36 √n 2^-24 ‖y‖. Inputs enter exactly but for float64, which is rounded to float32 first (2^-24).
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupted import interrupt
from projections import (
    DTYPES,
    ISAS,
    KINDS,
    MODEL_ID,
    SEED,
    check,
    entries,
    layout_cases,
    random,
    zeros_without_memory,
)

import trak_fast
from trak_fast import Projector
from trak_fast.projection import reference

BATCHES = [0, 1, 3, 4, 5, 12, 17, 33, 64, 129, 300]
GRAD_DIMS = [0, 1, 2, 31, 32, 33, 511, 512, 513, 2048, 4099]
PROJ_DIMS = [1, 2, 31, 32, 33, 127, 128, 129, 513, 1000]


def adjoint(y: torch.Tensor, grad_dim: int, proj_type: str = "rademacher", **options: Any) -> torch.Tensor:
    return trak_fast.project_adjoint(y, grad_dim, proj_type=proj_type, seed=SEED, model_id=MODEL_ID, **options)


def tolerance(y: torch.Tensor) -> np.ndarray:
    rounding = 6 * 2.0**-24 if y.dtype == torch.float64 else 0
    norm = y.detach().double().norm(dim=1, keepdim=True).numpy()
    return (rounding + 36 * math.sqrt(y.shape[1]) * 2.0**-24) * norm


@pytest.mark.parametrize("proj_type", KINDS)
def test_shapes(isa: str, proj_type: str) -> None:
    y = random(300, 1000)
    cases = [(B, D, PROJ_DIMS[n % 10]) for n, (B, D) in enumerate(itertools.product(BATCHES, GRAD_DIMS))]
    cases += [(B, GRAD_DIMS[n % 11], k) for n, (B, k) in enumerate(itertools.product(BATCHES, PROJ_DIMS))]
    for B, D, k in cases:
        part = y[:B, :k]
        expected = part.double().numpy() @ entries(proj_type)[:k, :D]
        check(adjoint(part, D, proj_type), expected, tolerance(part))


@pytest.mark.parametrize("proj_type", KINDS)
@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # isa is the same for all examples
)
@given(
    batch=st.integers(0, 70),
    grad_dim=st.integers(0, 2000),
    proj_dim=st.integers(1, 300),
    offset=st.integers(0, 2099),
    first=st.integers(0, 31),
    dtype=st.sampled_from(DTYPES),
)
def test_odd_shapes(
    isa: str, proj_type: str, batch: int, grad_dim: int, proj_dim: int, offset: int, first: int, dtype: torch.dtype
) -> None:
    y = random(batch, proj_dim + first, dtype=dtype)[:, first:]
    expected = y.double().numpy() @ entries(proj_type)[:proj_dim, offset : offset + grad_dim]
    check(adjoint(y, grad_dim, proj_type, offset=offset), expected, tolerance(y))


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("offset", [2**32 * 32 - 700, 2**32 * 512 - 700, 2**48 - 1400])
def test_high_columns(isa: str, proj_type: str, offset: int) -> None:
    """Looks where the block's number passes 32 bits, and at the end of the columns."""
    P = reference.matrix(proj_type, SEED, MODEL_ID, range(40), range(offset, offset + 1400)).astype(np.float64)
    y = random(5, 40)
    check(adjoint(y, 1400, proj_type, offset=offset), y.double().numpy() @ P, tolerance(y))


@pytest.mark.parametrize("proj_type", KINDS)
def test_more_rows_than_one_pass_takes(isa: str, proj_type: str) -> None:
    k = 2**15 + 700
    y = random(65, k)
    P = reference.matrix(proj_type, SEED, MODEL_ID, range(k), range(30, 70)).astype(np.float64)
    check(adjoint(y, 40, proj_type, offset=30), y.double().numpy() @ P, tolerance(y))


@pytest.mark.parametrize("proj_type", KINDS)
def test_one_hot_inputs_give_the_rows_of_the_matrix(isa: str, proj_type: str) -> None:
    rows = adjoint(torch.eye(600), 700, proj_type, offset=100)
    assert np.array_equal(rows.numpy(), entries(proj_type)[:600, 100:800])


def test_sums_of_small_integers_are_exact(isa: str) -> None:
    y = torch.randint(-128, 129, (33, 3000), generator=torch.Generator().manual_seed(1))
    P = reference.matrix("rademacher", SEED, MODEL_ID, range(3000), range(700))
    for dtype in DTYPES:
        assert np.array_equal(adjoint(y.to(dtype), 700).numpy(), y.numpy() @ P.astype(np.int64))


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_adjoint_of_the_projection(isa: str, proj_type: str, dtype: torch.dtype) -> None:
    """⟨Pg, y⟩ = ⟨g, P'y⟩, within what each side's roundings allow."""
    g, y = random(9, 3000, dtype=dtype), random(9, 170, dtype=dtype, seed=1)
    options = {"proj_type": proj_type, "seed": 3, "model_id": 4, "offset": 2**33 + 77}
    left = (trak_fast.project(g, 170, precision="highest", **options).double() * y.double()).sum(1)
    right = (trak_fast.project_adjoint(y, 3000, **options).double() * g.double()).sum(1)
    norms = g.double().norm(dim=1) * y.double().norm(dim=1)
    # errors of independent signs, weighted with the other side's vector: 6 ‖·‖ times each one's bound
    bound = 6 * 36 * 2.0**-24 * (math.sqrt(3 * 3000) + math.sqrt(170)) * norms
    assert torch.all((left - right).abs() <= bound)
    assert left.norm() > 100 * bound.norm()  # so a missing column would show


STRIDES = {
    "transposed": lambda dtype: random(600, 33, dtype=dtype).T,
    "every other row and third column": lambda dtype: random(66, 1800, dtype=dtype)[::2, ::3],
    "first element not aligned": lambda dtype: random(1 + 33 * 600, dtype=dtype)[1:].view(33, 600),
    "one row repeated": lambda dtype: random(1, 600, dtype=dtype).expand(33, 600),
    "one column repeated": lambda dtype: random(33, 1, dtype=dtype).expand(33, 600),
    "requires grad": lambda dtype: random(33, 600, dtype=dtype).requires_grad_(),
    "negated lazily": lambda dtype: torch.complex(random(33, 600), random(33, 600, seed=1)).conj().imag,
}


@pytest.mark.parametrize(
    ("isa", "layout", "dtype", "proj_type"), layout_cases(STRIDES, ISAS[:1], ISAS[1:]), indirect=["isa"]
)
def test_strides(isa: str, layout: str, dtype: torch.dtype, proj_type: str) -> None:
    y = STRIDES[layout](dtype)
    expected = y.detach().resolve_neg().double().numpy() @ entries(proj_type)[:600, 100:700]
    result = adjoint(y, 600, proj_type, offset=100)
    check(result, expected, tolerance(y.resolve_neg()))
    assert not result.requires_grad


def test_out_is_added_to_whatever_its_strides() -> None:
    y = random(5, 40)
    expected = adjoint(y, 600)
    memory = torch.zeros(1201, 16)
    out = memory[1:1201:2, 1:16:3].T
    for times in (1, 2):
        assert adjoint(y, 600, out=out) is out
        assert torch.equal(out, times * expected)
    out.zero_()
    assert not memory.any()  # nothing beside it was touched


@pytest.mark.parametrize("proj_type", KINDS)
def test_columns_are_the_same_however_they_are_cut(isa: str, proj_type: str) -> None:
    y = random(19, 300)
    whole = adjoint(y, 4099, proj_type)
    for start, stop in itertools.pairwise([0, 1, 500, 512, 2047, 4099]):
        assert torch.equal(adjoint(y, stop - start, proj_type, offset=start), whole[:, start:stop])


@pytest.mark.parametrize("proj_type", KINDS)
def test_same_bits_for_any_thread_count(isa: str, proj_type: str, restore_threads: None) -> None:
    y = random(33, 300)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(adjoint(y, 70001, proj_type))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("proj_type", KINDS)
def test_nonfinite_values_stay_in_their_row(isa: str, proj_type: str) -> None:
    for batch in (4, 37):
        y = random(batch, 300)
        expected = y.double().numpy() @ entries(proj_type)[:300, :1000]
        bad = {0: math.inf, 2: math.nan, batch - 1: -math.inf}
        for row, value in bad.items():
            y[row, 33 * row % 300] = value
        result = adjoint(y, 1000, proj_type)
        good = [row for row in range(batch) if row not in bad]
        assert not torch.isfinite(result[list(bad)]).any()
        check(result[good], expected[good], tolerance(y[good]))


def test_addresses_beyond_32_bits() -> None:
    y = zeros_without_memory(2**32 + 2**30).as_strided((3, 5), (2**31 + 7, 1))
    y.copy_(random(3, 5))
    check(adjoint(y, 40), y.double().numpy() @ entries("rademacher")[:5, :40], tolerance(y))


def test_projector() -> None:
    projector = Projector(600, 40, SEED, "normal")
    y = random(9, 40)
    check(projector.adjoint(y, MODEL_ID), y.double().numpy() @ entries("normal")[:40, :600], tolerance(y))
    with pytest.raises(ValueError, match="y has 41 columns, but proj_dim is 40"):
        projector.adjoint(random(9, 41))


def test_back_and_forth_is_an_unbiased_estimate() -> None:
    """E[P'P] = k I: the mean over many matrices of P'Pg / k is g, within 5 standard errors."""
    g, k, count = random(1, 50), 64, 200
    for proj_type in KINDS:
        sums = torch.zeros(1, 50, dtype=torch.float64)
        for model_id in range(count):
            options = {"proj_type": proj_type, "seed": 1, "model_id": model_id}
            sums += trak_fast.project_adjoint(trak_fast.project(g, k, **options), 50, **options).double() / k
        # an entry's variance is about (‖g‖² + g_j²) / k
        error = (sums / count - g).abs()
        assert torch.all(error < 5 * (2 * g.norm() ** 2 / k / count).sqrt())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", KINDS)
def test_on_cuda(proj_type: str, dtype: torch.dtype) -> None:
    y = random(33, 5000, dtype=dtype)[:, ::5]
    expected = y.double().numpy() @ entries(proj_type)[:1000, 100:4099]
    result = adjoint(y.cuda(), 3999, proj_type, offset=100)
    check(result.cpu(), expected, tolerance(y))
    leaf = random(33, 3999).cuda().requires_grad_()
    options = {"proj_type": proj_type, "seed": SEED, "model_id": MODEL_ID, "offset": 100}
    trak_fast.project(leaf, 1000, differentiable=True, **options).backward(y.float().cuda())
    check(leaf.grad.cpu(), expected, tolerance(y))


GOOD = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (TypeError, lambda: adjoint(GOOD.numpy(), 5), ["y", "ndarray"]),
        (TypeError, lambda: adjoint([GOOD], 5), ["y", "list"]),
        (ValueError, lambda: adjoint(torch.ones(4), 5), ["y", "(B, proj_dim)", "(4,)"]),
        (ValueError, lambda: adjoint(torch.ones(3, 0), 5), ["y", "at least 1", "(3, 0)"]),
        (TypeError, lambda: adjoint(GOOD.long(), 5), ["y", "int64", "float32"]),
        (TypeError, lambda: adjoint(GOOD.to("meta"), 5), ["y", "meta", "cpu"]),
        (TypeError, lambda: torch.func.vmap(lambda y: adjoint(y, 5))(torch.ones(2, 3, 4)), ["y", "vmap"]),
        (ValueError, lambda: adjoint(GOOD, -1), ["grad_dim", "-1"]),
        (TypeError, lambda: adjoint(GOOD, 5.0), ["grad_dim", "integer"]),
        (ValueError, lambda: adjoint(GOOD, 5, offset=2**48 - 4), ["offset + D", str(2**48 + 1)]),
        (ValueError, lambda: adjoint(GOOD, 5, "gaussian"), ["proj_type", "gaussian"]),
        (ValueError, lambda: adjoint(GOOD, 5, out=torch.zeros(3, 4)), ["out", "(B, grad_dim)", "(3, 5)"]),
        (TypeError, lambda: adjoint(GOOD, 5, out=torch.zeros(3, 5).double()), ["out", "float64"]),
        (ValueError, lambda: adjoint(GOOD, 4, out=GOOD), ["out", "shares", "y"]),
        (ValueError, lambda: adjoint(GOOD, 5, out=torch.zeros(3, 1).expand(3, 5)), ["out", "share memory"]),
    ],
)
def test_bad_input(error: type[Exception], call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


INTERRUPTED = """
import torch, trak_fast
out = torch.zeros(1, 1).expand(8, 2**34)
# allows an out of 2^34 columns in little memory
trak_fast.projection.checks.check_adjoint_out = lambda *arguments, **options: None
print("working", flush=True)
try:
    trak_fast.project_adjoint(torch.ones(8, 512), 2**34, out=out)
except KeyboardInterrupt:
    print("interrupted", float(trak_fast.project_adjoint(torch.ones(2, 1), 1).abs().sum()))
"""


def test_control_c_stops_a_long_adjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert interrupt(INTERRUPTED, tmp_path) == ("interrupted 2.0\n", 0)
