"""Linear response gives back the covariance that a mean-field guide has lost."""

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import polygamma

import latentlab as ll
from latentlab.guides import FullRank, MeanField
from latentlab.inference.check import prepare
from latentlab.inference.response import response_covariance

SEEN = torch.zeros((), dtype=torch.float64)


def gaussian(size, seed):
    r = np.random.default_rng(seed)
    root = r.normal(size=(size, size))
    unit = np.exp(2 * r.normal(size=size))
    covariance = torch.from_numpy((root @ root.T + 0.1 * np.eye(size)) * unit[:, None] * unit)
    mean = torch.from_numpy(r.normal(size=size) * unit)

    def model(x):
        z = pyro.sample("z", dist.MultivariateNormal(mean, covariance))
        pyro.sample("x", dist.Normal(z @ (1 / scale), 1.0), obs=x)

    scale = covariance.diagonal().sqrt()
    precision = torch.linalg.inv(covariance)
    after = torch.linalg.inv(precision + 1 / scale[:, None] / scale)
    return model, after @ (precision @ mean + 1 / scale), after


def regression(x, y):
    slopes = pyro.sample("slopes", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
    with ll.rows(x):
        pyro.sample("y", dist.Normal((x * slopes).sum(-1), 0.7), obs=y)


def table():
    r = np.random.default_rng(0)
    x = r.normal(size=(40, 1)) + 0.3 * r.normal(size=(40, 2))
    return x, x @ [1.0, -0.2] + 0.7 * r.normal(size=40)


@pytest.fixture(scope="module")
def narrow():
    x, y = table()
    data = torch.from_numpy(x), torch.from_numpy(y)
    return ll.fit(regression, data, "mean_field", num_restarts=1, progress=False)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_of_a_normal_it_is_the_covariance(seed, dense):
    model, mean, covariance = gaussian(5, seed)
    posterior = ll.fit(model, SEEN + 1, "mean_field", seed=seed, num_restarts=1, progress=False)
    sd = covariance.diagonal().sqrt()
    with posterior.pair.entered(seed=0):
        assert float(((posterior.guide.free_mean().detach() - mean) / sd).abs().max()) < 1e-6
        pair, _ = prepare(model, SEEN + 1, posterior.guide)
        pair.guide.load_state_dict(posterior.guide.state_dict())
        found = response_covariance(pair, seed=seed + 7, dense=dense)
    assert float(((found - covariance) / sd / sd[:, None]).abs().max()) < 1e-6


def test_rows_of_a_normal_with_unknown_scale_have_their_conjugate_posterior():
    """Normal-gamma: var(mean) = b / (k (a - 1)), var(log precision) = trigamma(a)."""
    x = torch.from_numpy(np.random.default_rng(1).normal(3.0, 2.0, size=400))
    one = torch.ones((), dtype=torch.float64)

    def model(x):
        precision = pyro.sample("precision", dist.Gamma(2 * one, 1.0))
        loc = pyro.sample("loc", dist.Normal(0 * one, precision**-0.5))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, precision**-0.5), obs=x)

    posterior = ll.fit(model, x, "mean_field", num_restarts=1, progress=False)
    n, mean = len(x), float(x.mean())
    k, a = 1 + n, 2 + n / 2
    b = 1 + 0.5 * float(((x - mean) ** 2).sum()) + 0.5 * n / k * mean**2
    draws = ll.linear_response(posterior).sample(40_000)
    assert float(draws["loc"].mean()) == pytest.approx(n * mean / k, abs=0.005)
    assert float(draws["loc"].std()) == pytest.approx(math.sqrt(b / (k * (a - 1))), rel=0.015)
    spread = float(draws["precision"].log().std())
    assert spread == pytest.approx(float(polygamma(1, a)) ** 0.5, rel=0.015)


def test_corrected_figures_are_those_of_the_exact_posterior(narrow):
    x, y = table()
    loc, cov, log_evidence = oracles.linear_regression(x, y, 5.0, 0.7)
    wide = ll.linear_response(narrow)
    assert isinstance(wide.guide, FullRank)
    with wide.pair.entered(seed=0):
        assert np.allclose(wide.guide.free_mean().detach(), loc, atol=1e-6)
        assert np.allclose(wide.guide.covariance().detach(), cov, rtol=1e-6)
    assert wide.elbo.value == pytest.approx(log_evidence, abs=1e-6)
    summary = wide.summary()
    assert np.allclose(summary["sd"], np.sqrt(np.diag(cov)), rtol=0.05)
    assert (narrow.summary()["sd"] < 0.6 * summary["sd"]).all()


def test_it_is_told_apart_and_judged_on_its_own(narrow, tmp_path):
    before = {k: v.clone() for k, v in narrow.guide.state_dict().items()}
    wide = ll.linear_response(narrow)
    assert wide.check().level == "use"
    assert narrow.check().level != "use"
    assert wide.method == "saa, linear response"
    assert "by linear response" in wide.notes[-1]
    assert isinstance(narrow.guide, MeanField)
    assert all(torch.equal(v, before[k]) for k, v in narrow.guide.state_dict().items())
    again = ll.load(wide.save(tmp_path), model=regression)
    assert again.method == wide.method
    assert torch.equal(again.sample(3)["slopes"], wide.sample(3)["slopes"])
    assert torch.equal(
        ll.linear_response(narrow).params["guide.lower"], wide.params["guide.lower"]
    )


def test_what_cannot_be_corrected_is_said(narrow, tmp_path):
    full = ll.linear_response(narrow)
    with pytest.raises(ValueError, match='expected one fitted with guide="mean_field".*FullRank'):
        ll.linear_response(full)
    loaded = ll.load(narrow.save(tmp_path), model=regression)
    with pytest.raises(ValueError, match="loaded without its data"):
        ll.linear_response(loaded)


def test_a_guide_at_no_optimum_is_refused():
    def two_hills(x):
        z = pyro.sample("z", dist.Normal(SEEN, 10.0))
        pyro.factor("hills", torch.logaddexp(-((z - 5) ** 2) * 2, -((z + 5) ** 2) * 2) + 0 * x)

    posterior = ll.fit(two_hills, SEEN, "mean_field", num_restarts=1, progress=False)
    with torch.no_grad():
        posterior.guide.start(torch.zeros(1).double(), torch.full((1,), 0.1).double())
    with pytest.raises(ValueError, match="no optimum"):
        ll.linear_response(posterior)
