"""One of the processes that torchrun starts: a stage of a pipeline, whose schedule runs the passes."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sharded_models import SEED, TASK, VOCABULARY, WIDTH, Given, K, build, samples
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from trak_fast.features.streaming import GradientProjector

folder = Path(sys.argv[1])
schedule_type = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[sys.argv[2]]
MICRO_BATCHES = 3


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return TASK.get_outputs(Given(logits), {}, {}, [tokens, torch.ones_like(tokens)]).sum()


dist.init_process_group("gloo")
rank = dist.get_rank()
whole = build("untied")
columns = GradientProjector(whole, TASK, K).columns
parts = (nn.Sequential(whole.embedding, whole.blocks[0]), nn.Sequential(whole.blocks[1], whole.norm, whole.head))
names = {id(parameter): name for name, parameter in whole.named_parameters()}
own = {name: columns[names[id(parameter)]] for name, parameter in parts[rank].named_parameters()}
projector = GradientProjector(parts[rank], TASK, K, seed=SEED, columns=own)
tokens, hidden = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, WIDTH, requires_grad=True)
shapes = [tokens, hidden, torch.zeros(2, 8, VOCABULARY, requires_grad=True)]  # or a trial pass finds them out
stage = PipelineStage(
    parts[rank], rank, 2, torch.device("cpu"), input_args=(shapes[rank],), output_args=(shapes[rank + 1],)
)
schedule = schedule_type(stage, MICRO_BATCHES, loss_fn=loss)
features = []
for seed in range(2):
    tokens = samples(6, length=8, seed=seed)[0]
    with projector.stage(6, MICRO_BATCHES) as passed:
        schedule.step(*([tokens] if rank == 0 else []), target=tokens)
    dist.all_reduce(passed.features)
    features.append(passed.features.numpy())
np.savez(folder / f"rank_{rank}.npz", features=np.concatenate(features))
dist.barrier()
dist.destroy_process_group()
