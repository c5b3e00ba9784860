"""Featurizes the first batch of the first checkpoint, waits for a line, and goes on; prints the error of that."""

import os
import sys
from pathlib import Path

from attribution import CHECKPOINTS
from extended import OLD, featurize, opened

traker = opened(Path(sys.argv[1]), OLD)
traker.load_checkpoint(CHECKPOINTS[0], 0)
if sys.argv[2] == "claimed":
    featurize(traker, 0, 5, model_ids=(0,))
print(os.getpid(), flush=True)
sys.stdin.readline()
try:
    featurize(traker, 5, OLD, model_ids=(0,))
except ValueError as error:
    print(error)
