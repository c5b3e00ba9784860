"""One of the processes that torchrun starts: projects the gradients of its own samples, its model sharded by FSDP2."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sharded_models import SEED, TASK, K, build, samples
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trak_fast.features.streaming import GradientProjector

folder = Path(sys.argv[1])
name = sys.argv[2]
variant = sys.argv[3]

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (size,))
model = build(name)
for module in [*model.modules()] if variant == "each" else []:
    if isinstance(module, nn.Linear):
        fully_shard(module, mesh=mesh)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if variant == "half" else None)
if variant == "checkpointed":
    model.gradient_checkpointing_enable()
for layer in model.model.layers if name == "llama" else model.blocks:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)

projector = GradientProjector(model, TASK, K, seed=SEED)
counts = [[3, 0, 5, 1], [0, 2, 1, 4], [2, 2, 0, 0]]  # of each rank, call by call
rows = {}
for call, shares in enumerate(counts):
    batch = samples(shares[rank], length=7 + rank, seed=10 * call + rank)
    if variant == "coupled" and rank == 1:
        batch[0][:, 0] = 0
    dist.barrier()  # a call is over in all processes once it is in one
    rows[f"call_{call}"] = projector.project(batch).numpy()
assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
rows["singly"] = np.array(sorted(projector.singly))
rows["parameters"] = np.array(sorted(projector.selected))
np.savez(folder / f"rank_{rank}.npz", **rows)
dist.barrier()
dist.destroy_process_group()
