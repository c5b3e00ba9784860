"""The SciPy operator against the reference matrix."""

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, lsqr, svds

from trak_fast.compat.scipy import ProjectionOperator
from trak_fast.projection import reference

DTYPES = [np.float32, np.float64, np.float16, np.int64]


def operator_and_matrix(kind: str = "normal", scale: float = 0.25) -> tuple[ProjectionOperator, np.ndarray]:
    nonzeros = 2 if kind == "sjlt" else None
    k = 64 if nonzeros else 40
    operator = ProjectionOperator(700, k, 2**64 - 1, kind, model_id=3, scale=scale, nonzeros=nonzeros)
    return operator, scale * reference.matrix(kind, 2**64 - 1, 3, range(k), range(700), k, 2).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
def test_products(rng: np.random.Generator, kind: str, dtype: type) -> None:
    operator, P = operator_and_matrix(kind)
    assert (operator.shape, operator.dtype) == (P.shape, np.float32)
    x, y = (4 * rng.standard_normal((700, 5))).astype(dtype), (4 * rng.standard_normal((len(P), 6))).astype(dtype)
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


@pytest.mark.parametrize("scale", [0.25, 1e-30, 1e25])
def test_columns_of_any_scale(rng: np.random.Generator, scale: float) -> None:
    """float64 columns beyond float32 and denormal ones, where the result is within float32."""
    operator, P = operator_and_matrix(scale=scale)
    powers = np.round(np.log2(1 / scale)).astype(int) + np.array([0, 110, -100, 60, 0])
    for matrix, multiply in ((P, operator.matmat), (P.T, operator.rmatmat)):
        unit = rng.standard_normal((matrix.shape[1], 5)) * np.array([1, 1, 1, 1, 0])
        result = multiply(np.ldexp(unit, powers))
        assert result.dtype == np.float32
        error = np.ldexp(result.astype(np.float64), -powers) - matrix @ unit
        assert np.abs(error).max() <= 1e-4 * scale
        vector = np.ldexp(unit[:, 1], powers[1])
        single = operator.matvec(vector) if matrix is P else operator.rmatvec(vector)
        np.testing.assert_allclose(single, result[:, 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e38, 1e300, 1e-40, 1e-300])
def test_columns_whose_result_float32_cannot_hold_are_refused(size: float) -> None:
    operator, P = operator_and_matrix(scale=1.0)
    for matrix, multiply in ((P, operator.matmat), (P.T, operator.rmatmat)):
        X = np.ones((matrix.shape[1], 4)) * np.array([1, 0, size, 1])
        with pytest.raises(
            ValueError, match=r"must be 0 or in \[1.18e-38, 3.4e\+38\], not .* \(columns \[2\]\); multiply"
        ):
            multiply(X)
    scaled, P = operator_and_matrix(scale=1 / size)  # the advice
    x = np.ones(700) * size
    np.testing.assert_allclose(scaled.matvec(x), P @ x, rtol=1e-4, atol=1e-4)
    x[3] = np.inf
    assert not np.isfinite(operator.matvec(x)).all()  # as in NumPy


def test_algebra_and_solvers_of_scipy(rng: np.random.Generator) -> None:
    operator, P = operator_and_matrix()
    gram = operator @ operator.H
    assert isinstance(gram, LinearOperator)
    v = rng.standard_normal(40)
    np.testing.assert_allclose(gram @ v, P @ (P.T @ v), rtol=1e-5, atol=1e-3)
    b = rng.standard_normal(40)
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
    with pytest.raises(ValueError, match="proj_type must be one of 'rademacher', 'normal', 'sjlt', not 'sparse'"):
        ProjectionOperator(5, 4, proj_type="sparse")
