"""Featurizes under a limit on the process's memory, and prints the bytes that were free and the samples at a time.

Arguments: the folder, and the memory budget in MiB; 0 for that of the free memory.
"""

import resource
import sys

import torch
from torch import Tensor, nn

import trak_fast
from trak_fast.features.memory import free_bytes
from trak_fast.gradients import FunctionalGradientComputer

COUNT, SPARE = 64, 1 << 29
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1000, 4000), nn.ReLU(), nn.Linear(4000, 4))  # a gradient has 16 MB
batch = [torch.randn(COUNT, 1000), torch.randint(4, (COUNT,))]
sizes: list[int] = []


class Watching(FunctionalGradientComputer):
    def compute_per_sample_grad(self, batch: list[Tensor]) -> dict[str, Tensor]:
        sizes.append(len(batch[0]))
        return super().compute_per_sample_grad(batch)


traker = trak_fast.TRAKer(
    model,
    "image_classification",
    COUNT,
    sys.argv[1],
    gradient_computer=Watching,
    proj_dim=16,
    grad_wrt=["0.*"],
    memory_budget=int(sys.argv[2]) << 20 or None,
)
traker.load_checkpoint(model.state_dict(), 0)
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + SPARE
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
free = free_bytes(torch.device("cpu"))
traker.featurize(batch, num_samples=COUNT)
print(free, *sizes)
