"""Kills a process before each call of `extend` that changes the disk, in a fork each; prints how many there are."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from extended import NEW, OLD, opened

LASTING = ("pwrite", "fdatasync", "fsync", "ftruncate", "link", "mkdir", "rename", "replace", "rmdir", "unlink")
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def extend(save_dir: Path, moment: int) -> None:
    """Extends a folder, unless the lasting call whose number is `moment` comes first."""
    traker = opened(save_dir, OLD)
    calls = 0

    def dying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                if name == "pwrite":  # half of it reaches the disk
                    handle, data, offset = args
                    function(handle, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in LASTING:
        setattr(os, name, dying(name, getattr(os, name)))
    traker.extend(NEW)


moment = 0
killed = True
while killed:
    moment += 1
    shutil.copytree(folder / "before", folder / str(moment))
    child = os.fork()
    if child == 0:
        extend(folder / str(moment), moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = status != 0
    assert status in (0, signal.SIGKILL), (moment, status)
print(moment - 1)
