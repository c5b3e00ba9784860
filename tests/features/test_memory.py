"""The number of samples that are differentiated at a time."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution import CHECKPOINTS, TRAIN, N, build
from torch import Tensor, nn

from trak_fast import TRAKer
from trak_fast.features import memory
from trak_fast.features.memory import free_bytes, halving_on_oom, sample_bytes
from trak_fast.gradients import FunctionalGradientComputer


def test_bytes_are_those_of_the_gradient_and_of_what_the_forward_pass_makes() -> None:
    x, w = torch.ones(10, 4), torch.ones(4, 6)
    # a product, its tanh; a transpose and a part make nothing
    assert sample_bytes(lambda: torch.tanh(x @ w).T[:3], 100) == 2 * (100 + 240 + 240)
    assert sample_bytes(lambda: x.double().add_(1), 0) == 2 * 8 * 40


def test_parts_have_the_size_until_memory_runs_out() -> None:
    seen: list[slice] = []

    def compute(part: slice) -> None:
        if part.stop - part.start > limit:
            raise torch.cuda.OutOfMemoryError
        seen.append(part)

    limit = 9
    assert halving_on_oom(10, 4, compute) == 4
    assert seen == [slice(0, 4), slice(4, 8), slice(8, 10)]
    seen.clear()
    limit = 3
    assert halving_on_oom(10, 9, compute) == 2
    assert seen == [slice(i, i + 2) for i in range(0, 10, 2)]
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        halving_on_oom(2, 2, compute)
    assert halving_on_oom(0, 2, compute) == 2


def counted(folder: Path, **options: Any) -> list[int]:
    """Samples at a time in featurizing all training samples as one batch."""
    sizes: list[int] = []

    class Counting(FunctionalGradientComputer):
        def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
            sizes.append(len(batch[0]))
            return super().compute_per_sample_grad(batch)

    traker = build(folder, gradient_computer=Counting, **options)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    assert traker.store.train(0).done.all()
    return sizes


def test_batches_are_cut_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = 131 * 8
    assert counted(tmp_path / "roomy") == [N]
    assert counted(tmp_path / "tiny", memory_budget=1) == [1] * N
    (some,) = set(counted(tmp_path / "some", memory_budget=4 * 2 * 2 * gradient))
    assert 4 <= some < 8  # forward passes make something, but less than gradients here
    assert counted(tmp_path / "given", memory_budget=1, chunk_size=5) == [5, 5, 2]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 3 * 2 * 2 * gradient)
    (some,) = set(counted(tmp_path / "machine"))
    assert 3 <= some < 6
    with pytest.raises(ValueError, match=r"memory_budget must be in \[1, 2\*\*62\], not 0"):
        build(tmp_path / "none", memory_budget=0)


def too_large(allocate: Callable[[], object]) -> Exception:
    """Returns the error of an allocation."""
    try:
        allocate()
    except Exception as error:
        return error
    raise AssertionError("allocated")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        too_large(lambda: np.empty(1 << 60, np.uint8)),
        too_large(lambda: torch.empty(1 << 60, dtype=torch.uint8)),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:85] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("torch.func cannot differentiate this model or task: DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("unable to mmap 8 bytes from file </dev/shm/1>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_failed_allocations_of_any_kind_are_tried_again_in_halves(error: Exception) -> None:
    seen: list[slice] = []
    limit = 2

    def compute(part: slice) -> None:
        if part.stop - part.start > limit:
            raise error
        seen.append(part)

    assert halving_on_oom(5, 5, compute) == 2
    assert seen == [slice(0, 2), slice(2, 4), slice(4, 5)]
    limit = 0
    with pytest.raises(type(error)) as caught:
        halving_on_oom(5, 5, compute)
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("expected scalar type Float"), ValueError("std::bad_alloc"), OSError(errno.ENOSPC, "No space")],
)
def test_other_errors_are_raised_at_once(error: Exception) -> None:
    calls: list[slice] = []

    def compute(part: slice) -> None:
        calls.append(part)
        raise error

    with pytest.raises(type(error)) as caught:
        halving_on_oom(5, 5, compute)
    assert caught.value is error
    assert calls == [slice(0, 5)]


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_limits_of_control_groups_hold_with_those_around_them(tmp_path: Path) -> None:
    """In version 2: the lower of two limits, at each level, and pages of files that are free to take."""
    root, listing = tmp_path / "cgroup", tmp_path / "listing"
    listing.write_text("0::/batch/job/step\n")
    write(root, memory__stat="inactive_file 7")
    write(
        root / "batch",
        memory__max=1000,
        memory__high="max",
        memory__current=600,
        memory__stat="anon 9\ninactive_file 150",
    )
    write(root / "batch/job", memory__max=900, memory__high=800, memory__current=500, memory__stat="inactive_file 0")
    write(root / "batch/job/step", memory__max="max", memory__high="max", memory__current=100)
    assert memory._left_by_groups(listing, root) == [550, 300]
    write(root / "batch/job/step", memory__max=90)
    assert memory._left_by_groups(listing, root) == [550, 300, -10]
    listing.write_text("0::/\n")
    assert memory._left_by_groups(listing, root) == []
    listing.write_text("0::/../../batch/job\n")
    assert memory._left_by_groups(listing, root) == []
    assert memory._left_by_groups(tmp_path / "none", root) == []


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    """In a container the path is that of the machine, which the container does not see; its own group is the root."""
    root, listing = tmp_path / "cgroup", tmp_path / "listing"
    listing.write_text("9:name=systemd:/x\n4:cpu,memory:/docker/abc\n1:cpu:/docker/abc\n0::/\n")
    write(
        root / "memory",
        memory__limit_in_bytes=5000,
        memory__usage_in_bytes=4000,
        memory__stat="inactive_file 10\ntotal_inactive_file 300",
    )
    assert memory._left_by_groups(listing, root) == [1300]
    write(
        root / "memory/docker/abc",
        memory__limit_in_bytes=700,
        memory__usage_in_bytes=200,
        memory__stat="total_inactive_file 50",
    )
    assert memory._left_by_groups(listing, root) == [1300, 550]


def test_free_memory_is_the_least_of_the_machine_and_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, limits, groups, expected in [
        (9, [], [], 9),
        (9, [5], [7, 6], 5),
        (9, [8], [7, 3], 3),
        (9, [-4], [], 0),
    ]:
        monkeypatch.setattr(memory, "_free_of_machine", lambda machine=machine: machine)
        monkeypatch.setattr(memory, "_left_by_limits", lambda limits=limits: limits)
        monkeypatch.setattr(memory, "_left_by_groups", lambda groups=groups: groups)
        assert free_bytes(torch.device("cpu")) == expected


@pytest.mark.parametrize("option", ["v", "d"])
def test_free_memory_respects_the_limits_of_the_process(option: str) -> None:
    """`ulimit -v` counts all memory of the process, `ulimit -d` what it can write to."""
    limit = 4 << 30
    name = {"v": "VmSize", "d": "VmData"}[option]
    program = (
        "import torch; from trak_fast.features.memory import free_bytes\n"
        "print(free_bytes(torch.device('cpu')), open('/proc/self/status').read())"
    )
    shell = f'ulimit -{option} {limit >> 10} && exec "$0" -c "$1"'
    command = ["sh", "-c", shell, sys.executable, program]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    free, status = done.stdout.split(" ", 1)
    used = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))
    # the process may have grown between both readings
    assert 0 < int(free) <= limit - used + (64 << 20)
    assert int(free) >= min(limit - used, memory._free_of_machine() // 2)


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_features_under_a_limit_are_those_without_it(tmp_path: Path, budget: int) -> None:
    """By a budget below what is free, or, where a budget promises more than there is, by trying again in halves."""
    program = Path(__file__).parents[1] / "programs" / "featurize_with_limited_memory.py"
    command = [sys.executable, program, tmp_path / "limited", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    free, *sizes = map(int, done.stdout.split())
    assert free <= 1 << 29
    if budget:
        assert sizes[0] == 64
        assert sizes[-1] < 32  # 64 gradients of 16 MB, and the sums in making them, are more than 512 MiB
    else:
        assert max(sizes) <= (free // 4) // (2 * 16_000_000)
        assert sum(sizes) == 64
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 4000), nn.ReLU(), nn.Linear(4000, 4))
    batch = [torch.randn(64, 1000), torch.randint(4, (64,))]
    traker = TRAKer(model, "image_classification", 64, tmp_path / "free", proj_dim=16, grad_wrt=["0.*"], chunk_size=8)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch, num_samples=64)
    expected = np.array(traker.store.train(0).features)
    features = np.load(tmp_path / "limited/checkpoint_0/train/features.npy")
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_free_memory_is_less_than_there_is() -> None:
    with open("/proc/meminfo") as file:
        total = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    assert 0 < free_bytes(torch.device("cpu")) < total
