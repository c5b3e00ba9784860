"""Checks of a projection's results: accuracy, distortion, independence of columns, repeatability."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..projection import reference
from .candidates import Candidate, gradients
from .case import NONZEROS, Case
from .results import Quality

IDENTITY_BYTES = 1 << 28
"""Bytes of the largest identity that is projected to see a matrix; a matrix with more columns is not looked at."""
CHECK_VECTORS = 256
"""Vectors that distortion is measured with."""
ACCURACY_ROWS = 32
"""Rows of P, from everywhere in it, whose results are compared with float64."""
COLUMNS = 4096
"""Columns compared pairwise on a CPU; a GPU compares all."""


@dataclass(frozen=True)
class Distortion:
    """The change of norms and inner products by a projection; see `results.Quality`."""

    norms: float
    inner_products: float
    effective_dim: float


@dataclass(frozen=True)
class Independence:
    """The independence of the columns of P; see `results.Quality`."""

    column_dim: float
    equal_columns: int


def check(candidate: Candidate, case: Case) -> Quality:
    """Checks a candidate's results at one shape, whose batch does not count."""
    rows = 32 if case.device == "cuda" else CHECK_VECTORS  # the fused projections of others take no more on a GPU
    case = replace(case, batch=rows)
    project = candidate.make(case)

    def projected(vectors: Tensor) -> Tensor:
        step = rows if case.device == "cuda" else len(vectors)
        return torch.cat([project(vectors[i : i + step]) for i in range(0, len(vectors), step)])

    grads = gradients(case, CHECK_VECTORS)
    raw, again = projected(grads), projected(grads)
    remade = candidate.make(case)(grads[:rows])
    divisor = math.sqrt(case.column_entries)
    distorted = distortion(grads.double(), raw.double() / (1 if candidate.scaled else divisor))
    sample = torch.arange(0, case.proj_dim, max(1, case.proj_dim // ACCURACY_ROWS))[:ACCURACY_ROWS]
    source: str | None = None
    error: float | None = None
    independence: Independence | None = None
    if case.grad_dim**2 * case.torch_dtype.itemsize <= IDENTITY_BYTES:
        matrix = projected(identity(case)).double()  # (D, k): P'
        independence = columns(matrix if case.device == "cuda" else matrix[:COLUMNS])
        if case.proj_type == "rademacher":  # exact, whatever the result was rounded to
            matrix = matrix.sign() / (divisor if candidate.scaled else 1)
        matrix = matrix[:, sample.to(matrix.device)]
        source = "identity"
    if candidate.ours:
        entries = reference.matrix(case.proj_type, 0, 0, sample.numpy(), range(case.grad_dim), case.proj_dim, NONZEROS)
        matrix = torch.from_numpy(entries).double().T
        source = "reference"
    if source is not None:
        truth = grads[:rows].double().cpu() @ matrix.cpu()
        error = float((raw[:rows].cpu()[:, sample].double() - truth).norm() / truth.norm())
    return Quality(
        repeatable=torch.equal(raw, again),
        remade=torch.equal(raw[:rows], remade),
        error=error,
        matrix=source,
        column_dim=independence.column_dim if independence else None,
        equal_columns=independence.equal_columns if independence else None,
        norm_distortion=distorted.norms,
        inner_distortion=distorted.inner_products,
        effective_dim=distorted.effective_dim,
    )


def identity(case: Case) -> Tensor:
    """Makes the identity (D, D) in the gradients' dtype."""
    return torch.eye(case.grad_dim, dtype=case.torch_dtype, device=case.device)


def distortion(grads: Tensor, projected: Tensor) -> Distortion:
    """Measures the change of norms and inner products by a projection.

    Args:
        grads: (n, D) float64.
        projected: (n, k) float64, scaled so that norms are kept on average.
    """
    lengths = grads.norm(dim=1, keepdim=True)
    grads = grads / lengths
    projected = projected / lengths
    change = projected @ projected.T - grads @ grads.T
    norms = change.diagonal().square().mean()
    off = (change.square().sum() - change.diagonal().square().sum()) / (len(grads) * (len(grads) - 1))
    return Distortion(norms=float(norms.sqrt()), inner_products=float(off.sqrt()), effective_dim=float(2 / norms))


def columns(matrix: Tensor, block: int = 1024) -> Independence:
    """Measures the independence of the columns of P.

    Args:
        matrix: (D, k) float64: the columns, one a row here.
        block: Columns to correlate at a time.
    """
    unit = (matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-300)).float()
    squares = 0.0
    equal = 0
    for start in range(0, len(unit), block):
        correlations = unit[start : start + block] @ unit[start:].T
        upper = correlations.triu_(1)
        squares += float(upper.double().square().sum())
        equal += int((upper.abs() > 0.9999).sum())
    pairs = len(unit) * (len(unit) - 1) / 2
    return Independence(column_dim=pairs / squares if squares else float(matrix.shape[1]), equal_columns=equal)
