"""Imports the layers where no other library is, and prints what is missing when they are asked to patch one."""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Missing(MetaPathFinder):
    """Finds none of the libraries that layers stand in for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.split(".")[0] in ("trak", "dattri", "bergson", "sjlt", "fast_jl", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import torch  # noqa: E402

from trak_fast.compat import bergson, dattri, fast_jl, scipy, sjlt, traker  # noqa: E402, F401

assert not torch.cuda.is_initialized()
assert "fast_jl" not in sys.modules
for layer in (traker, dattri, bergson, sjlt):
    try:
        layer.patch()
    except ModuleNotFoundError as error:
        print(error)
