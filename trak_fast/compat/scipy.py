"""The projection matrix as a `scipy.sparse.linalg.LinearOperator`."""

from __future__ import annotations

import enum
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from ..arguments import real
from ..projection.projector import Projector
from ..scales import beyond_float32, map_rows

__all__ = ["ProjectionOperator"]


class ProjectionOperator(LinearOperator):  # type: ignore[misc]
    """The operator scale · P, (k, D), without a stored matrix.

    `matvec` and `matmat` project; `rmatvec` and `rmatmat` apply the adjoint. Results are float32. Columns of any scale
    are right to its precision; one whose result float32 cannot hold is a ValueError.

    Args:
        grad_dim: D, the number of columns.
        proj_dim: k, the number of rows.
        seed: See `trak_fast.project`.
        proj_type: "rademacher", "normal" or "sjlt".
        model_id: See `trak_fast.project`.
        scale: The factor of P, such as 1/√k to keep lengths, or 1/√nonzeros for "sjlt".
        nonzeros: See `trak_fast.project`.

    Raises:
        ValueError: A number is out of range.
        TypeError: Something has the wrong type.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str | enum.Enum = "rademacher",
        model_id: int = 0,
        *,
        scale: float = 1.0,
        nonzeros: int | None = None,
    ) -> None:
        self.projector = Projector(grad_dim, proj_dim, seed, proj_type, precision="highest", nonzeros=nonzeros)
        self.model_id = model_id
        self.scale = real("scale", scale, -sys.float_info.max)
        super().__init__(np.dtype(np.float32), (self.projector.proj_dim, self.projector.grad_dim))

    def _matmat(self, X: NDArray[Any]) -> NDArray[np.float32]:
        return self._scaled(map_rows(partial(self.projector.project, model_id=self.model_id), _batch(X)), X)

    def _rmatmat(self, X: NDArray[Any]) -> NDArray[np.float32]:
        return self._scaled(map_rows(partial(self.projector.adjoint, model_id=self.model_id), _batch(X)), X)

    def _matvec(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _rmatvec(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return self._rmatmat(x.reshape(-1, 1))[:, 0]

    def _scaled(self, result: torch.Tensor, X: NDArray[Any]) -> NDArray[np.float32]:
        """Scales the result for X, and returns its rows as columns, which float32 must hold."""
        array: NDArray[Any]
        if result.dtype == torch.float32 and (self.scale == 0 or 2.0**-60 <= abs(self.scale) <= 2.0**20):
            array = result.mul_(self.scale).numpy().T  # magnitudes in [2^-120, 2^120], or 0
            return array
        array = result.double().mul_(self.scale).numpy().T
        largest = np.abs(array).max(axis=0, initial=0)
        columns = np.flatnonzero(beyond_float32(largest))
        columns = columns[np.isfinite(X[:, columns]).all(axis=0)]  # else the result is not finite either
        if len(columns):
            raise ValueError(
                f"the largest magnitude of a result must be 0 or in [1.18e-38, 3.4e+38], not {largest[columns[0]]:.3g} "
                f"(columns {columns.tolist()[:5]}); multiply them, or `scale`, by a constant"
            )
        return array.astype(np.float32)


def _batch(X: NDArray[Any]) -> torch.Tensor:
    """Returns the columns of X as the rows of a tensor, without a copy if dtype and strides allow."""
    X = np.asarray(X)
    if X.dtype.kind != "c" and X.dtype not in (np.float16, np.float32, np.float64):  # Projector refuses complex ones
        X = X.astype(np.float64)
    if not X.flags.writeable or any(step < 0 for step in X.strides):
        X = X.copy()
    return torch.from_numpy(X.T)
