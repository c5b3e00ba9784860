"""One of the processes that torchrun starts: projects the gradients of samples, its model split by DTensor."""

import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from sharded_models import SEED, TASK, K, build, samples
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trak_fast.features.streaming import GradientProjector

folder = Path(sys.argv[1])
name = sys.argv[2]
variant = sys.argv[3]
proj_type = sys.argv[4]

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (size,))
model = build(name)
if name == "llama":
    first, last = "model.embed_tokens", "lm_head"
    layers = model.model.layers
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
else:
    first, last = "embedding", "head"
    layers = model.blocks
    columns = ("query", "key", "value", "up")
    rows = ("output", "down")
root = {
    first: (ColwiseParallel if variant == "width" else RowwiseParallel)(
        input_layouts=Replicate(), output_layouts=Replicate()
    ),
    last: ColwiseParallel(output_layouts=Replicate()),
}
plan = {**dict.fromkeys(columns, ColwiseParallel()), **dict.fromkeys(rows, RowwiseParallel())}
if variant == "sequence":
    root["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    root["norm"] = SequenceParallel()
    root["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    plan |= {"first_norm": SequenceParallel(), "second_norm": SequenceParallel()}
    plan |= dict.fromkeys(columns, ColwiseParallel(input_layouts=Shard(1)))
    plan |= dict.fromkeys(rows, RowwiseParallel(output_layouts=Shard(1)))
parallelize_module(model, mesh, root)
if name == "tied":
    model.head.weight = model.embedding.weight
for layer in layers:
    parallelize_module(layer, mesh, plan)

projector = GradientProjector(model, TASK, K, seed=SEED, proj_type=proj_type)
features = [projector.project(samples(count, length=8, seed=call)).numpy() for call, count in enumerate((3, 2))]
np.savez(folder / f"rank_{rank}.npz", features=np.concatenate(features), singly=np.array(sorted(projector.singly)))
dist.barrier()
dist.destroy_process_group()
