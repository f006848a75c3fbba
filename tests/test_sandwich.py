"""Bounds on the evidence, and on errors of moments, are those of normals in closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from latentlab.diagnostics import error_bounds, psis, sandwich

SEEDS = st.integers(0, 2**32 - 1)


def normals(seed, loc, variance, num_samples=20_000, log_evidence=0.0):
    """Draws of a standard normal guide, and weights of a target N(loc, variance), (S, D)."""
    loc, variance = np.atleast_1d(loc), np.atleast_1d(variance)
    z = np.random.default_rng(seed).normal(size=(num_samples, len(loc)))
    log_p = stats.norm(loc, np.sqrt(variance)).logpdf(z).sum(1)
    return z, log_evidence + log_p - stats.norm.logpdf(z).sum(1)


def power(loc, variance, n):
    """E w^n for one dimension: a Gaussian integral."""
    rate = n / variance - (n - 1)
    return (
        math.exp(n**2 * loc**2 / variance**2 / (2 * rate) - n * loc**2 / (2 * variance))
        * variance ** (-n / 2)
        / math.sqrt(rate)
    )


# ---- the evidence ------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([(0.3, 0.8), (0.0, 0.6), (-0.4, 1.2)]), st.sampled_from([1.5, 2, 3]))
def test_bounds_of_normals_are_closed_forms(seed, target, order):
    loc, variance = target
    found = sandwich(normals(seed, loc, variance, log_evidence=-1130.0)[1], order)
    kl = 0.5 * (1 / variance + loc**2 / variance - 1 + math.log(variance))
    cubo = math.log(power(loc, variance, order)) / order
    for figure, exact in (
        (found.elbo, -1130 - kl),
        (found.evidence, -1130.0),
        (found.cubo, -1130 + cubo),
        (found.kl, kl),
    ):
        assert abs(figure.value - exact) < 6 * figure.se + 0.005
    assert found.elbo.value <= found.evidence.value <= found.cubo.value


@pytest.mark.parametrize("seed", range(5))
def test_particles_close_the_gap(seed):
    """Far enough, the gap of K particles is half the variance of a weight over K."""
    found = sandwich(normals(seed, 0.5, 1.0, 100_000)[1])
    assert list(found.iwae) == [10, 100, 1000]
    variance = math.exp(0.25) - 1
    for K in (100, 1000):
        assert abs(found.iwae[K].value + variance / (2 * K)) < 5 * found.iwae[K].se + 1e-4
    bounds = [found.elbo, *found.iwae.values()]
    assert (np.diff([bound.value for bound in bounds]) > -0.01).all()


def test_stated_errors_are_the_spread_over_repetitions():
    found = [sandwich(normals(seed, 0.4, 0.9, 2000)[1]) for seed in range(200)]
    for name in ("elbo", "evidence", "cubo", "kl"):
        figures = [getattr(f, name) for f in found]
        spread = np.std([figure.value for figure in figures])
        assert np.mean([figure.se for figure in figures]) == pytest.approx(spread, rel=0.25)


def test_an_exact_guide_has_no_gap():
    found = sandwich(np.full(1000, -7.5))
    for figure in (found.elbo, *found.iwae.values(), found.evidence, found.cubo):
        assert figure.value == pytest.approx(-7.5)
        assert figure.se == pytest.approx(0, abs=1e-12)
    assert found.kl.value == pytest.approx(0, abs=1e-9)
    assert found.unreliable == ()


def test_evidence_is_that_of_smoothed_weights_and_their_height():
    """Of heavy weights, smoothed: the body is as it was, and the tail is lower or higher."""
    for weights in (
        normals(0, 0.0, 3.0, 1000)[1],
        np.where(np.arange(1000) < 990, -np.inf, np.arange(1000) / 100),
        np.round(normals(0, 1.0, 1.0, 1000)[1]),
    ):
        found, smooth = sandwich(weights + 50), psis(weights)
        kept = (weights > -np.inf) & (weights < np.sort(weights)[-smooth.tail_size - 1] + 1e-9)
        if kept.any():
            n = int(np.flatnonzero(kept)[0])
            level = weights[n] - float(smooth.log_weights[n])
            assert found.evidence.value == pytest.approx(50 + level - math.log(1000))
        else:
            assert found.evidence.value == pytest.approx(
                50 + np.log(np.exp(weights).mean()), abs=1e-9
            )
            assert found.elbo.value == -math.inf


def test_text_says_what_the_draws_cannot_tell():
    good = str(sandwich(normals(0, 0.2, 1.0)[1]))
    assert good.count("<=") == 3
    assert "IWAE-1000" in good
    assert "unknown" not in good
    middle = sandwich(normals(0, 0.0, 1.9)[1])
    assert middle.unreliable == ("CUBO",)
    heavy = sandwich(0.95 * np.random.default_rng(0).exponential(size=20_000))
    assert heavy.unreliable == ("evidence", "CUBO")
    assert "too small by an unknown amount: evidence, CUBO (k-hat" in str(heavy)


@pytest.mark.parametrize("num_zero", [0, 500])
def test_plot_shows_the_bounds_by_particles(num_zero):
    weights = normals(0, 0.4, 1.0, 4000)[1]
    weights[:num_zero] = -np.inf
    found = sandwich(weights)
    ax = found.plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        *("evidence", "CUBO, n = 2", "ELBO, IWAE"),
    ]
    assert found.plot(ax) is ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize("order", [1.0, 0.5, math.inf, math.nan])
def test_orders_that_bound_nothing_are_refused(order):
    with pytest.raises(ValueError, match="order: expected a number above 1"):
        sandwich(np.zeros(100), order)


# ---- errors of moments -------------------------------------------------------------------------


def exact_bounds(loc, variance):
    """What is stated for a standard normal guide of D dimensions; kappa^2 is 3 - 1."""
    chi = math.sqrt(np.prod([power(m, v, 2) for m, v in zip(loc, variance, strict=True)]) - 1)
    D = len(loc)
    own = math.sqrt(2 * chi * math.sqrt(3))
    least = 1 - chi**2 - math.sqrt(2) * chi
    below, above = 1 - math.sqrt(max(least, 0)), math.sqrt(1 + math.sqrt(2) * chi) - 1
    whole = math.sqrt(2 * chi * math.sqrt(D**2 + 2 * D))  # (tr 1)^2 + 2 tr 1^2
    return chi, min(chi, own), min(max(below, above), own), whole


TARGETS = [
    ([0.1], [1.0]),
    ([0.0], [0.9]),
    ([0.3], [0.7]),
    ([0.1, -0.1, 0.0], [1.0, 0.95, 1.05]),
    ([0.2, 0.2, 0.2, 0.2], [0.9, 0.9, 0.9, 0.9]),
    ([2.0, 0.0], [0.5, 1.0]),  # so far that the bounds change their kind
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("loc", "variance"), TARGETS)
def test_bounds_hold_and_are_the_numbers_stated(loc, variance, seed):
    loc, variance = np.array(loc), np.array(variance)
    z, log_weights = normals(seed, loc, variance, 50_000)
    found = error_bounds(z, log_weights + 3)
    chi, mean, sd, whole = exact_bounds(loc, variance)
    for value, se, exact in (
        (found.mean, found.mean_se, mean),
        (found.sd, found.sd_se, sd),
        (torch.tensor([found.wasserstein.value]), torch.tensor([found.wasserstein.se]), whole),
        (found.divergence.value, found.divergence.se, math.log1p(chi**2)),
    ):
        gap = torch.as_tensor(value, dtype=torch.float64) - exact
        assert (gap.abs() < 6 * torch.as_tensor(se) + 0.01 * exact).all()
    assert (np.abs(loc) <= mean).all()
    assert (np.abs(np.sqrt(variance) - 1) <= sd).all()
    distance = math.sqrt((loc**2).sum() + ((np.sqrt(variance) - 1) ** 2).sum())  # of normals
    assert distance <= whole


@given(st.floats(-1, 1), st.floats(0.3, 1.7))
def test_what_is_stated_bounds_every_normal(loc, variance):
    """Also the step from W2 to mean and sd, by itself."""
    _, mean, sd, whole = exact_bounds([loc], [variance])
    assert abs(loc) <= mean + 1e-12
    assert abs(math.sqrt(variance) - 1) <= sd + 1e-12
    assert math.hypot(loc, math.sqrt(variance) - 1) <= whole + 1e-12


def test_the_bound_of_a_mean_is_sharp_for_small_shifts():
    z, log_weights = normals(0, 0.05, 1.0, 50_000)
    assert float(error_bounds(z, log_weights).mean) == pytest.approx(0.05, rel=0.05)


def test_far_away_the_distance_bounds_the_mean():
    z, log_weights = normals(0, 2.2, 0.5)
    found = error_bounds(z, log_weights)
    assert float(found.mean) < math.sqrt(math.expm1(found.divergence.value))  # chi
    assert float(found.mean) * z.std() == pytest.approx(found.wasserstein.value)


def test_the_errors_of_bounds_are_their_spread_over_repetitions():
    found = [error_bounds(*normals(seed, [0.3, 0.0], [0.9, 1.0], 2000)) for seed in range(200)]
    for name in ("mean", "sd"):
        values = torch.stack([getattr(f, name) for f in found])
        stated = torch.stack([getattr(f, f"{name}_se") for f in found]).mean(0)
        torch.testing.assert_close(stated, values.std(0), rtol=0.3, atol=0)
    for name in ("wasserstein", "divergence"):
        spread = np.std([getattr(f, name).value for f in found])
        assert np.mean([getattr(f, name).se for f in found]) == pytest.approx(spread, rel=0.3)


@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_units_of_a_figure_do_not_matter(scale, offset):
    z, log_weights = normals(0, 0.3, 0.9, 500)
    plain, moved = error_bounds(z, log_weights), error_bounds(scale * (z + offset), log_weights)
    torch.testing.assert_close(moved.mean, plain.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved.sd, plain.sd, rtol=1e-6, atol=0)
    assert moved.wasserstein.value == pytest.approx(scale * plain.wasserstein.value, rel=1e-6)


def test_without_a_variance_there_is_no_bound():
    z, log_weights = normals(0, [0.0, 0.0], [4.0, 1.0], 20_000)
    found = error_bounds(z, log_weights)
    assert found.mean.tolist() == [math.inf, math.inf]
    assert found.wasserstein.value == math.inf
    assert str(found).startswith("no bound: weights have no variance, k-hat 0.7")


def test_figures_that_do_not_vary_and_exact_guides_are_not_off():
    z, log_weights = normals(0, 0.3, 1.0, 1000)
    both = np.concatenate([np.full_like(z, 0.1), z, np.sign(z)], 1)
    found = error_bounds(both, log_weights)
    assert found.mean[0] == found.sd[0] == found.mean_se[0] == found.sd_se[0] == 0
    assert found.worst_mean[0] != 0
    for part in (found.mean_se, found.sd_se):
        assert part.isfinite().all()
    assert error_bounds(both[:, :1], log_weights).wasserstein.value == 0
    exact = error_bounds(z, np.zeros(1000))
    assert (float(exact.mean), float(exact.sd), exact.wasserstein.value) == (0, 0, 0)
    assert "at most 0 sd" in str(exact)


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"expected shapes \(S, F\) and \(S,\), got \(30,\)"):
        error_bounds(np.zeros(30), np.zeros(30))
    with pytest.raises(ValueError, match=r"got \(30, 2\) and \(29,\)"):
        error_bounds(np.zeros((30, 2)), np.zeros(29))
    with pytest.raises(ValueError, match="draws: expected finite numbers, got 60 others"):
        error_bounds(np.full((30, 2), np.nan), np.zeros(30))
    with pytest.raises(ValueError, match="log_weights has 30 NaN"):
        error_bounds(np.zeros((30, 2)), np.full(30, np.nan))
