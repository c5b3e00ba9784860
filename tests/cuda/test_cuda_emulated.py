"""The CUDA projection without a GPU: host planning and kernels as they are, on the emulated device.

Most tests are test_projection.py's own. What is below looks at what only these kernels have: tiles, splits, stages,
chunks, scratch memory and the order of threads.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulated import KERNELS, Device
from projections import (
    KINDS,
    MODEL_ID,
    SEED,
    STRIDES,
    check,
    check_layout,
    entries,
    layout_cases,
    random,
    tolerance,
)
from test_projection import (  # noqa: F401
    test_dtypes_and_precisions,
    test_nonfinite_values_stay_in_their_row,
    test_odd_shapes,
    test_one_column_keeps_the_bits_of_its_precision,
    test_parts_at_their_offsets_add_up,
    test_per_parameter_tensors_act_as_their_concatenation,
)

from trak_fast.projection import checks, kernels, reference

pytestmark = pytest.mark.compiles


@pytest.fixture(
    scope="module",
    params=[pytest.param(kernel, marks=pytest.mark.xdist_group(kernel)) for kernel in KERNELS],
    autouse=True,
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The emulated device, in the place of the compiled module."""
    device = Device(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_C", device)
        yield device
    instructions = ["wgmma"] if "sm90" in request.param else ["mma bf16", "mma fp16"]
    assert sum(map(device.count, instructions)) > 0


@pytest.fixture(autouse=True)
def usual_device(device: Device) -> None:
    device.set(KERNELS[device.kernel])


@pytest.fixture
def isa() -> str:
    return "emulated"


def describe(
    grads: torch.Tensor | list[torch.Tensor], out: torch.Tensor, kind: str, offset: int = 0, terms: int = 3
) -> Any:
    """Describes a projection to the compiled module."""
    tensors = grads if isinstance(grads, list) else [grads]
    return kernels._C.Projection(
        kind=checks.KINDS[kind],
        seed=SEED,
        stream=MODEL_ID,
        rows=out.shape[1],
        batch=len(out),
        offset=offset,
        terms=terms,
        nonzeros=0,
        parts=[kernels.part_of(tensor) for tensor in tensors],
        out=out.data_ptr(),
        out_batch_stride=out.stride(0),
        out_row_stride=out.stride(1),
    )


def project(
    device: Device, grads: torch.Tensor | list[torch.Tensor], proj_dim: int, kind: str, **options: int
) -> torch.Tensor:
    """Projects into an output of NaN, every element of which has to be written."""
    batch = (grads if isinstance(grads, torch.Tensor) else grads[0]).shape[0]
    out = torch.full((batch, proj_dim), torch.nan)
    device.run(describe(grads, out, kind, **options), add=False)
    return out


@pytest.mark.parametrize("offset", [0, 5, 2**37 - 300, 2**41 - 300, 2**48 - 600])
@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_gradients_give_the_columns_of_the_matrix(device: Device, kind: str, offset: int) -> None:
    """Takes batches of each kernel's widths in all dtypes; their ones are in the last columns."""
    for batch, dtype in [(600, torch.bfloat16), (40, torch.float32), (11, torch.float16), (5, torch.bfloat16)]:
        columns = torch.arange(600)[-batch:]
        grads = torch.zeros(batch, 600, dtype=dtype)
        grads[torch.arange(batch), columns] = 1
        expected = entries(kind, offset, 70, 600)[:, columns.numpy()].T
        assert np.array_equal(project(device, grads, 70, kind, offset=offset).numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(device: Device, kind: str) -> None:
    # Around the widths of tiles (panel rows), stages and units (columns), and tiles (rows of P).
    batches = [1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 193, 256, 257]
    grad_dims = [1, 8, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1024, 1031]
    proj_dims = [1, 15, 16, 17, 64, 127, 128, 129, 255, 256, 257, 300]
    for n, batch in enumerate(batches):
        grad_dim, proj_dim = grad_dims[n * 5 % 13], proj_dims[n * 7 % 12]
        dtype = [torch.bfloat16, torch.float32, torch.float16][n % 3]
        grads = random(batch, grad_dim, dtype=dtype)
        expected = grads.double().numpy() @ entries(kind)[:proj_dim, :grad_dim].T
        check(project(device, grads, proj_dim, kind), expected, tolerance(grads, "highest"))


@pytest.mark.parametrize(
    ("device", "layout", "dtype", "kind"),
    layout_cases(STRIDES, ["sm90"], ["sm80", "sm90_wide"], in_place=[torch.bfloat16]),
    indirect=["device"],
)
def test_strides(device: Device, layout: str, dtype: torch.dtype, kind: str) -> None:
    check_layout(layout, dtype, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_threads_gives_the_same_bits(device: Device, kind: str) -> None:
    grads = random(20, 1700)
    first = project(device, grads, 200, kind, offset=77)
    for seed in range(1, 9):
        device.set(KERNELS[device.kernel], seed=seed)
        assert torch.equal(project(device, grads, 200, kind, offset=77), first), seed


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_multiprocessors(device: Device, dtype: torch.dtype, multiprocessors: int) -> None:
    """More multiprocessors make more splits; with one of them, each split has several segments of sums."""
    device.set(KERNELS[device.kernel], multiprocessors)
    grads = random(5, 20001, dtype=dtype)
    expected = grads.double().numpy() @ entries("rademacher", 7, 33, 20001).T
    check(project(device, grads, 33, "rademacher", offset=7), expected, tolerance(grads, "highest"))


def test_chunks_of_the_packed_panel_add_up(device: Device) -> None:
    """256 panel rows of packed columns fill a chunk every 65536 columns, whatever kernel reads it."""
    if device.kernel != "sm90":
        pytest.skip("the plan is the same for all kernels")
    grads = random(128, 66000)
    expected = grads.double().numpy() @ entries("rademacher", 65000, 20, 66000).T
    y = project(device, grads, 20, "rademacher", offset=65000, terms=2)
    check(y, expected, tolerance(grads, "high"))


def test_steps_of_tensors_that_are_read_in_place(device: Device) -> None:
    """A launch ends at every multiple of 2^30 columns."""
    grads = random(9, 1000, dtype=torch.bfloat16)
    for offset in (2**30 - 512, 2**30 - 504, 2**30 - 8, 3 * 2**30 - 1000):
        expected = grads.double().numpy() @ entries("rademacher", offset, 40, 1000).T
        check(project(device, grads, 40, "rademacher", offset=offset), expected, tolerance(grads))


def test_large_and_small_tensors_in_one_call(device: Device) -> None:
    """Large 16-bit tensors are read where they are, small ones between them are packed together."""
    widths = [3, 0, 65600, 7, 1, 70, 2]
    parts = [random(64, width, dtype=torch.bfloat16, seed=i) for i, width in enumerate(widths)]
    whole = torch.cat(parts, dim=1)
    expected = whole.double().numpy() @ entries("rademacher", 13, 20, whole.shape[1]).T
    y = project(device, [part for part in parts if part.numel()], 20, "rademacher", offset=13)
    check(y, expected, tolerance(whole))


def test_many_small_tensors(device: Device) -> None:
    """Takes more tensors than a launch of the packing kernel does."""
    parts = [random(6, 1 + i * 7 % 40, seed=i) for i in range(100)]
    whole = torch.cat(parts, dim=1)
    expected = whole.double().numpy() @ entries("rademacher", 3, 20, whole.shape[1]).T
    check(project(device, parts, 20, "rademacher", offset=3), expected, tolerance(whole, "highest"))


RESNET_18 = [
    *(64 * 3 * 49, 64, 64),
    *4 * (64 * 64 * 9, 64, 64),
    *(128 * 64 * 9, 128, 128, 128 * 128 * 9, 128, 128, 128 * 64, 128, 128, *2 * (128 * 128 * 9, 128, 128)),
    *(256 * 128 * 9, 256, 256, 256 * 256 * 9, 256, 256, 256 * 128, 256, 256, *2 * (256 * 256 * 9, 256, 256)),
    *(512 * 256 * 9, 512, 512, 512 * 512 * 9, 512, 512, 512 * 256, 512, 512, *2 * (512 * 512 * 9, 512, 512)),
    *(1000 * 512, 1000),
]
GPT_2 = [
    *(50257 * 768, 1024 * 768),
    *12 * (768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072, 3072 * 768, 768),
    *(768, 768),
]
LORA = 128 * [8 * 4096]  # rank 8, two matrices for each of 64 layers of width 4096


@pytest.mark.parametrize(
    ("widths", "parameters", "dtype", "most"),
    [
        (RESNET_18, 11_689_512, torch.float32, 91),
        (RESNET_18, 11_689_512, torch.bfloat16, 44),
        (GPT_2, 124_439_808, torch.float32, 951),
        (GPT_2, 124_439_808, torch.bfloat16, 149),
        (LORA, 4_194_304, torch.float32, 33),
    ],
)
def test_launches_for_lists_of_parameters(
    device: Device, widths: list[int], parameters: int, dtype: torch.dtype, most: int
) -> None:
    """Allows two launches for each chunk of 32 MiB, one for each large tensor, and one that adds up."""
    if device.kernel != "sm90":
        pytest.skip("the plan is the same for all kernels")
    assert sum(widths) == parameters
    parts = [
        device.Part(
            data=2**40, dtype=checks.DTYPES[dtype], columns=width, batch_stride=width, sizes=[width], strides=[1]
        )
        for width in widths
    ]
    projection = device.Projection(
        kind=0,
        seed=SEED,
        stream=MODEL_ID,
        rows=4096,
        batch=32,
        offset=0,
        terms=2 if dtype == torch.float32 else 1,
        nonzeros=0,
        parts=parts,
        out=2**40,
        out_batch_stride=4096,
        out_row_stride=1,
    )
    assert device.launches(projection) <= most


@pytest.mark.parametrize("add", [False, True])
def test_output_of_any_strides_and_nothing_beside_it(device: Device, add: bool) -> None:
    grads = random(21, 700)
    expected = grads.double().numpy() @ entries("rademacher")[:50, :700].T + (1 if add else 0)
    memory = torch.full((3 * 21, 2 * 50), 1.0 if add else torch.nan)
    before = memory.clone()
    for out in (memory[1::3, ::2], memory.flatten()[: 21 * 50].view(50, 21).T):
        memory.copy_(before)
        device.run(describe(grads, out, "rademacher"), add)
        check(out, expected, tolerance(grads, "highest") + 2.0**-23)
        out.fill_(1 if add else torch.nan)
        assert torch.equal(memory.nan_to_num(7), before.nan_to_num(7))


def test_kernels_by_compute_capability(device: Device) -> None:
    for capability, names in {75: [], 80: ["sm80"], 86: ["sm80"], 89: ["sm80"], 100: ["sm80"], 120: ["sm80"]}.items():
        device.set(capability)
        assert device.cuda_kernels(0) == names
    device.set(90)
    assert device.cuda_kernels(0) == ["sm90", "sm90_wide", "sm80"]


def test_kernels_that_a_device_cannot_run(device: Device) -> None:
    out = torch.zeros(1, 2)
    wanted = describe(torch.ones(1, 3), out, "rademacher")
    device.set(89)
    project = functools.partial(device.project_cuda, wanted, False, 0, pytest.fail)
    with pytest.raises(ValueError, match=r"'sm90' .* device 0 can run: sm80"):
        project(0, 0, "sm90")
    device.set(75)
    with pytest.raises(RuntimeError, match=r"older than compute capability 8\.0"):
        project(0, 0, "")
    with pytest.raises(RuntimeError, match=r"invalid device ordinal"):
        project(1, 0, "")


@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_devices_with_less_shared_memory(device: Device, kind: str, capability: int) -> None:
    if device.kernel != "sm80":
        pytest.skip("these run the sm80 kernel only")
    device.set(capability)
    for batch in (8, 16, 32, 64, 128):
        grads = random(batch, 600, dtype=torch.float16)
        expected = grads.double().numpy() @ entries(kind)[:40, :600].T
        check(project(device, grads, 40, kind), expected, tolerance(grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("proj_dim", [512, 4096, 16384])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_scratch_memory_is_bounded(device: Device, batch: int, proj_dim: int, dtype: torch.dtype) -> None:
    """Allows 64 MiB and the sums of splits, of which there are not many more than multiprocessors need."""
    device.set(KERNELS[device.kernel], 132)
    out = torch.empty(batch, proj_dim)
    for grad_dim in (10**5, 10**7, 10**9):
        grads = torch.empty(1, dtype=dtype).expand(batch, grad_dim)  # only its shape matters here
        size = device.scratch_bytes(describe(grads, out, "rademacher"))
        rows = batch * (3 if dtype == torch.float32 else 1)
        sums = 4 * proj_dim * min(256, 2 * rows + 8)
        assert 0 < size <= 64 * 2**20 + 4 * sums + 8 * 132 * 128 * 256 * 4


def test_reference_of_this_file() -> None:
    """`entries`, which the tests above compare with, against the slower function of the reference."""
    grads = random(3, 600)
    slow = reference.project(grads.numpy(), 20, "normal", SEED, MODEL_ID, 5)
    assert np.allclose(slow, grads.double().numpy() @ entries("normal", 5, 20, 600).T, rtol=0, atol=1e-9)
