"""Files whose reading would run code, if they were read as pickles."""

import os
import pickle
from pathlib import Path

import numpy as np
import torch


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def plant(file: Path, kind: str, mark: Path) -> None:
    """Writes a file that makes the folder `mark` when it is unpickled.

    Args:
        file: The file.
        kind: "pickle", "npy", "npz", "torch", or "old torch" for a file as torch < 1.6 wrote it.
        mark: The folder.
    """
    bomb = Bomb(mark)
    with file.open("wb") as handle:
        if kind == "pickle":
            pickle.dump(bomb, handle)
        elif kind == "npy":
            np.save(handle, np.array([bomb], object), allow_pickle=True)
        elif kind == "npz":
            np.savez(handle, indices=np.array([bomb], object), gram=np.array([bomb], object), rows=np.zeros(1))
        else:
            torch.save({"state": bomb}, handle, _use_new_zipfile_serialization=kind == "torch")
