"""The sparse kind on CUDA without a GPU: host planning and kernels as they are, on the emulated device.

Many tests are test_sparse.py's own. What is below looks at what only these kernels have: stages, sets of threads, row
groups, splits, panels, scratch memory and the order of threads.

The bound. A gradient enters a row's sum in a register, with up to 1,023 others; such sums are added up in memory, and
those of all slices by up to 32 warps. It goes through at most h roundings (see `bound`) of at most 2^-24 of its size
each, so a result is within h · 2^-24 (1 + 2^-10) · Σ |g_j| over its columns.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulated import Device
from numpy.typing import NDArray
from projections import DTYPES, MODEL_ID, SEED, check, random
from test_sparse import (  # noqa: F401
    add_up,
    integers,
    test_adjoint_is_the_transpose,
    test_kernels_multiply_exactly_this_matrix,
    test_largest_blocks_of_rows,
    test_nonfinite_values_stay_in_their_row,
    test_odd_shapes,
    test_parts_at_their_offsets_add_up,
    test_strides,
)

import trak_fast
from trak_fast.projection import checks, kernels, reference

pytestmark = [pytest.mark.compiles, pytest.mark.xdist_group("sparse")]

# k and c: all shapes of stages, sets of threads that take chunks in turns, row groups, and chunks that are gathered.
SIZES = [
    *((16, 1), (64, 4), (128, 8), (2048, 8), (1024, 1), (4096, 1), (16384, 1), (2048, 2), (8192, 2), (1024, 4)),
    *((4096, 4), (8192, 4), (16384, 4), (32768, 4), (65536, 4), (131072, 8), (32768, 1), (131072, 2)),
]


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[Device]:
    """The emulated device, in the place of the compiled module."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_C", device)
        yield device
    assert device.count("cp.async") > 0


@pytest.fixture(autouse=True)
def usual_device(device: Device) -> None:
    device.set(90)


@pytest.fixture
def isa() -> str:
    return "emulated"


def describe(
    grads: torch.Tensor | list[torch.Tensor], out: torch.Tensor, nonzeros: int, offset: int = 0, parts: Any = None
) -> Any:
    """Describes a projection to the compiled module; `parts`, if given, in the place of gradients."""
    tensors = grads if isinstance(grads, list) else [grads]
    return kernels._C.Projection(
        kind=checks.KINDS["sjlt"],
        seed=SEED,
        stream=MODEL_ID,
        rows=out.shape[1],
        batch=len(out),
        offset=offset,
        terms=1,
        nonzeros=nonzeros,
        parts=[kernels.part_of(tensor) for tensor in tensors] if parts is None else parts,
        out=out.data_ptr(),
        out_batch_stride=out.stride(0),
        out_row_stride=out.stride(1),
    )


def project(
    device: Device, grads: torch.Tensor | list[torch.Tensor], proj_dim: int, nonzeros: int, offset: int = 0
) -> torch.Tensor:
    """Projects into an output of NaN, every element of which has to be written."""
    batch = (grads if isinstance(grads, torch.Tensor) else grads[0]).shape[0]
    out = torch.full((batch, proj_dim), torch.nan)
    device.run(describe(grads, out, nonzeros, offset), add=False)
    return out


def bound(grads: torch.Tensor, proj_dim: int, nonzeros: int, offset: int = 0) -> NDArray[np.float64]:
    """Computes the bound above, (B, k)."""
    sizes = grads.double().abs().numpy()
    chunks = grads.shape[1] * nonzeros // proj_dim + 2
    slices = min(chunks, 32 + chunks // 32)
    depth = min(1024, chunks) + chunks // 1024 + slices + 1 + (grads.dtype == torch.float64)
    return depth * 2.0**-24 * (1 + 2.0**-10) * add_up(sizes, proj_dim, nonzeros, offset, with_signs=False)


@pytest.mark.parametrize(("proj_dim", "nonzeros"), SIZES)
def test_shapes(device: Device, proj_dim: int, nonzeros: int) -> None:
    """Takes every width of a stage in every type, from tensors that are read in place and from panels."""
    whole = integers(70, 40_001)
    batches, grad_dims = [1, 2, 3, 4, 5, 8, 9, 17, 70], [1, 15, 1024, 4099, 9000, 40_001]
    cases = [*itertools.product(batches, [torch.float32, torch.bfloat16, torch.float16])]
    for n, (batch, dtype) in enumerate(cases if proj_dim < 2**16 else cases[::5]):
        offset = (0, 4, 1, 5000, 2**41 - 3004)[n % 5]
        grad_dim = grad_dims[n % 6] if batch < 70 else 1024
        grads = whole[:batch, :grad_dim].to(dtype).contiguous()
        expected = add_up(grads.double().numpy(), proj_dim, nonzeros, offset)
        assert np.array_equal(project(device, grads, proj_dim, nonzeros, offset).numpy(), expected), (batch, dtype)


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(("proj_dim", "nonzeros"), [(1024, 4), (8192, 1), (65536, 4), (16, 1), (128, 8)])
def test_devices_with_other_shared_memory(device: Device, proj_dim: int, nonzeros: int, capability: int) -> None:
    """A device has room for three stages, for two, or not for two large ones."""
    device.set(capability)
    for dtype in (torch.float32, torch.bfloat16):
        grads = integers(9, 50_000).to(dtype)
        expected = add_up(grads.double().numpy(), proj_dim, nonzeros, 4)
        assert np.array_equal(project(device, grads, proj_dim, nonzeros, 4).numpy(), expected)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_any_number_of_multiprocessors(device: Device, multiprocessors: int) -> None:
    """More of them make more splits, of which some have no stage; with one, a split has several segments."""
    device.set(90, multiprocessors)
    for proj_dim, nonzeros, grad_dim in [(64, 1, 70_000), (1024, 4, 30_000), (32768, 1, 100_000)]:
        grads = integers(9, grad_dim)
        expected = add_up(grads.double().numpy(), proj_dim, nonzeros, 7)
        assert np.array_equal(project(device, grads, proj_dim, nonzeros, 7).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_order_of_threads_gives_the_same_bits(device: Device, dtype: torch.dtype) -> None:
    for proj_dim, nonzeros, grad_dim in [(1024, 4, 9001), (64, 1, 9001), (65536, 4, 40_000), (32768, 1, 40_000)]:
        grads = random(9, grad_dim, dtype=dtype)
        y = random(3, proj_dim, dtype=dtype)
        kind = {"proj_type": "sjlt", "nonzeros": nonzeros, "seed": SEED, "model_id": MODEL_ID}
        device.set(90)
        first = project(device, grads, proj_dim, nonzeros, 76)
        back = trak_fast.project_adjoint(y, 5000, **kind)
        for seed in range(1, 7):
            device.set(90, seed=seed)
            assert torch.equal(project(device, grads, proj_dim, nonzeros, 76), first), seed
            assert torch.equal(trak_fast.project_adjoint(y, 5000, **kind), back), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("proj_dim", "nonzeros"), [(64, 4), (512, 1), (4096, 4), (32768, 1)])
def test_rounding_stays_within_the_bound(device: Device, proj_dim: int, nonzeros: int, dtype: torch.dtype) -> None:
    device.set(90, 2)
    grads = random(9, 300_000, dtype=dtype)
    expected = add_up(grads.double().numpy(), proj_dim, nonzeros, 76)
    check(project(device, grads, proj_dim, nonzeros, 76), expected, bound(grads, proj_dim, nonzeros, 76))


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32]])
def test_large_and_small_tensors_in_one_call(device: Device, dtypes: list[torch.dtype]) -> None:
    """Large tensors are read where they are, small ones between them are packed; all add to the same sums."""
    widths = [3, 65_601, 7, 1, 70, 65_608, 65_536, *(1 + i * 7 % 40 for i in range(100))]
    parts = [integers(64, width, seed=i).to(dtypes[i % len(dtypes)]) for i, width in enumerate(widths)]
    whole = torch.cat([part.double() for part in parts], dim=1)
    for proj_dim, nonzeros in [(64, 4), (32768, 1)]:
        expected = add_up(whole.numpy(), proj_dim, nonzeros, 13)
        assert np.array_equal(project(device, parts, proj_dim, nonzeros, 13).numpy(), expected)


def test_launches_end_where_their_stages_count_to_32_bits(device: Device) -> None:
    """A launch ends at every multiple of 2^40 columns."""
    for offset in (2**40 - 5000, 3 * 2**40 - 4):
        grads = integers(3, 9000)
        expected = add_up(grads.double().numpy(), 1024, 4, offset)
        assert np.array_equal(project(device, grads, 1024, 4, offset).numpy(), expected)


@pytest.mark.parametrize("add", [False, True])
def test_output_of_any_strides_and_nothing_beside_it(device: Device, add: bool) -> None:
    for proj_dim, nonzeros in [(64, 4), (32768, 1)]:
        grads = integers(5, 3000)
        expected = add_up(grads.double().numpy(), proj_dim, nonzeros) + (1 if add else 0)
        memory = torch.full((3 * 5, 2 * proj_dim), 1.0 if add else torch.nan)
        before = memory.clone()
        for out in (memory[1::3, ::2], memory.flatten()[: 5 * proj_dim].view(proj_dim, 5).T):
            memory.copy_(before)
            device.run(describe(grads, out, nonzeros), add)
            assert np.array_equal(out.numpy(), expected)
            out.fill_(1 if add else torch.nan)
            assert torch.equal(memory.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("proj_dim", "nonzeros"), [(16, 1), (1024, 4), (4096, 4), (65536, 4), (2**23, 8)])
def test_scratch_memory_is_bounded(device: Device, proj_dim: int, nonzeros: int, dtype: torch.dtype) -> None:
    """Allows a panel of 32 MiB, and sums: two waves of blocks have 64 of them for each of 512 threads."""
    device.set(90, 132)
    for batch, grad_dim in itertools.product((1, 32, 256, 3000), (10**5, 10**9)):
        out = torch.empty(1, proj_dim).expand(batch, proj_dim)  # only shapes matter here
        grads = torch.empty(1, dtype=dtype).expand(batch, grad_dim)
        size = device.scratch_bytes(describe(grads, out, nonzeros))
        assert 0 < size <= (32 + 1) * 2**20 + max(2 * 132 * 64 * 512, 4 * proj_dim, 2**22) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_for_a_list_of_parameters(device: Device, dtype: torch.dtype) -> None:
    """Large tensors take a launch each, and so do the small ones between them, with one for their panel."""
    widths = [50257 * 768, 1024 * 768, *12 * (768, 768, 768 * 2304, 2304, 768 * 768, 768, 768 * 3072, 3072), 768]
    parts = [
        device.Part(
            data=2**40, dtype=checks.DTYPES[dtype], columns=width, batch_stride=width, sizes=[width], strides=[1]
        )
        for width in widths
    ]
    out = torch.empty(32, 4096)
    assert device.launches(describe([], out, 4, parts=parts)) <= 1 + 2 * len(widths)


def test_reference_of_this_file() -> None:
    """`add_up`, which the tests above compare with, against the slower function of the reference."""
    grads = random(3, 600)
    slow = reference.project(grads.numpy(), 64, "sjlt", SEED, MODEL_ID, 5, 2)
    assert np.allclose(add_up(grads.double().numpy(), 64, 2, 5), slow, rtol=0, atol=1e-9)
    assert math.isclose(np.abs(add_up(np.ones((1, 1)), 64, 4)).sum(), 4)
