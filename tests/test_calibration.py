"""Ranks, coverage and probabilities: right ones pass at the nominal rate, wrong ones are named."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentlab.diagnostics import (
    contraction,
    coverage,
    holm,
    reliability,
    sbc,
    sbc_ranks,
    tarp,
    uniformity,
)
from latentlab.diagnostics.ecdf import _band_level, _bounds, _inside, _spaced

SEEDS = st.integers(0, 2**32 - 1)


def rng_of(seed):
    return np.random.default_rng(seed)


def simulations(seed, c=1.0, shift=0.0, num_simulations=500, num_draws=99):
    """Truths, draws and posterior means of a normal mean; c is the sd's factor, in error."""
    rng = rng_of(seed)
    truth = rng.normal(size=(num_simulations, 1))
    centre = (truth + rng.normal(size=truth.shape)) / 2
    noise = rng.normal(size=(num_simulations, num_draws, 1))
    return truth, centre[:, None] + math.sqrt(0.5) * (shift + c * noise), centre


# ---- uniformity ------------------------------------------------------------------------------


def test_the_chance_to_stay_inside_is_that_of_brute_force():
    """Two values and two points: all (counts at 1/3, counts at 2/3) by hand."""
    points = (1 / 3, 2 / 3)
    one = _inside(2, points, np.array([0, 1]), np.array([1, 2]))
    # Not both below 1/3, and not both above 2/3.
    assert one == pytest.approx(1 - 1 / 9 - 1 / 9)
    assert _inside(2, points, np.array([0, 0]), np.array([2, 2])) == pytest.approx(1)
    assert _inside(2, points, np.array([2, 0]), np.array([1, 2])) == 0


@pytest.mark.parametrize(("N", "num_draws"), [(10, None), (50, 9), (200, 99), (3000, 7)])
def test_bands_cover_what_they_say(N, num_draws):
    rng, points = rng_of(0), _spaced(num_draws + 1 if num_draws else min(N, 100))
    lower, upper = _bounds(N, points, _band_level(N, points, 0.05))
    counts = rng.multinomial(N, np.diff([0, *points, 1]), size=4000)[:, :-1].cumsum(1)
    covered = ((counts >= lower) & (counts <= upper)).all(1).mean()
    exact = _inside(N, points, lower, upper)
    assert exact >= 0.95
    assert abs(covered - exact) < 5 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize(("N", "num_points"), [(20, 7), (150, 60)])
def test_the_chance_to_stay_inside_is_that_of_arviz(N, num_points):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
        from arviz.stats import ecdf_utils
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x has its bands elsewhere")
    points = _spaced(num_points)
    z, before = np.array(points), np.array([0.0, *points[:-1]])
    for gamma in (1e-6, 0.001, 0.02, 0.3):
        lower, upper = _bounds(N, points, gamma)
        expected = ecdf_utils._ecdf_band_interior_probability(
            (z - before) / (1 - before), N, lower, upper + 1
        )
        assert _inside(N, points, lower, upper) == pytest.approx(expected, abs=1e-11)


def test_convolutions_by_fourier_transform_are_the_same(monkeypatch):
    bounds = _bounds(2000, _spaced(10), 1e-4)
    plain = _inside(2000, _spaced(10), *bounds)
    monkeypatch.setattr("latentlab.diagnostics.ecdf._FAST_FROM", 10)
    assert _inside(2000, _spaced(10), *bounds) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize(("N", "num_draws"), [(10, None), (100, None), (60, 19)])
def test_uniform_values_are_rejected_at_the_nominal_rate(N, num_draws):
    rng = rng_of(N)
    draw = (
        (lambda: rng.uniform(size=N))
        if num_draws is None
        else (lambda: rng.integers(0, num_draws + 1, N))
    )
    p = np.array([uniformity(draw(), num_draws).p_value for _ in range(200)])
    for level in (0.05, 0.3):
        share = (p <= level).mean()
        assert share < level + 4 * math.sqrt(level * (1 - level) / 200)
    assert (p <= 0.5).mean() > 0.3


@settings(max_examples=25)
@given(SEEDS, st.integers(10, 300), st.sampled_from([None, 5, 99, 300]))
def test_a_line_leaves_its_band_when_the_p_value_says_so(seed, N, num_draws):
    rng, most = rng_of(seed), num_draws or 1
    u = rng.beta(*rng.choice([0.7, 1.0, 1.3], size=2), size=N)
    found = uniformity(
        u if num_draws is None else np.floor(u * (most + 1)).clip(0, most), num_draws
    )
    outside = (found.difference < found.lower - 1e-12) | (found.difference > found.upper + 1e-12)
    assert bool(outside.any()) == (not found.ok)
    assert 0 < found.p_value <= 1


def test_readings_and_edges():
    u = (rng_of(0).permutation(500) + 0.5) / 500
    assert uniformity(u**3).reading.startswith("biased high")
    assert uniformity(1 - u**3).reading.startswith("biased low")
    assert uniformity(0.25 + u / 2).reading == "too wide (hump)"
    assert uniformity(np.where(u < 0.5, u / 2, (1 + u) / 2)).reading == "too narrow (U-shape)"
    teeth = uniformity(np.where(u < 0.5, 0.2 + 0.15 * u, 0.7 + 0.15 * u))
    assert not teeth.ok
    assert uniformity(np.zeros(1000)).p_value < 1e-100
    assert uniformity(np.zeros(10), 1).p_value == pytest.approx(2 / 2**10)  # ten heads or tails
    assert "ECDF" in uniformity(u).plot().get_ylabel()


# ---- simulation-based calibration --------------------------------------------------------------


@pytest.mark.parametrize("c", [0.5, 0.8, 1.0, 2.0])
def test_a_width_off_by_a_factor_gives_the_share_of_the_theory(c):
    truth, draws, _ = simulations(1, c, num_simulations=4000)
    found = sbc(sbc_ranks(truth, draws), 99)
    exact = 2 * stats.norm.cdf(c * stats.norm.ppf(0.1))
    assert abs(float(found.outer) - exact) < 5 * math.sqrt(exact * (1 - exact) / 4000) + 0.005
    assert abs(found.sd_ratio[0].value - c) < 5 * found.sd_ratio[0].se + 0.02
    assert found.ok == (c == 1.0)
    reading = {0.5: "too narrow (U-shape)", 0.8: "too narrow (U-shape)", 2.0: "too wide (hump)"}
    assert reading.get(c, "calibrated") in str(found)


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([-1, 1]))
def test_a_bias_has_its_direction(seed, sign):
    truth, draws, _ = simulations(seed, shift=0.7 * sign)
    text = str(sbc(sbc_ranks(truth, draws), 99, ["loc"]))
    assert f"loc biased {'high' if sign > 0 else 'low'}" in text


def test_many_calibrated_quantities_pass_at_the_nominal_rate():
    wrong = [not sbc(rng_of(seed).integers(0, 10, (50, 5)), 9).ok for seed in range(100)]
    assert np.mean(wrong) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 100)


def test_ties_of_counts_are_broken_at_random():
    rng = rng_of(0)
    rate = rng.gamma(2.0, size=(2000, 1))
    truth, draws = rng.poisson(rate), rng.poisson(rate[:, None], size=(2000, 19, 1))
    ranks = sbc_ranks(truth, draws)
    assert sbc(ranks, 19).ok
    assert not sbc((draws < truth[:, None]).sum(1), 19).ok
    assert torch.equal(ranks, sbc_ranks(truth, draws))
    assert int(ranks.min()) == 0
    assert int(ranks.max()) == 19


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


# ---- coverage, contraction, TARP ---------------------------------------------------------------


@pytest.mark.parametrize("c", [0.5, 1.0, 1.5])
def test_intervals_hold_what_normals_hold(c):
    truth, draws, _ = simulations(2, c, num_simulations=3000, num_draws=199)
    found = coverage(sbc_ranks(truth, draws), 199)
    assert found.levels.tolist() == pytest.approx([0.5, 0.8, 0.9, 0.95])
    exact = 2 * stats.norm.cdf(c * stats.norm.ppf((1 + found.levels.numpy()) / 2)) - 1
    assert (abs(found.share[:, 0].numpy() - exact) < 5 * found.se[:, 0].numpy() + 0.005).all()
    assert found.ok == (c == 1.0)


def test_levels_are_what_the_draws_can_have():
    ranks = torch.arange(10)[:, None].repeat(10, 1)  # uniform on 0..9, exactly
    found = coverage(ranks, 9, [0.77])
    assert found.levels.tolist() == [pytest.approx(0.8)]
    assert found.share.item() == pytest.approx(0.8)


@given(SEEDS, st.floats(0.3, 3.0))
def test_z_scores_and_contraction_are_those_of_normals(seed, c):
    truth, _, centre = simulations(seed, num_simulations=1000)
    found = contraction(truth, centre, np.full_like(truth, c * math.sqrt(0.5)), [1.0])
    assert abs(found.width[0].value - 1 / c) < 5 * found.width[0].se
    assert abs(found.bias[0].value) < 5 * found.bias[0].se
    assert found.learnt[0].value == pytest.approx(1 - c**2 / 2)
    assert "quantity[0]: z-score" in str(found)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_tarp_is_the_closed_form_for_references_in_the_middle(c):
    truth, draws, centre = simulations(3, c, num_simulations=3000)
    found = tarp(truth, draws, centre)
    exact = 2 * stats.norm.cdf(c * stats.norm.ppf((1 + found.levels.numpy()) / 2)) - 1
    assert (abs(found.coverage.numpy() - exact) < 5 * found.se.numpy() + 0.012).all()
    assert found.ok == (c == 1.0)


def test_tarp_by_hand():
    rng = rng_of(0)
    truth, draws, references = (
        rng.normal(size=(20, 3)),
        rng.normal(size=(20, 9, 3)),
        np.ones((20, 3)),
    )
    unit = truth.std(0, ddof=1)
    shares = []
    for m in range(20):
        near = [np.linalg.norm((draw - references[m]) / unit) for draw in draws[m]]
        shares.append(np.mean(near < np.linalg.norm((truth[m] - references[m]) / unit)))
    found = tarp(truth, draws, references)
    expected = [np.mean(np.array(shares) < level) for level in found.levels.tolist()]
    np.testing.assert_allclose(found.coverage, expected, atol=1e-12)


def test_tarp_sees_a_correlation_that_ranks_do_not():
    rng = rng_of(0)
    root = np.linalg.cholesky([[1.0, 0.95], [0.95, 1.0]])
    truth, draws = rng.normal(size=(1000, 2)) @ root.T, rng.normal(size=(1000, 99, 2))
    assert sbc(sbc_ranks(truth, draws), 99).ok
    assert not tarp(truth, draws, np.full((1000, 2), [2.0, -2.0])).ok


# ---- probabilities ----------------------------------------------------------------------------


def test_probabilities_that_are_right_pass_at_the_nominal_rate():
    p_values = []
    for seed in range(200):
        p = rng_of(seed).uniform(size=200)
        y = rng_of(seed + 1000).uniform(size=200) < p
        p_values.append(reliability(p, y, num_resamples=19, seed=seed).p_value)
    low = np.mean(np.array(p_values) <= 0.1)
    assert low < 0.1 + 4 * math.sqrt(0.09 / 200)
    assert np.mean(np.array(p_values) <= 0.5) > 0.35


@settings(max_examples=10)
@given(SEEDS, st.booleans())
def test_overconfidence_is_named_and_is_the_theory(seed, over):
    """Uniform q of success, stated as q / (q + (1 - q) (q / (1 - q))^(1 - a)): by quadrature."""
    power = 3.0 if over else 1 / 3
    q = rng_of(seed).uniform(size=2000)
    stated = q**power / (q**power + (1 - q) ** power)
    y = rng_of(seed + 1).uniform(size=2000) < q
    found = reliability(stated, y, num_resamples=50)
    grid = (np.arange(10_000) + 0.5) / 10_000
    wide = grid**power / (grid**power + (1 - grid) ** power)
    exact = np.maximum(wide, 1 - wide).mean() - np.maximum(grid, 1 - grid).mean()
    assert abs(found.overconfidence.value - exact) < 5 * found.overconfidence.se
    # What recalibration saves is E (stated - q)^2.
    noise = found.expected_miscalibration + 0.004
    assert abs(found.miscalibration - ((wide - grid) ** 2).mean()) < 4 * noise
    assert not found.ok
    assert f"{'over' if over else 'under'}confident by" in str(found)


@given(SEEDS, st.integers(10, 60))
def test_parts_add_up_to_the_brier_score(seed, N):
    rng = rng_of(seed)
    p, y = rng.integers(0, 5, N) / 4, rng.integers(0, 2, N)
    found = reliability(p, y, num_resamples=1)
    parts = found.miscalibration - found.discrimination + found.uncertainty
    assert parts == pytest.approx(((p - y) ** 2).mean())
    assert found.brier.value == pytest.approx(((p - y) ** 2).mean())
    assert found.miscalibration > -1e-12
    assert found.discrimination > -1e-12
    assert found.uncertainty == pytest.approx(y.mean() * (1 - y.mean()))
    fitted = stats_isotonic(p, y)
    np.testing.assert_allclose(found.calibrated, fitted, atol=1e-12)
    assert ((found.lower <= found.upper) & (found.lower >= 0) & (found.upper <= 1)).all()


def stats_isotonic(p, y):
    """SciPy's isotonic regression on the groups of equal probabilities."""
    from scipy.optimize import isotonic_regression

    groups = [y[p == value] for value in np.unique(p)]
    weights = [len(group) for group in groups]
    return isotonic_regression([group.mean() for group in groups], weights=weights).x


def test_several_classes_are_taken_together():
    p = rng_of(0).dirichlet([1, 1, 1], size=1000)
    labels = (p.cumsum(1)[:, :-1] < rng_of(1).uniform(size=(1000, 1))).sum(1)
    assert reliability(p, labels, 99).ok
    sharp = p**3 / (p**3).sum(1, keepdims=True)
    found = reliability(sharp, labels, 99)
    assert not found.ok
    exact = sharp.max(1).mean() - np.mean(sharp.argmax(1) == labels)
    assert found.overconfidence.value == pytest.approx(exact)
    assert "true" in found.plot().get_ylabel()


def test_certainty_that_holds_and_levels_that_are_off():
    sure = reliability(np.repeat([0.0, 1.0], 20), np.repeat([0, 1], 20))
    assert sure.p_value == 1.0
    assert str(sure) == "probabilities come true (p = 1; Brier score 0)"
    off = reliability(np.full(400, 0.3), np.arange(400) % 2)
    assert not off.ok
    assert off.bias.value == pytest.approx(-0.2)
    assert reliability(np.append(0.0, np.full(50, 0.5)), np.ones(51)).p_value < 0.05


# ---- plots and faults --------------------------------------------------------------------------


def test_plots_are_drawn():
    truth, draws, centre = simulations(0, 0.6, num_simulations=100)
    ranks = sbc_ranks(truth, draws)
    assert sbc(ranks, 99).plot().get_title() == "1 of 1 not calibrated"
    assert sbc(ranks.repeat(1, 6), 99).plot().get_legend() is not None
    assert coverage(ranks, 99).plot().get_xlabel() == "level"
    assert tarp(truth, draws, centre).plot().get_xlabel() == "credibility"
    sd = np.full_like(truth, 0.5)
    assert contraction(truth, centre, sd, [1.0]).plot().get_ylabel() == "z-score"


ONES = np.ones((20, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniformity(np.ones(9)), r"values: expected shape \(N,\) with at least 10"),
        (lambda: uniformity(np.ones((10, 1))), "values: expected shape"),
        (lambda: uniformity(np.full(10, 1.1)), r"numbers in \[0, 1\], got 1.1 at \[0\]"),
        (lambda: uniformity(np.full(10, np.nan)), r"numbers in \[0, 1\], got nan"),
        (lambda: uniformity(np.full(10, 0.5), 9), "whole numbers from 0 to num_draws=9, got 0.5"),
        (lambda: uniformity(np.full(10, 10), 9), "got 10 at"),
        (lambda: uniformity(np.ones(10), 0), "num_draws: expected at least 1"),
        (lambda: sbc(np.ones(10), 9), r"ranks: expected shape \(M, F\).*ranks\[:, None\]"),
        (lambda: sbc(np.full((10, 2), 10), 9, ["a", "b"]), "ranks of a: values: expected whole"),
        (lambda: sbc(np.ones((10, 2)), 9, ["a"]), "names: expected 2, .* got 1"),
        (lambda: sbc_ranks(ONES, np.ones((20, 5, 3))), r"shapes \(M, F\) and \(M, S, F\)"),
        (lambda: sbc_ranks(ONES, np.full((20, 5, 2), np.nan)), "draws: expected numbers, got NaN"),
        (lambda: tarp(ONES, np.ones((20, 5, 2)), np.ones(20)), "truth, draws, references"),
        (lambda: tarp(ONES, np.ones((20, 5, 2)), ONES * np.inf), r"references: .* at \[0, 0\]"),
        (lambda: coverage(np.ones(20), 9), "ranks: expected shape"),
        (lambda: coverage(ONES * 10, 9), "ranks: expected 0 to num_draws=9, got 10 to 10"),
        (lambda: coverage(ONES, 9, [1.0]), "levels: expected numbers between 0 and 1"),
        (lambda: contraction(ONES, ONES, np.ones(2), [1, 1]), "truth, mean, sd: expected one"),
        (lambda: contraction(ONES, ONES, ONES, [1.0]), r"prior_sd: expected shape \(2,\)"),
        (lambda: contraction(ONES, ONES, 0 * ONES, [1, 1]), "sd: expected positive"),
        (lambda: contraction(ONES * np.nan, ONES, ONES, [1, 1]), "truth: expected finite"),
        (lambda: reliability(np.ones(9), np.ones(9)), "at least 10 rows"),
        (lambda: reliability(np.ones((20, 1)), np.ones(20)), "2 classes"),
        (lambda: reliability(np.full(20, 1.5), np.ones(20)), r"in \[0, 1\], got 1.5 at \[0\]"),
        (lambda: reliability(np.full(20, np.nan), np.ones(20)), "got nan"),
        (lambda: reliability(ONES, np.ones(20)), "rows of sum 1, got 2 in row 0"),
        (lambda: reliability(np.ones(20), np.ones(19)), r"outcomes: expected shape \(20,\)"),
        (lambda: reliability(ONES / 2, np.full(20, 2)), "whole numbers 0 to 1, got 2 at"),
        (lambda: reliability(np.ones(20), np.ones(20), 0), "num_resamples: expected at least 1"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
