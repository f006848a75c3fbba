"""What codes tell is the closed form of normal codes, and its parts add up."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

from latentlab.diagnostics import collapse, information, information_from_densities
from tests.test_collapse import linear_encodings

SEEDS = st.integers(0, 2**32 - 1)


def normal_codes(seed, num_rows=2000):
    """Codes of correlated means, one dimension unused, and the exact parts of their KL."""
    covariance = np.array([[0.75, 0.4, 0], [0.4, 0.9, 0], [0, 0, 0]])
    scale = np.array([0.6, 0.7, 1.0])
    rng = np.random.default_rng(seed)
    loc = rng.multivariate_normal(np.zeros(3), covariance, size=num_rows)
    total = covariance + np.diag(scale**2)
    log = np.linalg.slogdet(total)[1]
    diagonal = np.diag(total)
    exact = {
        "mutual_information": log / 2 - np.log(scale).sum(),
        "total_correlation": (np.log(diagonal).sum() - log) / 2,
        "dimensions": (diagonal - 1 - np.log(diagonal)).sum() / 2,
    }
    exact["marginal_kl"] = exact["total_correlation"] + exact["dimensions"]
    exact["kl"] = exact["mutual_information"] + exact["marginal_kl"]
    return loc, np.broadcast_to(scale, loc.shape), exact


@settings(max_examples=6)
@given(SEEDS)
def test_parts_are_those_of_normal_codes(seed):
    loc, scale, exact = normal_codes(seed)
    found = information(loc, scale, num_samples=1000)
    for part, value in exact.items():
        estimate = getattr(found, part)
        # Of N rows, dependence among three dimensions is seen where there is none: some L / N.
        assert abs(estimate.value - value) < 5 * estimate.se + 0.02, part
    assert found.upper.value > exact["mutual_information"] - 5 * found.upper.se
    assert found.enough_rows


@settings(max_examples=10)
@given(SEEDS, st.integers(10, 40), st.integers(1, 4))
def test_parts_add_up(seed, N, L):
    rng = np.random.default_rng(seed)
    loc, scale = 2 * rng.normal(size=(N, L)), rng.gamma(2, 0.3, size=(N, L)) + 0.05
    found = information(loc, scale, num_samples=500)
    assert found.kl.value == pytest.approx(
        found.mutual_information.value + found.marginal_kl.value
    )
    parts = found.total_correlation.value + found.dimensions.value
    assert found.marginal_kl.value == pytest.approx(parts, abs=1e-9)
    assert found.mutual_information.value <= math.log(N) + 1e-9
    assert found.upper.value >= found.mutual_information.value
    assert abs(found.kl.value - collapse(loc, scale).total_kl.value) < 6 * found.kl.se + 0.3


def test_codes_of_a_linear_decoder_are_the_prior_all_together():
    loc, scale = linear_encodings([5.0, 2.0, 0.5], 1.0, num_rows=2000)
    found = information(loc, scale, num_samples=2000)
    exact = (math.log(5) + math.log(2)) / 2
    assert abs(found.mutual_information.value - exact) < 5 * found.mutual_information.se + 0.02
    assert abs(found.marginal_kl.value) < 5 * found.marginal_kl.se + 0.02


def test_a_collapsed_encoder_tells_nothing():
    found = information(np.zeros((50, 2)), np.ones((50, 2)))
    for part in (found.kl, found.mutual_information, found.marginal_kl, found.total_correlation):
        assert abs(part.value) < 1e-12
    assert found.enough_rows


def test_densities_of_any_encoder_give_the_same():
    rng = np.random.default_rng(0)
    loc, scale = torch.from_numpy(rng.normal(size=(400, 2))), torch.full((400, 2), 0.7).double()
    z = loc + scale * torch.from_numpy(rng.normal(size=(400, 2)))
    q = Independent(Normal(loc, scale), 1)
    prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    found = information_from_densities(q.log_prob(z[:, None]), prior.log_prob(z))
    same = information(loc, scale, num_samples=4000)
    for part in ("kl", "mutual_information", "marginal_kl", "upper"):
        a, b = getattr(found, part), getattr(same, part)
        assert abs(a.value - b.value) < 5 * math.hypot(a.se, b.se), part
    assert found.total_correlation is None
    by_hand = torch.stack([q.log_prob(one).exp().mean() for one in z]).log()
    exact = (q.log_prob(z) - by_hand).mean()
    assert found.mutual_information.value == pytest.approx(float(exact))
    others = [q.log_prob(one)[torch.arange(400) != n].exp().mean() for n, one in enumerate(z)]
    exact = (q.log_prob(z) - torch.stack(others).log()).mean()
    assert found.upper.value == pytest.approx(float(exact))


def test_too_few_rows_are_told():
    loc = np.random.default_rng(0).normal(size=(50, 10))
    found = information(loc, np.full_like(loc, 0.1))
    assert not found.enough_rows
    assert found.mutual_information.value == pytest.approx(math.log(50), abs=1e-3)
    assert "50 rows are too few" in str(found)


def test_rows_are_limited_and_seeds_repeat():
    loc = np.random.default_rng(0).normal(size=(300, 2))
    found = information(loc, np.ones_like(loc), num_samples=100, max_rows=200)
    assert found.num_rows == 200
    again = information(loc, np.ones_like(loc), num_samples=100, max_rows=200)
    assert repr(again) == repr(found)
    assert information(loc, np.ones_like(loc), num_samples=100, seed=1).kl != found.kl
    assert found.plot().get_xlabel() == "nats per row"


def test_pairs_in_batches_are_the_same(monkeypatch):
    loc = np.random.default_rng(0).normal(size=(100, 2))
    found = information(loc, np.ones_like(loc))
    monkeypatch.setattr(sys.modules["latentlab.diagnostics.information"], "_BATCH", 1000)
    assert information(loc, np.ones_like(loc)).kl.value == pytest.approx(found.kl.value)


def test_errors_are_the_spread_over_repetitions():
    found = [
        information(*normal_codes(seed, 300)[:2], num_samples=300, seed=seed) for seed in range(80)
    ]
    for part in ("kl", "mutual_information", "marginal_kl"):
        values = [getattr(one, part).value for one in found]
        stated = np.mean([getattr(one, part).se for one in found])
        assert 0.7 < stated / np.std(values) < 1.5, part


ONES = np.ones((20, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information(np.ones(20), np.ones(20)), r"loc: expected shape \(N, L\)"),
        (lambda: information(ONES[:9], ONES[:9]), "at least 10 rows"),
        (lambda: information(ONES, np.ones((20, 1))), "scale: expected the shape of loc"),
        (lambda: information(ONES, 0 * ONES), "scale: expected positive numbers, got 0"),
        (lambda: information(ONES * np.nan, ONES), r"loc: expected finite .* at \[0, 0\]"),
        (lambda: information(ONES, ONES, num_samples=1), "num_samples: expected at least"),
        (lambda: information_from_densities(ONES, np.ones(20)), r"shapes \(N, N\) and \(N,\)"),
        (
            lambda: information_from_densities(np.full((10, 10), -np.inf), np.ones(10)),
            "finite on the diagonal",
        ),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
