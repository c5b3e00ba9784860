"""bergson 2.5's global projection (`bergson.collector.collector.project_global`).

Call `patch()` to put it into bergson, or call `project_global` itself. bergson names each module's matrix by an
identifier, which contains its seed; trak_fast's seed and model_id are taken from the identifier's SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import choice
from ..projection import reference
from ..projection.checks import SPARSE
from ..projection.functions import matrix, project
from .patching import Patch, fitting_nonzeros

__all__ = ["patch", "project_global"]
_SLAB = 1 << 26
"""The largest number of entries of outer products that are formed at a time."""
_patch: Patch | None = None


def project_global(
    identifier: str, P: Any, m: int, projection_type: str = "normal", projection_scale: str = "jl"
) -> Tensor:
    """Returns `P @ R.T` for the (m, n) projection matrix R with the name `identifier`.

    Args:
        identifier: The name of R; each identifier has a matrix of its own.
        P: Gradients (N, n), or bergson's `OuterProductGradients`, which are formed in slabs.
        m: The number of rows of R.
        projection_type: "normal" or "rademacher"; or "sjlt", which bergson does not have, for an m that is a power of
            two.
        projection_scale: "jl" divides by √m ("sjlt": by √nonzeros), which keeps norms on average; "row_norm" divides
            each output by the norm of its row of R.

    Returns:
        Float32 (N, m), also for gradients in half precision: bergson adds the modules' results in the dtype of the
        first one.

    Raises:
        ValueError: `projection_scale` or `projection_type` is unknown, or a size is out of range.
        TypeError: An argument has the wrong type.
    """
    choice("projection_scale", projection_scale, ("jl", "row_norm"))
    seed, model_id = matrix_of(identifier)
    nonzeros = fitting_nonzeros(m) if projection_type == SPARSE else None
    options: dict[str, Any] = {
        "proj_type": projection_type,
        "seed": seed,
        "model_id": model_id,
        "nonzeros": nonzeros,
    }
    if isinstance(P, Tensor):
        columns = P.shape[1]
        result = project(P, m, **options)
    else:
        rows = P.g.shape[-1]
        width = P.a.shape[-1]
        columns = rows * width
        result = torch.zeros(len(P.g), m, dtype=torch.float32, device=P.g.device)
        step = max(1, _SLAB // max(1, width * len(P.g)))
        for first in range(0, rows, step):
            slab = _rows(P, first, min(first + step, rows)).materialize().flatten(1)
            project(slab, m, offset=first * width, out=result, **options)
    if projection_scale == "jl":
        return result.div_(math.sqrt(nonzeros or m))
    if projection_type == "rademacher":
        return result.div_(math.sqrt(columns))
    norms = _row_norms if nonzeros is None else _sparse_row_norms
    return result.div_(norms(seed, model_id, m, columns).to(result.device))


def matrix_of(identifier: str) -> tuple[int, int]:
    """Returns the seed and the model_id of trak_fast for an identifier."""
    digest = hashlib.sha256(identifier.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:12], "little")


def _rows(grads: Any, first: int, last: int) -> Any:
    """Cuts outer products to rows `first` to `last - 1` of the (O, W) gradients."""
    bias = None if grads.bias is None else grads.bias[..., first:last]
    divisor = None if grads.divisor is None else grads.divisor[first:last]
    return replace(grads, g=grads.g[..., first:last], bias=bias, divisor=divisor)


@functools.lru_cache(maxsize=4096)
def _row_norms(seed: int, model_id: int, rows: int, columns: int) -> Tensor:
    """Computes the norms of the rows of a normal matrix, (rows,) float32."""
    squares = torch.zeros(rows, dtype=torch.float64)
    step = max(1, (1 << 24) // rows)
    for first in range(0, columns, step):
        block = matrix("normal", seed, model_id, range(rows), range(first, min(first + step, columns)))
        squares += block.double().square().sum(1)
    return squares.sqrt().float()


@functools.lru_cache(maxsize=4096)
def _sparse_row_norms(seed: int, model_id: int, rows: int, columns: int) -> Tensor:
    """Computes the norms of the rows of a sparse matrix, (rows,) float32; 1 for a row without an entry."""
    nonzeros = fitting_nonzeros(rows)
    whole, rest = divmod(columns, rows // nonzeros)
    # each chunk of columns meets every row once, the last one some of them
    last = np.arange(columns - rest, columns, dtype=np.uint64)
    met = reference.sparse_rows(seed, model_id, last, rows, nonzeros).ravel().astype(np.intp)
    counts = torch.from_numpy(whole + np.bincount(met, minlength=rows))
    return counts.clamp_min(1).sqrt().float()


def patch() -> Patch:
    """Puts `project_global` into an installed bergson, and into all modules that have imported bergson's own.

    Returns:
        The patch, which can be undone.

    Raises:
        ImportError: bergson is not installed.
    """
    global _patch
    if _patch is None or not _patch.active:
        collector = importlib.import_module("bergson.collector.collector")
        _patch = Patch(collector, {"project_global": project_global})
    return _patch
