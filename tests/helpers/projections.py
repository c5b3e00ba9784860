"""Gradients, and how far their projection may be from a float64 product with the reference matrix.

The bound. A kernel may split an input into bf16 terms and adds n = terms · D products in float32, in an order of its
own. P's entries are independent of the gradient g, with mean 0 and variance 1, so a sum Σ P_j c_j with fixed c stays
below 6 ‖c‖ (Hoeffding: 4e-9 of failing; the seeds are fixed, so a pass stays a pass).

- Splitting: the kernel sees g_j (1 + δ_j) with |δ_j| ≤ ε, so the result moves by Σ P_j g_j δ_j, at most 6 ε ‖g‖.
  A bf16 has 8 bits, so the nearest one to a value in [1, 2) is within 2^-8 and the rest, below that, has a nearest one
  within 2^-17: ε is 2^-8 for one term, 2^-17 for two, and 0 for three, which hold all 24 bits. float64 becomes float32
  first, with 2^-24. bf16 and fp16 are exact.
- Adding: each of the n roundings is at most 2^-24 of a partial sum, hence 2^-24 · 6 ‖g‖, with independent signs
  (Higham and Mary, "A new approach to probabilistic rounding error analysis", SISC 2019), so all together are at most
  6 √n times that. A single lost or wrong column would show: it moves the result by about ‖g‖ / √D.
- Matrix instructions read bf16 below 2^-126 as 0, and |P| < 4.32.
"""

import functools
import itertools
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

import trak_fast
from trak_fast.projection import reference

FORCED = os.environ.get("TRAK_FAST_ISA")
ISAS: list[str] = [FORCED] if FORCED else trak_fast.info()["instruction_sets"]
BOTH_PANELS = list(dict.fromkeys([ISAS[0], ISAS[-1]]))
"""The best instruction set, whose panels hold bfloat16 where the processor has that, and the portable one: floats."""

KINDS = ["rademacher", "normal"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Terms, and ε. None, the default, is at least "high".
SPLITS = {None: (3, 2.0**-17), "highest": (3, 0.0), "high": (2, 2.0**-17), "medium": (1, 2.0**-8)}
SEED, MODEL_ID = 2**63 + 11, 2**31 + 5


def tolerance(grads: torch.Tensor, precision: str | None = None) -> np.ndarray:
    """(B, 1) float64, the bound above for each row of (B, D) `grads`."""
    terms, split = SPLITS[precision]
    if grads.dtype == torch.float64:
        split += 2.0**-24
    elif grads.dtype != torch.float32:
        terms, split = 2, 0.0  # fp16 may become two terms, exactly
    n = terms * grads.shape[1]
    norm = grads.detach().double().norm(dim=1, keepdim=True).numpy()
    return (6 * split + 36 * math.sqrt(n) * 2.0**-24) * norm + n * 2.0**-124


def check(y: torch.Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    assert y.dtype == torch.float32
    assert y.shape == expected.shape
    excess = np.abs(y.detach().double().numpy() - expected) - bound
    assert np.all(excess <= 0), f"{np.sum(excess > 0)} of {excess.size} entries, the worst by {excess.max()}"


@functools.cache
def entries(proj_type: str, offset: int = 0, proj_dim: int = 1000, grad_dim: int = 4099) -> np.ndarray:
    columns = range(offset, offset + grad_dim)
    return reference.matrix(proj_type, SEED, MODEL_ID, range(proj_dim), columns).astype(np.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def project(grads: Any, proj_dim: int, proj_type: str = "rademacher", **options: Any) -> torch.Tensor:
    return trak_fast.project(grads, proj_dim, proj_type=proj_type, seed=SEED, model_id=MODEL_ID, **options)


@functools.cache
def integer_case() -> tuple[torch.Tensor, np.ndarray]:
    grads = torch.randint(-128, 129, (33, 70001), generator=torch.Generator().manual_seed(1))
    return grads, reference.project(grads.numpy(), 33, "rademacher", SEED, MODEL_ID, 2**32 - 35000)


STRIDES = {
    "transposed": lambda dtype: random(600, 33, dtype=dtype).T,
    "every other row and third column": lambda dtype: random(66, 1800, dtype=dtype)[::2, ::3],
    "first element not aligned": lambda dtype: random(1 + 33 * 600, dtype=dtype)[1:].view(33, 600),
    "rows not aligned": lambda dtype: random(33, 607, dtype=dtype)[:, 3:603],
    "one row repeated": lambda dtype: random(1, 600, dtype=dtype).expand(33, 600),
    "one column repeated": lambda dtype: random(33, 1, dtype=dtype).expand(33, 600),
    "overlapping windows": lambda dtype: random(700, dtype=dtype).as_strided((33, 600), (3, 1), 1),
    "inner dimension of three": lambda dtype: random(33, 600, 5, dtype=dtype)[..., 2],
    "requires grad": lambda dtype: random(33, 600, dtype=dtype).requires_grad_(),
    "parameter": lambda dtype: torch.nn.Parameter(random(33, 600, dtype=dtype)),
    "inside a graph": lambda dtype: random(33, 600, dtype=dtype).requires_grad_() * 2,
}


def layout_cases(
    layouts: Iterable[str], whole: Sequence[str], others: Sequence[str], in_place: Sequence[torch.dtype] = ()
) -> list[tuple[str, str, torch.dtype, str]]:
    """Cases (backend, layout, dtype, kind) for tests of strides.

    Layouts and dtypes are resolved before a backend's own code. The backends in `whole` get all pairs of both for one
    kind; for the other kind, and on the `others`, each dtype has one layout. Dtypes that the others read `in_place`,
    where the layout is their own matter, have all layouts there too.
    """
    every = [*itertools.product(layouts, DTYPES)]
    some = [(layout, DTYPES[i % len(DTYPES)]) for i, layout in enumerate(layouts) if i < len(DTYPES)]
    more = [(layout, dtype) for layout, dtype in every if dtype in in_place]
    cases = []
    for backend in (*whole, *others):
        pairs = every if backend in whole else list(dict.fromkeys([*some, *more]))
        cases += [(backend, *pair, "normal") for pair in pairs]
        cases += [(backend, *pair, "rademacher") for pair in some]
    return cases


def check_layout(layout: str, dtype: torch.dtype, proj_type: str) -> None:
    """Projects gradients that lie in memory as one of STRIDES says."""
    grads = STRIDES[layout](dtype)
    expected = grads.detach().double().numpy() @ entries(proj_type)[:40, 100:700].T
    y = project(grads, 40, proj_type, offset=100)
    check(y, expected, tolerance(grads))
    assert not y.requires_grad


def per_parameter_gradients(batch: int) -> dict[str, torch.Tensor]:
    return {
        "conv.weight": random(batch, 7, 3, 5, 2).permute(0, 4, 2, 1, 3),
        "conv.bias": random(batch, 14, seed=1)[:, ::2],
        "scale": random(2 * batch, seed=2)[::2],
        "linear.weight": random(batch, 40, 30, dtype=torch.bfloat16, seed=3).transpose(1, 2),
        "nothing": random(batch, 0, 3),
        "linear.bias": random(1, 13, dtype=torch.float16, seed=4).expand(batch, 13),
        "matrix": random(batch, 9, 70, dtype=torch.float64, seed=5).requires_grad_(),
        "shift": random(batch, seed=6),
    }


def zeros_without_memory(n: int) -> torch.Tensor:
    """(n,) bfloat16 whose pages exist once they are written to; a read meets the system's one page of zeros."""
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * n, flags=flags), dtype=torch.bfloat16)
