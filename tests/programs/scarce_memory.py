"""Projects by four threads under limits of memory, around the least that suffices, and prints how each attempt ended.

Each attempt is a process. A thread that found no memory would end it: by SIGABRT, or by the C library with status 127.
"""

import collections
import os
import resource
from collections.abc import Callable

import numpy as np
import torch

import trak_fast

STEP, LIMITS = 1 << 14, 64  # bytes between two limits, and their number: about 1 MiB, of which the last tenth suffices
RESULTS = {0: "passed", 1: "MemoryError"}


def attempt(call: Callable[[], object], spare: int) -> str:
    child = os.fork()
    if child == 0:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + spare
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            call()
        except MemoryError:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return RESULTS.get(status, f"status {status}")


torch.set_num_threads(4)
# NumPy fills them without threads, whose memory the attempts would find and take.
grads = torch.from_numpy(np.ones((3, 600_000), np.float32))
many = torch.from_numpy(np.ones((48, 40_000), np.float32))  # whose panels do not fit into what imports have left over
y = torch.from_numpy(np.ones((3, 2**18), np.float32))
CALLS = {
    "dense": lambda: trak_fast.project(many, 4096),
    "sparse": lambda: trak_fast.project(grads, 2**20, proj_type="sjlt", nonzeros=1),
    "sparse adjoint": lambda: trak_fast.project_adjoint(y, 600_000, proj_type="sjlt", nonzeros=1),
}
for name, call in CALLS.items():
    short, enough = 0, 1 << 30
    while enough - short > STEP:
        middle = (short + enough) // 2
        if attempt(call, middle) == "passed":
            enough = middle
        else:
            short = middle
    ends = (attempt(call, max(0, enough + (i - LIMITS * 9 // 10) * STEP)) for i in range(LIMITS))
    print(name, *sorted(collections.Counter(ends)), sep=", ", flush=True)
