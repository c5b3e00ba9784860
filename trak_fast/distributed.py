"""Many processes: which rows each has, and what they sum and gather (torch.distributed).

Every process of a group gets the same calls and does its share of them. What they compute is exchanged through the
store's folder, which all of them see, apart from sums and lists of the best scores. Groups use gloo, whose sums are
taken in the processors' memory: X'X is float64 and small beside the features.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def share(total: int, rank: int, size: int) -> slice:
    """The rows of one of `size` processes: contiguous, in the order of ranks, their numbers differ by at most one."""
    return slice(total * rank // size, total * (rank + 1) // size)


_joined: weakref.WeakSet[Ranks] = weakref.WeakSet()
_begun: list[bool] = []  # whether the group is ours to end


@atexit.register
def _leave() -> None:
    """Ends groups before the interpreter does: their threads must not let go of tensors when it is half gone."""
    for ranks in _joined:
        ranks._group = None
    if _begun and dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """One of `size` processes that work together; of one process alone unless it was started otherwise."""

    def __init__(self, distributed: bool | None = None) -> None:
        """Joins the group.

        Args:
            distributed: Whether to work together with the other processes; None: if torch.distributed is initialised,
                or torchrun started the process, which initialises it with gloo.

        Raises:
            RuntimeError: It is True, but there is no group to join.
        """
        self.rank, self.size, self._group = 0, 1, None
        if distributed is False or not dist.is_available():
            return
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                if distributed:
                    raise RuntimeError("distributed=True, but torch.distributed is not initialised; use torchrun")
                return
            dist.init_process_group("gloo")
            _begun.append(True)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            # ranks wait for the slowest, however long; that one died shows at once by its connections
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            _joined.add(self)

    def rows(self, total: int) -> slice:
        """This process's share of `total` rows."""
        return share(total, self.rank, self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on the device of `value`."""
        if self.size == 1:
            return value
        total = value.cpu()
        dist.all_reduce(total, group=self._group)
        return total.to(value.device)

    def gather(self, value: T) -> list[T]:
        """What all processes have, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """At the end of the block waits for all; if one of them raised something, all do, and none waits in vain."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(errors):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")
