"""Figures of collapse are the closed forms of the linear autoencoder; evidence has its error."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from latentlab.diagnostics import collapse, kl_per_dimension, row_evidence

SEEDS = st.integers(0, 2**32 - 1)


def linear_encodings(eigenvalues, noise, num_rows=400, seed=0):
    """Exact encodings of a linear decoder at its optimum, of data with just these eigenvalues."""
    rng = np.random.default_rng(seed)
    eigenvalues = np.asarray(eigenvalues, float)
    q = np.linalg.qr(rng.normal(size=(num_rows, len(eigenvalues) + 1)))[0]
    q = q - q.mean(0)
    q = np.linalg.qr(q[:, : len(eigenvalues)])[0] * math.sqrt(num_rows)  # uncorrelated, mean zero
    x = q * np.sqrt(eigenvalues)
    loading = np.sqrt(np.maximum(eigenvalues - noise, 0))
    precision = 1 + loading**2 / noise
    return x * loading / noise / precision, np.broadcast_to(precision**-0.5, x.shape)


# ---- collapse -----------------------------------------------------------------------------------


@given(SEEDS, st.lists(st.floats(0.05, 20.0), min_size=1, max_size=6), st.floats(0.1, 5.0))
def test_figures_are_those_of_the_linear_autoencoder(seed, eigenvalues, noise):
    found = collapse(*linear_encodings(eigenvalues, noise, seed=seed))
    kept = np.maximum(np.asarray(eigenvalues), noise)
    N = 400
    np.testing.assert_allclose(found.kl, np.log(kept / noise) / 2, atol=1e-9)
    np.testing.assert_allclose(found.variance, (1 - noise / kept) * N / (N - 1), atol=1e-9)
    clear = [v for v in eigenvalues if not 1 < v / noise < 1.02]
    if len(clear) == len(eigenvalues):
        assert found.active.tolist() == [v > noise for v in eigenvalues]


@given(SEEDS, st.integers(2, 9), st.integers(1, 4))
def test_kl_is_that_of_torch(seed, N, L):
    rng = np.random.default_rng(seed)
    loc, scale = torch.from_numpy(rng.normal(size=(2, N, L)))
    scale = scale.exp()
    expected = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dimension(loc, scale), expected)
    torch.testing.assert_close(collapse(loc, scale).kl, expected.mean(0))


def test_a_dimension_that_is_the_prior_costs_nothing():
    kl = kl_per_dimension(torch.full((2, 1), 1e-9), torch.full((2, 1), 1 + 1e-9).double())
    assert 0 <= kl.max().item() < 1e-17


def test_errors_are_those_of_the_mean_over_rows():
    torch.manual_seed(0)
    loc = torch.randn(1000, 50, 1).double()
    found = [collapse(part, torch.full_like(part, 0.5)) for part in loc.unbind(1)]
    for values, errors in (
        ([f.kl for f in found], [f.kl_se for f in found]),
        ([f.variance for f in found], [f.variance_se for f in found]),
    ):
        spread = torch.cat(values).std() / torch.cat(errors).mean()
        assert 0.6 < spread < 1.5  # 50 of them: 0.1 is one standard error
    total = found[0].total_kl
    assert total.value == pytest.approx(float(found[0].kl))
    assert total.se == pytest.approx(float(found[0].kl_se))


def test_a_reading_says_which_dimensions_are_not_used():
    loc, scale = linear_encodings([5, 0.5, 3, 0.2], 1.0)
    found = collapse(loc, scale)
    assert str(found) == "2 of 4 latent dimensions are inactive (z[1], z[3])"
    assert found.inactive == [1, 3]
    assert str(collapse(loc[:, ::2])) == "all 2 latent dimensions are active"
    nothing = collapse(np.zeros((5, 20)))
    assert str(nothing) == "posterior collapse: none of the 20 latent dimensions is used"
    assert nothing.kl is nothing.total_kl is None
    assert "z[7], ...)" in str(collapse(np.append(np.zeros((5, 9)), np.arange(5)[:, None], 1)))


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (np.zeros(3), None, r"loc: expected shape \(N, L\) with at least 2 rows, got \(3,\)"),
        (np.zeros((1, 3)), None, r"loc: expected shape .* got \(1, 3\)"),
        (np.zeros((2, 3)), np.ones((2, 2)), r"scale: expected the shape of loc, \(2, 3\)"),
        (np.zeros((2, 1)), np.zeros((2, 1)), "scale: expected positive numbers, got 0"),
    ],
)
def test_faults_are_named(loc, scale, message):
    with pytest.raises(ValueError, match=message):
        collapse(loc, scale)


# ---- evidence of rows ---------------------------------------------------------------------------


def test_constant_weights_are_the_evidence():
    found = row_evidence(torch.tensor([-3.0, 700.0]).double().expand(100, 2))
    torch.testing.assert_close(found.log_prob, torch.tensor([-3.0, 700.0]).double())
    assert found.se.tolist() == [0.0, 0.0]
    assert (found.khat.khat == -math.inf).all()
    assert (found.mean.value, found.mean.se) == (pytest.approx(348.5), 0.0)


def test_evidence_is_within_its_error():
    torch.manual_seed(1)
    sd = 0.5  # E exp(sd z - sd^2 / 2) = 1: the log evidence of every row is zero
    found = row_evidence(sd * torch.randn(2000, 300).double() - sd**2 / 2)
    z = found.log_prob / found.se
    assert abs(z.mean().item()) < 5 / 300**0.5 + 0.1
    assert 0.8 < z.std().item() < 1.2
    assert abs(found.mean.value) < 5 * found.mean.se
    assert found.mean.se == pytest.approx(math.expm1(sd**2) ** 0.5 / (2000 * 300) ** 0.5, rel=0.1)
    assert found.population.se > found.mean.se
    assert "nats per row (2000 draws; 0 of 300 rows have k-hat > 0.7)" in str(found)


def test_heavy_weights_are_told():
    torch.manual_seed(2)
    heavy = torch.distributions.Exponential(1 / 0.9).sample((1000, 1)).double()  # k = 0.9
    assert len(row_evidence(torch.cat([heavy, heavy.new_zeros(1000, 1)], 1)).khat.khat) == 2
    big = torch.distributions.Exponential(1 / 0.95).sample((100_000, 1)).double()
    assert row_evidence(big).khat.bad.tolist() == [0]


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 25"):
        row_evidence(torch.zeros(10, 2))
