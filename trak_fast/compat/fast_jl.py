"""The functions of fast_jl 0.1.3, for any device, dtype and size.

`trak_fast.compat.install_fast_jl()` makes `import fast_jl` find this module.

- input: (B, F), float32, float16, bfloat16 or float64, on CUDA or the CPU, any strides.
- B, N: any; the 8, 16 or 32 in a function's name is no limit. (fast_jl takes 32 rows in a pass, and multiples of 512
  for N.)
- seed: any integer, taken modulo 2^64. Callers pass `seed + 10000 * model_id`, which may be negative or one of NumPy's
  integers.
- num_feature_tiles: has no influence. (fast_jl's result depends on it, and callers pass the GPU's number of
  multiprocessors.)
- result: (B, N), float32, unscaled, on the input's device and current stream.
"""

from __future__ import annotations

from typing import SupportsIndex

from torch import Tensor

from ..projection.functions import project
from .patching import bits

__all__ = [
    "project_normal_8",
    "project_normal_16",
    "project_normal_32",
    "project_rademacher_8",
    "project_rademacher_16",
    "project_rademacher_32",
]


def project_rademacher_8(input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: int = 0) -> Tensor:
    """Projects (B, F) to (B, N) by a matrix of ±1."""
    return project(input, N, proj_type="rademacher", seed=bits("seed", seed, 64))  # type: ignore[arg-type]


def project_normal_8(input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: int = 0) -> Tensor:
    """Projects (B, F) to (B, N) by a matrix of standard normal entries."""
    return project(input, N, proj_type="normal", seed=bits("seed", seed, 64))  # type: ignore[arg-type]


project_rademacher_16 = project_rademacher_32 = project_rademacher_8
project_normal_16 = project_normal_32 = project_normal_8
