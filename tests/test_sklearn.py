"""The estimator is scikit-learn's to its users, and the posterior's to whoever asks further."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy import sparse, stats
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Peer
from sklearn.utils.estimator_checks import parametrize_with_checks

import latentlab as ll
from latentlab.sklearn import GaussianMixture

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[-3.0, 10.0, 0.0], [2.0, 14.0, 1.0]])
SCALES = np.array([[1.0, 0.5, 2.0], [0.7, 1.0, 1.5]])
COLUMNS = ["a", "b", "c"]
METHODS = ["predict", "predict_proba", "score_samples", "score", "bic", "aic"]


def simulate(num_rows, seed):
    r = np.random.default_rng(seed)
    z = (r.random(num_rows) < WEIGHTS[1]).astype(int)
    return MEANS[z] + SCALES[z] * r.normal(size=(num_rows, 3)), z


def with_holes(x, share=0.2, seed=3):
    return np.where(np.random.default_rng(seed).random(x.shape) < share, np.nan, x)


def quick(n_components=2, **changes):
    """An estimator for what does not depend on how well it is fitted; its fits end early."""
    quickly = {"covariance_type": "diag", "max_iter": 20, "n_init": 1, "random_state": 0}
    return GaussianMixture(n_components, **(quickly | changes))


def quick_fit(x, *args, sample_weight=None, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return quick(*args, **changes).fit(x, sample_weight=sample_weight)


X, Z = simulate(600, seed=0)
SMALL = X[:40]


@pytest.fixture(scope="module")
def fitted():
    return GaussianMixture(2, covariance_type="diag", n_init=2, random_state=0).fit(X)


@pytest.fixture(scope="module")
def peer():
    exact = {"reg_covar": 0, "tol": 1e-10, "max_iter": 1000, "random_state": 0}
    return Peer(2, covariance_type="diag", **exact).fit(X)


def order_of(estimator):
    """The numbers of its components, from left to right in the first column."""
    return estimator.means_[:, 0].argsort()


def posterior_sd(estimator):
    """Standard deviations of weights and means, components from left to right."""
    draws, order = estimator.posterior_.sample(1000, seed=5), order_of(estimator)
    return [draws[site].std(0).numpy()[order] for site in ("weights", "locs")]


def ordered(estimator):
    order = order_of(estimator)
    return estimator.weights_[order], estimator.means_[order], estimator.covariances_[order]


# ---- scikit-learn's own checks ------------------------------------------------------------------


# Two components few steps: on the 15 rows in 30 columns of one check the climb is chaotic, and
# what the order of the rows rounds differently, 1e-16, is 1e-12 after 20 steps, 3e-8 after 100.
@parametrize_with_checks([quick(1, max_iter=100), quick(2)])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimator_contract(estimator, check):
    check(estimator)


# ---- equal to scikit-learn's mixture, but for what a prior and an average add -------------------


def test_means_are_maximum_likelihood_within_a_fraction_of_a_posterior_sd(fitted, peer):
    weights, means, covariances = ordered(fitted)
    weights_sd, means_sd = posterior_sd(fitted)
    assert fitted.converged_
    assert (abs(weights - ordered(peer)[0]) < 0.25 * weights_sd).all()
    assert (abs(means - ordered(peer)[1]) < 0.25 * means_sd).all()
    # A variance from n rows has a relative sd of sqrt(2 / n); its mean is above its mode by 3 / n.
    n = 600 * weights[:, None]
    assert (abs(covariances / ordered(peer)[2] - 1) < 0.5 * np.sqrt(2 / n) + 3 / n).all()


def test_labels_are_those_of_scikit_learn(fitted, peer):
    new, _ = simulate(2000, seed=1)
    rank, peer_rank = order_of(fitted).argsort(), order_of(peer).argsort()
    assert (rank[fitted.predict(new)] == peer_rank[peer.predict(new)]).mean() > 0.99


@pytest.mark.parametrize("seed", [0, 1])
def test_score_is_that_of_scikit_learn(fitted, peer, seed):
    """The posterior predictive differs from the plug-in density by about p / 2N nats."""
    x, _ = simulate(600, seed)
    assert fitted.score(x) == pytest.approx(peer.score(x), abs=13 / 600)


def test_criteria_count_the_parameters_that_scikit_learn_counts(fitted, peer):
    num_free = (peer.aic(X) + 2 * 600 * peer.score(X)) / 2
    total = fitted.score_samples(X).sum()
    assert num_free == pytest.approx(13)
    assert fitted.aic(X) == pytest.approx(-2 * total + 2 * num_free)
    assert fitted.bic(X) == pytest.approx(-2 * total + np.log(600) * num_free)
    assert fitted.bic(X) == pytest.approx(peer.bic(X), abs=13)


def test_precisions_are_those_of_scikit_learn(fitted):
    peer = Peer(2, covariance_type="diag").fit(X)
    peer.covariances_ = fitted.covariances_
    np.testing.assert_allclose(fitted.precisions_ * fitted.covariances_, 1)
    np.testing.assert_allclose(fitted.precisions_cholesky_**2, fitted.precisions_)
    for name in vars(peer):
        if name.endswith("_"):
            assert np.shape(getattr(fitted, name)) == np.shape(getattr(peer, name)) or (
                name == "lower_bounds_"
            )


# ---- the posterior behind it --------------------------------------------------------------------


def brute_force(estimator, x, seed=11, num_draws=4000):
    """log p(x_n, z_n = k | draw s), shape (S, N, K), from draws of our own."""
    draws = {k: v.numpy() for k, v in estimator.posterior_.sample(num_draws, seed=seed).items()}
    log_normal = stats.norm(draws["locs"][:, None], draws["scales"][:, None]).logpdf(x[:, None, :])
    return np.nansum(log_normal, -1) + np.log(draws["weights"])[:, None]  # (S, N, K)


@pytest.mark.parametrize("rows", [X[:50], with_holes(X[:50])], ids=["complete", "holes"])
def test_scores_are_the_posterior_predictive_density(fitted, rows):
    log_prob = logsumexp(brute_force(fitted, rows), 2)  # (S, N)
    expected = logsumexp(log_prob, 0) - np.log(len(log_prob))
    spread = np.exp(log_prob - expected).std(0)
    se = spread * np.sqrt(1 / len(log_prob) + 1 / 500)
    assert (abs(fitted.score_samples(rows) - expected) < 5 * se + 1e-5).all()


def test_few_rows_widen_the_predictive_density_beyond_any_one_normal():
    estimator = quick_fit(X[Z == 1][:8], 1, max_iter=300)
    away = MEANS[1] + np.linspace(3, 5, 9)[:, None] * SCALES[1]
    plugged_in = stats.norm(estimator.means_[0], np.sqrt(estimator.covariances_[0])).logpdf(away)
    log_prob = logsumexp(brute_force(estimator, away), 2)
    expected = logsumexp(log_prob, 0) - np.log(len(log_prob))
    se = np.exp(log_prob - expected).std(0) * np.sqrt(1 / len(log_prob) + 1 / 500)
    found = estimator.score_samples(away)
    assert (abs(found - expected) < 5 * se).all()
    assert (abs(plugged_in.sum(1) - expected) > 5 * se).any()  # the two are told apart here


@pytest.mark.parametrize("rows", [X[:200], with_holes(X[:200])], ids=["complete", "holes"])
def test_probabilities_are_bayes_rule_averaged_over_the_posterior(fitted, rows):
    joint = brute_force(fitted, rows)
    probs = np.exp(joint - logsumexp(joint, 2, keepdims=True))
    se = probs.std(0) * np.sqrt(1 / len(joint) + 1 / 500)
    assert (abs(fitted.predict_proba(rows) - probs.mean(0)) < 5 * se + 1e-5).all()
    np.testing.assert_array_equal(fitted.predict(rows), fitted.predict_proba(rows).argmax(1))


def test_a_row_without_a_cell_has_the_prior_odds(fitted):
    nothing = np.full((1, 3), np.nan)
    error = 5 * fitted.posterior_.sample(1000)["weights"].std(0).numpy() / np.sqrt(500)
    assert fitted.score_samples(nothing) == pytest.approx([0.0], abs=1e-12)
    assert (abs(fitted.predict_proba(nothing)[0] - fitted.weights_) < error).all()


def test_missing_cells_leave_the_means_where_they_are(fitted):
    holed = GaussianMixture(2, covariance_type="diag", n_init=1, random_state=0).fit(with_holes(X))
    _, sd = posterior_sd(holed)
    assert (abs(ordered(holed)[1] - ordered(fitted)[1]) < 3 * sd).all()
    assert (sd > posterior_sd(fitted)[1]).mean() > 0.5  # less is known


def test_means_are_those_of_the_summary(fitted):
    summary = fitted.posterior_.summary().groupby("site", sort=False)["mean"]
    np.testing.assert_allclose(fitted.weights_, summary.get_group("weights"), rtol=1e-10)
    np.testing.assert_allclose(fitted.means_.ravel(), summary.get_group("locs"), rtol=1e-10)


def test_the_lower_bound_is_the_elbo_per_row(fitted):
    assert fitted.lower_bound_ == pytest.approx(fitted.posterior_.elbo.value / 600)
    assert fitted.lower_bound_ < fitted.score(X)  # log p(x) is below the predictive density
    assert len(fitted.lower_bounds_) == fitted.n_iter_ == len(fitted.posterior_.losses)
    assert fitted.lower_bounds_[-100:].mean() == pytest.approx(fitted.lower_bound_, abs=0.01)


def test_components_have_one_numbering(fitted):
    np.testing.assert_array_equal(fitted.predict(fitted.means_), [0, 1])
    labels = fitted.predict(X)
    for k in range(2):
        rows = X[labels == k]
        assert len(rows) == pytest.approx(600 * fitted.weights_[k], rel=0.1)
        np.testing.assert_allclose(rows.mean(0), fitted.means_[k], atol=0.2)
        np.testing.assert_allclose(rows.var(0), fitted.covariances_[k], rtol=0.2)


def test_draws_that_switch_labels_do_not_change_a_prediction(fitted):
    def switched(num_samples):
        draws, odd = fitted.posterior_.sample(num_samples), torch.arange(num_samples) % 2 == 1
        for value in draws.values():
            value[odd] = value[odd].flip(1)
        return draws

    switching = copy.copy(fitted)
    switching.posterior_ = SimpleNamespace(model=fitted.posterior_.model, sample=switched)
    np.testing.assert_allclose(switching.predict_proba(X), fitted.predict_proba(X), rtol=1e-10)
    np.testing.assert_array_equal(switching.sample(50)[1], fitted.sample(50)[1])


def test_order_of_rows_and_columns_does_not_matter(fitted):
    r = np.random.default_rng(0)
    rows, columns = r.permutation(600), [2, 0, 1]
    permuted = GaussianMixture(2, covariance_type="diag", n_init=1, random_state=0).fit(
        X[rows][:, columns]
    )
    order = permuted.means_[:, 1].argsort()
    sd = posterior_sd(fitted)[1][:, columns]
    assert (abs(permuted.means_[order] - ordered(fitted)[1][:, columns]) < 0.2 * sd).all()
    rank = order_of(fitted).argsort()
    labels = order.argsort()[permuted.predict(X[:, columns])]
    assert (labels == rank[fitted.predict(X)]).mean() > 0.99


def test_verdict_is_judged_when_asked_for_and_once(fitted):
    refitted = quick_fit(SMALL, max_iter=3)
    first = refitted.verdict_
    assert first.level in ("use with care", "do not use")  # it did not converge
    assert str(first) == str(refitted.posterior_.check())
    assert refitted.verdict_ is first
    with pytest.warns(ConvergenceWarning):
        assert refitted.fit(X).verdict_ is not first
    assert fitted.verdict_.level == "use"


# ---- new rows -----------------------------------------------------------------------------------


def test_new_rows_follow_the_posterior_predictive(fitted):
    x, labels = fitted.sample(20_000)
    draws = {k: v.numpy() for k, v in fitted.posterior_.sample(2000, seed=7).items()}
    share = np.bincount(labels) / 20_000
    assert (abs(share - fitted.weights_) < 5 * np.sqrt(share * (1 - share) / 20_000) + 2e-3).all()
    for d in range(3):
        grid = np.quantile(x[:, d], [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
        below = stats.norm(draws["locs"][..., d], draws["scales"][..., d]).cdf(grid[:, None, None])
        expected = (draws["weights"] * below).sum(-1).mean(-1)
        found = (x[:, d] < grid[:, None]).mean(-1)
        error = 5 * np.sqrt(expected * (1 - expected) / 20_000) + 2e-3
        assert (abs(found - expected) < error).all()


def test_labels_of_new_rows_are_those_of_their_components(fitted):
    x, labels = fitted.sample(5000)
    sure = fitted.predict_proba(x).max(1) > 0.999
    assert sure.mean() > 0.8
    assert (fitted.predict(x)[sure] == labels[sure]).mean() > 0.99


def test_new_rows_come_as_from_scikit_learn(fitted, peer):
    for found, expected in zip(fitted.sample(7), peer.sample(7), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
    assert fitted.sample()[0].shape == (1, 3)
    with pytest.raises(ValueError, match="n_samples must be an int >= 1, got 0"):
        fitted.sample(0)


# ---- randomness ---------------------------------------------------------------------------------


def test_an_int_gives_the_same_fit_and_touches_no_global_generator():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second = quick_fit(SMALL), quick_fit(SMALL)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(first.means_, second.means_)
    np.testing.assert_array_equal(first.sample(9)[0], second.sample(9)[0])
    np.testing.assert_array_equal(first.sample(9)[0], first.sample(9)[0])
    assert (quick_fit(SMALL, random_state=1).means_ != first.means_).all()


def test_an_int_is_the_seed_of_the_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = ll.fit(ll.GaussianMixture(3, 2), SMALL, num_restarts=1, max_steps=20, seed=3)
    estimator = quick_fit(SMALL, random_state=3)
    assert torch.equal(posterior.sample(5)["locs"], estimator.posterior_.sample(5)["locs"])


def test_a_random_state_moves_on():
    shared = np.random.RandomState(0)
    first, second = (quick_fit(SMALL, random_state=shared) for _ in range(2))
    again = quick_fit(SMALL, random_state=np.random.RandomState(0))
    np.testing.assert_array_equal(first.means_, again.means_)
    assert (first.means_ != second.means_).all()
    assert (first.sample(5)[0] != first.sample(5)[0]).all()


def test_none_takes_the_seed_that_numpy_was_given():
    state = np.random.get_state()
    try:
        np.random.seed(4)
        first = quick_fit(SMALL, random_state=None)
        np.random.seed(4)
        np.testing.assert_array_equal(quick_fit(SMALL, random_state=None).means_, first.means_)
    finally:
        np.random.set_state(state)


# ---- an estimator among others ------------------------------------------------------------------


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy])
def test_a_copy_answers_alike(fitted, copied):
    again = copied(fitted)
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    np.testing.assert_array_equal(again.sample(5)[0], fitted.sample(5)[0])
    assert torch.equal(again.posterior_.sample(5)["locs"], fitted.posterior_.sample(5)["locs"])
    assert str(again.verdict_) == str(fitted.verdict_)


def test_a_clone_is_not_fitted(fitted):
    assert clone(fitted).get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


def test_fit_predict_is_fit_and_predict():
    with pytest.warns(ConvergenceWarning):
        labels = quick(max_iter=3).fit_predict(SMALL)
    np.testing.assert_array_equal(labels, quick_fit(SMALL, max_iter=3).predict(SMALL))


def test_a_fit_that_ends_early_warns_once():
    with pytest.warns(ConvergenceWarning, match="did not converge .*; raise max_iter") as caught:
        estimator = quick(max_iter=3).fit(SMALL)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not estimator.converged_
    assert estimator.n_iter_ <= 4  # an ascent ends where a step does


def test_a_fit_that_fails_changes_nothing(fitted):
    estimator = copy.copy(fitted)
    bad = pd.DataFrame({"p": [1.0, 2.0, np.inf], "q": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="inf"):
        estimator.fit(bad)
    assert {k: id(v) for k, v in vars(estimator).items()} == {
        k: id(v) for k, v in vars(fitted).items()
    }
    np.testing.assert_array_equal(estimator.predict(X), fitted.predict(X))
    with pytest.raises(ValueError, match="inf"):
        (fresh := quick()).fit(bad)
    assert vars(fresh) == vars(quick())


def test_verbose_shows_a_bar_and_silence_is_silent(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    quick_fit(SMALL)
    assert capfd.readouterr() == ("", "")
    quick_fit(SMALL, verbose=1)
    out, err = capfd.readouterr()
    assert not out
    assert "fit" in err


# ---- rows of many kinds -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return quick_fit(SMALL)


KINDS = {
    "list": SMALL.tolist(),
    "object array": SMALL.astype(object),
    "Fortran order": np.asfortranarray(SMALL),
    "pandas": pd.DataFrame(SMALL, columns=COLUMNS),
    "pandas without names": pd.DataFrame(SMALL),
    "pandas object columns": pd.DataFrame(SMALL, columns=COLUMNS).astype(object),
    "polars": pl.DataFrame(SMALL, schema=COLUMNS),
    "tensor": torch.from_numpy(SMALL),
    "tensor with a gradient": torch.from_numpy(SMALL).requires_grad_(),
    "table": ll.data.load(torch.from_numpy(SMALL)),
    "table with names": ll.data.Table(torch.from_numpy(SMALL), tuple(COLUMNS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_kind_give_the_same_fit(plain, kind):
    x = KINDS[kind]
    estimator = quick_fit(x)
    np.testing.assert_array_equal(estimator.means_, plain.means_)
    np.testing.assert_array_equal(estimator.predict_proba(x), plain.predict_proba(SMALL))
    assert estimator.n_features_in_ == 3
    named = kind in ("pandas", "pandas object columns", "polars", "table with names")
    assert list(vars(estimator).get("feature_names_in_", [])) == (COLUMNS if named else [])
    assert (
        estimator.posterior_.names is None
        or not named
        or (list(estimator.posterior_.names) == COLUMNS)
    )


@pytest.mark.parametrize("dtype", [int, bool, np.uint8, np.float32])
@pytest.mark.parametrize(
    "held",
    [np.asarray, lambda x: x.astype(object), torch.from_numpy],
    ids=["array", "object array", "tensor"],
)
def test_numbers_of_any_kind_are_float64(dtype, held):
    x = (SMALL > SMALL.mean(0) if dtype is bool else 10 + SMALL).astype(dtype)
    expected = quick_fit(x.astype(float))
    estimator = quick_fit(held(x))
    np.testing.assert_array_equal(estimator.means_, expected.means_)
    assert estimator.means_.dtype == estimator.score_samples(held(x)).dtype == np.float64


@pytest.mark.parametrize(
    "half", [SMALL.astype(np.float16), torch.from_numpy(SMALL).to(torch.bfloat16)]
)
def test_half_precision_is_upcast_with_a_warning(half):
    with pytest.warns(UserWarning, match="float16 is coarse; converted to float64"):
        estimator = quick_fit(half)
    exact = half.double().numpy() if isinstance(half, torch.Tensor) else half.astype(float)
    np.testing.assert_array_equal(estimator.means_, quick_fit(exact).means_)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": pd.array([1, 2, None, 4, 5], "Int64"), "b": [0.5, 2.0, 1.0, 9.0, 7.0]}),
        pd.DataFrame({"a": [1, 2, pd.NA, 4, 5], "b": [0.5, 2.0, 1.0, 9.0, 7.0]}),
        pd.DataFrame({"a": [1, 2, None, 4, 5], "b": [0.5, 2.0, 1.0, 9.0, 7.0]}),
        pl.DataFrame({"a": [1, 2, None, 4, 5], "b": [0.5, 2.0, 1.0, 9.0, 7.0]}),
    ],
    ids=["Int64", "NA", "None", "polars null"],
)
def test_missing_cells_of_frames_are_known(frame):
    x = np.array([[1, 0.5], [2, 2.0], [np.nan, 1.0], [4, 9.0], [5, 7.0]])
    np.testing.assert_array_equal(quick_fit(frame, 1).means_, quick_fit(x, 1).means_)


FRAME = pd.DataFrame(SMALL, columns=COLUMNS)


@pytest.mark.parametrize("package", [pd.DataFrame, lambda frame: pl.from_dict(dict(frame))])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (FRAME[["b", "a", "c"]], "(?s)must be in the same order"),
        (FRAME[["a", "c"]], "(?s)seen at fit time, yet now missing:\n- b"),
        (FRAME.assign(d=1.0), "(?s)unseen at fit time:\n- d"),
        (FRAME.rename(columns={"a": "z"}), "(?s)- z\n.*missing:\n- a"),
    ],
)
def test_other_columns_are_named(package, changed, message):
    estimator = quick_fit(package(FRAME))
    with pytest.raises(ValueError, match=message):
        estimator.predict(package(changed))


def test_another_number_of_columns_is_an_error(plain):
    with pytest.raises(ValueError, match="X has 2 features, but .* expecting 3"):
        plain.predict(SMALL[:, :2])


# ---- bad input: errors --------------------------------------------------------------------------


def put(value, column=1):
    x = SMALL.copy()
    x[3, column] = value
    return x


BAD_ROWS = {
    "infinite": (put(np.inf), r"X has 1 inf \(first at \[3, 1\]\)"),
    "minus infinite": (put(-np.inf), r"X has 1 inf \(first at \[3, 1\]\)"),
    "beyond the square root of float64": (put(1e200), r"1 beyond .* \[3, 1\].*larger unit"),
    "too narrow for a variance": (1e-200 * SMALL, "'x0' spans .*-200, too little.*smaller unit"),
    "a column of NaN": (np.where([0, 1, 0], np.nan, SMALL), "column 'x1' is all NaN"),
    "a named column of NaN": (FRAME.assign(b=np.nan), "column 'b' is all NaN"),
    "one row": (SMALL[:1], r"1 sample\(s\) .* minimum of 2 is required"),
    "no row": (SMALL[:0], r"0 sample\(s\)"),
    "no column": (SMALL[:, :0], r"0 feature\(s\)"),
    "an empty list": ([], "Expected 2D array"),
    "an empty frame": (pd.DataFrame(), "X is empty"),
    "one dimension": (SMALL[:, 0], "(?s)Expected 2D array, got 1D.*[Rr]eshape"),
    "a tensor of one dimension": (torch.ones(5), r"got shape \(5,\); x.reshape\(-1, 1\)"),
    "three dimensions": (SMALL[None], "dim 3"),
    "text": ([["a", "b"], ["c", "d"]], "Convert your data to numeric"),
    "digits in text": (SMALL.astype(str), "Convert your data to numeric"),
    "digits in text as objects": (SMALL.astype(str).astype(object), "not numeric"),
    "a column of text": (FRAME.assign(b=FRAME["b"].astype(str)), "column 'b' is not numeric"),
    "complex": (SMALL.astype(complex), "Complex data not supported"),
    "a complex tensor": (torch.from_numpy(SMALL).to(torch.complex128), "expected real numbers"),
    "sparse": (sparse.csr_array(SMALL), "dense data is required"),
    "a sparse tensor": (torch.from_numpy(SMALL).to_sparse(), "dense required"),
    "ragged": ([[1.0, 2.0], [3.0]], "inhomogeneous"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_rows_that_cannot_be_fitted_are_refused(kind):
    x, message = BAD_ROWS[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        quick(1).fit(x)


@pytest.mark.parametrize("method", METHODS)
def test_rows_to_predict_are_checked_as_those_of_the_fit(plain, method):
    with pytest.raises(ValueError, match=r"X has 1 inf \(first at \[3, 1\]\)"):
        getattr(plain, method)(put(np.inf))
    with pytest.raises((ValueError, TypeError), match="Convert your data to numeric"):
        getattr(plain, method)(SMALL.astype(str))


def test_more_components_than_rows_are_refused():
    with pytest.raises(ValueError, match="n_components: .* got 5 components for 3 rows"):
        quick(5).fit(SMALL[:3])


@pytest.mark.parametrize("name", ["n_components", "n_init", "max_iter"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, None])
def test_counts_are_counts(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an int >= 1, got .*{value}"):
        quick().set_params(**{name: value}).fit(SMALL)


@pytest.mark.parametrize("value", [-1, 2.5, "0", True, 2**63, np.random.default_rng(0)])
def test_a_seed_is_a_seed(value):
    with pytest.raises(ValueError, match="random_state must be an int >= 0"):
        quick(random_state=value).fit(SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"covariance_type": "round"}, "covariance_type: expected \"full\" or .*, got 'round'"),
        ({"init_params": "kmeans"}, 'init_params: expected "k-means.." or "random_from_data"'),
        ({"tol": 0}, "tol: expected a number > 0"),
        ({"tol": "small"}, "tol: expected a number > 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        quick(**arguments).fit(SMALL)


def test_what_is_not_honoured_is_not_taken():
    with pytest.raises(TypeError, match="reg_covar"):
        GaussianMixture(2, reg_covar=1e-6)


@pytest.mark.slow
def test_arguments_are_honoured():
    assert len(quick_fit(SMALL, n_init=3).posterior_.restarts.elbos) == 3
    found = [quick_fit(SMALL, tol=tol, max_iter=1000).converged_ for tol in (1e-9, 0.5)]
    assert found == [False, True]
    starts = [quick_fit(SMALL, init_params=name) for name in ("k-means++", "random_from_data")]
    assert [e.posterior_.model.init for e in starts] == ["k-means++", "random"]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_answered_before_a_fit(method):
    with pytest.raises(NotFittedError):
        getattr(quick(), method)(SMALL)


def test_nothing_is_drawn_or_judged_before_a_fit():
    with pytest.raises(NotFittedError):
        quick().sample()
    with pytest.raises(NotFittedError):
        quick().verdict_  # noqa: B018


# ---- bad input: a warning and a usable result ---------------------------------------------------


def assert_usable(estimator, x):
    for name in ("weights_", "means_", "covariances_", "precisions_", "lower_bound_"):
        assert np.isfinite(getattr(estimator, name)).all()
    assert (estimator.covariances_ > 0).all()
    assert np.isfinite(estimator.score_samples(x)).all()
    np.testing.assert_allclose(estimator.predict_proba(x).sum(1), 1)


def test_a_constant_column_warns_and_is_fitted():
    x = FRAME.assign(b=3.0)
    with pytest.warns(UserWarning, match="constant column 'b'") as caught:
        estimator = quick_fit(x)
    assert len(caught) == 1
    assert_usable(estimator, x)
    np.testing.assert_allclose(estimator.means_[:, 1], 3, rtol=0.01)


def test_equal_rows_warn_and_say_how_many_components_there_are():
    x = np.ones((20, 2))
    with pytest.warns(UserWarning, match="all 20 rows are equal") as caught:
        estimator = quick_fit(x)
    assert len(caught) == 1
    assert_usable(estimator, x)
    assert "effective number of components 1" in str(estimator.verdict_)


@pytest.mark.parametrize("n_components", [1, 2])
def test_an_outlier_warns_and_is_fitted(n_components):
    x = put(1e8)
    with pytest.warns(UserWarning, match="row 3 of column 'x1' .* look alike") as caught:
        estimator = quick_fit(x, n_components)
    assert len(caught) == 1
    assert_usable(estimator, x)


@pytest.mark.slow
def test_a_far_offset_loses_nothing(fitted):
    far = GaussianMixture(2, covariance_type="diag", n_init=1, max_iter=1000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # float64 steps are 1e-4 out there
        far.fit(X + 1e12)
    _, sd = posterior_sd(fitted)
    assert_usable(far, X + 1e12)
    assert (abs(ordered(far)[1] - 1e12 - ordered(fitted)[1]) < 0.2 * sd).all()
    assert far.score(X + 1e12) == pytest.approx(fitted.score(X), abs=1e-3)


@pytest.mark.parametrize("unit", [1e-100, 1e-6, 1e6, 1e100])
def test_units_do_not_matter(plain, unit):
    scaled = quick_fit(unit * SMALL)
    assert_usable(scaled, unit * SMALL)
    sd = plain.posterior_.sample(1000)["locs"].std(0).numpy()
    assert (abs(scaled.means_ / unit - plain.means_) < 0.1 * sd).all()
    np.testing.assert_array_equal(scaled.predict(unit * SMALL), plain.predict(SMALL))
    score = scaled.score(unit * SMALL) + 3 * np.log(unit)
    assert score == pytest.approx(plain.score(SMALL), abs=0.01)


# ---- covariances of every shape, rows that count more than once ---------------------------------

TYPES = ["full", "tied", "diag", "spherical"]


@pytest.fixture(scope="module")
def of_type():
    """Name -> estimator with that covariance type, fitted once."""
    x = X[:200] @ np.array([[1.0, 0.3, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    cases = {name: quick_fit(x, covariance_type=name, max_iter=700) for name in TYPES}
    return x, cases


def test_the_default_is_that_of_scikit_learn():
    for name in ("n_components", "covariance_type"):
        assert getattr(GaussianMixture(), name) == getattr(Peer(), name)


@pytest.mark.slow
@pytest.mark.parametrize("covariance_type", TYPES)
def test_every_shape_of_covariance_is_that_of_scikit_learn(of_type, covariance_type):
    x, cases = of_type
    estimator = cases[covariance_type]
    peer = Peer(2, covariance_type=covariance_type, n_init=3, random_state=0).fit(x)
    num_free = (peer.aic(x) + 2 * len(x) * peer.score(x)) / 2
    # The posterior predictive differs from the plug-in density by about p / 2N nats.
    assert estimator.score(x) == pytest.approx(peer.score(x), abs=num_free / len(x))
    assert estimator._num_free == pytest.approx(num_free)
    order, peer_order = order_of(estimator), order_of(peer)
    for name in ("covariances_", "precisions_", "precisions_cholesky_"):
        found, expected = getattr(estimator, name), getattr(peer, name)
        assert found.shape == expected.shape
        if covariance_type != "tied":
            found, expected = found[order], expected[peer_order]
        spread = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=0.25 * spread)
    covariances = estimator.covariances_
    if covariance_type in ("full", "tied"):
        eye = np.broadcast_to(np.eye(3), covariances.shape)
        np.testing.assert_allclose(covariances @ estimator.precisions_, eye, atol=1e-8)
        upper = estimator.precisions_cholesky_
        np.testing.assert_allclose(upper, np.triu(upper), atol=1e-12)
        np.testing.assert_allclose(upper @ upper.swapaxes(-1, -2), estimator.precisions_)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_new_rows_have_the_covariance_of_their_component(of_type, covariance_type):
    estimator = of_type[1][covariance_type]
    x, labels = estimator.sample(20_000)
    for k in range(2):
        rows = x[labels == k]
        found = np.cov(rows.T)
        expected = {
            "full": lambda k=k: estimator.covariances_[k],
            "tied": lambda: estimator.covariances_,
            "diag": lambda k=k: np.diag(estimator.covariances_[k]),
            "spherical": lambda k=k: estimator.covariances_[k] * np.eye(3),
        }[covariance_type]()
        # What the means do not know of themselves is added: a share of 1 / n_k.
        size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        error = 5 * size * np.sqrt(2 / len(rows)) + 3 * size / (0.25 * 200)
        assert (abs(found - expected) < error).all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_missing_cells_are_integrated_out_of_every_shape(of_type, covariance_type):
    x, cases = of_type
    holes = with_holes(x[:30])
    estimator = cases[covariance_type]
    draws = estimator._draws()
    mixture = estimator._model.mixture(draws)
    trils = mixture.scale_trils
    if trils is None:
        trils = mixture.scales.expand_as(mixture.locs).diag_embed()
    covariances = (trils @ trils.mT).squeeze(1).expand(-1, 2, -1, -1).numpy()
    weights, locs = draws["weights"].numpy(), draws["locs"].numpy()
    for row, found in zip(holes, estimator.score_samples(holes), strict=True):
        seen = ~np.isnan(row)
        parts = [
            np.log(weights[s, k])
            + stats.multivariate_normal(
                locs[s, k, seen], covariances[s, k][np.ix_(seen, seen)]
            ).logpdf(row[seen])
            if seen.any()
            else np.log(weights[s, k])
            for s in range(0, 500, 10)
            for k in range(2)
        ]
        each = np.array(parts).reshape(-1, 2)
        spread = logsumexp(each, 1)
        expected = logsumexp(spread) - np.log(len(spread))
        assert abs(found - expected) < 5 * np.exp(spread - expected).std() / np.sqrt(50) + 1e-6


def test_a_weight_of_two_is_the_row_twice_and_none_leaves_it_out():
    weights = np.array([2.0] * 20 + [1.0] * 10 + [0.0] * 10)
    rows = np.concatenate([SMALL[:20], SMALL[:30]])
    counted = quick_fit(SMALL, max_iter=400, sample_weight=weights)
    repeated = quick_fit(rows, max_iter=400)
    np.testing.assert_allclose(counted.means_, repeated.means_, rtol=1e-5)
    np.testing.assert_allclose(counted.weights_, repeated.weights_, rtol=1e-4)
    assert counted.lower_bound_ == pytest.approx(repeated.lower_bound_, rel=1e-5)
    with pytest.warns(ConvergenceWarning):
        labels = quick(max_iter=3).fit_predict(SMALL, sample_weight=weights)
    assert labels.shape == (40,)


def test_names_stay_where_rows_are_weighted():
    estimator = quick_fit(FRAME, sample_weight=np.ones(40))
    assert list(estimator.feature_names_in_) == COLUMNS
    assert list(estimator.posterior_.names) == COLUMNS


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 39, r"sample_weight: expected shape \(40,\), one for each row of X, got \(39,\)"),
        ([[1.0]] * 40, r"sample_weight: expected shape \(40,\)"),
        ([-1.0] + [1.0] * 39, "sample_weight: expected finite numbers >= 0, got -1 for row 0"),
        ([1.0, np.nan] + [1.0] * 38, "sample_weight: .* got nan for row 1"),
        ([1.0, np.inf] + [1.0] * 38, "sample_weight: .* got inf for row 1"),
        ([0.0] * 40, "sample_weight: expected at least one above 0"),
        ("heavy", "sample_weight: expected one number for each row, got 'heavy'"),
    ],
)
def test_row_45_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises((ValueError, TypeError), match=message):
        quick(1).fit(SMALL, sample_weight=weights)
