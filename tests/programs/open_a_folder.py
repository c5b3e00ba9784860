"""Opens a folder at a moment, which other processes do too, with a seed; prints whether it may."""

import sys
import time
from pathlib import Path

from attribution import build

seed = int(sys.argv[2])
moment = float(sys.argv[3])
time.sleep(max(0, moment - time.time()))
try:
    build(Path(sys.argv[1]), projector_seed=seed)
    print("opened", seed)
except ValueError as error:
    print("refused", seed, "seed: stored" in str(error))
