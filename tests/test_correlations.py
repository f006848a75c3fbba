"""Partial correlations are another writing of a correlation matrix, and so is their prior."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import LKJCholesky
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab.distributions.correlations import (
    PartialCorrelations,
    correlation_tril,
    partial_correlations,
)

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(2, 5)


def values_of(seed, D, batch=()):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-0.95, 0.95, size=(*batch, D * (D - 1) // 2)))


@given(SEEDS, WIDTHS)
def test_they_make_a_correlation_matrix_and_come_back(seed, D):
    values = values_of(seed, D, (3,))
    tril = correlation_tril(values, D)
    matrix = tril @ tril.mT
    torch.testing.assert_close(matrix.diagonal(dim1=-2, dim2=-1), torch.ones(3, D).double())
    assert (torch.linalg.eigvalsh(matrix) > 0).all()
    assert torch.equal(tril, tril.tril())
    torch.testing.assert_close(partial_correlations(tril), values)


@given(SEEDS)
def test_each_is_the_correlation_given_the_columns_before(seed):
    """That of i and j given 1 .. j - 1, from the inverse of their block of the matrix."""
    values, D = values_of(seed, 4), 4
    tril = correlation_tril(values, D)
    matrix = (tril @ tril.T).numpy()
    number = 0
    for i in range(D):
        for j in range(i):
            block = [*range(j), j, i]
            precision = np.linalg.inv(matrix[np.ix_(block, block)])
            partial = -precision[-1, -2] / np.sqrt(precision[-1, -1] * precision[-2, -2])
            assert values[number].item() == pytest.approx(partial, abs=1e-9)
            number += 1


@given(SEEDS, WIDTHS, st.floats(0.3, 5))
def test_their_density_is_that_of_torch_but_for_the_volume(seed, D, concentration):
    values = values_of(seed, D)
    below = torch.tril_indices(D, D, -1)

    def entries(values):
        return correlation_tril(values, D)[below[0], below[1]]

    volume = torch.autograd.functional.jacobian(entries, values).slogdet()[1]
    eta = torch.tensor(concentration, dtype=torch.float64)
    torchs = LKJCholesky(D, eta).log_prob(correlation_tril(values, D)) + volume
    ours = PartialCorrelations(D, eta).log_prob(values)
    torch.testing.assert_close(ours, torchs, rtol=1e-8, atol=1e-8)


def test_of_two_columns_the_uniform_prior_is_uniform():
    prior = PartialCorrelations(2, torch.tensor(1.0, dtype=torch.float64))
    log_prob = prior.log_prob(torch.linspace(-0.99, 0.99, 50, dtype=torch.float64)[:, None])
    torch.testing.assert_close(log_prob.exp(), torch.full((50,), 0.5).double())


def test_draws_come_from_the_density():
    """A correlation of D columns has mean 0 and variance 1 / (2 eta + D - 1) under the prior."""
    torch.manual_seed(0)
    D, eta, S = 4, 2.5, 40_000
    values = PartialCorrelations(D, torch.tensor(eta).double()).sample((S,))
    tril = correlation_tril(values, D)
    matrix = tril @ tril.mT
    for i in range(D):
        for j in range(i):
            rho = matrix[:, i, j]
            assert rho.mean().abs() < 4.5 * rho.std() / S**0.5
            square = rho**2
            error = 4.5 * square.std() / S**0.5
            assert (square.mean() - 1 / (2 * eta + D - 1)).abs() < error


def test_shapes_gradients_and_expansion():
    eta = torch.tensor(2.0, requires_grad=True)
    prior = PartialCorrelations(3, eta).expand((5,))
    assert (prior.batch_shape, prior.event_shape) == ((5,), (3,))
    draws = prior.rsample((2,))
    assert draws.shape == (2, 5, 3)
    assert prior.log_prob(draws).shape == (2, 5)
    assert torch.autograd.grad(draws.square().sum(), eta)[0] != 0
    assert torch.autograd.gradcheck(
        lambda v: correlation_tril(v, 3), values_of(0, 3).requires_grad_()
    )


def test_values_at_the_edge_stay_finite():
    edge = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    clipped = partial_correlations(correlation_tril(edge, 3))
    assert clipped.isfinite().all()
    assert (clipped.abs() < 1).all()


def test_it_can_be_traced():
    def density(values):
        tril = correlation_tril(values, 4)
        return PartialCorrelations(4, values.new_full((), 2.0), False).log_prob(values), tril

    graph = make_fx(density)(values_of(0, 4))
    for found, expected in zip(graph(values_of(1, 4)), density(values_of(1, 4)), strict=True):
        torch.testing.assert_close(found, expected)


def test_validation_refuses_what_is_no_correlation():
    prior = PartialCorrelations(2, torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(torch.tensor([1.5]))
    with pytest.raises(ValueError, match="concentration"):
        PartialCorrelations(2, torch.tensor(-1.0), validate_args=True)
