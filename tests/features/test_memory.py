"""The number of samples that are differentiated at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attribution import CHECKPOINTS, TRAIN, N, build
from torch import Tensor

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


def test_free_memory_is_less_than_there_is() -> None:
    with open("/proc/meminfo") as file:
        total = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    assert 0 < free_bytes(torch.device("cpu")) < total
