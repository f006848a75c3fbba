"""Stein's identities hold for draws of the model's posterior, and for no others."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll

X = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)


def model(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 1.0]).double()))
    with ll.rows(x):
        pyro.sample("n", dist.Poisson(rate), obs=x)
    pyro.sample("k", dist.Multinomial(10, share), obs=torch.tensor([7.0, 2.0, 1.0]).double())


def exact(num, seed):
    """Conjugate: Gamma(2 + sum, 1 + N) and Dirichlet(1 + 7, 2 + 2, 1 + 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rate = dist.Gamma(torch.tensor(12.0).double(), 5.0).sample((num,))
        share = dist.Dirichlet(torch.tensor([8.0, 4.0, 2.0]).double()).sample((num,))
    return {"rate": rate, "share": share}


@pytest.mark.parametrize("seed", range(3))
def test_exact_draws_pass(seed):
    found = ll.check_posterior(model, X, exact(4000, seed))
    assert found.p_value > 1e-4, found


@pytest.mark.parametrize(
    "wrong",
    [
        lambda d: d | {"rate": d["rate"] * 1.2},
        lambda d: d | {"rate": d["rate"].mean() + 2 * (d["rate"] - d["rate"].mean()).abs()},
        lambda d: d | {"share": d["share"].flip(-1)},
    ],
)
def test_other_draws_fail(wrong):
    found = ll.check_posterior(model, X, wrong(exact(4000, 0)))
    assert not found.ok
    assert found.p_value < 1e-6


def test_other_data_fail():
    assert not ll.check_posterior(model, X + 2, exact(4000, 0)).ok


def test_arrays_posteriors_and_chains_are_taken():
    assert ll.check_posterior(model, X, {k: v.numpy() for k, v in exact(500, 1).items()}).ok

    def normal(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    posterior = ll.fit(normal, X, guide="mean_field", progress=False, num_restarts=1)
    assert ll.check_posterior(normal, X, posterior).p_value > 1e-4
    draws = posterior.sample(400)["loc"].reshape(4, 100)
    told = {"diverging": torch.zeros(4, 100, dtype=torch.bool)}
    chains = ll.Chains(posterior.pair, 0, {"loc": draws}, told, "pyro", 0.0)
    found = ll.check_posterior(normal, X, chains)
    assert found.p_value > 1e-4
    assert found.names == ("loc",)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({"rate": torch.ones(200)}, "expected those of site 'share'"),
        (
            {"rate": torch.ones(200, 2), "share": torch.ones(200, 3) / 3},
            r"'rate'\]: expected shape",
        ),
        ({"rate": -torch.ones(200), "share": torch.ones(200, 3) / 3}, "outside of the support"),
        ({"rate": torch.ones(200), "share": torch.ones(100, 3) / 3}, "as many of each site"),
        ({"rate": torch.full((200,), math.nan), "share": torch.ones(200, 3) / 3}, "support"),
    ],
)
def test_draws_that_do_not_fit_are_refused(draws, message):
    with pytest.raises(ValueError, match=message):
        ll.check_posterior(model, X, draws)


def fitted_scale(x):
    scale = pyro.param("scale", torch.tensor(1.0).double(), constraint=dist.constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def test_parameters_are_those_that_were_fitted():
    x = 5 * torch.randn(50, generator=torch.Generator().manual_seed(1)).double()
    posterior = ll.fit(fitted_scale, x, "mean_field", progress=False, num_restarts=1)
    assert posterior.params["scale"] > 3
    assert ll.check_posterior(fitted_scale, x, posterior).p_value > 1e-4
    with pytest.raises(ValueError, match="its parameter 'scale' is fitted"):
        ll.check_posterior(fitted_scale, x, {"loc": torch.randn(200)})


def test_a_density_that_is_nowhere_finite_is_no_target():
    def impossible(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-math.inf) + 0 * loc)

    with pytest.raises(ValueError, match="not finite|never"):
        ll.check_posterior(impossible, X, {"loc": torch.randn(200)})


def test_inference_mode_does_no_harm():
    with torch.inference_mode():
        assert ll.check_posterior(model, X, exact(400, 2)).p_value > 1e-6
