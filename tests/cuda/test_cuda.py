"""The CUDA projection and its adjoint, where there is a device: the same matrix bit for bit, sums within rounding, and
what callers rely on: streams, graphs, devices, memory, repeatable bits.

`test_cuda_emulated.py` runs the same kernels without a device on small shapes. The bounds are those of
`helpers/projections.py`, plus one for tensor cores, whose accumulators round toward zero: each of the D / 16 additions
of a segment takes at most 2^-23 of a partial sum, which stays below 6 ‖c‖, always in the same direction, for at most
1,024 additions in a row.
"""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from projections import (
    DTYPES,
    KINDS,
    MODEL_ID,
    SEED,
    SPLITS,
    STRIDES,
    entries,
    integer_case,
    per_parameter_gradients,
    project,
    random,
    tolerance,
)
from test_sparse import add_up, integers

import trak_fast
from trak_fast.projection import kernels, reference

pytestmark = pytest.mark.gpu
OFFSET = 2**41 - 300
KERNELS = ["sm90", "sm90_wide", "sm80"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces each tile kernel that the device can run."""
    monkeypatch.setenv("TRAK_FAST_CUDA_KERNEL", request.param)
    if request.param not in trak_fast.info()["cuda_devices"][0]["kernels"]:
        pytest.skip(f"this device cannot run {request.param}")
    return request.param


def check(y: torch.Tensor, grads: torch.Tensor, expected: np.ndarray, precision: str | None = None) -> None:
    grads = grads.detach().cpu()
    norm = grads.double().norm(dim=1, keepdim=True).numpy()
    terms = SPLITS[precision][0]
    truncation = 6 * min(1024, terms * grads.shape[1] / 16 + terms) * 2.0**-23 * norm
    bound = tolerance(grads, precision) + truncation
    assert y.dtype == torch.float32
    assert y.device.type == "cuda"
    assert tuple(y.shape) == expected.shape
    excess = np.abs(y.double().cpu().numpy() - expected) - bound
    assert np.all(excess <= 0), f"{np.sum(excess > 0)} of {excess.size} entries, the worst by {excess.max()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proj_type", KINDS)
def test_one_hot_gradients_give_the_columns_of_the_matrix(kernel: str, proj_type: str, dtype: torch.dtype) -> None:
    grads = torch.eye(600, device="cuda", dtype=dtype)
    for offset in (0, 5, 2**37 - 300, OFFSET, 2**48 - 600):
        y = trak_fast.project(grads, 4100, proj_type=proj_type, seed=2**40 + 1, model_id=3, offset=offset)
        columns = offset + np.arange(600, dtype=np.uint64)
        expected = reference.matrix(proj_type, 2**40 + 1, 3, np.arange(4100), columns).T
        assert torch.equal(y.cpu(), torch.from_numpy(np.ascontiguousarray(expected)))


@pytest.mark.parametrize("proj_type", KINDS)
def test_shapes(kernel: str, proj_type: str) -> None:
    grads = random(520, 4099)
    on_device = {dtype: grads.to("cuda", dtype) for dtype in (torch.float32, torch.bfloat16)}
    expected = {
        dtype: tensor.double().cpu().numpy() @ entries(proj_type).T.astype(np.float64)
        for dtype, tensor in on_device.items()
    }
    batches, proj_dims = [1, 2, 8, 9, 31, 64, 65, 128, 129, 160, 200, 256, 257, 520], [1, 17, 256, 257, 1000]
    for dtype, B, k in itertools.product(on_device, batches, proj_dims):
        check(project(on_device[dtype][:B], k, proj_type), grads[:B].to(dtype), expected[dtype][:B, :k])
    for dtype, D in itertools.product(on_device, [1, 2, 15, 16, 511, 512, 513, 1000, 2049]):
        g = on_device[dtype][:33, :D]
        check(project(g, 100, proj_type), g, g.double().cpu().numpy() @ entries(proj_type)[:100, :D].T)


@pytest.mark.parametrize("precision", SPLITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", KINDS)
def test_dtypes_and_precisions(kernel: str, proj_type: str, dtype: torch.dtype, precision: str | None) -> None:
    exponents = torch.arange(40) % 21 - 10
    grads = (random(40, 4099) * 2.0 ** (exponents if dtype == torch.float16 else 9 * exponents)[:, None]).to(dtype)
    offset = 2**41 - 1500
    expected = grads.double().numpy() @ entries(proj_type, offset, 100).T
    check(project(grads.cuda(), 100, proj_type, offset=offset, precision=precision), grads, expected, precision)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_small_integers_are_exact(kernel: str, dtype: torch.dtype) -> None:
    grads, expected = integer_case()
    for precision in SPLITS:
        y = project(grads.to("cuda", dtype), 33, offset=2**32 - 35000, precision=precision)
        assert np.array_equal(y.double().cpu().numpy(), expected)


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(kernel: str, layout: str, dtype: torch.dtype, proj_type: str) -> None:
    host = STRIDES[layout](dtype)
    flat = torch.empty(host.untyped_storage().nbytes(), dtype=torch.uint8, device="cuda").view(dtype)
    grads = flat.as_strided(host.shape, host.stride(), host.storage_offset())
    storage = torch.empty(0, dtype=dtype).set_(host.detach().untyped_storage())
    flat.copy_(storage)
    expected = host.detach().double().numpy() @ entries(proj_type)[:40, 100:700].T
    check(project(grads.requires_grad_(host.requires_grad), 40, proj_type, offset=100), host, expected)


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 35])
def test_per_parameter_tensors_act_as_their_concatenation(kernel: str, proj_type: str, batch: int) -> None:
    grads = {name: g.cuda() for name, g in per_parameter_gradients(batch).items()}
    whole = torch.cat([g.detach().double().reshape(batch, -1 if batch else math.prod(g.shape[1:])).cpu()
                       for g in grads.values()], dim=1)  # fmt: skip
    expected = whole.numpy() @ entries(proj_type)[:50, 200 : 200 + whole.shape[1]].T
    check(project(grads, 50, proj_type, offset=200), whole, expected)


def test_many_tensors_and_many_dimensions() -> None:
    small = [random(5, n % 7, seed=n).cuda() for n in range(300)]
    strange = random(5, 2, 2, 2, 2, 2, 2, 2, 2).permute(0, 8, 1, 7, 2, 6, 3, 5, 4)
    whole = torch.cat([*(g.cpu() for g in small), strange.reshape(5, -1)], dim=1)
    y = project([*small, strange.cuda()], 60, "normal")
    check(y, whole, whole.double().numpy() @ entries("normal")[:60, : whole.shape[1]].T)


@pytest.mark.parametrize("proj_type", KINDS)
def test_rows_with_nonfinite_values_stay_alone(kernel: str, proj_type: str) -> None:
    for dtype in DTYPES:
        grads = random(37, 1000, dtype=dtype)
        grads[3, 500], grads[20, 7], grads[36, 999] = math.inf, math.nan, -math.inf
        y = project(grads.cuda(), 50, proj_type)
        bad = torch.tensor([3, 20, 36])
        good = torch.ones(37, dtype=torch.bool)
        good[bad] = False
        assert not torch.isfinite(y.cpu()[bad]).any()
        check(y[good.cuda()], grads[good], grads[good].double().numpy() @ entries(proj_type)[:50, :1000].T)


@pytest.mark.parametrize("proj_type", KINDS)
def test_same_bits_every_time_and_out_is_added_to(kernel: str, proj_type: str) -> None:
    grads = torch.randn(70, 3 * 10**5, device="cuda")
    first = project(grads, 700, proj_type)
    for _ in range(5):
        assert torch.equal(project(grads, 700, proj_type), first)
    out = torch.full((700, 140), 2.0, device="cuda")[:, ::2].T
    assert project(grads, 700, proj_type, out=out) is out
    assert torch.equal(out, first + 2)


@pytest.mark.parametrize("proj_type", KINDS)
def test_the_processor_gives_the_same_up_to_rounding(kernel: str, proj_type: str) -> None:
    grads = random(48, 200_001)
    expected = project(grads, 1000, proj_type, precision="highest").double().numpy()
    check(project(grads.cuda(), 1000, proj_type, precision="highest"), grads, expected, "highest")


def test_the_current_stream_is_used() -> None:
    """On another stream, work that is queued there first must be seen."""
    stream = torch.cuda.Stream()
    grads = torch.zeros(8, 10**6, device="cuda")
    project(grads, 64)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grads.fill_(1)
        y = project(grads, 64)
    stream.synchronize()
    assert torch.equal(y, project(torch.ones(8, 10**6, device="cuda"), 64))


@pytest.mark.parametrize("proj_type", KINDS)
def test_a_graph_captures_it(kernel: str, proj_type: str) -> None:
    grads = torch.randn(16, 123_457, device="cuda")
    out = torch.zeros(16, 300, device="cuda")
    project(grads, 300, proj_type, out=out)  # what happens once, such as the table's upload
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = project(grads, 300, proj_type)
        project(grads, 300, proj_type, out=out)
    fresh = torch.randn(16, 123_457, device="cuda")
    grads.copy_(fresh)
    out.zero_()
    graph.replay()
    expected = project(fresh, 300, proj_type)
    assert torch.equal(captured, expected)
    assert torch.equal(out, expected)


def test_a_projector_uploads_what_a_capture_needs() -> None:
    kernels._device_table.cache_clear()
    grads = torch.randn(4, 3000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"proj_type='normal' on cuda:0 .* before the capture"),
        torch.cuda.graph(graph),
    ):
        project(grads, 50, "normal")
    projector = trak_fast.Projector(3000, 50, SEED, "normal", "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = projector.project(grads, MODEL_ID)
    graph.replay()
    assert torch.equal(captured, project(grads, 50, "normal"))


def test_nothing_synchronises() -> None:
    grads = torch.randn(16, 10**5, device="cuda")
    project(grads, 300, "normal")
    torch.cuda.set_sync_debug_mode("error")
    try:
        project(grads, 300, "normal")
        trak_fast.project_adjoint(torch.ones(4, 300, device="cuda"), 5000, proj_type="normal")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    grads = torch.randn(16, 10**5)
    assert torch.equal(project(grads.to("cuda:1"), 300).cpu(), project(grads.to("cuda:0"), 300).cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_above_input_and_output_is_bounded(kernel: str, dtype: torch.dtype) -> None:
    B, D, k = 32, 10**7 + 1, 4096
    grads = torch.randn(B, D, device="cuda", dtype=dtype)
    project(grads, k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = project(grads, k)
    extra = torch.cuda.max_memory_allocated() - before - y.numel() * 4
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = max(4, 2 * multiprocessors)  # more than there ever are
    terms = 1 if dtype == torch.bfloat16 else 2
    assert extra <= 64 * 2**20 + splits * 8 * 128 * terms * B * 4


def test_out_of_memory_is_torchs_error() -> None:
    grads = torch.ones(64, 10, device="cuda")  # the result alone would take a terabyte
    with pytest.raises(torch.cuda.OutOfMemoryError):
        project(grads, 2**32)
    assert torch.equal(project(grads, 4), project(grads.cpu(), 4).cuda())


def test_more_than_32_bits_of_elements(kernel: str) -> None:
    """Columns, and rows times columns, beyond 2^32, in place and packed."""
    D = 2**32 + 700
    if torch.cuda.mem_get_info()[0] < 3 * D:
        pytest.skip("needs 13 GB of device memory")
    grads = torch.zeros(D, dtype=torch.bfloat16, device="cuda")
    columns = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, D - 1])
    grads[columns.cuda()] = torch.tensor([1.0, 2, 4, 8, 16, 32], device="cuda").bfloat16()
    for offset in (2**33, 2**33 + 5):
        P = reference.matrix("rademacher", SEED, MODEL_ID, range(8), (offset + columns).numpy())
        expected = np.array([1.0, 2, 4, 8, 16, 32]) @ P.T
        assert np.array_equal(project(grads[None], 8, offset=offset)[0].cpu().numpy(), expected)
        assert np.array_equal(project(grads[1:][None], 8, offset=offset + 1)[0].cpu().numpy(), expected - P[:, 0])
    wide = grads[: 2**32].view(8, 2**29)  # two-dimensional, element 2^31 and beyond in row 4
    y = project(wide, 8)
    rows, within = columns[:4] // 2**29, columns[:4] % 2**29
    P = reference.matrix("rademacher", SEED, MODEL_ID, range(8), within.numpy())
    expected = np.zeros((8, 8))
    for row, column, value in zip(rows.tolist(), P.T, [1.0, 2, 4, 8], strict=True):
        expected[row] += value * column
    assert np.array_equal(y.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", KINDS)
def test_adjoint(proj_type: str, dtype: torch.dtype) -> None:
    for B, k, D, offset in [
        (1, 1, 1, 0),
        (3, 70, 1100, 7),
        (9, 1000, 513, 511),
        (40, 130, 700, OFFSET),
        (300, 33, 99, 3),
    ]:
        y = random(B, k).to(dtype)
        P = reference.matrix(proj_type, SEED, MODEL_ID, range(k), range(offset, offset + D)).astype(np.float64)
        g = trak_fast.project_adjoint(y.cuda(), D, proj_type=proj_type, seed=SEED, model_id=MODEL_ID, offset=offset)
        check(g, y, y.double().numpy() @ P, "highest")


@pytest.mark.parametrize("proj_type", KINDS)
def test_adjoint_of_unit_vectors_gives_the_rows_of_the_matrix(proj_type: str) -> None:
    rows = torch.eye(200, device="cuda")
    g = trak_fast.project_adjoint(rows, 3000, proj_type=proj_type, seed=SEED, model_id=MODEL_ID, offset=OFFSET)
    expected = reference.matrix(proj_type, SEED, MODEL_ID, range(200), range(OFFSET, OFFSET + 3000))
    assert torch.equal(g.cpu(), torch.from_numpy(expected))


def test_adjoint_of_many_rows_and_added_to_out() -> None:
    y = random(5, 40_000)
    P = reference.matrix("rademacher", SEED, MODEL_ID, range(40_000), range(600)).astype(np.float64)
    out = torch.ones(600, 10, device="cuda")[:, ::2].T
    g = trak_fast.project_adjoint(y.cuda(), 600, seed=SEED, model_id=MODEL_ID, out=out)
    assert g is out
    check(g - 1, y, y.double().numpy() @ P, "highest")


@pytest.mark.parametrize(
    ("proj_dim", "nonzeros"),
    [(16, 1), (64, 4), (1024, 4), (2048, 8), (4096, 1), (4096, 4), (16384, 2), (65536, 4), (32768, 1), (2**20, 1)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_sums_of_integers_are_exact(proj_dim: int, nonzeros: int, dtype: torch.dtype) -> None:
    """Takes aligned and other tensors of all widths, far columns, `out` with strides, and the adjoint."""
    kind = {"proj_type": "sjlt", "nonzeros": nonzeros, "seed": SEED, "model_id": MODEL_ID}
    whole = integers(70, 100_003).to(dtype)
    for n, batch in enumerate((1, 2, 3, 8, 9, 70)):
        offset = (0, 4, OFFSET, 77)[n % 4]
        for grads in (whole[:batch, : 100_000 - n % 2].contiguous(), whole[:batch, 3:5000]):
            expected = add_up(grads.double().numpy(), proj_dim, nonzeros, offset)
            on_device = grads.cuda()
            y = trak_fast.project(on_device, proj_dim, offset=offset, **kind)
            assert np.array_equal(y.cpu().numpy(), expected)
            assert torch.equal(trak_fast.project(on_device, proj_dim, offset=offset, **kind), y)
        out = torch.ones(proj_dim, 2 * batch, device="cuda")[:, ::2].T
        assert trak_fast.project(on_device, proj_dim, offset=offset, out=out, **kind) is out
        assert np.array_equal(out.cpu().numpy(), expected + 1)
        y = integers(batch, proj_dim).to(dtype)
        columns = np.arange(offset, offset + 3000, dtype=np.uint64)
        rows = reference.sparse_rows(SEED, MODEL_ID, columns, proj_dim, nonzeros).astype(np.intp)
        sums = y.double().numpy()[:, rows].sum(axis=1) * reference.sparse_signs(SEED, MODEL_ID, columns)
        assert np.array_equal(trak_fast.project_adjoint(y.cuda(), 3000, offset=offset, **kind).cpu().numpy(), sums)


def test_sparse_projections_of_lists_and_in_graphs() -> None:
    grads = {name: g.cuda() for name, g in per_parameter_gradients(35).items()}
    flat = [g.detach().double().cpu().reshape(35, math.prod(g.shape[1:])) for g in grads.values()]
    expected = add_up(torch.cat(flat, dim=1).numpy(), 512, 4)
    check(project(grads, 512, "sjlt"), torch.cat(flat, dim=1), expected)
    large = torch.randn(32, 300_000, device="cuda")
    out = torch.zeros(32, 4096, device="cuda")
    first = project(large, 4096, "sjlt")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        project(large, 4096, "sjlt", out=out)
    graph.replay()
    assert torch.equal(out, first)
    check(first, large, project(large.cpu(), 4096, "sjlt").double().numpy())


def test_a_compiled_function_projects() -> None:
    @torch.compile(fullgraph=True)
    def features(x: torch.Tensor) -> torch.Tensor:
        return 2 * project(x.sin(), 64)

    x = torch.randn(4, 5000, device="cuda")
    torch.testing.assert_close(features(x), 2 * project(x.sin(), 64), rtol=1e-5, atol=1e-3)


def test_a_kernel_that_the_device_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAK_FAST_CUDA_KERNEL", "sm42")
    with pytest.raises(ValueError, match=r"'sm42'.*can run.*sm80"):
        project(torch.ones(1, 5, device="cuda"), 4)


def test_import_does_not_touch_the_device() -> None:
    code = "import torch, trak_fast; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
