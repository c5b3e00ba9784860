"""Imports every module of the package; fails if one warns, initialises CUDA or changes a setting of torch."""

import importlib
import pkgutil
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("CUDA was initialised")


def driver() -> bool:
    """If True, this process has loaded CUDA's driver."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libcuda.so" in maps.read_text()


for library in ("matplotlib", "numpy", "scipy", "sklearn", "tqdm"):  # may do and say what they like
    importlib.import_module(library)
before = driver(), torch.get_num_threads(), torch.random.initial_seed(), torch.get_default_dtype()
torch.cuda._lazy_init = refuse
warnings.simplefilter("error")
package = importlib.import_module("trak_fast")
for module in pkgutil.walk_packages(package.__path__, "trak_fast."):
    if not module.name.endswith("__main__") and ".compat" not in module.name:  # commands; libraries that may be absent
        importlib.import_module(module.name)
assert not torch.cuda.is_initialized()
assert before == (driver(), torch.get_num_threads(), torch.random.initial_seed(), torch.get_default_dtype())
