"""Many processes that share the work: the rows of each, sums and lists over all of them (torch.distributed).

Every process of a group gets the same calls and does its share of them. Results are exchanged through the store's
folder, which all processes see, apart from sums and lists of the best scores. Groups use gloo, whose sums are taken in
the processors' memory: X'X is float64, and small beside the features.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch import Tensor

PATIENCE_SECONDS = 10.0
"""Seconds of waiting for the other processes after which a message says so."""

logger = logging.getLogger("trak_fast")
T = TypeVar("T")
P = ParamSpec("P")


def share(total: int, rank: int, size: int) -> slice:
    """Returns the rows of one of `size` processes: contiguous, in the order of ranks, equal numbers up to one."""
    return slice(total * rank // size, total * (rank + 1) // size)


def _nothing() -> None:
    """Does nothing."""


_joined: weakref.WeakSet[Ranks] = weakref.WeakSet()
_initialized_here = False  # True once torch.distributed was initialised here, and is to be ended here


@atexit.register
def _leave() -> None:
    """Leaves groups before the interpreter shuts down: their threads must not free tensors meanwhile."""
    for ranks in _joined:
        ranks.leave()
    if _initialized_here and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _telling_that_it_waits() -> Iterator[None]:
    """Logs an error if the block takes long, as it does where other processes never get there; it goes on waiting."""
    message = (
        "still waiting for the other processes of torch.distributed: each of them must make a TRAKer too; "
        "TRAKer(..., distributed=False) works alone"
    )
    timer = threading.Timer(PATIENCE_SECONDS, logger.error, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class OtherRankError(RuntimeError):
    """The error that another process failed, which this one would wait for in vain."""


class Ranks:
    """This process's place among those that work together; it works alone unless it was started otherwise.

    Attributes:
        rank: Number of this process, from 0.
        size: The number of processes.
    """

    def __init__(self, distributed: bool | None = None) -> None:
        """Joins the group.

        Args:
            distributed: True joins the other processes, False works alone. None joins them if torch.distributed is
                initialised, or if torchrun started this process; it is then initialised with gloo.

        Raises:
            RuntimeError: It is True, but there is no group to join.
        """
        self.rank = 0
        self.size = 1
        self.prepare: Callable[[], object] = _nothing  # before each meeting: finishes what needs all processes
        self._group: Any = None
        if distributed is False or not dist.is_available():
            return
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                if distributed:
                    raise RuntimeError("distributed=True, but torch.distributed is not initialised; use torchrun")
                return
            with _telling_that_it_waits():
                dist.init_process_group("gloo")
            global _initialized_here
            _initialized_here = True
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        if self.size > 1:
            # ranks wait for the slowest one, however long; the death of one shows at once by its connections
            with _telling_that_it_waits():
                self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            _joined.add(self)

    def leave(self) -> None:
        """Lets go of the group."""
        self._group = None

    def rows(self, total: int) -> slice:
        """Returns this process's share of `total` rows."""
        return share(total, self.rank, self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Sums a tensor over all processes; the sum is on its device."""
        if self.size == 1:
            return value
        self.prepare()
        total = value.cpu()
        dist.all_reduce(total, group=self._group)
        return total.to(value.device)

    def gather(self, value: T) -> list[T]:
        """Collects a value of each process, in the order of ranks."""
        if self.size == 1:
            return [value]
        self.prepare()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Waits until all processes are here."""
        with self.together():
            pass

    def first(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Makes a call in the first process, for whose end the others wait; if it raises, all raise."""
        with self.together():
            if self.rank == 0:
                call(*args, **kwargs)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Lets all processes leave the block together: if one raises, all raise, and none waits in vain."""
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
                raise OtherRankError(f"rank {rank} failed: {message}")
