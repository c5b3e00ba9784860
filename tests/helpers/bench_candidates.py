"""Candidates with known faults, for the benchmark to find; the worker processes import this file.

Their workers flush a small cache and take the machine's ceilings from here, since both take most of a small run's time.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trak_fast.bench.candidates import Candidate
from trak_fast.bench.case import Case

worker = sys.modules["__main__"]
if hasattr(worker, "cache_bytes"):
    worker.cache_bytes = lambda device: 1 << 16
    worker.ceilings = lambda device, once: {
        "copy_bytes_per_second": 1e10,
        "flop_per_second": dict.fromkeys(("float32", "bfloat16", "float16", "float64"), 1e11),
    }


def logged(name: str) -> None:
    """Notes a call, so that the order of calls can be seen."""
    if path := os.environ.get("BENCH_TEST_LOG"):
        with Path(path).open("a") as file:
            file.write(f"{name}\n")


def signs(case: Case, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.empty(columns, case.proj_dim).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def good(case: Case) -> Callable[[Tensor], Tensor]:
    logged(f"make good {case.grad_dim}")
    matrix = signs(case, case.grad_dim)

    def project(grads: Tensor) -> Tensor:
        logged("good")
        return grads.float() @ matrix

    return project


def other(case: Case) -> Callable[[Tensor], Tensor]:
    matrix = signs(case, case.grad_dim)

    def project(grads: Tensor) -> Tensor:
        logged("other")
        time.sleep(0.01)
        return grads.float() @ matrix

    return project


def paired(case: Case) -> Callable[[Tensor], Tensor]:
    """Every column twice, and an error of one in a thousand in every result."""
    matrix = signs(case, case.grad_dim // 2).repeat_interleave(2, 0)
    return lambda grads: grads.float() @ matrix * (1 if len(grads) == case.grad_dim else 1.001)


def moody(case: Case) -> Callable[[Tensor], Tensor]:
    """Never the same bits."""
    matrix = signs(case, case.grad_dim)
    return lambda grads: grads.float() @ matrix + torch.rand(1)


def failing(case: Case) -> Callable[[Tensor], Tensor]:
    if case.grad_dim == 5000:  # while it is tried out
        return lambda grads: torch.zeros(len(grads), case.proj_dim)
    raise RuntimeError("out of luck")


def dying(case: Case) -> Callable[[Tensor], Tensor]:
    if case.grad_dim == 5000:
        return lambda grads: torch.zeros(len(grads), case.proj_dim)
    os._exit(3)


def unable(case: Case) -> Callable[[Tensor], Tensor]:
    raise ValueError("does not even import")


def hanging(case: Case) -> Callable[[Tensor], Tensor]:
    if case.grad_dim != 5000:
        time.sleep(600)
    return lambda grads: torch.zeros(len(grads), case.proj_dim)


def everything(device: str) -> list[Candidate]:
    return [
        *(Candidate(make.__name__, "torch", make) for make in (good, other, paired, moody, failing, dying, unable)),
        Candidate("hanging", "torch", hanging),
        Candidate("absent", "no_such_library", good, package="no-such-package"),
        Candidate("picky", "torch", good, dtypes=("float64",), proj_dim_step=512),
    ]
