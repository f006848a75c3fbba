"""Stein's identities hold for draws of the target, and for no others; errors know correlation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from latentlab.diagnostics import stein

SEEDS = st.integers(0, 2**32 - 1)


def normal(seed, num_samples=1000, L=3, persistence=0.0, num_chains=1):
    """Draws of a correlated normal, one chain or several, and its scores."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(L, L)) / math.sqrt(L) + np.eye(L)
    noise = rng.normal(size=(num_chains, num_samples, L))
    noise[:, 1:] *= math.sqrt(1 - persistence**2)
    noise = signal.lfilter([1.0], [1.0, -persistence], noise, axis=1)
    u = noise @ root.T
    return u + 3, -np.linalg.solve(root @ root.T, u[..., None])[..., 0]


# ---- errors of means of correlated draws ----------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "L", "persistence", "num_chains"),
    [(1000, 3, 0.0, 1), (400, 40, 0.0, 1), (500, 2, 0.7, 4)],
)
def test_draws_of_the_target_pass_at_the_nominal_rate(num_samples, L, persistence, num_chains):
    found = [
        stein(*normal(seed, num_samples, L, persistence, num_chains)).p_value
        for seed in range(200)
    ]
    low = np.mean(np.array(found) < 0.05)
    assert low < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)
    assert np.mean(np.array(found) < 0.5) > 0.2  # and it is not asleep


@settings(max_examples=20)
@given(SEEDS)
def test_a_variance_taken_for_a_standard_deviation_is_caught(seed):
    rng = np.random.default_rng(seed)
    scale = np.array([0.5, 1.0, 2.0])
    u = scale * rng.normal(size=(4000, 3))
    found = stein(u, -u / scale, ["a", "b", "c"])  # variance `scale` where sd was meant
    assert not found.ok
    assert found.spread_z.abs().argmax() != 1  # one is its own square
    text = str(found)
    assert "do not belong" in text
    assert "a: spread" in text or "c: spread" in text
    assert stein(u, -u / scale**2, ["a", "b", "c"]).p_value > 1e-5


@given(SEEDS, st.floats(-0.5, 0.5), st.floats(0.5, 2.0))
def test_figures_are_those_of_normals(seed, shift, ratio):
    u = 5 + 2 * (shift + ratio * np.random.default_rng(seed).normal(size=(2000, 1)))
    found = stein(u, -(u - 5) / 4)
    assert abs(float(found.slope) + shift / 2) < 5 * float(found.slope_se)
    assert abs(float(found.spread) + ratio**2) < 5 * float(found.spread_se) + 0.01


def test_a_mean_field_guide_is_seen_in_pairs_only():
    precision = np.linalg.inv([[1.0, 0.6], [0.6, 1.0]])
    u = np.random.default_rng(0).normal(size=(4000, 2)) / np.sqrt(np.diag(precision))
    found = stein(u, -u @ precision)
    assert found.spread_z.abs().max() < 4
    assert found.slope_z.abs().max() < 4
    assert found.pair_z.abs().max() > 10
    assert found.worst[0][1] in ("u[0] with u[1]", "u[1] with u[0]")
    many = [np.random.default_rng(1).normal(size=(4000, 31))]
    assert stein(*[np.hstack([v, *many]) for v in (u, -u @ precision)]).pair_z is None


def test_heavy_tails_of_the_draws_do_no_harm():
    low = 0
    for seed in range(200):
        u = np.random.default_rng(seed).standard_cauchy(size=(1000, 2))
        low += stein(u, -2 * u / (1 + u**2)).p_value < 0.05
    assert low / 200 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_heavy_tails_do_not_hide_a_width():
    """With the mean as centre, one draw far out would drown the rest: a third is missed."""
    for seed in range(10):
        u = 2 * np.random.default_rng(seed).standard_cauchy(size=(500, 1))
        assert not stein(u, -2 * u / (1 + u**2)).ok


def test_z_scores_of_squares_are_as_likely_below_as_above():
    """Chi-square draws are skew: without Hall's transformation 0.4 % and 3 % are beyond 2.33."""
    rng = np.random.default_rng(0)
    z = torch.cat([stein(u, -u).spread_z for u in rng.normal(size=(100, 150, 30))])
    for share in ((z < -2.33).double().mean(), (z > 2.33).double().mean()):
        assert 0.004 < float(share) < 0.022


def test_chains_and_units_do_not_matter():
    u, g = normal(0, 500, 2, 0.5, 2)
    one = stein(u, g)
    torch.testing.assert_close(stein(1e6 * u + 1, g / 1e6).spread_z, one.spread_z)
    torch.testing.assert_close(stein(u[::-1].copy(), g[::-1].copy()).slope_z, one.slope_z)
    assert one.num_tests == 6
    assert 50 < one.ess < 1000


def test_what_does_not_vary_fails():
    u, g = normal(0, 200, 2)
    u[:, :, 1] = 3.0
    found = stein(u, g)
    assert found.spread_z[1] == math.inf
    assert found.p_value == 0.0
    assert "u[1]: spread 0, not -1 (z = inf)" in str(found)
    assert stein(u, np.zeros_like(g)).spread_z[0] == math.inf


def test_a_plot_is_drawn():
    ax = stein(*normal(0, 200, 3)).plot()
    assert "Stein" in ax.get_title()
    assert stein(*normal(0, 200, 40)).plot().get_ylabel() == "z-score"


@pytest.mark.parametrize(
    ("draws", "scores", "names", "message"),
    [
        (np.ones(100), np.ones(100), None, r"draws: expected shape \(S, L\) or \(C, S, L\)"),
        (np.ones((99, 2)), np.ones((99, 2)), None, "at least 100 draws"),
        (np.ones((100, 0)), np.ones((100, 0)), None, "draws: expected shape"),
        (np.ones((100, 2)), np.ones((100, 1)), None, "scores: expected the shape of draws"),
        (np.ones((100, 2)), np.full((100, 2), np.nan), None, r"200 .* \(first at draw 0, lat"),
        (np.full((100, 2), np.inf), np.ones((100, 2)), None, "draws: expected finite"),
        (np.ones((100, 2)), np.ones((100, 2)), ["a"], "names: expected 2, .* got 1"),
    ],
)
def test_faults_are_named(draws, scores, names, message):
    with pytest.raises(ValueError, match=message):
        stein(draws, scores, names)
