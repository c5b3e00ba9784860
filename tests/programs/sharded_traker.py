"""One of the processes that torchrun starts: an attribution with a model sharded by FSDP2, or whole."""

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sharded_models import SEED, TASK, Given, K, build, samples
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import trak_fast
from trak_fast.tasks import CausalLM


def function(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Computes the f of causal language modelling for one sample alone."""
    batch = [tokens.unsqueeze(0), mask.unsqueeze(0)]
    return TASK.get_outputs(Given(model(*batch)), {}, {}, batch)[0]


class Weighted(CausalLM):
    """Causal language modelling with weightings by a pass of their own."""

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        return self.get_outputs(model, weights, buffers, batch).detach().sigmoid()


folder = Path(sys.argv[1])
name = sys.argv[2]
variant = sys.argv[3]
task = {"causal": TASK, "function": function, "weighted": Weighted()}[sys.argv[4]]
folder.mkdir(exist_ok=True)
N, M = 11, 3
train, targets = samples(N, seed=1), samples(M, seed=2)
model = build(name)
checkpoints = [copy.deepcopy(model.state_dict())]
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.1
checkpoints.append(copy.deepcopy(model.state_dict()))
rank = 0
if variant != "whole":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.blocks:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
if variant == "shards":  # state dicts of shards
    for place, checkpoint in enumerate(checkpoints):
        trak_fast.checkpoints.load_checkpoint(model, checkpoint)
        checkpoints[place] = copy.deepcopy(model.state_dict())
traker = trak_fast.TRAKer(model, task, N, folder / "results", proj_dim=K, projector_seed=SEED, metric=None)
own = traker.rows() if variant == "own rows" else range(N)
for model_id, checkpoint in enumerate(checkpoints):
    traker.load_checkpoint(checkpoint, model_id)
    for start in range(0, len(own), 2):
        rows = np.array(own[start : start + 2])
        traker.featurize([x[rows] for x in train], inds=rows)
        if variant == "shards":
            dist.barrier()
traker.finalize_features()
for model_id, checkpoint in enumerate(checkpoints):
    traker.start_scoring_checkpoint("test", checkpoint, model_id, num_targets=M)
    traker.score(targets, num_samples=M)
scores = traker.finalize_scores("test")
np.savez(folder / f"rank_{rank}.npz", scores=scores, influence=traker.self_influence())
