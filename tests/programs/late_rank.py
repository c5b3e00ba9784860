"""One of two processes that torchrun starts, the second of which is late."""

import os
import sys
import threading
import time
from pathlib import Path

from attribution import N, build

from trak_fast import distributed

distributed.PATIENCE_SECONDS = 0.5
if os.environ["RANK"] == "1":
    time.sleep(4)
traker = build(Path(sys.argv[1]))
assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
assert len(traker.rows()) == N // 2
