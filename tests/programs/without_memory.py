"""Projects tensors whose memory is elsewhere or gone, and prints of each whether its memory was named."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trak_fast

freed = torch.ones(3, 5)
part = freed[1:]
freed.untyped_storage().resize_(0)
shrunk = torch.ones(9, 5)
shrunk.untyped_storage().resize_(80)
with FakeTensorMode():
    fake = torch.ones(3, 5)
out = torch.zeros(3, 4)
out.untyped_storage().resize_(0)
calls = {
    "freed": lambda: trak_fast.project(freed, 4),
    "part of freed": lambda: trak_fast.project(part, 4),
    "shrunk": lambda: trak_fast.project({"a": torch.ones(9, 2), "b": shrunk}, 4),
    "fake": lambda: trak_fast.project(fake, 4),
    "zero": lambda: trak_fast.project(torch._efficientzerotensor((3, 5)), 4),
    "functional": lambda: torch.func.functionalize(lambda g: trak_fast.project(g, 4))(torch.ones(3, 5)),
    "out": lambda: trak_fast.project(torch.ones(3, 5), 4, out=out),
}
for name, call in calls.items():
    try:
        call()
    except (TypeError, ValueError) as error:
        print(name, "memory" in str(error), flush=True)
    else:
        print(name, "passed", flush=True)
