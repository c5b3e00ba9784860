"""The scikit-learn transformer: against the reference, in pipelines, and under scikit-learn's own checks."""

import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import GaussianRandomProjection
from sklearn.utils.estimator_checks import estimator_checks_generator

from trak_fast.compat.sklearn import FusedRandomProjection
from trak_fast.projection import reference

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("check", [
    pytest.param((estimator, check), id=f"{check.func.__name__}-{estimator.proj_type}")
    for kind in ("normal", "rademacher")
    for estimator, check in estimator_checks_generator(FusedRandomProjection(n_components=2, proj_type=kind))
])  # fmt: skip
def test_scikit_learn_s_own_checks(check: tuple[Any, Any]) -> None:
    estimator, function = check
    function(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_transform(kind: str, dtype: type) -> None:
    X = RNG.standard_normal((30, 500)).astype(dtype)
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


def test_number_of_components_as_in_scikit_learn() -> None:
    X = np.ones((10, 2000))
    for eps in (0.3, 0.5, 0.9):
        theirs = GaussianRandomProjection(eps=eps).fit(X)
        assert FusedRandomProjection(eps=eps).fit(X).n_components_ == theirs.n_components_
    with pytest.raises(ValueError, match=r"eps=0\.1 and n_samples=10 lead to 1973 components"):
        FusedRandomProjection().fit(X[:, :100])


def test_in_a_pipeline_and_a_grid_search() -> None:
    """Digits classified from 32 of 64 dimensions: as well as with scikit-learn's Gaussian matrix."""
    X, y = load_digits(return_X_y=True)
    scores = {}
    for name, projection in [
        ("ours", FusedRandomProjection(random_state=0)),
        ("theirs", GaussianRandomProjection(random_state=0)),
    ]:
        key = projection.__class__.__name__.lower() + "__n_components"
        search = GridSearchCV(make_pipeline(projection, RidgeClassifier()), {key: [8, 32]}, cv=3).fit(X, y)
        assert search.best_params_ == {key: 32}
        scores[name] = search.best_score_
    assert scores["ours"] > 0.75  # by chance 0.1
    assert abs(scores["ours"] - scores["theirs"]) < 0.07


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
            "proj_type must be one of 'rademacher', 'normal', not 'sparse'",
        ),
    ]:
        with pytest.raises(error, match=message):
            FusedRandomProjection(**bad).fit(np.ones((2, 5)))  # type: ignore[arg-type]
