"""Prints how many MiB the best scores, and then all scores, of 500,000 samples and 200 targets take."""

import sys
from pathlib import Path

import torch
from torch import nn

from trak_fast import TRAKer

torch.set_num_threads(1)
n = 500_000
m = 200
model = nn.Linear(3, 2)
traker = TRAKer(model, lambda model, x: model(x[None])[0, 0], n, Path(sys.argv[1]), proj_dim=4)
traker.load_checkpoint(model.state_dict(), 0)
generator = torch.Generator().manual_seed(0)
for _ in range(n // 50_000):
    traker.featurize([torch.randn(50_000, 3, generator=generator)], num_samples=50_000)
traker.finalize_features()
traker.start_scoring_checkpoint("x", model.state_dict(), 0, num_targets=m)
traker.score([torch.randn(m, 3, generator=generator)], num_samples=m)


def status(field: str) -> float:
    """A size that the system tells of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


for compute in (lambda: traker.top_scores("x", 10), lambda: traker.finalize_scores("x")):
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = status("VmRSS")
    compute()
    print(status("VmHWM") - before)
