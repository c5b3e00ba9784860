"""The scikit-learn transformer: against the reference, in pipelines, and under scikit-learn's own checks."""

import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection
from sklearn.utils.estimator_checks import estimator_checks_generator

from trak_fast.compat.sklearn import FusedRandomProjection, FusedSparseProjection
from trak_fast.projection import reference


class OfSixteen(FusedSparseProjection):
    """The sparse projection in scikit-learn's checks, which set `n_components = 1`: here that becomes 16."""

    def __setattr__(self, name: str, value: Any) -> None:
        one = name == "n_components" and isinstance(value, int) and value == 1
        super().__setattr__(name, 16 if one else value)


def estimators() -> dict[str, Any]:
    return {
        "normal": FusedRandomProjection(n_components=2, proj_type="normal"),
        "rademacher": FusedRandomProjection(n_components=2, proj_type="rademacher"),
        "sjlt": OfSixteen(n_components=16, nonzeros=1),
    }


@pytest.mark.parametrize("check", [
    pytest.param((estimator, check), id=f"{check.func.__name__}-{name}")
    for name, made in estimators().items()
    for estimator, check in estimator_checks_generator(made)
])  # fmt: skip
def test_scikit_learn_s_own_checks(check: tuple[Any, Any]) -> None:
    estimator, function = check
    function(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_transform(rng: np.random.Generator, kind: str, dtype: type) -> None:
    X = rng.standard_normal((30, 500)).astype(dtype)
    projection = FusedRandomProjection(n_components=40, proj_type=kind, random_state=3).fit(X)
    P = reference.matrix(kind, projection.seed_, 0, range(40), range(500)).astype(np.float64) / 40**0.5
    np.testing.assert_allclose(projection.components_, P, rtol=1e-6)
    for given in (X, np.asfortranarray(X), X[::-1][::-1], scipy.sparse.csr_matrix(X), scipy.sparse.csc_array(X)):
        result = projection.transform(given)
        assert (result.shape, result.dtype) == ((30, 40), dtype)
        np.testing.assert_allclose(result, X.astype(np.float64) @ P.T, rtol=0, atol=2e-5)
    np.testing.assert_allclose(projection.transform(X[::-1]), X[::-1].astype(np.float64) @ P.T, rtol=0, atol=2e-5)
    again = FusedRandomProjection(n_components=40, proj_type=kind, random_state=3).fit_transform(X)
    assert np.array_equal(again, projection.transform(X))
    assert np.array_equal(pickle.loads(pickle.dumps(projection)).transform(X), again)
    other = FusedRandomProjection(n_components=40, proj_type=kind, random_state=4).fit_transform(X)
    assert not np.allclose(other, again)


def test_sparse_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    X = scipy.sparse.random(50, 300, 0.1, format="csr", random_state=0)
    projection = FusedRandomProjection(n_components=20, random_state=0).fit(X)
    whole = projection.transform(X.toarray())
    monkeypatch.setattr("trak_fast.compat.sklearn._DENSE", 7 * 300)
    np.testing.assert_allclose(projection.transform(X), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("k", "nonzeros"), [(16, 1), (64, 2), (512, 4), (128, 8)])
def test_transform_by_a_sparse_matrix(rng: np.random.Generator, k: int, nonzeros: int, dtype: type) -> None:
    X = rng.standard_normal((30, 500)).astype(dtype)
    projection = FusedSparseProjection(n_components=k, nonzeros=nonzeros, random_state=3).fit(X)
    P = sparse_matrix(projection, nonzeros)
    assert projection.density_ == nonzeros / k
    components = projection.components_
    assert (components.format, components.dtype, components.nnz) == ("csr", np.float32, 500 * nonzeros)
    np.testing.assert_allclose(components.toarray(), P, rtol=1e-6)
    dense = projection.transform(X)
    np.testing.assert_allclose(dense, X.astype(np.float64) @ P.T, rtol=0, atol=2e-5)
    assert dense.dtype == dtype
    wide = FusedSparseProjection(n_components=k, nonzeros=nonzeros, random_state=3, dense_output=True)
    for kind in (scipy.sparse.csr_matrix, scipy.sparse.csr_array, scipy.sparse.csc_array):
        result = projection.transform(kind(X))
        assert scipy.sparse.issparse(result)
        assert isinstance(result, scipy.sparse.sparray) == (kind is not scipy.sparse.csr_matrix)
        assert (result.format, result.dtype) == ("csr", dtype)
        np.testing.assert_allclose(result.toarray(), dense, rtol=0, atol=1e-6)
        assert np.array_equal(wide.fit_transform(kind(X)), result.toarray())
    assert np.array_equal(pickle.loads(pickle.dumps(projection)).transform(X), dense)


@pytest.mark.parametrize("kind", [FusedSparseProjection, FusedRandomProjection])
def test_the_matrix_is_that_of_fit(rng: np.random.Generator, kind: type) -> None:
    """Parameters that change afterwards, and torch's defaults, have no part in it."""
    X = rng.standard_normal((5, 300)).astype(np.float32)
    projection = kind(n_components=2048, random_state=3).fit(X)
    expected = projection.transform(X)
    projection.set_params(n_components=512, **({"proj_type": "rademacher"} if kind is FusedRandomProjection else {}))
    if kind is FusedSparseProjection:
        projection.set_params(nonzeros=2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert np.array_equal(projection.transform(X), expected)
            components = projection.components_
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(X @ components.T, expected, rtol=1e-4, atol=1e-4)


def sparse_matrix(projection: FusedSparseProjection, nonzeros: int) -> np.ndarray:
    k, D = projection.n_components_, projection.n_features_in_
    P = reference.matrix("sjlt", projection.seed_, 0, range(k), range(D), k, nonzeros)
    return P.astype(np.float64) / nonzeros**0.5


@pytest.mark.parametrize("shape", [(64, 4, 200), (64, 4, 40), (128, 8, 128), (32, 2, 33), (16, 1, 3), (16, 1, 16)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_transform_of_a_sparse_matrix(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pseudo-inverse by singular values, of the matrix whole; here it is made in blocks."""
    k, nonzeros, D = shape
    monkeypatch.setattr("trak_fast.compat.sklearn._DENSE", 3 * k)
    X, Y = rng.standard_normal((6, D)).astype(dtype), rng.standard_normal((6, k)).astype(dtype)
    for stored in (False, True):
        projection = FusedSparseProjection(
            n_components=k, nonzeros=nonzeros, random_state=1, compute_inverse_components=stored
        ).fit(X)
        right = Y @ np.linalg.pinv(sparse_matrix(projection, nonzeros), rcond=1e-7).T
        close = {"rtol": 0, "atol": (1e-9 if dtype == np.float64 else 1e-5) * np.abs(right).max()}
        assert hasattr(projection, "inverse_components_") == stored
        for given in (Y, scipy.sparse.csc_matrix(Y)):
            result = projection.inverse_transform(given)
            assert (result.shape, result.dtype) == ((6, D), dtype)
            np.testing.assert_allclose(result, right, **close)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("sparse", [False, True])
def test_samples_of_any_scale(rng: np.random.Generator, kind: str, sparse: bool) -> None:
    """float64 samples beyond float32, beside ordinary ones and one of zeros, are right to float32's precision."""
    powers = np.array([0, 700, 200, 126, 0, -126, -149, -300, -1000])
    unit = rng.standard_normal((9, 300)) * np.array([1, 1, 1, 1, 0, 1, 1, 1, 1])[:, None]
    X = np.ldexp(unit, powers[:, None])
    projection = FusedRandomProjection(n_components=20, proj_type=kind, random_state=3).fit(X)
    result = projection.transform(scipy.sparse.csr_matrix(X) if sparse else X)
    P = reference.matrix(kind, projection.seed_, 0, range(20), range(300)).astype(np.float64) / 20**0.5
    np.testing.assert_allclose(np.ldexp(result, -powers[:, None]), unit @ P.T, rtol=0, atol=2e-5)
    assert result.dtype == np.float64
    assert (result[4] == 0).all()
    assert np.array_equal(result[0], projection.transform(X[:1])[0])


def test_results_that_the_dtype_cannot_hold_are_refused() -> None:
    X = np.ones((4, 300), np.float32) * np.array([1, 3e38, 1e-40, 0], np.float32)[:, None]
    projection = FusedRandomProjection(n_components=4, random_state=0).fit(X)
    for operation in (projection.transform, FusedRandomProjection(n_components=300, random_state=0).fit(X).transform):
        with pytest.raises(ValueError, match=r"samples \[1, 2\] must be within .* float32, not .*e\+.*; pass float64"):
            operation(X)
    wide = X.astype(np.float64)
    P = projection.components_.astype(np.float64)
    np.testing.assert_allclose(projection.transform(wide), wide @ P.T, rtol=1e-5)  # the advice
    with pytest.raises(ValueError, match=r"samples \[1\] .* float64, not inf; multiply them by a constant"):
        projection.transform(wide * 5e269)
    Y = np.float32(3e38) * np.ones((1, 300), np.float32)
    square = FusedRandomProjection(n_components=300, random_state=0).fit(X)
    with pytest.raises(ValueError, match=r"samples \[0\] .* float32, not .*; pass float64"):
        square.inverse_transform(Y)
    assert np.isfinite(square.inverse_transform(Y.astype(np.float64))).all()


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("shape", [(30, 200), (5, 5), (12, 12), (40, 7), (1, 3), (3, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_transform_is_by_the_pseudo_inverse(
    rng: np.random.Generator, kind: str, shape: tuple[int, int], dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pseudo-inverse by singular values, of the matrix whole; here it is made in blocks."""
    monkeypatch.setattr("trak_fast.compat.sklearn._DENSE", 3 * shape[0])
    k, D = shape
    X = rng.standard_normal((6, D)).astype(dtype)
    Y = rng.standard_normal((6, k)).astype(dtype)
    P = None
    for stored in (False, True):
        projection = FusedRandomProjection(
            n_components=k, proj_type=kind, random_state=1, compute_inverse_components=stored
        ).fit(X)
        P = reference.matrix(kind, projection.seed_, 0, range(k), range(D)).astype(np.float64) / k**0.5
        right = Y @ np.linalg.pinv(P, rcond=1e-7).T
        close = {"rtol": 0, "atol": (1e-9 if dtype == np.float64 else 1e-5) * np.abs(right).max()}
        assert hasattr(projection, "inverse_components_") == stored
        if stored:
            assert (projection.inverse_components_.shape, projection.inverse_components_.dtype) == ((D, k), dtype)
        for given in (Y, scipy.sparse.csc_matrix(Y), Y.tolist() if dtype == np.float64 else Y):
            result = projection.inverse_transform(given)
            assert (result.shape, result.dtype) == ((6, D), dtype)
            np.testing.assert_allclose(result, right, **close)
    again = projection.transform(projection.inverse_transform(Y)) if k <= D else Y
    if np.linalg.matrix_rank(P) == k:
        np.testing.assert_allclose(again, Y, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=f"X must have n_components_ = {k} columns, not {k + 1}"):
        projection.inverse_transform(np.ones((2, k + 1)))


def test_inverse_transform_as_in_scikit_learn(rng: np.random.Generator) -> None:
    X = rng.standard_normal((20, 60))
    ours, theirs = (cls(n_components=10, random_state=0) for cls in (FusedRandomProjection, GaussianRandomProjection))
    theirs.fit(X)
    ours.fit(X)
    theirs.components_ = ours.components_.astype(np.float64)
    Y = rng.standard_normal((4, 10))
    np.testing.assert_allclose(ours.inverse_transform(Y), theirs.inverse_transform(Y), rtol=0, atol=1e-6)


def test_number_of_components_as_in_scikit_learn() -> None:
    X = np.ones((10, 2000))
    for eps in (0.3, 0.5, 0.9):
        theirs = GaussianRandomProjection(eps=eps).fit(X)
        assert FusedRandomProjection(eps=eps).fit(X).n_components_ == theirs.n_components_
    with pytest.raises(ValueError, match=r"eps=0\.1 and n_samples=10 lead to 1973 components"):
        FusedRandomProjection().fit(X[:, :100])


@pytest.mark.parametrize(
    ("nonzeros", "eps", "expected"), [(4, 0.3, 256), (4, 0.5, 128), (4, 0.9, 64), (1, 0.9, 64), (8, 0.9, 128)]
)
def test_number_of_components_of_a_sparse_matrix_is_the_next_that_fits(
    nonzeros: int, eps: float, expected: int
) -> None:
    X = np.ones((10, 2000))
    needed = SparseRandomProjection(eps=eps).fit(X).n_components_
    found = FusedSparseProjection(nonzeros=nonzeros, eps=eps).fit(X).n_components_
    assert found == expected
    assert found >= needed
    assert found < 2 * needed or found == 16 * nonzeros
    with pytest.raises(ValueError, match=r"lead to .* components, which is not in 1 to n_features=20"):
        FusedSparseProjection(nonzeros=nonzeros, eps=eps).fit(X[:, :20])


def test_in_a_pipeline_and_a_grid_search() -> None:
    """Digits classified from 32 of 64 dimensions: as well as with scikit-learn's Gaussian matrix."""
    X, y = load_digits(return_X_y=True)
    scores = {}
    for name, projection in [
        ("ours", FusedRandomProjection(random_state=0)),
        ("theirs", GaussianRandomProjection(random_state=0)),
        ("sparse", FusedSparseProjection(nonzeros=1, random_state=0)),
    ]:
        key = projection.__class__.__name__.lower() + "__n_components"
        sizes = [16, 32] if name == "sparse" else [8, 32]
        search = GridSearchCV(make_pipeline(projection, RidgeClassifier()), {key: sizes}, cv=3).fit(X, y)
        assert search.best_params_ == {key: 32}
        scores[name] = search.best_score_
    for name in ("ours", "sparse"):
        assert scores[name] > 0.75  # by chance 0.1
        assert abs(scores[name] - scores["theirs"]) < 0.07


def test_names_and_parameters() -> None:
    projection = FusedRandomProjection(n_components=3, proj_type="rademacher", random_state=1)
    assert clone(projection).get_params() == projection.get_params()
    names = projection.fit(np.ones((2, 5))).get_feature_names_out()
    assert list(names) == [f"fusedrandomprojection{i}" for i in range(3)]
    for bad, error, message in [
        ({"n_components": 0}, ValueError, "n_components must be at least 1, not 0"),
        ({"n_components": 2**32 + 1}, ValueError, r"proj_dim must be in \[1, 2\*\*32\], not 4294967297"),
        ({"n_components": "many"}, ValueError, "n_components must be 'auto' or an integer, not 'many'"),
        ({"n_components": 2.5}, TypeError, r"n_components must be an integer, not float \(2\.5\)"),
        ({"eps": 0}, ValueError, "eps must be above 0, not 0"),
        ({"eps": 1}, ValueError, r"eps must be in \(0, 1\), not 1"),
        ({"eps": 1.5}, ValueError, r"eps must be in \(0, 1\), not 1\.5"),
        ({"eps": "some"}, TypeError, r"eps must be a number, not str \('some'\)"),
        (
            {"n_components": 2, "proj_type": "sparse"},
            ValueError,
            "proj_type must be one of 'rademacher', 'normal', 'sjlt', not 'sparse'",
        ),
        (
            {"n_components": 64, "proj_type": "sjlt"},
            ValueError,
            "proj_type must be one of 'rademacher', 'normal', not 'sjlt'; FusedSparseProjection has it",
        ),
    ]:
        with pytest.raises(error, match=message):
            FusedRandomProjection(**bad).fit(np.ones((2, 5)))  # type: ignore[arg-type]


def test_names_and_parameters_of_the_sparse_one() -> None:
    projection = FusedSparseProjection(n_components=64, nonzeros=2, random_state=1)
    assert clone(projection).get_params() == projection.get_params()
    assert projection.fit(np.ones((2, 5))).get_feature_names_out()[63] == "fusedsparseprojection63"
    for bad, error, message in [
        ({"n_components": 1000}, ValueError, "not 1000; near it with nonzeros=4: 512 and 1024"),
        ({"n_components": "many"}, ValueError, "n_components must be 'auto' or an integer, not 'many'"),
        ({"n_components": 64, "nonzeros": 3}, ValueError, "nonzeros must be one of 1, 2, 4, 8, not 3"),
        ({"nonzeros": 0}, ValueError, r"nonzeros must be one of 1, 2, 4, 8, not 0"),
        ({"nonzeros": "4"}, TypeError, "nonzeros must be an integer, not str"),
        ({"n_components": 64, "nonzeros": None}, TypeError, "nonzeros must be an integer, not NoneType"),
        ({"eps": 1}, ValueError, r"eps must be in \(0, 1\), not 1"),
    ]:
        with pytest.raises(error, match=message):
            FusedSparseProjection(**bad).fit(np.ones((2, 5)))  # type: ignore[arg-type]
