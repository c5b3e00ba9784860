"""Kills a process before each call of `extend` that changes the disk, in a fork each; prints how many there are."""

import shutil
import sys
from pathlib import Path

import torch
from extended import NEW, OLD, opened
from killing import count_moments, die_at

LASTING = ("pwrite", "fdatasync", "fsync", "ftruncate", "link", "mkdir", "rename", "replace", "rmdir", "unlink")
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def extend(moment: int) -> None:
    """Extends a copy of the folder, unless the lasting call whose number is `moment` comes first."""
    save_dir = folder / str(moment)
    shutil.copytree(folder / "before", save_dir)
    traker = opened(save_dir, OLD)
    die_at(moment, LASTING)
    traker.extend(NEW)


print(count_moments(extend))
