"""Featurizes while no file may grow beyond a limit."""

import resource
import sys
from pathlib import Path

from attribution import CHECKPOINTS, build, featurize

folder = Path(sys.argv[1])
build(folder).load_checkpoint(CHECKPOINTS[0], 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
featurize(folder)
