"""Kills a run before each call that changes the disk, in a fork each, and prints how many such calls a run makes."""

import sys
from pathlib import Path

import torch
from attribution import TRAIN, N, build
from killing import count_moments, die_at

from trak_fast.scoring import partial_grams

torch.set_num_threads(1)
partial_grams.SAVE_SECONDS = 0  # save with each batch
LASTING = ("pwrite", "fdatasync", "fsync", "link", "rename", "replace", "mkdir", "ftruncate")


def featurize(moment: int) -> None:
    """Featurizes all samples, unless a call that lasts kills the process first: the one whose number is `moment`."""
    die_at(moment, LASTING)
    traker = build(folder / str(moment))
    traker.load_checkpoint(state, model_id=0)
    for start in range(0, N, 5):
        traker.featurize([x[start : start + 5] for x in TRAIN], inds=list(range(start, min(start + 5, N))))
    traker.finalize_features()


torch.func.vmap(torch.func.grad(torch.sum))(torch.ones(1, 1))  # loads torch's modules before the forks
folder = Path(sys.argv[1])
state = torch.load(folder / "state.pt")
print(count_moments(featurize))
