"""Effective sample sizes are ArviZ's, and those of processes whose autocorrelation is known."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from latentlab.diagnostics import ess, mcse

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("bulk", "tail", "mean", "sd")


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x takes other arrays")
    return arviz


def autoregressive(seed, shape, keep):
    """Stationary, standard normal, with correlation keep^t at lag t along the second axis."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise[:, 1:] *= math.sqrt(1 - keep**2)
    return lfilter([1.0], [1.0, -keep], noise, axis=1)


# ---- equal to ArviZ -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", [4, 5, 6, 7, 8, 9, 10, 11, 102, 400, 1002])
@pytest.mark.parametrize("num_chains", [1, 4])
def test_equals_arviz(arviz, kind, num_samples, num_chains):
    columns = [
        autoregressive(seed, (num_chains, num_samples), keep)
        for seed in range(4)
        for keep in (-0.9, -0.3, 0.0, 0.5, 0.95)
    ]
    r = np.random.default_rng(0)
    columns.append(r.standard_cauchy(size=(num_chains, num_samples)))
    columns.append(columns[0].cumsum(1))  # never stationary
    columns.append(columns[0] + 3 * np.arange(num_chains)[:, None])  # chains that do not agree
    columns.append(np.round(columns[2]))  # ties
    expected = [float(arviz.ess(x, method=kind)) for x in columns]
    np.testing.assert_allclose(ess(np.stack(columns, -1), kind), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["mean", "sd"])
@pytest.mark.parametrize("num_samples", [4, 9, 400])
def test_mcse_equals_arviz(arviz, kind, num_samples):
    x = np.stack([autoregressive(s, (3, num_samples), 0.6) for s in range(8)], -1)
    expected = [float(arviz.mcse(x[..., p], method=kind)) for p in range(8)]
    np.testing.assert_allclose(mcse(x, kind), expected, rtol=1e-10)


# ---- processes that are known ------------------------------------------------------------------


@given(SEEDS, st.sampled_from([-0.6, 0.0, 0.5, 0.9]))
def test_autoregressive_draws_are_worth_their_part(seed, keep):
    x = autoregressive(seed, (4, 5000), keep)[..., None]
    part = float(ess(x, "mean")) / 20_000
    assert part == pytest.approx((1 - keep) / (1 + keep), rel=0.35)
    assert float(ess(x, "bulk")) / 20_000 == pytest.approx(part, rel=0.15)


@given(SEEDS, st.sampled_from([0.5, 0.9]))
def test_squares_forget_twice_as_fast(seed, keep):
    """The squares of normal draws with correlation keep^t have correlation keep^2t."""
    x = autoregressive(seed, (4, 5000), keep)[..., None]
    part = float(ess(x, "sd")) / 20_000
    assert part == pytest.approx((1 - keep**2) / (1 + keep**2), rel=0.35)


def test_the_error_is_the_spread_over_repetitions():
    x = autoregressive(0, (400, 500), 0.7).T[None]  # each column is a repetition
    for kind, figures in (("mean", x[0].mean(0)), ("sd", x[0].std(0))):
        stated = float(mcse(x, kind).square().mean().sqrt())
        assert stated == pytest.approx(figures.std(), rel=0.15)


def test_tails_that_are_stuck_count_for_little():
    """Visits of ten draws each to what lies beyond the 95 % quantile."""
    r = np.random.default_rng(0)
    x = r.normal(size=(4000, 1)).clip(max=1.6)
    for start in r.choice(400, size=20, replace=False):
        x[10 * start : 10 * start + 10] = 2 + r.random((10, 1))
    assert float(ess(x, "tail")) < 700
    assert float(ess(x, "bulk")) > 1000


def test_a_quantile_that_is_a_draw_is_not_lost_to_rounding():
    """The 96th of 101 draws is at or below itself; 101 * 0.95 + 0.05 is a little less than 96."""
    x = np.random.default_rng(0).normal(size=(101, 1))
    below = [(x <= np.sort(x, 0)[k]).astype(float) for k in (5, 95)]
    expected = min(float(ess(indicator, "mean")) for indicator in below)
    assert float(ess(x, "tail")) == expected
    ties = np.round(3 * x) / 3
    below = [(ties <= np.sort(ties, 0)[k]).astype(float) for k in (5, 95)]
    assert float(ess(ties, "tail")) == min(float(ess(i, "mean")) for i in below)


# ---- laws --------------------------------------------------------------------------------------


@given(SEEDS, st.floats(-100, 100), st.floats(0.01, 100), st.sampled_from(KINDS))
def test_units_and_the_order_of_chains_do_not_matter(seed, shift, scale, kind):
    x = np.random.default_rng(seed).normal(size=(3, 50, 2))
    np.testing.assert_allclose(ess(shift + scale * x[::-1], kind), ess(x, kind), rtol=1e-5)


def test_ranks_do_not_need_a_variance_or_a_scale():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 200, 1)))
    torch.testing.assert_close(ess(x.exp().exp(), "bulk"), ess(x, "bulk"))
    torch.testing.assert_close(ess(1e-25 * x, "mean"), ess(x, "mean"))


def test_columns_do_not_touch_and_are_done_in_parts(monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, 64, 30))
    x[..., 3] = 7.0
    x[1, 5, 4] = np.nan
    whole = {kind: ess(x, kind) for kind in KINDS}
    monkeypatch.setattr(sys.modules["latentlab.diagnostics.ess"], "_BATCH", 4 * 4 * 32 * 7)
    for kind, found in whole.items():
        torch.testing.assert_close(ess(x, kind), found, equal_nan=True)
        assert found[3] == 128
        assert found.isnan().nonzero().tolist() == [[4]]
        assert ess(x[..., 9:10], kind) == pytest.approx(float(found[9]))
    for kind in ("mean", "sd"):
        assert mcse(x, kind)[3] == 0
        assert mcse(x, kind)[4].isnan()
    assert ess(x[..., :0]).shape == (0,)


@pytest.mark.parametrize("function", [ess, mcse])
def test_faults_are_named(function):
    with pytest.raises(ValueError, match=r"expected shape \(S, P\) or \(C, S, P\)"):
        function(np.zeros(10))
    with pytest.raises(ValueError, match=r"at least 4 draws S, got \(1, 3, 2\)"):
        function(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="kind: expected .* got 'median'"):
        function(np.zeros((10, 2)), "median")
