"""Where climbs begin: near modes, with the curvature there, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference import starts
from latentlab.inference.check import prepare


def placed(model, data, guide, start=0, seed=0):
    pair, report = prepare(model, data, guide)
    assert report.ok
    with pair.entered(seed):
        starts.Starts(pair, seed).place(start)
    return pair.guide


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1e4).expand([x.shape[1]]).to_event(1))
    with ll.rows(y):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), 1.0), obs=y)


def columns(correlation, num_rows=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    x[:, 1] = correlation * x[:, 0] + math.sqrt(1 - correlation**2) * x[:, 1]
    y = x @ torch.tensor([3.0, -2.0]).double() + torch.randn(
        num_rows, generator=generator, dtype=torch.float64
    )
    return x, y


@pytest.mark.parametrize("correlation", [0.0, 0.99])
@pytest.mark.parametrize("start", [0, 1])
def test_a_linear_model_starts_at_its_posterior(correlation, start):
    """Normal equations, with a prior that is flat on the scale of the data."""
    x, y = columns(correlation)
    precision = x.T @ x + 1e-8 * torch.eye(2).double()
    mean = torch.linalg.solve(precision, x.T @ y)
    guide = placed(regression, (x, y), "full_rank", start)
    covariance = guide.covariance().detach()
    assert torch.allclose(covariance @ precision, torch.eye(2).double(), atol=1e-6)
    sds = covariance.diagonal().sqrt()
    assert ((guide.free_mean().detach() - mean).abs() < 0.01 * sds).all()


def test_a_mean_field_guide_starts_with_the_precisions():
    """The optimum of the ELBO for a normal target: sd 1 / sqrt of the precision's diagonal."""
    x, y = columns(0.9)
    guide = placed(regression, (x, y), "mean_field")
    expected = (x.T @ x).diagonal().rsqrt()
    assert torch.allclose(guide.covariance().detach().diagonal().sqrt(), expected, rtol=1e-6)


def test_a_point_starts_at_the_mode_on_the_support():
    """Of a scale under a flat prior, that is the root of the mean square."""

    def model(x):
        scale = pyro.sample("scale", dist.Uniform(0.001, 100.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    x = columns(0.0)[1]
    guide = placed(model, x, "point")
    found = guide.draw(1).values["scale"].detach()
    assert float(found) == pytest.approx(float((x**2).mean().sqrt()), rel=1e-3)


def test_a_mode_without_mass_is_left_alone():
    """A centred hierarchy has its highest density where the scale of the groups is zero."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    y = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.4, 0.3, 0.0, -0.2], dtype=torch.float64)
    guide = placed(model, y, "mean_field")
    tau = guide.draw(1000).values["tau"].detach()
    assert float(tau.median()) > 0.01


def test_flat_directions_get_the_width_of_the_prior():
    def model(x):
        pair = pyro.sample("pair", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(pair.sum(-1), 1.0), obs=x)

    x = torch.zeros(50, dtype=torch.float64)
    guide = placed(model, x, "full_rank")
    across = torch.tensor([1.0, -1.0]).double() / math.sqrt(2)
    variance = float((across @ guide.covariance() @ across).detach())
    assert variance == pytest.approx(4.0, rel=0.25)  # by the spread of 200 prior draws


def test_starts_differ_and_repeat():
    """Where there are several modes, starts reach several; the same start is the same again."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(z.abs(), 1.0), obs=x)

    x = torch.full((30,), 4.0, dtype=torch.float64)
    ends, again = (
        [float(placed(model, x, "full_rank", start).free_mean().detach()) for start in range(12)]
        for _ in range(2)
    )
    assert ends == again
    assert min(ends) < -3.5
    assert max(ends) > 3.5


def test_values_of_the_model_are_taken():
    class Model:
        def __call__(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            with ll.rows(x):
                pyro.sample("x", dist.Normal(z.abs(), 1.0), obs=x)

        def starting_values(self, x, *, seed):
            return {"z": torch.tensor(-2.0), "other": torch.zeros(3)}

    x = torch.full((30,), 4.0, dtype=torch.float64)
    for start in range(4):
        assert float(placed(Model(), x, "full_rank", start).free_mean().detach()) < -3.5
