"""The sparse kind: its golden values, and projections against sums in float64 that are made one column at a time.

The bound. Every result is a sum of n_i signed gradients, one from each chunk of K columns. A gradient enters it by one
addition in its segment of 64 chunks, passes the additions of later chunks of the segment, and those of later segments.
So no gradient goes through more than h = min(64, chunks) + segments + 1 roundings, of at most 2^-24 of its size each
(and one more where float64 becomes float32): a result is within h · 2^-24 (1 + 2^-10) · Σ |g_j| over its columns.
"""

import functools
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from projections import (
    DTYPES,
    FORCED,
    ISAS,
    MODEL_ID,
    SEED,
    STRIDES,
    check,
    per_parameter_gradients,
    random,
    zeros_without_memory,
)

import trak_fast
from trak_fast.projection import reference

# k and c, with K from the least to more than what is staged at once, and every number of entries
SIZES = [(16, 1), (64, 4), (128, 8), (512, 1), (1024, 2), (512, 4), (8192, 8), (4096, 1), (32768, 4)]
BATCHES = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 19, 33, 70]
GRAD_DIMS = [0, 1, 15, 16, 17, 511, 512, 513, 1025, 4099, 9000]


def project(grads: object, proj_dim: int, nonzeros: int, **options: object) -> torch.Tensor:
    kind = {"proj_type": "sjlt", "nonzeros": nonzeros, "seed": SEED, "model_id": MODEL_ID}
    return trak_fast.project(grads, proj_dim, **kind, **options)  # type: ignore[arg-type]


def add_up(
    grads: NDArray[np.float64], proj_dim: int, nonzeros: int, offset: int = 0, with_signs: bool = True
) -> NDArray[np.float64]:
    """Computes P g for each row of (B, D), column by column, in float64; without signs, by |P|."""
    columns = np.arange(offset, offset + grads.shape[1], dtype=np.uint64)
    added = grads * reference.sparse_signs(SEED, MODEL_ID, columns) if with_signs else grads
    result = np.zeros((proj_dim, len(grads)))
    for rows in reference.sparse_rows(SEED, MODEL_ID, columns, proj_dim, nonzeros):
        np.add.at(result, rows.astype(np.intp), added.T)
    return result.T


def bound(grads: torch.Tensor, proj_dim: int, nonzeros: int, offset: int = 0) -> NDArray[np.float64]:
    """Computes the bound above, (B, k)."""
    sizes = grads.detach().double().abs().numpy()
    chunks = grads.shape[1] * nonzeros // proj_dim + 2
    depth = min(64, chunks) + chunks // 64 + 2 + (grads.dtype == torch.float64)
    return depth * 2.0**-24 * (1 + 2.0**-10) * add_up(sizes, proj_dim, nonzeros, offset, with_signs=False)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Makes integers that every dtype holds, whose sums are exact in float32."""
    return torch.randint(-128, 129, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(
    ("proj_dim", "nonzeros", "rows", "sha256"),
    [
        (256, 1, [[122, 235, 92, 205]], "324eb7e227bad62416c69b330539330ae6b8f41b2d4fece957ed364e90e5f2a2"),
        (
            512,
            4,
            [[122, 107, 92, 77], [139, 210, 153, 224], [337, 282, 355, 300], [442, 425, 408, 391]],
            "fc10b297355d5ac2480bd6378f8b814b803f33967ef3754566b84d47ab342ce5",
        ),
        (
            4096,
            4,
            [[890, 1003, 92, 205], [1547, 1362, 1177, 2016], [2769, 2202, 2659, 2092], [3898, 3241, 3608, 3975]],
            "82816640515a80d08db9ee7ded4ed248b30e11241913e45c1a567c4ad6402926",
        ),
        (1024, 8, None, "d39184953655b31cea4a50ee6a750c33d1d539bb5d4cfd3c74ba3b65025efd9c"),
    ],
)
def test_golden_values(proj_dim: int, nonzeros: int, rows: list[list[int]] | None, sha256: str) -> None:
    seed, model_id = 12345678901234567, 3
    expected = reference.matrix("sjlt", seed, model_id, range(proj_dim), range(2048), proj_dim, nonzeros)
    P = trak_fast.matrix(
        "sjlt", seed, model_id, range(proj_dim), range(2048), proj_dim=proj_dim, nonzeros=nonzeros
    ).numpy()
    for block in (expected, P):
        assert hashlib.sha256(block.astype("<f4").tobytes()).hexdigest() == sha256
    assert [P[:, j].sum() / nonzeros for j in range(8)] == [1, -1, 1, 1, 1, -1, -1, 1]
    if rows is not None:
        assert np.array_equal([np.flatnonzero(P[:, j]) for j in range(4)], np.transpose(rows))


def test_golden_values_of_far_columns() -> None:
    columns = [2**40 + 5, 2**41 + 513, 10**12]
    rows = [[839, 596, 657], [1621, 2031, 1580], [2650, 2849, 3024], [3344, 3852, 3754]]
    P = trak_fast.matrix("sjlt", 1, 0, range(4096), columns, proj_dim=4096).numpy()
    assert np.array_equal([np.flatnonzero(P[:, j]) for j in range(3)], np.transpose(rows))
    assert P.sum(axis=0).tolist() == [-4, -4, 4]


@functools.cache
def columns_of(proj_dim: int, nonzeros: int, offset: int) -> NDArray[np.float32]:
    """Makes 600 columns of P, (k, 600), by the reference, with which `trak_fast.matrix` must agree."""
    columns = range(offset, offset + 600)
    expected = reference.matrix("sjlt", SEED, MODEL_ID, range(proj_dim), columns, proj_dim, nonzeros)
    P = trak_fast.matrix("sjlt", SEED, MODEL_ID, range(proj_dim), columns, proj_dim=proj_dim, nonzeros=nonzeros)
    assert np.array_equal(P.numpy(), expected)
    return expected


@pytest.mark.parametrize(("proj_dim", "nonzeros"), SIZES)
@pytest.mark.parametrize("offset", [0, 2**32 - 300, 2**41 - 257, 2**48 - 1000])
def test_kernels_multiply_exactly_this_matrix(isa: str, proj_dim: int, nonzeros: int, offset: int) -> None:
    """Projecting the unit vector e_j gives column j of P: one product by 1, and sums with zeros, are exact."""
    expected = columns_of(proj_dim, nonzeros, offset).T
    unit = torch.eye(600)
    assert np.array_equal(project(unit, proj_dim, nonzeros, offset=offset).numpy(), expected)
    assert np.array_equal(project(unit[77:78], proj_dim, nonzeros, offset=offset).numpy(), expected[77:78])


@functools.cache
def shape_cases(proj_dim: int, nonzeros: int) -> list[tuple[int, torch.Tensor, NDArray[np.float64]]]:
    """Makes gradients of all pairs of B and D, each with an offset and the right result."""
    whole = integers(70, 9000)
    cases = []
    for number, grad_dim in enumerate(GRAD_DIMS):
        offset = (0, 1, 500, 4095, 16 * 1024 - 3)[number % 5]
        grads = whole[:, :grad_dim]
        expected = add_up(grads.double().numpy(), proj_dim, nonzeros, offset).astype(np.float32)
        cases += [(offset, grads[:batch], expected[:batch]) for batch in BATCHES]
    return cases


@pytest.mark.parametrize(("proj_dim", "nonzeros"), SIZES)
def test_shapes(isa: str, proj_dim: int, nonzeros: int) -> None:
    for offset, grads, expected in shape_cases(proj_dim, nonzeros):
        assert np.array_equal(project(grads, proj_dim, nonzeros, offset=offset).numpy(), expected)


@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # isa is the same for all examples
)
@given(
    batch=st.integers(0, 40),
    grad_dim=st.integers(0, 3000),
    block_rows=st.integers(4, 12),
    nonzeros=st.sampled_from([1, 2, 4, 8]),
    offset=st.one_of(st.integers(0, 5000), st.integers(2**47, 2**47 + 2**17)),
    first=st.integers(0, 31),
    dtype=st.sampled_from(DTYPES),
)
def test_odd_shapes(
    isa: str,
    batch: int,
    grad_dim: int,
    block_rows: int,
    nonzeros: int,
    offset: int,
    first: int,
    dtype: torch.dtype,
) -> None:
    proj_dim = nonzeros << block_rows
    grads = integers(batch, grad_dim + first).to(dtype)[:, first:]
    expected = add_up(grads.double().numpy(), proj_dim, nonzeros, offset)
    assert np.array_equal(project(grads, proj_dim, nonzeros, offset=offset).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("proj_dim", "nonzeros"), [(64, 4), (512, 1), (2048, 4)])
def test_rounding_stays_within_the_bound(proj_dim: int, nonzeros: int, dtype: torch.dtype) -> None:
    """Takes the best instruction set: the next test shows that all give the same bits."""
    exponents = torch.arange(21) % 21 - 10
    factors = 2.0 ** (exponents if dtype == torch.float16 else 9 * exponents)
    grads = (random(21, 150_007) * factors[:, None]).to(dtype)
    expected = add_up(grads.double().numpy(), proj_dim, nonzeros, 77)
    check(project(grads, proj_dim, nonzeros, offset=77), expected, bound(grads, proj_dim, nonzeros, 77))


def test_same_bits_on_all_instruction_sets_threads_and_batches(
    monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    """The order of every sum is part of the result: it depends on the columns alone."""
    for proj_dim, nonzeros, grad_dim in [(64, 4, 70_001), (4096, 4, 300_000), (1024, 1, 300_000), (65536, 4, 40_000)]:
        grads = random(21, grad_dim)
        expected = project(grads, proj_dim, nonzeros, offset=5)
        back = trak_fast.project_adjoint(expected, grad_dim, proj_type="sjlt", nonzeros=nonzeros)
        for isa, threads in itertools.product(ISAS, (1, 2, 3, 7)):
            monkeypatch.setenv("TRAK_FAST_ISA", isa)
            torch.set_num_threads(threads)
            assert torch.equal(project(grads, proj_dim, nonzeros, offset=5), expected)
            assert torch.equal(trak_fast.project_adjoint(expected, grad_dim, proj_type="sjlt", nonzeros=nonzeros), back)
        for batch in (1, 2, 3, 7, 15, 17):
            assert torch.equal(project(grads[:batch], proj_dim, nonzeros, offset=5), expected[:batch])
        parts = [*grads[:, :1003].split(17, dim=1), grads[:, 1003:]]
        assert torch.equal(project(parts, proj_dim, nonzeros, offset=5), expected)
        out = random(21, proj_dim, seed=1)
        assert torch.equal(project(grads, proj_dim, nonzeros, offset=5, out=out.clone()), out + expected)


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa: str, layout: str, dtype: torch.dtype) -> None:
    grads = STRIDES[layout](dtype)
    expected = add_up(grads.detach().double().numpy(), 512, 4, 100)
    y = project(grads, 512, 4, offset=100)
    check(y, expected, bound(grads, 512, 4, 100))
    assert not y.requires_grad


@pytest.mark.parametrize("batch", [0, 1, 35])
def test_per_parameter_tensors_act_as_their_concatenation(isa: str, batch: int) -> None:
    grads = per_parameter_gradients(batch)
    flat = [g.detach().double().reshape(batch, math.prod(g.shape[1:])) for g in grads.values()]
    whole = torch.cat(flat, dim=1)
    expected = add_up(whole.numpy(), 512, 2)
    check(project(grads, 512, 2), expected, bound(whole, 512, 2))
    projector = trak_fast.Projector(whole.shape[1], 512, SEED, "sjlt", nonzeros=2)
    assert torch.equal(projector.project(grads, model_id=MODEL_ID), project(grads, 512, 2))
    assert (projector.nonzeros, projector.dense_scale) == (2, 16)
    assert "proj_type='sjlt'" in repr(projector)
    assert "nonzeros=2" in repr(projector)


@pytest.mark.parametrize("cuts", [[512], [1, 2, 3], [500, 1000, 1003], [16, 48, 2048, 4098]])
def test_parts_at_their_offsets_add_up(isa: str, cuts: list[int]) -> None:
    grads = integers(19, 4099)
    projector = trak_fast.Projector(4099, 256, SEED, "sjlt")
    accumulator = projector.accumulator(19, MODEL_ID)
    out = torch.ones(256, 38)[:, ::2].T
    for start, stop in itertools.pairwise([0, *cuts, 4099]):
        accumulator.add(grads[:, start:stop], start)
        assert project(grads[:, start:stop], 256, 4, offset=start, out=out) is out
    expected = add_up(grads.double().numpy(), 256, 4)
    assert np.array_equal(accumulator.result().numpy(), expected)
    assert np.array_equal(out.numpy(), expected + 1)


@pytest.mark.parametrize(("proj_dim", "nonzeros"), SIZES)
def test_adjoint_is_the_transpose(isa: str, proj_dim: int, nonzeros: int) -> None:
    for batch, grad_dim, offset in [(0, 10, 0), (1, 1, 3), (2, 700, 2**41 - 100), (9, 5000, 17), (19, 513, 511)]:
        y = integers(batch, proj_dim)
        columns = np.arange(offset, offset + grad_dim, dtype=np.uint64)
        rows = reference.sparse_rows(SEED, MODEL_ID, columns, proj_dim, nonzeros).astype(np.intp)
        sums = y.double().numpy()[:, rows].sum(axis=1)
        expected = sums * reference.sparse_signs(SEED, MODEL_ID, columns)
        kind = {"proj_type": "sjlt", "nonzeros": nonzeros, "seed": SEED, "model_id": MODEL_ID, "offset": offset}
        for dtype in DTYPES:
            back = trak_fast.project_adjoint(y.to(dtype), grad_dim, **kind)
            assert np.array_equal(back.numpy(), expected)
        out = torch.ones(grad_dim, batch).T
        assert trak_fast.project_adjoint(y.T.contiguous().T, grad_dim, out=out, **kind) is out
        assert np.array_equal(out.numpy(), expected + 1)


def test_adjoint_identity() -> None:
    """⟨P g, y⟩ = ⟨g, P'y⟩, exactly for integers, over more columns than one task or segment has."""
    grads, y = integers(5, 200_003), integers(5, 1024, seed=1)
    projected = project(grads, 1024, 8, offset=9)
    back = trak_fast.project_adjoint(y, 200_003, proj_type="sjlt", nonzeros=8, seed=SEED, model_id=MODEL_ID, offset=9)
    assert torch.equal((projected.double() * y).sum(1), (grads.double() * back).sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_stay_in_their_row(isa: str, dtype: torch.dtype) -> None:
    for batch, nonzeros in itertools.product((4, 37), (1, 4)):
        grads = integers(batch, 1000).to(dtype)
        expected = add_up(grads.double().numpy(), 64, nonzeros)
        bad = {0: math.inf, 2: math.nan, batch - 1: -math.inf}
        for row, value in bad.items():
            grads[row, 333 * row % 1000] = value
        y = project(grads, 64, nonzeros)
        good = [row for row in range(batch) if row not in bad]
        assert torch.equal((~torch.isfinite(y)).sum(1).nonzero().flatten(), torch.tensor(sorted(bad)))
        assert np.array_equal(y[good].numpy(), expected[good])


@pytest.mark.parametrize("strides", [(2**31 + 7, 1), (3, 2**30 + 1)])
def test_addresses_beyond_32_bits(strides: tuple[int, int]) -> None:
    grads = zeros_without_memory(2**32 + 2**30).as_strided((3, 5), strides)
    grads.copy_(integers(3, 5))
    assert np.array_equal(project(grads, 64, 4).numpy(), add_up(grads.double().numpy(), 64, 4))


@pytest.mark.skipif(FORCED not in (None, trak_fast.info()["instruction_sets"][0]), reason="the best one counts for all")
def test_more_columns_than_32_bits_count() -> None:
    grad_dim, offset = 2**32 + 700, 2**33 + 5
    grads = zeros_without_memory(grad_dim)
    columns = [0, 2**31, 2**32 - 1, 2**32, grad_dim - 1]
    values = torch.tensor([1.0, 2, 4, 8, 16])
    grads[columns] = values.bfloat16()
    far = [offset + column for column in columns]
    P = reference.matrix("sjlt", SEED, MODEL_ID, range(4096), far, 4096, 1)
    assert np.array_equal(project(grads[None], 4096, 1, offset=offset).numpy(), values.numpy()[None] @ P.T)


def test_largest_blocks_of_rows() -> None:
    for proj_dim, nonzeros in [(2**20, 1), (2**23, 8)]:
        grads = integers(3, 1500)
        expected = add_up(grads.double().numpy(), proj_dim, nonzeros, 2**20 - 700)
        assert np.array_equal(project(grads, proj_dim, nonzeros, offset=2**20 - 700).numpy(), expected)


@pytest.mark.parametrize(
    ("proj_dim", "nonzeros", "message"),
    [
        (1000, 4, r"proj_dim must be nonzeros times a power of two in \[16, 2\*\*20\] .* not 1000; .*: 512 and 1024"),
        (1001, None, r"not 1001; near it with nonzeros=4: 512 and 1024; the dense kinds take any"),
        (32, 4, r"not 32; near it with nonzeros=4: 64; nonzeros=1 or 2 takes it"),
        (2**24, 8, r"near it with nonzeros=8: 8388608"),
        (48, 1, r"near it with nonzeros=1: 32 and 64"),
        (512, 3, r"nonzeros must be one of 1, 2, 4, 8, not 3"),
        (512, 0, r"nonzeros must be one of 1, 2, 4, 8, not 0"),
        (512, 16, r"nonzeros must be one of 1, 2, 4, 8, not 16"),
    ],
)
def test_sizes_that_do_not_fit(proj_dim: int, nonzeros: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trak_fast.project(random(2, 5), proj_dim, proj_type="sjlt", nonzeros=nonzeros)
    with pytest.raises(ValueError, match=message):
        trak_fast.project_adjoint(torch.empty(0, proj_dim), 5, proj_type="sjlt", nonzeros=nonzeros)
    with pytest.raises(ValueError, match=message):
        trak_fast.Projector(5, proj_dim, proj_type="sjlt", nonzeros=nonzeros)
    with pytest.raises(ValueError, match=message):
        trak_fast.matrix("sjlt", 0, 0, [0], [0], proj_dim=proj_dim, nonzeros=nonzeros)


def test_arguments_that_belong_to_other_kinds() -> None:
    with pytest.raises(ValueError, match="nonzeros belongs to proj_type='sjlt'"):
        trak_fast.project(random(2, 5), 64, nonzeros=4)
    with pytest.raises(ValueError, match="nonzeros belongs to proj_type='sjlt'"):
        trak_fast.Projector(5, 64, proj_type="normal", nonzeros=1)
    with pytest.raises(ValueError, match="proj_dim must be given for proj_type='sjlt'"):
        trak_fast.matrix("sjlt", 0, 0, [0], [0])
    with pytest.raises(ValueError, match=r"rows must be in \[0, 63\], not 64"):
        trak_fast.matrix("sjlt", 0, 0, [64], [0], proj_dim=64)
    with pytest.raises(TypeError, match="nonzeros must be an integer, not float"):
        trak_fast.project(random(2, 5), 64, proj_type="sjlt", nonzeros=4.0)  # type: ignore[arg-type]
    assert trak_fast.info()["proj_types"] == ["rademacher", "normal", "sjlt"]
