"""Memory that gradients need and that is free, and smaller parts where it runs out."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..gradients.errors import is_out_of_memory


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
    """Returns the bytes that are free on a device.

    On the CPU they are those that the machine has, and no more than the limits of the process (`ulimit -v`, `-d`) and
    of its control groups leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds but does not use is free to us
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([_free_of_machine(), *_left_by_limits(), *_left_by_groups()]))


def _free_of_machine() -> int:
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_by_limits() -> list[int]:
    """Lists the bytes that each limit of the process leaves it."""
    limits = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
    finite = {name: soft for name, limit in limits.items() if (soft := resource.getrlimit(limit)[0]) >= 0}
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        used = {
            name: 1024 * int(value.split()[0])
            for name, _, value in (line.partition(":") for line in lines)
            if name in finite
        }
        return [finite[name] - used[name] for name in used]
    return []


def _left_by_groups(listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Lists the bytes that the limits of the process's control groups leave, those of the groups around them included.

    Pages of files that were not used lately count as free: the kernel gives them up first.

    Args:
        listing: The file that names the groups: "0::/path" in version 2, "4:memory:/path" in version 1.
        root: The folder of the groups' file systems.
    """
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "memory" if controllers else root
        parts = [] if ".." in path else Path(path).parts[1:]  # a group outside of what a container sees
        for depth in range(len(parts) + 1):
            group = mount.joinpath(*parts[:depth])
            limits = ("memory.limit_in_bytes",) if controllers else ("memory.max", "memory.high")
            numbers = [number for name in limits if (number := _number(group / name)) is not None]
            used = _number(group / ("memory.usage_in_bytes" if controllers else "memory.current"))
            if numbers and used is not None:
                cached = _number(group / "memory.stat", "total_inactive_file" if controllers else "inactive_file") or 0
                left.append(min(numbers) - max(0, used - cached))
    return left


def _number(path: Path, name: str = "") -> int | None:
    """Reads the number in a file of a control group, or that after a name in it; None where there is none."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:-1] == ([name] if name else []):
                return int(words[-1])
    return None


def halving_on_oom(count: int, size: int, compute: Callable[[slice], object]) -> int:
    """Calls `compute` for slices of up to `size` of `count` samples, and for smaller ones where memory runs out.

    Returns:
        The size that was used in the end.

    Raises:
        Exception: Not even one sample fits; it is the error of its computation (see `is_out_of_memory`).
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            compute(slice(start, stop))
        except Exception as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start) // 2
        else:
            start = stop
    return size
