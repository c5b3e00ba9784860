"""One of the processes that torchrun starts: featurizes, extends the folder, and featurizes the rest."""

import sys
from pathlib import Path

import numpy as np
from extended import NEW, OLD, featurize, opened, score

save_dir, size = Path(sys.argv[1]), int(sys.argv[2])
traker = opened(save_dir, size)  # of a folder that is half extended, if it has `NEW`
if size == OLD:
    featurize(traker, 0, OLD)
    traker.finalize_features()
    score(traker)
    traker.extend(NEW)
assert (traker.train_set_size, traker.rows().stop - traker.rows().start) == (NEW, NEW // 2)
featurize(traker, 0, NEW)
traker.finalize_features()
score(traker)
top = traker.top_scores("test", 3)
np.savez(save_dir / f"rank_{traker.rows().start}.npz", influence=traker.self_influence(), indices=top.indices)
