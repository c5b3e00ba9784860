"""The settings of a benchmark, the defaults for a device, and the grid of cases that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import projection
from ..arguments import choice, integer
from ..projection.checks import MAX_COLUMNS
from .case import DEVICES, DTYPES, MOST_GRADIENTS, PROJ_TYPES, Case


@dataclass(frozen=True)
class Settings:
    """The grid that a run measures.

    Attributes:
        device: "cpu" or "cuda".
        batches: Gradients at a time, B, to measure.
        grad_dims: Sizes of a gradient, D, to measure.
        proj_dims: Projected sizes, k, to measure.
        dtypes: Dtypes of gradients to measure.
        proj_types: Kinds of matrix to measure.
        check_dims: D at which accuracy, distortion and repeatability are checked.
        check_proj_dim: k of these checks.
        full: If True, every combination is measured; otherwise one thing is varied at a time, from the middle one of
            each (the first one for dtypes and kinds of matrix).
        only: Parts of the names of candidates; empty: all candidates.
        threads: Processor threads to use.
    """

    device: str
    batches: tuple[int, ...]
    grad_dims: tuple[int, ...]
    proj_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    proj_types: tuple[str, ...]
    check_dims: tuple[int, ...]
    check_proj_dim: int
    full: bool
    only: tuple[str, ...]
    threads: int

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            TypeError: A setting has a wrong type.
            ValueError: A setting is out of its range.
        """
        choice("device", self.device, DEVICES)
        for name, high in (
            ("batches", MOST_GRADIENTS),
            ("grad_dims", MAX_COLUMNS),
            ("proj_dims", 2**32),
            ("check_dims", MAX_COLUMNS),
        ):
            for size in getattr(self, name):
                integer(name, size, 1, high)
        for dtype in self.dtypes:
            choice("dtypes", dtype, DTYPES)
        for proj_type in self.proj_types:
            choice("proj_types", proj_type, PROJ_TYPES)
        for name in ("batches", "grad_dims", "proj_dims", "dtypes", "proj_types"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be one or more values, not {getattr(self, name)}")
        integer("check_proj_dim", self.check_proj_dim, 1, 2**32)
        integer("threads", self.threads, 1)

    def cases(self) -> list[Case]:
        """Lists the cases to time, those that matter most first."""
        axes = (self.batches, self.grad_dims, self.proj_dims, self.dtypes, self.proj_types)
        middle = [sorted(values)[len(values) // 2] for values in axes[:3]]
        base = [*middle, self.dtypes[0], self.proj_types[0]]
        points: dict[tuple[Any, ...], int] = {tuple(base): 0}
        for axis, values in enumerate(axes):
            for step, value in enumerate(values):
                points.setdefault(tuple([*base[:axis], value, *base[axis + 1 :]]), 1 + step)
        ordered = sorted(points, key=lambda point: points[point])  # an early end leaves something of each axis
        if self.full:
            for b in self.batches:
                for d in self.grad_dims:
                    for k in self.proj_dims:
                        ordered += [(b, d, k, dtype, kind) for dtype in self.dtypes for kind in self.proj_types]
        return [Case(*point, self.device) for point in dict.fromkeys(ordered)]  # type: ignore[arg-type, call-arg]

    def checks(self) -> list[Case]:
        """Lists the cases to check: every size and kind with the first dtype, the smallest size with the others."""
        return [
            Case(1, grad_dim, self.check_proj_dim, dtype, kind, self.device)
            for dtype in self.dtypes
            for kind in self.proj_types
            for grad_dim in (self.check_dims if dtype == self.dtypes[0] else sorted(self.check_dims)[:1])
        ]


def check_device(device: str) -> None:
    """Checks that a device is there.

    Raises:
        TypeError: `device` is no string.
        ValueError: There is no such device.
    """
    choice("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' where torch finds no CUDA device, not 'cuda'")


def defaults(device: str | None = None) -> Settings:
    """Returns the settings of a run without arguments, which takes four and a half minutes on two cores.

    Args:
        device: By default "cuda" if there is a CUDA device that trak_fast has kernels for, else "cpu".

    Raises:
        TypeError: `device` is no string.
        ValueError: There is no such device.
    """
    if device is None:
        known = any(found["kernels"] for found in projection.info()["cuda_devices"])
        device = "cuda" if known and torch.cuda.is_available() else "cpu"
    check_device(device)
    gpu = device == "cuda"
    return Settings(
        device=device,
        batches=(1, 8, 32, 128, 512) if gpu else (1, 8, 32, 64, 256),
        grad_dims=(1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
        if gpu
        else (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20),
        proj_dims=(1024, 4096, 16384) if gpu else (256, 1024, 4096),
        dtypes=("bfloat16", "float16", "float32") if gpu else ("float32", "bfloat16"),
        proj_types=PROJ_TYPES,
        check_dims=(650, 7850, 50000),
        check_proj_dim=4096 if gpu else 512,
        full=False,
        only=(),
        threads=torch.get_num_threads(),
    )
