"""Runs `trak-fast lm` on the folders that its arguments name; fails if anything tries to reach a network."""

import sys

from network import require_silence, watch

watch()
from trak_fast.cli import main  # noqa: E402

status = main(["lm", *sys.argv[1:]])
require_silence()
sys.exit(status)
