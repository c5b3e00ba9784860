"""Kills a run before each call that changes the disk, in a fork each, and prints how many such calls a run makes."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attribution import TRAIN, N, build

from trak_fast.scoring import partial_grams

torch.set_num_threads(1)
partial_grams.SAVE_SECONDS = 0  # save with each batch
LASTING = ("pwrite", "fdatasync", "fsync", "link", "rename", "replace", "mkdir", "ftruncate")


def featurize(save_dir: Path, state: dict[str, Any], moment: int) -> None:
    """Featurizes all samples, unless a call that lasts kills the process first: the one whose number is `moment`."""
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
    traker = build(save_dir)
    traker.load_checkpoint(state, model_id=0)
    for start in range(0, N, 5):
        traker.featurize([x[start : start + 5] for x in TRAIN], inds=list(range(start, min(start + 5, N))))
    traker.finalize_features()


torch.func.vmap(torch.func.grad(torch.sum))(torch.ones(1, 1))  # loads torch's modules before the forks
folder = Path(sys.argv[1])
state = torch.load(folder / "state.pt")
moment = 0
killed = True
while killed:
    moment += 1
    child = os.fork()
    if child == 0:
        featurize(folder / str(moment), state, moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = status != 0
    assert status in (0, signal.SIGKILL), (moment, status)
print(moment - 1)
