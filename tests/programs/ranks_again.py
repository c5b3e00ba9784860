"""One of the processes that torchrun starts: experiments and checkpoints are replaced while others have them open."""

import sys
from pathlib import Path

import numpy as np
from attribution import CHECKPOINTS, TRAIN, M, N, build, data, run

from trak_fast.traker import TRAKer


def score(traker: TRAKer, targets: int, seed: int) -> None:
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("test", state, model_id, num_targets=targets)
        for i in range(targets):
            traker.score([x[i : i + 1] for x in data(targets, seed)], num_samples=1)


save_dir = Path(sys.argv[1])
traker = build(save_dir)
run(traker)
score(traker, M, 9)
again = np.array(build(save_dir).finalize_scores("test"))  # while `traker` has claimed targets
score(traker, M, 99)
first = np.array(traker.finalize_scores("test"))
score(traker, M, 9)
other = build(save_dir)
other.delete_experiment("test")
assert other.store.experiments() == []
score(traker, 3, 9)
fewer = np.array(traker.finalize_scores("test"))
traker.load_checkpoint(CHECKPOINTS[0], 0)
traker.featurize(TRAIN, num_samples=N)  # claims samples
other = build(save_dir, load_from_save_dir=False)
other.load_checkpoint(CHECKPOINTS[1], 0)
other.featurize(TRAIN, num_samples=N)
other.finalize_features()
np.savez(save_dir / f"rank_{other.rows().start}.npz", again=again, first=first, fewer=fewer, gram=other.store.gram(0))
