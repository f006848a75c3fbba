"""Exponential families against torch, scipy and quadrature, and the guide that is made of them."""

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from scipy import stats
from torch.distributions import Beta as TorchBeta
from torch.distributions import Dirichlet as TorchDirichlet
from torch.distributions import Gamma as TorchGamma
from torch.distributions import kl_divergence

from latentlab.distributions.factors import Beta, Dirichlet, Gamma, NormalGamma
from latentlab.guides import Families, FullRank, Latent, guide_from_spec
from latentlab.seeds import seeded


def positive(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 3 * torch.rand(shape, generator=generator, dtype=torch.float64)


PAIRS = {
    "Dirichlet": lambda s: Dirichlet(positive(s, 2, 3)),
    "Gamma": lambda s: Gamma(positive(s, 2, 3), positive(s + 10, 2, 3)),
    "Beta": lambda s: Beta(positive(s, 2, 3), positive(s + 10, 2, 3)),
    "NormalGamma": lambda s: NormalGamma(
        positive(s, 2, 3),
        positive(s + 10, 2, 3),
        1 + positive(s + 20, 2, 3),
        positive(s + 30, 2, 3),
    ),
}


def of_torch(factor):
    if isinstance(factor, Dirichlet):
        return TorchDirichlet(factor.concentration)
    if isinstance(factor, Beta):
        return TorchBeta(factor.ones, factor.zeros)
    return TorchGamma(factor.concentration, factor.rate)


@pytest.mark.parametrize("name", ["Dirichlet", "Gamma", "Beta"])
def test_divergence_and_density_are_those_of_torch(name):
    q, p = PAIRS[name](0), PAIRS[name](1)
    torch.testing.assert_close(q.kl(p), kl_divergence(of_torch(q), of_torch(p)).sum())
    with seeded(0):
        values = q.draw(4)
    (log_prob,) = q.log_probs(*values)
    torch.testing.assert_close(log_prob, of_torch(q).log_prob(values[0]).reshape(4, -1).sum(-1))


def test_the_divergence_of_a_normal_gamma_is_the_integral():
    q, p = (NormalGamma(*(torch.tensor([v], dtype=torch.float64) for v in each)) for each in (
        (0.4, 2.0, 3.0, 1.5), (-0.3, 0.7, 2.0, 2.5)
    ))  # fmt: skip

    def log_density(factor, precision, loc):
        m, count, a, b = (getattr(factor, name).item() for name in factor.names())
        return stats.gamma(a, scale=1 / b).logpdf(precision) + stats.norm(
            m, (count * precision) ** -0.5
        ).logpdf(loc)

    # Over the log of the precision by the trapezium rule, over the location by Gauss and Hermite.
    t, weights = np.polynomial.hermite_e.hermegauss(8)
    steps = np.linspace(-14, 4, 3001)[:, None]
    precision = np.exp(steps)
    loc = 0.4 + t / np.sqrt(2.0 * precision)
    between = log_density(q, precision, loc) - log_density(p, precision, loc)
    over_locs = between @ weights / weights.sum()
    density = (stats.gamma(3.0, scale=1 / 1.5).pdf(precision) * precision)[:, 0]
    wanted = np.trapezoid(over_locs * density, steps[:, 0])
    assert q.kl(p).item() == pytest.approx(wanted, abs=1e-10)


def test_scales_are_inverse_roots_of_gammas_and_locations_students():
    q = NormalGamma(*(torch.tensor([v], dtype=torch.float64) for v in (0.4, 2.0, 3.0, 1.5)))
    scales, locs = torch.tensor([[0.5], [1.3]]).double(), torch.tensor([[0.1], [2.0]]).double()
    of_scale, of_loc = q.log_probs(scales, locs)
    variance = stats.invgamma(3.0, scale=1.5)
    s = scales[:, 0].numpy()
    np.testing.assert_allclose(of_scale, variance.logpdf(s**2) + np.log(2 * s), rtol=1e-12)
    np.testing.assert_allclose(of_loc, stats.norm(0.4, s / 2**0.5).logpdf(locs[:, 0]), rtol=1e-12)
    student = stats.t(6.0, 0.4, (1.5 / (3.0 * 2.0)) ** 0.5)
    np.testing.assert_allclose(q.marginals(scales, locs)[1], student.logpdf(locs[:, 0]), rtol=1e-9)


# ---- the guide ----------------------------------------------------------------------------------

VECTOR = constraints.independent(constraints.positive, 1)
STATES = (("states", 2, -1),)
LATENTS = [
    Latent("weights", (), (3,), constraints.simplex),
    Latent("scales", (2,), (3,), VECTOR, STATES),
    Latent("locs", (2,), (3,), constraints.independent(constraints.real, 1), STATES),
    Latent("rates", (2,), (3,), VECTOR, STATES),
    Latent("probs", (2,), (3,), constraints.independent(constraints.unit_interval, 1), STATES),
]
FAMILIES = {
    ("weights",): Dirichlet,
    ("scales", "locs"): "NormalGamma",
    ("rates",): Gamma,
    ("probs",): "Beta",
}
FACTORS = {
    ("weights",): Dirichlet(positive(5, 3)),
    ("scales", "locs"): PAIRS["NormalGamma"](0),
    ("rates",): PAIRS["Gamma"](0),
    ("probs",): PAIRS["Beta"](0),
}


def bound():
    guide = Families(FAMILIES)
    guide.bind(LATENTS, max_plate_nesting=1, dtype=torch.float64)
    guide.put(FACTORS)
    return guide


def test_it_holds_what_it_was_given():
    for sites, factor in bound().factors().items():
        for name in factor.names():
            torch.testing.assert_close(
                getattr(factor, name).detach(), getattr(FACTORS[sites], name)
            )


def test_a_draw_is_scored_as_it_was_drawn():
    guide = bound()
    with seeded(1), torch.no_grad():
        draws = guide.draw(6)
    for latent in LATENTS:
        ones = (1,) * (1 - len(latent.batch_shape))
        assert draws.values[latent.name].shape == (6, *ones, *latent.shape)
        assert latent.support.check(draws.values[latent.name]).all()
    torch.testing.assert_close(guide.log_prob(draws.values).detach(), draws.log_q)


def test_it_is_a_program_of_pyro():
    guide = bound()
    with seeded(2):
        with pyro.plate("particles", 6, dim=-2):
            trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    values = {latent.name: trace.nodes[latent.name]["value"] for latent in LATENTS}
    log_q = sum(
        site["log_prob"].reshape(6, -1).sum(-1)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name != "particles"
        and not name.startswith("states")
    )  # fmt: skip
    torch.testing.assert_close(log_q, guide.log_prob(values))


def test_its_gradient_leads_to_the_posterior():
    """Climbed by gradient like any other guide: the gradient is zero where q is p, on average."""
    guide = bound()
    target = {k: v for k, v in FACTORS.items() if k != ("rates",)}
    target["rates",] = PAIRS["Gamma"](3)
    with seeded(3):
        draws = guide.draw(4000)
    values = {
        k: v.reshape(4000, *s.shape)
        for s in LATENTS
        for k, v in draws.values.items()
        if k == s.name
    }
    log_p = sum(sum(f.log_probs(*(values[s] for s in sites))) for sites, f in target.items())
    elbo = (log_p - draws.log_q).mean()
    divergence = FACTORS["rates",].kl(target["rates",])
    assert -elbo.item() == pytest.approx(divergence.item(), rel=0.2)
    elbo.backward()
    slopes = {
        name: p.grad.abs().max().item() for name, p in guide.named_parameters() if p.requires_grad
    }
    assert all(slope < 0.2 for name, slope in slopes.items() if not name.endswith("_2"))
    assert slopes["rate_2"] > 0.3


def test_a_start_is_near_its_centre():
    guide = bound()
    center = torch.linspace(-0.5, 0.5, guide.num_latents, dtype=torch.float64)
    guide.start(center, torch.full_like(center, 0.05))
    torch.testing.assert_close(guide.free_mean(), center, atol=0.02, rtol=0)
    assert (guide.free_sd() < 0.15).all()
    gaussian = FullRank()
    gaussian.bind(LATENTS, max_plate_nesting=1, dtype=torch.float64)
    gaussian.start_from(guide)
    torch.testing.assert_close(gaussian.free_mean().detach(), guide.free_mean())
    guide.start_from(gaussian)
    torch.testing.assert_close(guide.free_mean(), center, atol=0.05, rtol=0)


def test_it_is_built_again_from_its_spec():
    guide = bound()
    again = guide_from_spec(guide.spec(), torch.float64)
    again.load_state_dict(guide.state_dict())
    with seeded(4), torch.no_grad():
        first = guide.draw(3)
    with seeded(4), torch.no_grad():
        second = again.draw(3)
    assert all(first.values[k].equal(second.values[k]) for k in first.values)


def test_other_sites_are_refused():
    with pytest.raises(ValueError, match="families: expected one of"):
        Families({("weights",): "Cauchy"})
    with pytest.raises(ValueError, match="expected factors for the sites"):
        Families({("weights",): Dirichlet}).bind(LATENTS, max_plate_nesting=1)
