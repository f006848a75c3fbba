"""The density estimator keeps scikit-learn's conventions, and what it says is the model's."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from latentlab.sklearn import FlowDensity

QUICK = {"kind": "maf", "hidden_layer_sizes": (24,), "n_transforms": 1, "max_iter": 60}


def ring(num, seed=0):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, num)
    around = np.stack([np.cos(angle), np.sin(angle)], 1)
    return 3 * around + rng.normal(scale=0.2, size=(num, 2))


def quick(**arguments):
    return FlowDensity(**{**QUICK, "random_state": 0, **arguments})


@pytest.fixture(scope="module")
def fitted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return quick().fit(ring(300))


def test_scikit_learns_own_checks_find_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(quick(max_iter=5), on_fail=None, on_skip=None)
    assert [r["check_name"] for r in found if r["status"] == "failed"] == []


def test_scores_are_the_log_density_of_the_fitted_model(fitted):
    new = ring(50, seed=1)
    expected = fitted.posterior_.model.log_prob(new).numpy()
    assert np.array_equal(fitted.score_samples(new), expected)
    assert fitted.score(new) == pytest.approx(expected.sum())


def test_the_density_integrates_to_one(fitted):
    side = np.linspace(-12, 12, 400)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    mass = np.exp(fitted.score_samples(grid)).sum() * (side[1] - side[0]) ** 2
    assert mass == pytest.approx(1.0, abs=0.02)


def test_samples_have_a_seed(fitted):
    first, again = fitted.sample(5), fitted.sample(5)
    assert first.shape == (5, 2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, fitted.sample(5, random_state=1))


def test_too_few_steps_are_told():
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        density = quick(max_iter=5).fit(ring(100))
    assert not density.converged_
    assert density.n_iter_ == 5


def test_the_validation_score_is_that_of_rows_kept_aside(fitted):
    held = fitted.posterior_.held_out
    assert fitted.validation_score_ == held.value
    assert len(fitted.posterior_.pair.data.args[0]) == 270


def test_the_same_random_state_gives_the_same_fit(fitted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        again = quick().fit(ring(300))
    x = ring(20, seed=4)
    assert np.array_equal(again.score_samples(x), fitted.score_samples(x))


def test_an_unfitted_one_says_so():
    with pytest.raises(NotFittedError):
        quick().score_samples(ring(5))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "spline"}, "kind"),
        ({"kind": "planar"}, "kind"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": True}, "validation_fraction"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_iter": 2.5}, "max_iter"),
        ({"learning_rate_init": -1.0}, "learning_rate_init"),
        ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        quick(**arguments).fit(ring(40))


def test_missing_cells_are_refused_with_a_way_out():
    x = ring(40)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 NaN \(first at \[3, 1\]\)"):
        quick().fit(x)
