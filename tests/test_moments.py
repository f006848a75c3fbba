"""Errors of a guide's moments, against targets whose moments are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal

from latentlab.diagnostics import moment_errors, psis

S = 20_000


def draws_and_weights(target, guide, seed, num_samples=S):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = guide.sample((num_samples,))
    log_weights = (target.log_prob(z) - guide.log_prob(z)).reshape(num_samples, -1).sum(-1)
    return z.reshape(num_samples, -1), psis(log_weights).log_weights


@given(st.integers(0, 10**6), st.floats(-0.5, 0.5), st.floats(0.8, 1.5))
def test_shift_and_ratio_of_normals_are_within_their_errors(seed, loc, scale):
    one = torch.ones(1, dtype=torch.float64)
    z, weights = draws_and_weights(Normal(0 * one, one), Normal(loc * one, scale * one), seed)
    errors = moment_errors(z, weights)
    assert abs(float(errors.shift) - loc) < 5 * float(errors.shift_se) + 0.01
    assert abs(float(errors.ratio) - scale) < 5 * float(errors.ratio_se) + 0.01


@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.6]))
def test_a_mean_field_guide_of_a_correlated_normal_is_too_narrow(seed, correlation):
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]]).double()
    target = MultivariateNormal(torch.zeros(2).double(), covariance)
    scale = math.sqrt(1 - correlation**2)  # the optimum of the ELBO keeps the precisions
    guide = Normal(torch.zeros(2).double(), torch.full((2,), scale).double())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = guide.sample((S,))
    log_weights = psis(target.log_prob(z) - guide.log_prob(z).sum(-1)).log_weights
    errors = moment_errors(z, log_weights)
    assert ((errors.ratio - scale).abs() < 5 * errors.ratio_se + 0.02).all()
    assert (errors.shift.abs() < 5 * errors.shift_se + 0.01).all()


def test_the_stated_errors_are_the_spread_over_repetitions():
    one = torch.ones(1, dtype=torch.float64)
    found = [
        moment_errors(
            *draws_and_weights(Normal(0 * one, one), Normal(0.2 * one, 0.9 * one), s, 4000)
        )
        for s in range(200)
    ]
    for value, se in (("shift", "shift_se"), ("ratio", "ratio_se")):
        spread = torch.stack([getattr(e, value) for e in found]).std()
        stated = torch.stack([getattr(e, se) for e in found]).mean()
        assert 0.75 < stated / spread < 1.33


def test_equal_weights_find_nothing_wrong():
    z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).double()
    errors = moment_errors(z, torch.full((1000,), -7.0))
    assert errors.shift.abs().max() < 1e-12
    assert (errors.ratio - 1).abs().max() < 1e-12
    assert errors.shift_se.abs().max() < 1e-12


@given(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6))
def test_units_do_not_matter(scale, offset):
    one = torch.ones(1, dtype=torch.float64)
    z, weights = draws_and_weights(Normal(0 * one, one), Normal(0.3 * one, one), 0, 1000)
    plain, moved = moment_errors(z, weights), moment_errors(scale * z + offset, weights)
    digits = 1e-14 * (1 + abs(offset) / scale)
    assert float((plain.shift - moved.shift).abs()) < 1e-9 + 100 * digits
    assert float((plain.ratio - moved.ratio).abs()) < 1e-9 + 100 * digits


def test_a_figure_that_does_not_vary_is_not_off():
    z = torch.stack([torch.ones(100), torch.linspace(-1, 1, 100)], -1)
    errors = moment_errors(z, torch.linspace(0, 1, 100))
    assert float(errors.shift[0]) == 0.0
    assert float(errors.ratio[0]) == 1.0
    assert errors.worst_shift[0] == errors.worst_ratio[0] == 1


def test_the_worst_figure_is_named_whichever_way_it_is_off():
    z = torch.randn(S, 3, generator=torch.Generator().manual_seed(0)).double()
    target = Normal(
        torch.tensor([0.0, -0.4, 0.0]).double(), torch.tensor([1.0, 1.0, 0.6]).double()
    )
    log_weights = (target.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(-1)
    errors = moment_errors(z, log_weights)
    assert errors.worst_shift[0] == 1
    assert errors.worst_shift[1].value == pytest.approx(0.4, abs=0.1)
    assert errors.worst_ratio[0] == 2
    assert errors.worst_ratio[1].value == pytest.approx(1 / 0.6, abs=0.15)
    assert "mean off by 0.4" in str(errors)


@pytest.mark.parametrize(
    ("draws", "log_weights"),
    [
        (torch.zeros(5), torch.zeros(5)),
        (torch.zeros(5, 2), torch.zeros(4)),
        (torch.zeros(1, 1), torch.zeros(1)),
    ],
)
def test_shapes_that_do_not_fit_are_named(draws, log_weights):
    with pytest.raises(ValueError, match="expected shapes"):
        moment_errors(draws, log_weights)
