"""One of the processes that torchrun starts, of which there are more than training samples and targets."""

import sys
from pathlib import Path

import numpy as np
import torch
from attribution import CHECKPOINTS, SEED, network

from trak_fast.traker import TRAKer

save_dir, n = Path(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
batch = [torch.randn(n, 12, dtype=torch.float64, generator=generator), torch.arange(n) % 3]
traker = TRAKer(network(), "image_classification", n, save_dir, proj_dim=4, projector_seed=SEED, lambda_reg=0.3)
traker.load_checkpoint(CHECKPOINTS[0], 0)
traker.featurize(batch, num_samples=n)
traker.finalize_features()
traker.start_scoring_checkpoint("test", CHECKPOINTS[0], 0, num_targets=1)
traker.score([x[:1] for x in batch], num_samples=1)
top = traker.top_scores("test", n + 2)
low = traker.top_scores("test", 1, largest=False)
scores = np.array(traker.finalize_scores("test"))
influence = traker.self_influence()
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
np.savez(
    save_dir / f"rank_{rank}.npz",
    scores=scores,
    indices=top.indices,
    top=top.scores,
    low=low.scores,
    influence=influence,
    features=traker.store.train(0).features,
    weights=traker.store.train(0).weights,
)
