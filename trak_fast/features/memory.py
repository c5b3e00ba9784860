"""Memory that gradients need and that is free, and smaller parts where it runs out."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that operations make, views aside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            self.total += sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


@torch.no_grad()
def sample_bytes(forward: Callable[[], object], gradient_bytes: int) -> int:
    """Computes an upper bound on the memory that one sample's gradient needs.

    Args:
        forward: Computes the model output of one sample.
        gradient_bytes: Size of the gradient. It counts twice, as parts of it exist twice while it is made.

    Returns:
        Bytes. The results of the forward pass count twice too, as autograd keeps them and makes a gradient for each.
    """
    counter = _Counter()  # type: ignore[no-untyped-call]
    with counter, suppress(RuntimeError):  # from a task that differentiates by itself, which it cannot here
        forward()
    total: int = counter.total
    return 2 * (gradient_bytes + total)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that are free on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds but does not use is free to us
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def halving_on_oom(count: int, size: int, compute: Callable[[slice], object]) -> int:
    """Calls `compute` for slices of up to `size` of `count` samples, and for smaller ones where memory runs out.

    Returns:
        The size that was used in the end.

    Raises:
        torch.cuda.OutOfMemoryError: Not even one sample fits.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            compute(slice(start, stop))
        except torch.cuda.OutOfMemoryError:
            if stop - start == 1:
                raise
            size = (stop - start) // 2
        else:
            start = stop
    return size
