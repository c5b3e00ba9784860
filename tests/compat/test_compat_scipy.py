"""The SciPy operator against the reference matrix."""

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, lsqr, svds

from trak_fast.compat.scipy import ProjectionOperator
from trak_fast.projection import reference

RNG = np.random.default_rng(0)
DTYPES = [np.float32, np.float64, np.float16, np.int64]


def operator_and_matrix(kind: str = "normal", scale: float = 0.25) -> tuple[ProjectionOperator, np.ndarray]:
    operator = ProjectionOperator(700, 40, seed=2**64 - 1, proj_type=kind, model_id=3, scale=scale)
    return operator, scale * reference.matrix(kind, 2**64 - 1, 3, range(40), range(700)).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_products(kind: str, dtype: type) -> None:
    operator, P = operator_and_matrix(kind)
    assert (operator.shape, operator.dtype) == ((40, 700), np.float32)
    x, y = (4 * RNG.standard_normal((700, 5))).astype(dtype), (4 * RNG.standard_normal((40, 6))).astype(dtype)
    close = {"rtol": 0, "atol": 3e-4}
    np.testing.assert_allclose(operator.matvec(x[:, 0]), P @ x[:, 0], **close)
    np.testing.assert_allclose(operator.matvec(x[:, :1]), P @ x[:, :1], **close)
    np.testing.assert_allclose(operator @ x, P @ x, **close)
    np.testing.assert_allclose(operator.matmat(np.asfortranarray(x)), P @ x, **close)
    np.testing.assert_allclose(operator.matmat(x[::-1, ::-2]), P @ x[::-1, ::-2], **close)
    np.testing.assert_allclose(operator.rmatvec(y[:, 0]), P.T @ y[:, 0], **close)
    np.testing.assert_allclose(operator.rmatmat(y), P.T @ y, **close)
    np.testing.assert_allclose(operator.T @ y, P.T @ y, **close)
    np.testing.assert_allclose(operator.H @ y, P.T @ y, **close)
    frozen = x.copy()
    frozen.setflags(write=False)
    np.testing.assert_allclose(operator @ frozen, P @ x, **close)
    assert (operator @ x).dtype == np.float32


def test_algebra_and_solvers_of_scipy() -> None:
    operator, P = operator_and_matrix()
    gram = operator @ operator.H
    assert isinstance(gram, LinearOperator)
    v = RNG.standard_normal(40)
    np.testing.assert_allclose(gram @ v, P @ (P.T @ v), rtol=1e-5, atol=1e-3)
    b = RNG.standard_normal(40)
    solution = lsqr(operator, b, atol=1e-6, btol=1e-6)[0]
    np.testing.assert_allclose(solution, np.linalg.lstsq(P, b)[0], rtol=0, atol=1e-5)
    top = svds(operator, k=3, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(top), np.sort(np.linalg.svd(P, compute_uv=False)[:3]), rtol=1e-4)


def test_what_is_refused() -> None:
    operator, _ = operator_and_matrix()
    with pytest.raises(ValueError, match="dimension mismatch"):
        operator.matvec(np.ones(701))
    with pytest.raises(TypeError, match=r"grads must have one of the dtypes .* not torch\.complex128"):
        operator.matvec(np.ones(700, complex))
    with pytest.raises(ValueError, match="proj_type must be one of 'rademacher', 'normal', not 'sparse'"):
        ProjectionOperator(5, 4, proj_type="sparse")
