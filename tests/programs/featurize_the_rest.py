"""Featurizes the samples from number 4 on, in batches of 4."""

import sys
from pathlib import Path

from attribution import CHECKPOINTS, TRAIN, build

traker = build(Path(sys.argv[1]))
traker.load_checkpoint(CHECKPOINTS[0], 0)
for start in range(4, 12, 4):
    traker.featurize([x[start : start + 4] for x in TRAIN], inds=range(start, start + 4))
