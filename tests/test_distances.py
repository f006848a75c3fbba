"""Distances between draws are those of normals, whose closed forms are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist

from latentlab.diagnostics import c2st, compare_draws, mmd, sliced_wasserstein
from latentlab.diagnostics.distances import _squares

SEEDS = st.integers(0, 2**32 - 1)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def share_below(p_values, level):
    return np.mean(np.array(p_values) <= level)


# ---- sliced Wasserstein ------------------------------------------------------------------------


@settings(max_examples=20)
@given(SEEDS, st.floats(0.3, 2.0), st.floats(0.5, 2.0))
def test_distance_of_two_normals_in_one_dimension(seed, shift, ratio):
    x, y = normals(seed, 2000, 1), shift + ratio * normals(seed + 1, 3000, 1)
    found = sliced_wasserstein(x, y, num_permutations=1)
    assert abs(found.value.value - math.hypot(shift, ratio - 1)) < 5 * found.value.se + 0.01
    assert found.se_projections == 0


def test_a_shift_is_spread_over_directions():
    """A shift by m in one of F dimensions is m / sqrt(F) for all directions together."""
    x = normals(0, 1000, 4)
    found = sliced_wasserstein(x, x + [2.0, 0, 0, 0], num_projections=500, num_permutations=1)
    assert abs(found.value.value - 1.0) < 5 * found.se_projections
    few = [sliced_wasserstein(x, x + [2.0, 0, 0, 0], 20, 1, seed=s) for s in range(60)]
    spread = np.std([one.value.value for one in few])
    assert 0.7 < spread / np.mean([one.se_projections for one in few]) < 1.5


@given(SEEDS, st.integers(1, 6), st.integers(1, 3))
def test_one_direction_is_that_of_scipy(seed, S, times):
    """SciPy's distance is of order 1, so of sorted differences; order 2 is by brute force."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=S * times), rng.normal(size=S)
    assert float(_squares(*(torch.from_numpy(np.sort(v))[:, None] for v in (x, y)))) == (
        pytest.approx(np.mean((np.sort(x) - np.sort(np.repeat(y, times))) ** 2))
    )
    same = np.abs(np.sort(x) - np.sort(np.repeat(y, times))).mean()
    assert same == pytest.approx(stats.wasserstein_distance(x, y))


def test_error_and_noise_of_the_distance_are_right():
    pairs = [(normals(s, 200, 2), normals(s + 1000, 200, 2)) for s in range(100)]
    found = [sliced_wasserstein(x, 1.5 * y + 1, 30, 1) for x, y in pairs]
    spread = np.std([one.value.value for one in found])
    assert 0.75 < np.mean([one.se_draws for one in found]) / spread < 1.33
    null = [sliced_wasserstein(x, y, 20, 19) for x, y in pairs]
    assert share_below([one.p_value for one in null], 0.05) < 0.05 + 4 * math.sqrt(0.0475 / 100)
    assert np.mean([one.noise for one in null]) == pytest.approx(
        np.mean([one.value.value for one in null]), rel=0.1
    )
    assert "without a difference" in str(null[0])


# ---- MMD --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(SEEDS, st.floats(0.5, 2.0), st.floats(0.5, 1.5), st.integers(1, 3))
def test_discrepancy_of_two_normals(seed, bandwidth, ratio, F):
    """E k(a, b) for a - b ~ N(m, v): (1 + v / h^2)^(-F/2) exp(-|m|^2 / (2 (h^2 + v)))."""

    def kernel(m, v):
        h = bandwidth**2
        return (1 + v / h) ** (-F / 2) * math.exp(-F * m**2 / (2 * (h + v)))

    x, y = normals(seed, 400, F), 0.5 + ratio * normals(seed + 1, 300, F)
    exact = kernel(0, 2) + kernel(0, 2 * ratio**2) - 2 * kernel(0.5, 1 + ratio**2)
    found = mmd(x, y, bandwidth, num_permutations=1)
    assert abs(found.squared.value - exact) < 5 * found.squared.se
    assert found.bandwidth == bandwidth


def test_discrepancy_by_brute_force():
    x, y = normals(0, 25, 2), normals(1, 31, 2) + 1
    found = mmd(x, y)
    distances = cdist(np.vstack([x, y]), np.vstack([x, y]))
    assert found.bandwidth == pytest.approx(np.median(distances[np.triu_indices(56, 1)]))
    k = np.exp(-(distances**2) / (2 * found.bandwidth**2))
    np.fill_diagonal(k, 0)
    exact = k[:25, :25].sum() / 600 + k[25:, 25:].sum() / 930 - 2 * k[:25, 25:].mean()
    assert found.squared.value == pytest.approx(exact)
    assert found.p_value == pytest.approx(1 / 201)


def test_error_of_the_discrepancy_is_right():
    pairs = [(normals(s, 100, 2), normals(s + 1000, 100, 2)) for s in range(200)]
    found = [mmd(x, 1.5 * y + 1, 2.0, 1).squared for x, y in pairs]
    assert 0.75 < np.mean([f.se for f in found]) / np.std([f.value for f in found]) < 1.33
    null = [mmd(x, y, None, 19) for x, y in pairs]
    assert share_below([f.p_value for f in null], 0.05) < 0.05 + 4 * math.sqrt(0.0475 / 200)
    values = np.array([f.squared.value for f in null])
    assert abs(values.mean()) < 5 * values.std() / math.sqrt(200)  # unbiased


# ---- C2ST ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", ["logistic", "mlp", "forest"])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_accuracy_is_that_of_bayes(mu, classifier):
    size = 2000 if classifier == "logistic" else 500
    found = c2st(normals(0, size, 1), mu + normals(1, size, 1), classifier)
    exact = stats.norm.cdf(mu / 2)
    least = {"logistic": 0.01, "mlp": 0.03, "forest": 0.05}[classifier]
    assert exact - least - 5 * found.accuracy.se < found.accuracy.value
    assert found.accuracy.value < exact + 5 * found.accuracy.se
    assert (found.p_value < 0.01) == (mu > 0)


def test_widths_and_correlations_are_seen():
    x = normals(0, 1000, 2)
    assert c2st(x, 0.5 * normals(1, 1000, 2)).accuracy.value > 0.65
    root = np.linalg.cholesky([[1.0, 0.9], [0.9, 1.0]])
    assert c2st(x, normals(1, 1000, 2) @ root.T).accuracy.value > 0.65
    many = normals(2, 300, 31)
    assert c2st(many, 3 * normals(3, 300, 31)).accuracy.value > 0.9


def test_equal_draws_are_told_apart_at_the_nominal_rate():
    p = [c2st(normals(s, 60, 2), normals(s + 999, 60, 2), seed=s).p_value for s in range(60)]
    assert share_below(p, 0.05) < 0.05 + 4 * math.sqrt(0.0475 / 60)


def test_sets_of_other_sizes_have_half_the_say():
    found = c2st(normals(0, 100, 1), 1 + normals(1, 3000, 1)).accuracy
    assert abs(found.value - stats.norm.cdf(0.5)) < 5 * found.se
    assert found.se == pytest.approx(math.sqrt(found.value * (1 - found.value) / 200))


# ---- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_errors_in_the_table_are_those_of_normals(seed):
    x = normals(seed, 1000, 3) * [1.0, 0.5, 1.0] + [0.0, 0.0, 1.0]
    found = compare_draws(10 * x - 3, 10 * normals(seed + 1, 2000, 3) - 3)
    assert ((found.shift - torch.tensor([0, 0, 1])).abs() < 5 * found.shift_se).all()
    exact = torch.tensor([1.0, 0.5, 1.0]).log()
    assert ((found.log_ratio - exact).abs() < 5 * found.log_ratio_se).all()
    assert found.shift_se[0].item() == pytest.approx(math.sqrt(1 / 1000 + 1 / 2000), rel=0.2)
    assert found.log_ratio_se[0].item() == pytest.approx(math.sqrt(0.0005 + 0.00025), rel=0.2)
    exact = math.sqrt((0.5**2 + 1.0) / 3)
    assert found.sliced_wasserstein.value.value == pytest.approx(exact, abs=0.25)
    assert found.c2st.p_value < 1e-6
    assert found.mmd.p_value < 0.01


def test_errors_know_of_autocorrelation():
    """An autoregression of persistence 0.8 counts a ninth, its squares (1 - a^2) / (1 + a^2)."""
    from scipy.signal import lfilter

    x = lfilter([0.6], [1, -0.8], normals(0, 4, 2000, 9), axis=1)
    found = compare_draws(x, normals(1, 100_000, 9))
    assert float(found.shift_se.median()) == pytest.approx(math.sqrt(9 / 8000), rel=0.15)
    exact = math.sqrt((1 + 0.64) / (1 - 0.64) / 2 / 8000)
    assert float(found.log_ratio_se.median()) == pytest.approx(exact, rel=0.15)
    assert found.c2st.p_value > 1e-4


def test_the_table_is_text_and_a_picture():
    found = compare_draws(normals(0, 100, 2), normals(1, 100, 2), ["loc", "a long name"])
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("a long name  ")
    assert lines[3].startswith("sliced W2")
    assert found.plot().get_ylabel() == "error"
    still = compare_draws(np.ones((100, 1)), normals(0, 100, 1))
    assert still.log_ratio.item() == -math.inf
    assert repr(compare_draws(normals(0, 50, 1), normals(1, 50, 1))) == repr(
        compare_draws(normals(0, 50, 1), normals(1, 50, 1))
    )


ONES = np.ones((20, 2))


@pytest.mark.parametrize("function", [sliced_wasserstein, mmd, c2st])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones(20), ONES, r"x: expected shape \(draws, quantities\) with at least 20"),
        (ONES, np.ones((19, 2)), r"y: expected shape .* got \(19, 2\)"),
        (ONES, np.ones((20, 3)), "y: expected 2 quantities as of x, got 3"),
        (ONES * np.nan, ONES, r"x: expected finite numbers, not so first at \[0, 0\]"),
    ],
)
def test_faults_are_named(function, x, y, message):
    with pytest.raises(ValueError, match=message):
        function(x, y)


@pytest.mark.parametrize("function", [sliced_wasserstein, mmd, c2st])
def test_draws_that_do_not_vary_are_no_different(function):
    found = function(ONES, ONES)
    assert found.p_value > 0.05
    assert "nan" not in str(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(ONES, ONES, bandwidth=0.0), "bandwidth: expected a positive number, got 0"),
        (lambda: mmd(ONES, ONES, num_permutations=0), "num_permutations: expected at least 1"),
        (lambda: sliced_wasserstein(ONES, ONES, 0), "num_projections: expected"),
        (lambda: c2st(ONES, ONES, "tree"), 'classifier: expected "logistic", "mlp" or "forest"'),
        (lambda: c2st(ONES, ONES, num_folds=1), "num_folds: expected 2 to 20, got 1"),
        (lambda: compare_draws(np.ones(20), ONES), r"x: expected shape \(S, F\) or \(C, S, F\)"),
        (lambda: compare_draws(ONES, ONES), r"quantities that vary, x\[0\] does not"),
        (lambda: compare_draws(ONES * np.inf, ONES), "x: expected finite .* draw 0, quantity 0"),
        (lambda: compare_draws(ONES, np.ones((20, 1))), "reference: expected 2 quantities"),
        (lambda: compare_draws(ONES, ONES, ["a"]), "names: expected 2, .* got 1"),
    ],
)
def test_other_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
