"""The rows of the list of bad inputs, on the estimators that have no file of such rows."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from latentlab import sklearn as lls

R = np.random.default_rng(0)
ROWS = R.normal(size=(24, 3))
COUNTS = R.poisson(3.0, size=(24, 1)).astype(float)
NAN = float("nan")

ESTIMATORS = {
    "GaussianHMM": lambda: lls.GaussianHMM(2, n_iter=60, random_state=0),
    "PPCA": lambda: lls.PPCA(1),
    "VAE": lambda: lls.VAE(1, hidden_layer_sizes=(8,), max_iter=60, random_state=0),
    "FlowDensity": lambda: lls.FlowDensity(max_iter=60, random_state=0),
}


def put(value):
    x = ROWS.copy()
    x[3, 1] = value
    return x


REFUSED = {
    2: (put(np.inf), r"X has 1 inf \(first at \[3, 1\]\)"),
    3: (np.where([0, 1, 0], NAN, ROWS), "column 'x1' is all NaN"),
    6: (ROWS[:1], "minimum of 2"),
    9: (ROWS[:0], r"0 sample\(s\)"),
    10: (ROWS[:, 0], "(?s)Expected 2D array.*[Rr]eshape"),
    13: (ROWS.astype(str), "numeric"),
    15: (
        ROWS.astype(complex),
        "Complex data not supported: X: expected real numbers; take X.real$",
    ),
    16: (sparse.csr_array(ROWS), "dense"),
}


@pytest.mark.parametrize("row", REFUSED)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_is_refused(kind, row):
    x, message = REFUSED[row]
    estimator = ESTIMATORS[kind]()
    before = vars(estimator).copy()
    with pytest.raises((TypeError, ValueError), match=message):
        estimator.fit(x)
    assert vars(estimator) == before


ACCEPTED = {
    "14 objects": ROWS.astype(object),
    "14 whole numbers": (10 * ROWS).astype(int),
    "21 a frame": pd.DataFrame(ROWS, columns=["a", "b", "c"]),
    "24 far away": ROWS + 1e12,
}


@pytest.mark.parametrize("row", ACCEPTED)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_is_accepted(kind, row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few steps
        estimator = ESTIMATORS[kind]().fit(ACCEPTED[row])
    assert np.isfinite(estimator.score(ACCEPTED[row]))


TOLD = {
    4: (np.where([0, 1, 0], 7.0, ROWS), "'x1'"),
    26: (put(1e8), "row 3 of column 'x1'"),
}


@pytest.mark.parametrize("row", TOLD)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_is_told_and_finite(kind, row):
    x, message = TOLD[row]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        estimator = ESTIMATORS[kind]().fit(x)
    assert any(message in str(w.message) for w in told), [str(w.message) for w in told]
    assert np.isfinite(estimator.score(x))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_another_number_of_columns(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = ESTIMATORS[kind]().fit(ROWS)
    with pytest.raises(ValueError, match="X has 2 features, but .* expecting 3"):
        estimator.score(ROWS[:, :2])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([10, 10], "24.*20|20.*24"),
        ([24, 0], "lengths"),
        ([25, -1], "lengths"),
        ([12.5, 11.5], "lengths"),
    ],
)
@pytest.mark.parametrize("kind", ["GaussianHMM", "PoissonHMM", "CategoricalHMM"])
def test_lengths_that_do_not_fit(kind, lengths, message):
    x = ROWS if kind == "GaussianHMM" else COUNTS
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(lls, kind)(2).fit(x, lengths=lengths)


@pytest.mark.parametrize("value", [-1.0, 2.5])
@pytest.mark.parametrize("kind", ["PoissonHMM", "CategoricalHMM"])
def test_counts_that_are_none(kind, value):
    x = COUNTS.copy()
    x[3, 0] = value
    with pytest.raises(ValueError, match=rf"{value:g}.*\[3, 0\]|\[3, 0\].*{value:g}"):
        getattr(lls, kind)(2).fit(x)
