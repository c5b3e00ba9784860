"""Random projections for scikit-learn, in the manner of its `GaussianRandomProjection` and `SparseRandomProjection`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import pinvh
from scipy.sparse import csc_array, csr_array, csr_matrix, issparse, sparray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from ..arguments import integer, one_of, real
from ..projection.checks import BLOCK_ROWS, DEFAULT_NONZEROS, NONZEROS, SPARSE
from ..projection.functions import matrix, project_adjoint
from ..projection.projector import Projector
from ..scales import beyond_float32, map_rows

__all__ = ["FusedRandomProjection", "FusedSparseProjection"]
_DENSE = 1 << 24
"""The largest number of elements of a sparse or random matrix that are made dense at a time."""

Entries: TypeAlias = NDArray[np.float64] | csr_array
"""A part of a matrix, in float64."""

Fitted = TypeVar("Fitted", bound="_FusedProjection")


class _FusedProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """The parts that the projections have in common; each has parameters and a kind of matrix of its own."""

    n_components: int | str
    eps: float
    compute_inverse_components: bool
    random_state: int | np.random.RandomState | None
    n_components_: int
    n_features_in_: int
    seed_: int
    projector_: Projector

    @abstractmethod
    def _make_projector(self) -> Projector:
        """Makes the projector of the parameters, and checks them."""

    @abstractmethod
    def _divisor(self) -> float:
        """Returns the number by which the projector's results are divided."""

    @abstractmethod
    def _entries(self, rows: slice, columns: slice) -> Entries:
        """Returns a part of `components_`, in float64."""

    def _fitting(self, components: int) -> int:
        """Returns the least number of components that is possible and no less than `components`."""
        return components

    def fit(self: Fitted, X: Any, y: Any = None) -> Fitted:
        """Notes the number of features, and draws the seed.

        Args:
            X: (n_samples, n_features), dense or sparse; only its shape counts.
            y: Ignored.

        Returns:
            The transformer.

        Raises:
            ValueError: A parameter is out of its range, or X is no matrix of numbers.
            TypeError: A parameter has the wrong type.
        """
        X = self._validated(X, reset=True)
        if isinstance(self.n_components, str):
            if self.n_components != "auto":
                raise ValueError(f"n_components must be 'auto' or an integer, not {self.n_components!r}")
            self.n_components_ = self._fewest_components(*X.shape)
        else:
            self.n_components_ = integer("n_components", self.n_components, 1)
        high, low = check_random_state(self.random_state).randint(0, 2**32, 2, dtype=np.uint64).tolist()
        self.seed_ = high << 32 | low
        self.projector_ = self._make_projector()  # checks the rest
        if self.compute_inverse_components:
            self.inverse_components_ = self._inverse(np.eye(self.n_components_)).T.astype(X.dtype)
        return self

    def transform(self, X: Any) -> NDArray[Any]:
        """Projects samples.

        Args:
            X: (n_samples, n_features), dense or sparse; a sparse X is made dense in blocks of rows.

        Returns:
            (n_samples, n_components), float32 for float32 input, otherwise float64.

        Raises:
            ValueError: X does not have the features of `fit`, or a sample's result is beyond its dtype.
        """
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        projector = self.projector_
        result = np.empty((X.shape[0], self.n_components_), X.dtype)
        for rows in gen_batches(X.shape[0], max(1, _DENSE // X.shape[1] if hasattr(X, "toarray") else X.shape[0])):
            block = X[rows].toarray() if hasattr(X, "toarray") else X[rows]
            if not block.flags.writeable or min(block.strides) < 0:
                block = block.copy()
            projected = map_rows(projector.project, torch.from_numpy(block)).double().numpy()
            result[rows] = _as_dtype(projected / self._divisor(), X.dtype)
        return result

    def inverse_transform(self, X: Any) -> NDArray[Any]:
        """Takes projected samples back: of all samples with these projections, to those of the least norm.

        Args:
            X: (n_samples, n_components), dense or sparse.

        Returns:
            (n_samples, n_features), X times the transposed pseudo-inverse of `components_`; float32 for float32 input,
            otherwise float64. The matrix is made in blocks, and not stored.

        Raises:
            ValueError: X does not have `n_components_` columns, or a result is beyond its dtype.
        """
        check_is_fitted(self)
        X = check_array(X, dtype=[np.float64, np.float32], accept_sparse=("csr", "csc"))
        if X.shape[1] != self.n_components_:
            raise ValueError(f"X must have n_components_ = {self.n_components_} columns, not {X.shape[1]}")
        Y = (X.toarray() if hasattr(X, "toarray") else X).astype(np.float64)
        inverse = Y @ self.inverse_components_.T if self.compute_inverse_components else self._inverse(Y)
        return _as_dtype(inverse, X.dtype)

    def _inverse(self, Y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Multiplies Y (n, k) by the transposed pseudo-inverse of C = `components_`, which is (CC')⁺C and C(C'C)⁺."""
        k, features = self.n_components_, self.n_features_in_
        gram = np.zeros((min(k, features),) * 2)
        result = np.zeros((len(Y), features))
        if k <= features:
            columns = list(gen_batches(features, max(1, _DENSE // k)))
            for part in columns:
                block = self._entries(slice(0, k), part)
                gram += _dense(block @ block.T)
            Y = Y @ pinvh(gram)
            for part in columns:
                result[:, part] = Y @ self._entries(slice(0, k), part)
            return result
        # C has more rows than columns, so CC' would be the larger of the two, and singular
        for part in gen_batches(k, max(1, _DENSE // features)):
            block = self._entries(part, slice(0, features))
            gram += _dense(block.T @ block)
            result += Y[:, part] @ block
        least_norm: NDArray[np.float64] = result @ pinvh(gram)
        return least_norm

    def _fewest_components(self, samples: int, features: int) -> int:
        """Returns the number of components that keep distances up to `eps`, from 1 to `features`."""
        eps = real("eps", self.eps, 0, above=True)
        if eps >= 1:
            raise ValueError(f"eps must be in (0, 1), not {eps:g}")
        components = self._fitting(int(johnson_lindenstrauss_min_dim(samples, eps=eps)))
        if not 1 <= components <= features:
            raise ValueError(
                f"eps={eps:g} and n_samples={samples} lead to {components} components, "
                f"which is not in 1 to n_features={features}"
            )
        return components

    def _validated(self, X: Any, reset: bool) -> Any:
        """Checks X as scikit-learn does. If `reset` is True, notes its features, which else must be those of `fit`."""
        return validate_data(self, X, reset=reset, accept_sparse="csr", dtype=[np.float64, np.float32])

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.input_tags.sparse = True
        return tags


class FusedRandomProjection(_FusedProjection):
    """Reduces features by a random matrix that is made inside the multiplication and never stored.

    Distances are kept: results are scaled by 1/√n_components. For any number of features, the transformer stores a seed
    and no matrix, unless `compute_inverse_components` asks for one. Samples of any scale are right to float32's
    precision.

    Parameters:
        n_components: Number of components, or "auto": as many as `eps` needs (Johnson-Lindenstrauss).
        eps: Distortion of distances that "auto" allows, in (0, 1).
        proj_type: "normal" (each entry standard normal) or "rademacher" (±1).
        compute_inverse_components: Stores the pseudo-inverse of the matrix at `fit`, by which `inverse_transform` is
            faster.
        random_state: An int, a `numpy.random.RandomState`, or None for a new matrix at each `fit`.

    Attributes:
        n_components_: Number of components.
        n_features_in_: Number of features seen by `fit`.
        feature_names_in_: Names of the features seen by `fit`, if they have any.
        seed_: The seed of the matrix, drawn by `fit`.
        projector_: The projector of the matrix, which later changes of parameters do not reach.
        components_: The scaled matrix (n_components, n_features), made anew at each access.
        inverse_components_: Its pseudo-inverse (n_features, n_components), if `compute_inverse_components`.
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        eps: float = 0.1,
        compute_inverse_components: bool = False,
        proj_type: str = "normal",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.eps = eps
        self.compute_inverse_components = compute_inverse_components
        self.proj_type = proj_type
        self.random_state = random_state

    @property
    def components_(self) -> NDArray[np.float32]:
        """The scaled matrix (n_components, n_features)."""
        check_is_fitted(self)
        P = matrix(self.projector_.proj_type, self.seed_, 0, range(self.n_components_), range(self.n_features_in_))
        components: NDArray[np.float32] = P.div_(self._divisor()).numpy()
        return components

    def _make_projector(self) -> Projector:
        if self.proj_type == SPARSE:
            raise ValueError(
                f"proj_type must be one of 'rademacher', 'normal', not {SPARSE!r}; FusedSparseProjection has it"
            )
        return Projector(self.n_features_in_, self.n_components_, self.seed_, self.proj_type, precision="highest")

    def _divisor(self) -> float:
        return math.sqrt(self.n_components_)

    def _entries(self, rows: slice, columns: slice) -> Entries:
        kind = self.projector_.proj_type
        P = matrix(kind, self.seed_, 0, range(rows.start, rows.stop), range(columns.start, columns.stop))
        entries: NDArray[np.float64] = P.double().div_(self._divisor()).numpy()
        return entries


class FusedSparseProjection(_FusedProjection):
    """Reduces features by a sparse random matrix that is made inside the additions and never stored.

    Each column has `nonzeros` entries ±1/√nonzeros, one in each block of n_components / nonzeros rows. Distances are
    kept, and the work is `nonzeros` additions for each element of X, however many components there are (Kane, Nelson,
    "Sparser Johnson-Lindenstrauss transforms", JACM 2014). The transformer stores a seed and no matrix, unless
    `compute_inverse_components` asks for one. Samples of any scale are right to float32's precision.

    Parameters:
        n_components: Number of components, `nonzeros` times a power of two in [16, 2^20]; or "auto": the next such
            number that is as many as `eps` needs (Johnson-Lindenstrauss).
        nonzeros: Entries of each column: 1, 2, 4 or 8. With fewer, samples whose norm is in few features are distorted
            more.
        eps: Distortion of distances that "auto" allows, in (0, 1).
        dense_output: Returns dense results for sparse X too.
        compute_inverse_components: Stores the pseudo-inverse of the matrix at `fit`, by which `inverse_transform` is
            faster.
        random_state: An int, a `numpy.random.RandomState`, or None for a new matrix at each `fit`.

    Attributes:
        n_components_: Number of components.
        n_features_in_: Number of features seen by `fit`.
        feature_names_in_: Names of the features seen by `fit`, if they have any.
        seed_: The seed of the matrix, drawn by `fit`.
        projector_: The projector of the matrix, which later changes of parameters do not reach.
        density_: Share of the matrix that is not 0, nonzeros / n_components.
        components_: The scaled matrix (n_components, n_features) in CSR format, made anew at each access.
        inverse_components_: Its pseudo-inverse (n_features, n_components), if `compute_inverse_components`.
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        nonzeros: int = DEFAULT_NONZEROS,
        eps: float = 0.1,
        dense_output: bool = False,
        compute_inverse_components: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.nonzeros = nonzeros
        self.eps = eps
        self.dense_output = dense_output
        self.compute_inverse_components = compute_inverse_components
        self.random_state = random_state

    def transform(self, X: Any) -> Any:
        """Projects samples.

        Args:
            X: (n_samples, n_features), dense or sparse; a sparse X is made dense in blocks of rows.

        Returns:
            (n_samples, n_components), float32 for float32 input, otherwise float64; in CSR format for sparse X, unless
            `dense_output`.

        Raises:
            ValueError: X does not have the features of `fit`, or a sample's result is beyond its dtype.
        """
        result = super().transform(X)
        if self.dense_output or not issparse(X):
            return result
        return (csr_array if isinstance(X, sparray) else csr_matrix)(result)

    @property
    def density_(self) -> float:
        """The share of the matrix that is not 0."""
        check_is_fitted(self)
        return self._nonzeros() / self.n_components_

    @property
    def components_(self) -> csr_matrix:
        """The scaled matrix (n_components, n_features), float32."""
        check_is_fitted(self)
        entries = self._entries(slice(0, self.n_components_), slice(0, self.n_features_in_))
        return csr_matrix(entries.astype(np.float32))

    def _fitting(self, components: int) -> int:
        nonzeros = one_of("nonzeros", self.nonzeros, NONZEROS)
        rows = max(BLOCK_ROWS[0], -(-components // nonzeros))
        return nonzeros << (rows - 1).bit_length()

    def _make_projector(self) -> Projector:
        return Projector(
            self.n_features_in_,
            self.n_components_,
            self.seed_,
            SPARSE,
            precision="highest",
            nonzeros=one_of("nonzeros", self.nonzeros, NONZEROS),
        )

    def _divisor(self) -> float:
        return math.sqrt(self._nonzeros())

    def _nonzeros(self) -> int:
        """Returns the entries of a column of the fitted matrix."""
        number = self.projector_.nonzeros
        assert number is not None
        return number

    def _entries(self, rows: slice, columns: slice) -> Entries:
        nonzeros, count = self._nonzeros(), columns.stop - columns.start
        block = self.n_components_ // nonzeros
        places = torch.zeros(nonzeros, self.n_components_, dtype=torch.float32, device="cpu")
        for q in range(nonzeros):
            places[q, q * block : (q + 1) * block] = torch.arange(1, block + 1, device="cpu")
        # entry j of row q: the sign of column j times 1 + the place of its entry in block q
        found = project_adjoint(
            places, count, proj_type=SPARSE, seed=self.seed_, offset=columns.start, nonzeros=nonzeros
        ).T.numpy()
        indices = np.abs(found).astype(np.int64) - 1 + block * np.arange(nonzeros)
        starts = np.arange(0, count * nonzeros + 1, nonzeros)
        values = np.sign(found).astype(np.float64) / self._divisor()
        shape = (self.n_components_, count)
        return csc_array((values.ravel(), indices.ravel(), starts), shape=shape).tocsr()[rows]


def _dense(product: Entries) -> NDArray[np.float64]:
    """Returns a matrix as an array."""
    if isinstance(product, np.ndarray):
        return product
    array: NDArray[np.float64] = product.toarray()
    return array


def _as_dtype(result: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Returns results (n, k) in the dtype of the samples, which must hold them."""
    largest = np.abs(result).max(axis=1, initial=0)
    bad = beyond_float32(largest) if dtype == np.float32 else ~np.isfinite(largest)
    if len(samples := np.flatnonzero(bad)):
        raise ValueError(
            f"the results of samples {samples.tolist()[:5]} must be within the range of X's dtype {dtype}, "
            f"not {largest[samples[0]]:.3g}; "
            + ("pass float64" if dtype == np.float32 else "multiply them by a constant")
        )
    return result.astype(dtype, copy=False)
