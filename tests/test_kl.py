"""Figures carry their error; KL equals closed forms worked out by hand, and integrals."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    Uniform,
)

from latentlab.diagnostics import Estimate, kl, kl_from_draws, log_mean_exp

SEEDS = st.integers(0, 2**32 - 1)


# ---- estimates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (-1130.2648, 0.0412, "-1130.26 ± 0.04"),
        (1.23456, 0.0996, "1.23 ± 0.10"),
        (1.23456, 0.0149, "1.235 ± 0.015"),
        (-0.001, 0.3, "0.0 ± 0.3"),
        (123456.0, 300.0, "123500 ± 300"),
        (3.2e-11, 2e-12, "3.2e-11 ± 2e-12"),
        (2.0e10, 3e6, "2.0000e+10 ± 3e+06"),
        (0.5, 0.0, "0.5"),
        (-1130.26, 0.0, "-1130.26"),
        (0.1 + 0.2, 1e-17, "0.3"),
        (math.inf, 0.0, "inf"),
        (-math.inf, math.nan, "-inf ± nan"),
        (math.nan, math.nan, "nan ± nan"),
        (1.5, math.inf, "1.5 ± inf"),
        (0.0, 0.0, "0"),
    ],
)
def test_an_estimate_is_rounded_by_its_error(value, se, text):
    assert str(Estimate(value, se)) == text


def test_an_estimate_is_a_number():
    assert float(Estimate(1.5, 0.2)) == 1.5
    assert Estimate(1.5, 0.2) == Estimate(1.5, 0.2)


def test_mean_and_error_of_draws():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    for given_as in (values, torch.tensor(values), list(values)):
        estimate = Estimate.from_draws(given_as)
        assert estimate.value == pytest.approx(4)
        assert estimate.se == pytest.approx(stats.sem(values))
    assert Estimate.from_draws([1.0, -math.inf]).value == -math.inf


@pytest.mark.parametrize("values", [[1.0], 1.0, [[1.0, 2.0], [3.0, 4.0]]])
def test_an_error_needs_two_draws(values):
    with pytest.raises(ValueError, match="at least 2 draws"):
        Estimate.from_draws(values)


@given(SEEDS)
def test_log_mean_exp_is_within_its_error(seed):
    """E[exp(s e)] = exp(s^2 / 2); many draws and a small s, so that the delta method holds."""
    log_weights = -1e5 + 0.5 * np.random.default_rng(seed).normal(size=10_000)
    estimate = log_mean_exp(log_weights)
    assert abs(estimate.value + 1e5 - 0.125) < 5.5 * estimate.se
    assert estimate.se == pytest.approx(math.sqrt(math.expm1(0.25)) / 100, rel=0.15)


def test_log_mean_exp_of_rows_is_summed_and_rows_share_their_draws():
    draws = torch.randn(1000, dtype=torch.float64) * 0.1
    one = log_mean_exp(draws)
    two = log_mean_exp(torch.stack([draws, draws]), dim=1)
    assert two.value == pytest.approx(2 * one.value)
    assert two.se == pytest.approx(2 * one.se)
    with pytest.raises(ValueError, match="at least 2 draws"):
        log_mean_exp([0.0])


def test_log_mean_exp_of_weights_of_zero():
    assert log_mean_exp([0.0, -math.inf]).value == pytest.approx(-math.log(2))
    assert log_mean_exp([-math.inf, -math.inf]).value == -math.inf


# ---- closed forms -------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(0.2, 5), st.floats(-3, 3), st.floats(0.2, 5))
def test_normal_by_hand(a, s, b, t):
    by_hand = math.log(t / s) + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5
    p, q = (Normal(*torch.tensor(pair, dtype=torch.float64)) for pair in ((a, s), (b, t)))
    result = kl(p, q)
    assert result.value == pytest.approx(by_hand, abs=1e-12)
    assert result.se == 0


def test_batches_are_summed_like_events():
    p, q = Normal(torch.zeros(3, 2), 1.0), Normal(torch.ones(2), 1.0)
    assert kl(p, q).value == pytest.approx(6 * 0.5)
    assert kl(Independent(p, 1), Independent(Normal(torch.ones(3, 2), 1.0), 1)).value == (
        pytest.approx(6 * 0.5)
    )
    assert kl(
        dist.Normal(0.0, 1.0).expand([4]).to_event(1),
        dist.Normal(1.0, 1.0).expand([4]).to_event(1),
    ).value == pytest.approx(2)


def test_multivariate_normal_by_hand():
    """Mean-field optimum of a correlated normal: KL(q || p) = -log(1 - r^2) / 2."""
    r = 0.8
    p = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, r], [r, 1.0]]))
    scale = math.sqrt(1 - r**2)
    q = MultivariateNormal(torch.zeros(2), scale**2 * torch.eye(2))
    assert kl(q, p).value == pytest.approx(-0.5 * math.log(1 - r**2), rel=1e-5)


CLOSED = [
    (Normal(0.3, 1.2), Normal(-0.5, 2.0)),
    (Gamma(2.0, 1.5), Gamma(3.0, 1.0)),
    (Beta(2.0, 3.0), Beta(1.0, 1.0)),
    (Exponential(2.0), Gamma(1.5, 1.0)),
    (Dirichlet(torch.tensor([1.0, 2.0, 3.0])), Dirichlet(torch.ones(3))),
    (Poisson(3.0), Poisson(2.0)),
    (Categorical(torch.tensor([0.2, 0.8])), Categorical(torch.tensor([0.5, 0.5]))),
    (LogNormal(0.0, 0.5), LogNormal(0.3, 1.0)),
]


@pytest.mark.parametrize(("p", "q"), CLOSED, ids=lambda d: type(d).__name__)
@given(seed=SEEDS)
def test_draws_agree_with_closed_forms(p, q, seed):
    torch.manual_seed(seed)
    z = p.sample((4000,))
    by_draws = kl_from_draws(p.log_prob(z), q.log_prob(z))
    assert abs(by_draws.value - kl(p, q).value) < 5.5 * by_draws.se


# ---- without a closed form --------------------------------------------------------------------


def integral(p, q, *limits):
    return integrate.quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), *limits)[0]


NORMAL_TO_T = integral(stats.norm(0.5, 1.0), stats.t(3), -10, 11)


@given(SEEDS)
def test_draws_are_within_their_error_of_the_integral(seed):
    result = kl(Normal(0.5, 1.0), StudentT(3.0), num_samples=4000, seed=seed)
    assert result.se > 0
    assert abs(result.value - NORMAL_TO_T) < 5.5 * result.se


def test_mixtures_and_transforms():
    mixture = MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])), Normal(torch.tensor([-2.0, 1.0]), 1.0)
    )
    result = kl(mixture, mixture)
    assert result.value == pytest.approx(0, abs=1e-6)
    assert kl(mixture, Normal(0.0, 2.0)).value > 5 * kl(mixture, Normal(0.0, 2.0)).se
    exact = integral(stats.lognorm(0.5), stats.gamma(2), 0, 60)
    result = kl(LogNormal(0.0, 0.5), Gamma(2.0, 1.0))
    assert abs(result.value - exact) < 5.5 * result.se


@pytest.mark.parametrize("to_event", [0, 1])
def test_batches_of_draws_broadcast(to_event):
    one, q = dist.Normal(0.0, 1.0), dist.StudentT(torch.full((3,), 5.0))
    p = one.expand([3]).to_event(1) if to_event else one
    single = kl(one, dist.StudentT(5.0), num_samples=100_000)
    result = kl(p, q.to_event(to_event), num_samples=100_000)
    assert abs(result.value - 3 * single.value) < 5.5 * math.hypot(result.se, 3 * single.se)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (Normal(0.0, 1.0), HalfNormal(1.0)),
        (Normal(0.0, 1.0), Exponential(1.0)),
        (StudentT(3.0), Gamma(2.0, 1.0)),
        (Uniform(-1.0, 2.0), Uniform(0.0, 2.0)),
        (HalfNormal(1.0), Uniform(0.0, 1.0)),
        (
            dist.LogNormal(torch.zeros(4), 1.0).to_event(1),
            dist.Beta(torch.ones(4), 1.0).to_event(1),
        ),
    ],
    ids=str,
)
def test_mass_where_q_has_none_is_infinitely_far(p, q):
    assert kl(p, q) == Estimate(math.inf, 0.0)


def test_mass_where_p_has_none_costs_a_finite_amount():
    result = kl(HalfNormal(1.0), StudentT(3.0))
    assert math.log(2) / 2 < result.value < 2


@pytest.mark.parametrize("q", [StudentT(3.0), Normal(1.0, 1.0), HalfNormal(1.0)])
def test_the_global_generators_are_left_as_found(q):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    kl(Normal(0.0, 1.0), q)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(6)
    first, same, other = (kl(Normal(0.0, 1.0), StudentT(3.0), seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_generators_are_left_as_found_after_a_fault():
    class Faulty(StudentT):
        def log_prob(self, value):
            raise ValueError("no density")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no density"):
        kl(Normal(0.0, 1.0), Faulty(3.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gradient_is_kept():
    loc = torch.zeros((), requires_grad=True)
    assert isinstance(kl(Normal(loc, 1.0), StudentT(3.0)).value, float)
    assert isinstance(kl(Normal(loc, 1.0), Normal(1.0, 1.0)).value, float)


# ---- from log densities -----------------------------------------------------------------------


def test_densities_at_draws():
    assert kl_from_draws([0.0, 0.0], [-1.0, -3.0]) == Estimate(2.0, 1.0)
    assert kl_from_draws([0.0, 0.0], [-1.0, -math.inf]) == Estimate(math.inf, 0.0)
    assert math.isnan(kl_from_draws([0.0, math.nan], [-1.0, -1.0]).value)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"log_q: expected shape \(2,\) as of log_p, got \(3,\)"):
        kl_from_draws([0.0, 0.0], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"expected event shape \(\) as of p, got \(3,\)"):
        kl(Normal(torch.zeros(3), 1.0), Independent(Normal(torch.zeros(3), 1.0), 1))
