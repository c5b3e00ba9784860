"""What a projection's results are worth: accuracy, distortion, independence of columns, repeatability."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..projection import reference
from .candidates import Candidate, gradients
from .case import Case

IDENTITY_BYTES = 1 << 28
"""Of the identity that is projected to see a matrix; where the whole one is larger, the matrix isn't looked at."""

CHECK_VECTORS = 256
ACCURACY_ROWS = 32
COLUMNS = 4096
"""That a processor correlates with each other; a GPU takes all."""


def check(candidate: Candidate, case: Case) -> dict[str, Any]:
    """What a candidate's results are worth at one shape, whose batch does not count.

    Returns:
        `error`: ‖y − Pg‖/‖Pg‖ against float64, or None; `matrix`: where P came from ("reference", for ours; "identity":
        the projection of the identity); `norm_distortion`: root mean square of ‖y‖²/‖g‖² − 1; `inner_distortion`: that
        of ⟨y, y'⟩/(‖g‖‖g'‖) − ⟨g, g'⟩/(‖g‖‖g'‖); `effective_dim`: the k of independent entries with that distortion of
        norms, 2/distortion²; `column_dim`: 1/mean squared correlation of two columns of P, which is k where entries are
        independent, or None; `equal_columns`: pairs of these that are equal up to sign; `repeatable`: whether the
        same call gave the same bits twice, and `remade`: whether a projection made anew did.
    """
    rows = 32 if case.device == "cuda" else CHECK_VECTORS  # on a GPU what the fused projections of others take
    case = replace(case, batch=rows)
    project = candidate.make(case)

    def projected(vectors: Tensor) -> Tensor:
        step = rows if case.device == "cuda" else len(vectors)
        return torch.cat([project(vectors[i : i + step]) for i in range(0, len(vectors), step)])

    grads = gradients(case, CHECK_VECTORS)
    raw, again = projected(grads), projected(grads)
    remade = candidate.make(case)(grads[:rows])
    divisor = candidate.divisor(case.proj_dim) if candidate.dense else math.sqrt(case.proj_dim)
    result: dict[str, Any] = {
        "repeatable": torch.equal(raw, again),
        "remade": torch.equal(raw[:rows], remade),
        "error": None,
        "matrix": None,
        "column_dim": None,
        "equal_columns": None,
        **distortion(grads.double(), raw.double() * (divisor / math.sqrt(case.proj_dim))),
    }
    sample = min(ACCURACY_ROWS, case.proj_dim)
    if case.grad_dim**2 * case.torch_dtype.itemsize <= IDENTITY_BYTES:
        matrix = projected(identity(case)).double()  # (D, k): P'
        result.update(columns(matrix if case.device == "cuda" else matrix[:COLUMNS]))
        if candidate.dense and case.proj_type == "rademacher":  # exact, whatever the result was rounded to
            matrix = matrix.sign() / divisor
        result["matrix"] = "identity"
    if candidate.ours:
        entries = reference.matrix(case.proj_type, 0, 0, range(sample), range(case.grad_dim))
        matrix = torch.from_numpy(entries).double().T
        result["matrix"] = "reference"
    if result["matrix"]:
        truth = grads[:rows].double().cpu() @ matrix[:, :sample].cpu()
        result["error"] = float((raw[:rows, :sample].double().cpu() - truth).norm() / truth.norm())
    return result


def identity(case: Case) -> Tensor:
    """The identity (D, D) in the gradients' dtype."""
    return torch.eye(case.grad_dim, dtype=case.torch_dtype, device=case.device)


def distortion(grads: Tensor, projected: Tensor) -> dict[str, float]:
    """How a projection changes norms and inner products.

    Args:
        grads: (n, D) float64.
        projected: (n, k) float64, scaled so that norms are kept on average.
    """
    grads, lengths = grads / grads.norm(dim=1, keepdim=True), grads.norm(dim=1, keepdim=True)
    projected = projected / lengths
    change = projected @ projected.T - grads @ grads.T
    norms = change.diagonal().square().mean()
    off = (change.square().sum() - change.diagonal().square().sum()) / (len(grads) * (len(grads) - 1))
    return {
        "norm_distortion": float(norms.sqrt()),
        "inner_distortion": float(off.sqrt()),
        "effective_dim": float(2 / norms),
    }


def columns(matrix: Tensor, block: int = 1024) -> dict[str, float | int]:
    """Whether columns of P are independent.

    Args:
        matrix: (D, k) float64: the columns, one a row here.
        block: Of columns to correlate at a time.
    """
    unit = (matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-300)).float()
    squares, equal = 0.0, 0
    for start in range(0, len(unit), block):
        correlations = unit[start : start + block] @ unit[start:].T
        upper = correlations.triu_(1)
        squares += float(upper.double().square().sum())
        equal += int((upper.abs() > 0.9999).sum())
    pairs = len(unit) * (len(unit) - 1) / 2
    return {"column_dim": pairs / squares if squares else float(matrix.shape[1]), "equal_columns": equal}
