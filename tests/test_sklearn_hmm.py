"""The estimators are hmmlearn's by name, and the posterior's to whoever asks further."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import latentlab as ll
from latentlab.sklearn import CategoricalHMM, GaussianHMM, PoissonHMM

QUICK = {"n_iter": 20, "n_init": 1, "random_state": 0}
R = np.random.default_rng(0)


def states(num_rows, seed=0, stay=0.93):
    r = np.random.default_rng(seed)
    z = [0]
    for _ in range(num_rows - 1):
        z.append(z[-1] if r.random() < stay else 1 - z[-1])
    return np.array(z)


Z = states(200)
X = R.normal(np.array([[0.0, 5.0], [4.0, 1.0]])[Z])
COUNTS = R.poisson(np.array([[2.0], [20.0]])[Z])
CODES = np.where(R.random(200) < 0.9, Z, 2)[:, None]


def quick_fit(estimator, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(*args, **kwargs)


@parametrize_with_checks([GaussianHMM(**QUICK), PoissonHMM(**QUICK), CategoricalHMM(**QUICK)])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:.*constant")
@pytest.mark.filterwarnings("ignore:.*equal")
def test_estimator_contract(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def fitted():
    return quick_fit(GaussianHMM(2, n_init=1, n_iter=600, random_state=0), X, lengths=[120, 80])


def test_the_attributes_are_those_of_the_truth(fitted):
    order = fitted.means_[:, 0].argsort()
    np.testing.assert_allclose(fitted.means_[order], [[0, 5], [4, 1]], atol=0.6)
    np.testing.assert_allclose(fitted.covars_, np.eye(2)[None].repeat(2, 0), atol=0.6)
    np.testing.assert_allclose(fitted.transmat_.diagonal(), 0.93, atol=0.1)
    np.testing.assert_allclose(fitted.transmat_.sum(1), 1)
    assert fitted.startprob_.sum() == pytest.approx(1)
    agree = (order.argsort()[fitted.predict(X, [120, 80])] == Z).mean()
    assert agree > 0.97


def test_answers_agree_with_each_other(fitted):
    lengths = [120, 80]
    probs = fitted.predict_proba(X, lengths)
    np.testing.assert_allclose(probs.sum(1), 1)
    rows = fitted.score_samples(X, lengths)
    assert rows.shape == (200,)
    # A plug-in likelihood is above the average over draws by a few nats at most.
    assert abs(rows.sum() - fitted.score(X, lengths=lengths)) < 10
    log_joint, path = fitted.decode(X, lengths)
    assert log_joint < rows.sum()
    np.testing.assert_array_equal(path, fitted.predict(X, lengths))
    x, z = fitted.sample(30)
    assert x.shape == (30, 2)
    assert set(z) <= {0, 1}


def test_a_list_of_arrays_is_rows_with_lengths(fitted):
    parts = [X[:120], X[120:]]
    np.testing.assert_array_equal(fitted.predict(parts), fitted.predict(X, [120, 80]))
    again = quick_fit(clone(fitted), parts)
    np.testing.assert_array_equal(again.means_, fitted.means_)


def test_sequences_are_answered_each_by_itself(fitted):
    """The order of sequences, and the company they are in, changes nothing."""
    whole = fitted.predict_proba(X, [120, 80])
    np.testing.assert_allclose(fitted.predict_proba(X[120:]), whole[120:], atol=1e-9)
    turned = np.concatenate([X[120:], X[:120]])
    np.testing.assert_allclose(
        fitted.predict_proba(turned, [80, 120]),
        np.concatenate([whole[120:], whole[:120]]),
        atol=1e-9,
    )
    np.testing.assert_allclose(
        fitted.score(X, lengths=[120, 80]), fitted.score(turned, lengths=[80, 120])
    )


def test_missing_cells_are_integrated_out(fitted):
    x = X.copy()
    x[5:8] = np.nan
    assert np.isfinite(fitted.predict_proba(x)).all()
    assert fitted.score_samples(x)[5:8] == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.slow
def test_counts_and_codes_have_their_own(fitted):
    counts = quick_fit(PoissonHMM(2, n_init=1, n_iter=450, random_state=0), COUNTS)
    assert sorted(counts.lambdas_.ravel()) == pytest.approx([2, 20], rel=0.2)
    codes = quick_fit(CategoricalHMM(2, n_init=1, n_iter=450, random_state=0), CODES)
    assert codes.emissionprob_.shape == (2, 3)
    np.testing.assert_allclose(codes.emissionprob_.sum(1), 1)
    with pytest.raises(ValueError, match="codes from 0 to 2, got 3"):
        codes.predict([[3]])
    with pytest.raises(ValueError, match="counts"):
        counts.predict([[1.5]])


def test_a_full_covariance_is_one():
    full = quick_fit(
        GaussianHMM(1, covariance_type="full", n_init=1, n_iter=450, random_state=0), X
    )
    np.testing.assert_allclose(full.covars_[0], np.cov(X.T), rtol=0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_components": 0}, "n_components must be an int >= 1"),
        ({"covariance_type": "tied"}, "covariance_type: expected"),
        ({"n_init": 0}, "n_init"),
        ({"n_components": 300}, "300 states for 200 rows"),
    ],
)
def test_arguments_out_of_range_are_named(changes, message):
    estimator = GaussianHMM(**(QUICK | changes))
    with pytest.raises(ValueError, match=message):
        estimator.fit(X)
    assert not hasattr(estimator, "posterior_")


def test_lengths_have_to_sum():
    with pytest.raises(ValueError, match="sum to the 200 rows of X, got the sum 199"):
        GaussianHMM(**QUICK).fit(X, lengths=[100, 99])
    with pytest.raises(NotFittedError):
        GaussianHMM().predict(X)


def test_the_posterior_is_at_hand(fitted):
    assert isinstance(fitted.posterior_, ll.Posterior)
    assert fitted.verdict_.level in ("use", "use with care", "do not use")
    assert torch.is_tensor(fitted.posterior_.sample(2)["locs"])


def test_lengths_in_the_place_of_labels_are_refused(fitted):
    """hmmlearn takes them there; taken for labels they would be lost without a word."""
    with pytest.raises(ValueError, match=r"^y: .* 200 rows, got 2 values; .*lengths="):
        quick_fit(GaussianHMM(2, **QUICK), X, [120, 80])
    with pytest.raises(ValueError, match=r"^y: .*lengths="):
        fitted.score(X, [120, 80])
    assert fitted.score(X, Z, lengths=[120, 80]) == fitted.score(X, lengths=[120, 80])


def test_a_list_of_columns_is_sequences_unless_it_may_be_rows():
    one, two = COUNTS[:120, 0], COUNTS[120:, 0]
    model = quick_fit(PoissonHMM(2, **QUICK), [one, two])
    same = quick_fit(PoissonHMM(2, **QUICK), COUNTS, lengths=[120, 80])
    np.testing.assert_array_equal(model.lambdas_, same.lambdas_)
    with pytest.raises(ValueError, match=r"^X: a list of 2 arrays of shape \(80,\) may be rows"):
        model.predict([two, two])


def test_a_sample_has_a_seed_of_its_own(fitted):
    one, same, other = (fitted.sample(20, random_state=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
