"""Processes that are killed before a call that changes the disk, each at another one."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def die_at(moment: int, lasting: Sequence[str]) -> None:
    """Has this process killed before a call that lasts: the one whose number is `moment`, counted from here on.

    Args:
        moment: The number of the call, from 1 on.
        lasting: Names of functions of `os` that change the disk. Of `pwrite` half reaches it.
    """
    calls = 0

    def dying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                if name == "pwrite":
                    handle, data, offset = args
                    function(handle, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in lasting:
        setattr(os, name, dying(name, getattr(os, name)))


def count_moments(work: Callable[[int], object]) -> int:
    """Does work with a number from 1 on, in a fork each, until it is no longer killed; returns how often it was."""
    moment = 0
    killed = True
    while killed:
        moment += 1
        child = os.fork()
        if child == 0:
            work(moment)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = status != 0
        assert status in (0, signal.SIGKILL), (moment, status)
    return moment - 1
