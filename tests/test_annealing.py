r"""The objective of training: closed-form KL, weights and floors; what is reported has neither.

The pair throughout: z ~ N(0, I), x | z ~ N(w z, s^2), guide N(a x, t^2), all in closed form.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import latentlab as ll
from latentlab.inference.check import prepare
from latentlab.inference.training import objective
from latentlab.protocols import Anneals

W, S = 1.5, 0.7


class Line(nn.Module):
    """One latent for each number of x, (N, L) rows; the guide's parameters are learnt."""

    def __init__(self, num_latents=1, weight=1.0, free_bits=0.0, start=(0.3, 0.5)):
        super().__init__()
        self.num_latents, self.weight, self.free_bits = num_latents, weight, free_bits
        self.start = start

    def kl_weight(self, step):
        return self.weight(step) if callable(self.weight) else self.weight

    def forward(self, x=None, size=None):
        with ll.rows(x, size):
            prior = dist.Normal(torch.zeros(self.num_latents), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            return pyro.sample("x", dist.Normal(W * z, S).to_event(1), obs=x)

    def guide(self, x=None, size=None):
        gain, sd = self.start
        a = pyro.param("a", torch.full((self.num_latents,), gain))
        t = pyro.param("t", torch.full((self.num_latents,), sd), constraint=constraints.positive)
        with ll.rows(x, size):
            return pyro.sample("z", dist.Normal(a * x, t).to_event(1))


def data(num=40, num_latents=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, num_latents, generator=generator, dtype=torch.float64) * 1.6


def kl_of(x, gain, sd):
    """KL to N(0, 1) of each latent number of each row, (N, L)."""
    return 0.5 * ((gain * x) ** 2 + sd**2 - 1) - math.log(sd)


def at_seed(line, x, seed, step=0, num_particles=3, size=None):
    pair, report = prepare(line, x, line.guide)
    assert report.ok, report
    with pair.entered(seed):
        batch = pair.data if size is None else type(pair.data)((x[:10],), {"size": size})
        found = objective(pair, num_particles, batch, step)
        return float(found.loss.detach()), float(found.elbo)


def test_a_model_that_anneals_is_known_by_what_it_offers():
    assert isinstance(Line(), Anneals)
    assert isinstance(ll.VariationalAutoencoder(num_features=2, hidden_dims=(4,)), Anneals)
    assert not isinstance(ll.GaussianMixture(2, 2), Anneals)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 4.0])
def test_the_loss_weighs_the_kl_and_the_elbo_does_not(weight):
    x = data()
    plain, _ = at_seed(Line(weight=0.0), x, seed=1)
    loss, elbo = at_seed(Line(weight=weight), x, seed=1)
    kl = float(kl_of(x, 0.3, 0.5).sum())
    assert loss == pytest.approx(plain + weight * kl, rel=1e-10)
    assert elbo == pytest.approx(-(plain + kl), rel=1e-10)


def test_the_weight_is_that_of_the_step():
    line = Line(weight=lambda step: min(1.0, step / 10))
    x, kl = data(), float(kl_of(data(), 0.3, 0.5).sum())
    losses = [at_seed(line, x, seed=1, step=t)[0] for t in (0, 5, 10, 1000)]
    gains = [(loss - losses[0]) / kl for loss in losses]
    assert gains == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_free_bits_are_a_floor_under_each_dimensions_mean():
    x = data(num_latents=3) * torch.tensor([0.0, 1.0, 4.0])
    kl = kl_of(x, 0.3, 0.5).sum(0)  # (3,)
    free = float(kl[1]) / len(x)  # the second is at the floor, the first below
    plain, elbo = at_seed(Line(3), x, seed=2)
    floored, same = at_seed(Line(3, free_bits=free), x, seed=2)
    expected = plain + (len(x) * free - float(kl[0]))
    assert floored == pytest.approx(expected, rel=1e-10)
    assert same == elbo


def test_a_mini_batch_counts_for_all_rows_under_the_floor_too():
    x, free = data(num=40), 100.0
    loss, elbo = at_seed(Line(free_bits=free), x, seed=3, size=40)
    kl = 4 * float(kl_of(x[:10], 0.3, 0.5).sum())
    assert loss + elbo == pytest.approx(40 * free - kl, rel=1e-9)


def reversed_pair(order):
    """a ~ N(0,1), b | a ~ N(a, 1), x | b ~ N(b, 1), and its exact posterior in either order."""
    precision = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    cov = precision.inverse()

    def model(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        mean = cov @ torch.stack([torch.zeros(()), x])
        names = order
        first, second = ("ab".index(n) for n in names)
        u = pyro.sample(names[0], dist.Normal(mean[first], cov[first, first].sqrt()))
        slope = cov[0, 1] / cov[first, first]
        rest = cov[second, second] - cov[0, 1] ** 2 / cov[first, first]
        loc = mean[second] + slope * (u - mean[first])
        pyro.sample(names[1], dist.Normal(loc, rest.sqrt()))

    return model, guide


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_an_exact_guide_has_the_evidence_for_its_elbo_in_any_order(order):
    model, guide = reversed_pair(order)
    x = torch.tensor(1.3, dtype=torch.float64)
    pair, report = prepare(model, x, guide)
    assert report.ok, report
    evidence = -0.5 * (1.3**2 / 3 + math.log(2 * math.pi * 3))
    with pair.entered(0), torch.no_grad():
        values = torch.stack([objective(pair, 64, pair.data, 0).elbo for _ in range(50)])
    if order == "ba":  # no closed form may be used: draws, whose weights are all the evidence
        assert values.numpy() == pytest.approx(evidence, abs=1e-10)
    else:
        se = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - evidence) < 5 * se + 1e-10


def test_the_gradient_is_that_of_the_elbo():
    x = data(num=200)
    pair, _ = prepare(Line(), x, Line().guide)
    with pair.entered(0):
        names = pair.parameters()
        loss = objective(pair, 500, pair.data, 0).loss
        found = dict(zip(names, torch.autograd.grad(loss, [*names.values()]), strict=True))
    a, log_t = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.5))
    t = log_t  # in its own units first, then on the log scale that Pyro optimises
    fit = ((x * (1 - W * a)) ** 2).sum() + len(x) * W**2 * t**2
    exact = fit / (2 * S**2) + (0.5 * ((a * x) ** 2 + t**2 - 1) - t.log()).sum()
    slopes = torch.autograd.grad(exact, [a, log_t])
    assert float(found["a"]) == pytest.approx(float(slopes[0]), rel=0.05)
    assert float(found["t"]) == pytest.approx(float(slopes[1] * 0.5), rel=0.05)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_a_fit_ends_at_the_optimum_of_its_weight_and_reports_the_plain_elbo(beta):
    x = data(num=100)
    line = Line(weight=lambda step: beta * min(1.0, step / 50))
    posterior = ll.fit(line, x, line.guide, max_steps=4000, progress=False)
    precision = 1 + W**2 / (beta * S**2)
    assert float(posterior.params["t"]) == pytest.approx(precision**-0.5, rel=0.02)
    gain = W / (beta * S**2) / precision
    assert float(posterior.params["a"]) == pytest.approx(gain, rel=0.03)
    spread = ((x * (1 - W * gain)) ** 2 + W**2 / precision) / (2 * S**2)
    log_lik = -spread - math.log(S) - 0.5 * math.log(2 * math.pi)
    elbo = float((log_lik - kl_of(x, gain, precision**-0.5)).sum())
    assert posterior.elbo.value == pytest.approx(elbo, abs=0.5 + 5 * posterior.elbo.se)
    assert -float(posterior.losses[-500:].mean()) == pytest.approx(elbo, abs=3.0)


def test_a_guide_of_ours_is_annealed_too():
    class Beta(nn.Module):
        free_bits = 0.0

        def kl_weight(self, step):
            return 3.0

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(0.0, 2.0, 20, dtype=torch.float64)
    posterior = ll.fit(
        Beta(), x, guide="full_rank", num_restarts=1, max_steps=3000, progress=False
    )
    draws = posterior.sample(4000)["z"]
    assert float(draws.std()) == pytest.approx((1 + 20 / 3) ** -0.5, rel=0.05)
