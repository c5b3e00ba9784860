"""Projections against a float64 product with the reference matrix, within the bound of helpers/projections.py."""

import functools
import itertools
import math
import os
from enum import Enum

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from projections import (
    BOTH_PANELS,
    DTYPES,
    ISAS,
    KINDS,
    MODEL_ID,
    SEED,
    SPLITS,
    STRIDES,
    check,
    check_layout,
    entries,
    integer_case,
    layout_cases,
    per_parameter_gradients,
    project,
    random,
    tolerance,
    zeros_without_memory,
)

import trak_fast
from trak_fast.projection import reference

BATCHES = [0, 1, 2, 15, 16, 17, 31, 33, 64, 100, 257]
GRAD_DIMS = [0, 1, 2, 31, 32, 33, 511, 512, 513, 1000, 4099]
PROJ_DIMS = [1, 2, 15, 16, 17, 31, 33, 100, 512, 1000]


@functools.cache
def shape_case(proj_type: str, grad_dim: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Gradients (257, D), their projections (257, 1000) and the bound; the cases below take leading parts of them."""
    grads = random(257, grad_dim)
    expected = grads.double().numpy() @ entries(proj_type)[:, :grad_dim].T
    return grads, expected, tolerance(grads)


@pytest.mark.parametrize("proj_type", KINDS)
def test_shapes(isa: str, proj_type: str) -> None:
    # All pairs of B and D and all pairs of B and k.
    cases = [(B, D, PROJ_DIMS[n % 10]) for n, (B, D) in enumerate(itertools.product(BATCHES, GRAD_DIMS))]
    cases += [(B, GRAD_DIMS[n % 11], k) for n, (B, k) in enumerate(itertools.product(BATCHES, PROJ_DIMS))]
    for B, D, k in cases:
        grads, expected, bound = shape_case(proj_type, D)
        check(project(grads[:B], k, proj_type), expected[:B, :k], bound[:B])


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
    proj_dim=st.integers(1, 150),
    offset=st.integers(0, 2099),
    first=st.integers(0, 31),
    dtype=st.sampled_from(DTYPES),
    precision=st.sampled_from(list(SPLITS)),
)
def test_odd_shapes(
    isa: str,
    proj_type: str,
    batch: int,
    grad_dim: int,
    proj_dim: int,
    offset: int,
    first: int,
    dtype: torch.dtype,
    precision: str | None,
) -> None:
    grads = random(batch, grad_dim + first, dtype=dtype)[:, first:]
    P = entries(proj_type)[:proj_dim, offset : offset + grad_dim]
    y = project(grads, proj_dim, proj_type, offset=offset, precision=precision)
    check(y, grads.double().numpy() @ P.T, tolerance(grads, precision))


@pytest.mark.parametrize("precision", SPLITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", KINDS)
def test_dtypes_and_precisions(isa: str, proj_type: str, dtype: torch.dtype, precision: str | None) -> None:
    offset = 2**41 - 1500
    # Rows of very different sizes, each held to its own bound.
    exponents = torch.arange(40) % 21 - 10
    grads = (random(40, 4099) * 2.0 ** (exponents if dtype == torch.float16 else 9 * exponents)[:, None]).to(dtype)
    expected = grads.double().numpy() @ entries(proj_type, offset, 100).T
    check(project(grads, 100, proj_type, offset=offset, precision=precision), expected, tolerance(grads, precision))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column_keeps_the_bits_of_its_precision(isa: str, dtype: torch.dtype) -> None:
    """With D = 1 nothing is summed but the terms of the split, so only the split's error is left."""
    # 3.4e38 lies above the largest bf16, 3.39e38, and must not become infinite. Cut to 8 bits, not rounded, it is
    # within 2^-7. Below 2^-100 the last terms of a split would leave bf16's range.
    largest = min(torch.finfo(dtype).max, 3.4e38)
    tiny = max(torch.finfo(dtype).tiny, 2.0**-100)
    x = torch.cat([random(500, dtype=dtype), torch.tensor([largest, -largest, tiny, -tiny, 0.0, 1.0], dtype=dtype)])
    sign = entries("rademacher", 0, 70)[:, :1].T
    for precision, (_, split) in SPLITS.items():
        if dtype in (torch.bfloat16, torch.float16):
            split = 0.0
        # Two rounded terms may add up to more than 24 bits, which costs a rounding; so does leaving float64.
        rounding = 2.0**-24 if split or dtype == torch.float64 else 0.0
        wide = x.double().numpy()[:, None]
        relative = np.where(np.abs(wide) > 3e38, 2 * split, split) + rounding
        check(project(x[:, None], 70, precision=precision), wide * sign, relative * np.abs(wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_small_integers_are_exact(isa: str, dtype: torch.dtype) -> None:
    """Integers of up to 8 bits are exact in every format, and so are their signed sums, which stay below 2^24."""
    grads, expected = integer_case()
    for precision in SPLITS:
        y = project(grads.to(dtype), 33, offset=2**32 - 35000, precision=precision)
        assert np.array_equal(y.double().numpy(), expected)


@pytest.mark.parametrize("proj_type", KINDS)
def test_many_columns(isa: str, proj_type: str) -> None:
    grads = random(5, 70001)
    expected = grads.double().numpy() @ entries(proj_type, 7, 33, 70001).T
    check(project(grads, 33, proj_type, offset=7), expected, tolerance(grads))


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize(("batch", "proj_dim"), [(1100, 40), (5, 33000)])
def test_many_samples_and_many_rows(isa: str, proj_type: str, batch: int, proj_dim: int) -> None:
    grads = random(batch, 700)
    expected = grads.double().numpy() @ entries(proj_type, 0, proj_dim, 700).T
    check(project(grads, proj_dim, proj_type, precision="highest"), expected, tolerance(grads, "highest"))


@pytest.mark.parametrize(
    ("isa", "layout", "dtype", "proj_type"), layout_cases(STRIDES, BOTH_PANELS, ISAS[1:-1]), indirect=["isa"]
)
def test_strides(isa: str, layout: str, dtype: torch.dtype, proj_type: str) -> None:
    check_layout(layout, dtype, proj_type)


def test_lazily_negated_tensor() -> None:
    """The imaginary part of a conjugate is a view whose memory holds the opposite signs."""
    grads = torch.complex(random(9, 600), random(9, 600, seed=1)).conj().imag
    assert grads.is_neg()
    check(
        project(grads, 40),
        -random(9, 600, seed=1).double().numpy() @ entries("rademacher")[:40, :600].T,
        tolerance(grads),
    )


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 35])
def test_per_parameter_tensors_act_as_their_concatenation(isa: str, proj_type: str, batch: int) -> None:
    grads = per_parameter_gradients(batch)
    flat = [g.detach().double().reshape(batch, math.prod(g.shape[1:])) for g in grads.values()]
    whole = torch.cat(flat, dim=1)
    expected = whole.numpy() @ entries(proj_type)[:50, 200 : 200 + whole.shape[1]].T
    for given_as in (dict, lambda items: list(dict(items).values()), lambda items: tuple(dict(items).values())):
        y = project(given_as(grads.items()), 50, proj_type, offset=200)
        check(y, expected, tolerance(whole))
    projector = trak_fast.Projector(whole.shape[1], 50, SEED, proj_type)
    expected = whole.numpy() @ entries(proj_type)[:50, : whole.shape[1]].T
    check(projector.project(grads, model_id=MODEL_ID), expected, tolerance(whole))


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("cuts", [[512], [1, 2, 3], [500, 1000, 1003], [16, 48, 2048, 4098]])
def test_parts_at_their_offsets_add_up(isa: str, proj_type: str, cuts: list[int]) -> None:
    grads = random(19, 4099)
    expected = grads.double().numpy() @ entries(proj_type)[:77].T
    bound = tolerance(grads)
    edges = [0, *cuts, 4099]
    projector = trak_fast.Projector(4099, 77, SEED, proj_type)
    accumulator = projector.accumulator(19, MODEL_ID)
    out = torch.ones(19, 77)
    for start, stop in itertools.pairwise(edges):
        accumulator.add(grads[:, start:stop], start)
        assert project(grads[:, start:stop], 77, proj_type, offset=start, out=out) is out
    check(accumulator.result(), expected, bound)
    # Each addition to an out near 1 rounds to 2^-24 of the partial sum, which the bound has room for but for the 1.
    check(out, expected + 1, bound + len(edges) * 2.0**-24)


def test_projector_keeps_the_contract_of_traker() -> None:
    class Kind(Enum):
        NORMAL = "normal"

    projector = trak_fast.Projector(
        grad_dim=600, proj_dim=np.int64(40), seed=np.uint64(SEED), proj_type=Kind.NORMAL, device="cpu"
    )
    assert (projector.grad_dim, projector.proj_dim, projector.seed) == (600, 40, SEED)
    grads = random(9, 600)
    expected = grads.double().numpy() @ entries("normal")[:40, :600].T
    first = projector.project(grads, model_id=MODEL_ID)
    check(first, expected, tolerance(grads))
    first.div_(2)  # traker divides what it got in place
    projector.free_memory()
    projector.free_memory()
    check(projector.project(grads, model_id=MODEL_ID), expected, tolerance(grads))


def test_default_dtype_and_device_of_torch_do_not_matter() -> None:
    grads = random(9, 600)
    expected = project(grads, 40)
    accumulator = trak_fast.Projector(600, 40, SEED, device="cpu").accumulator(9, MODEL_ID)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = project(grads, 40)
            nothing = accumulator.result()
            accumulator.add(grads, 0)
            total = accumulator.result()
    finally:
        torch.set_default_dtype(before)
    for result, value in [(y, expected), (nothing, torch.zeros(9, 40)), (total, expected)]:
        assert (result.dtype, result.device.type) == (torch.float32, "cpu")
        assert torch.equal(result, value)


def test_result_is_fresh_memory_of_its_own() -> None:
    grads = random(9, 600)
    before = grads.clone()
    results = [project(grads, 40) for _ in range(3)]
    assert len({y.untyped_storage().data_ptr() for y in results}) == 3
    assert all(y.is_contiguous() and y.device.type == "cpu" for y in results)
    assert torch.equal(grads, before)


@pytest.mark.parametrize("precision", SPLITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", KINDS)
def test_nonfinite_values_stay_in_their_row(
    isa: str, proj_type: str, dtype: torch.dtype, precision: str | None
) -> None:
    for batch in (4, 37):
        grads = random(batch, 1000, dtype=dtype)
        expected = grads.double().numpy() @ entries(proj_type)[:50, :1000].T
        bad = {0: math.inf, 2: math.nan, batch - 1: -math.inf}
        for row, value in bad.items():
            grads[row, 333 * row % 1000] = value
        y = project(grads, 50, proj_type, precision=precision)
        good = [row for row in range(batch) if row not in bad]
        assert not torch.isfinite(y[list(bad)]).any()
        check(y[good], expected[good], tolerance(grads[good], precision))


@pytest.mark.parametrize("strides", [(2**31 + 7, 1), (3, 2**30 + 1)])
def test_addresses_beyond_32_bits(isa: str, strides: tuple[int, int]) -> None:
    grads = zeros_without_memory(2**32 + 2**30).as_strided((3, 5), strides)
    grads.copy_(random(3, 5))
    check(project(grads, 40), grads.double().numpy() @ entries("rademacher")[:40, :5].T, tolerance(grads))


@pytest.mark.skipif(
    os.environ.get("TRAK_FAST_ISA") not in (None, trak_fast.info()["instruction_sets"][0]),
    reason="counting does not depend on the instruction set: the best one does it",
)
def test_more_columns_than_32_bits_count() -> None:
    grad_dim, offset = 2**32 + 700, 2**33 + 5
    grads = zeros_without_memory(grad_dim)
    columns = [0, 2**31, 2**32 - 1, 2**32, grad_dim - 1]
    values = torch.tensor([1.0, 2, 4, 8, 16])
    grads[columns] = values.bfloat16()
    P = reference.matrix("rademacher", SEED, MODEL_ID, range(8), [offset + column for column in columns])
    assert np.array_equal(project(grads[None], 8, offset=offset).numpy(), values.numpy()[None] @ P.T)
