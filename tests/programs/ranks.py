"""One of the processes that torchrun starts: a whole run, in which rank 1 may die or pass over a batch."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from attribution import N, build, run

from trak_fast.traker import TRAKer

save_dir = Path(sys.argv[1])
proj_dim = int(sys.argv[2])
mode = sys.argv[3]
rank = int(os.environ["RANK"])
featurize = TRAKer.featurize
calls = 0


def counting(self: TRAKer, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Counts the calls of featurize; the third call of rank 1 kills its process or does nothing, as `mode` says."""
    global calls
    calls += 1
    if mode == "die" and rank == 1 and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "skip" and rank == 1 and calls == 3:
        return
    featurize(self, batch, *args, **kwargs)


TRAKer.featurize = counting
traker = build(save_dir, proj_dim=proj_dim)
rows = [*traker.rows()], [*traker.rows(4)]
line = f"rows {rank} {rows[0][0]} {rows[0][-1] + 1} {rows[1][0]} {rows[1][-1] + 1}"
print(line + "\n", end="", flush=True)  # in one piece: ranks share a pipe
scores = run(traker)
assert scores.shape == (N, 4)
top, low = traker.top_scores("test", 3), traker.top_scores("test", N, largest=False)
assert (low.indices[:, ::-1] == (-scores).argsort(0, kind="stable").T).all()
np.save(save_dir / f"influence_{rank}.npy", traker.self_influence())
