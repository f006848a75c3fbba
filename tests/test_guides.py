"""Guides have the density they say, whichever way they are asked, and reach what is in reach."""

import copy
import json
import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.infer import Predictive
from scipy import stats
from torch.distributions import MultivariateNormal, TransformedDistribution
from torch.distributions.transforms import IndependentTransform, ReshapeTransform

import latentlab as ll
from latentlab.diagnostics import psis
from latentlab.guides import (
    Draws,
    FullRank,
    Latent,
    MeanField,
    Point,
    guide_from_spec,
)
from latentlab.supports import bijection

GAUSSIAN = [MeanField, FullRank]
ALL = [MeanField, FullRank, Point]
SEEDS = st.integers(0, 2**32 - 1)

# Supports that torch has a bijection to, with the shape of one value.
SUPPORTS = {
    "real": (constraints.real, ()),
    "positive": (constraints.positive, ()),
    "interval": (constraints.interval(-1.0, 2.5), ()),
    "less_than": (constraints.less_than(0.5), ()),
    "simplex": (constraints.simplex, (3,)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "independent": (constraints.independent(constraints.positive, 1), (2,)),
}
MATRICES = {
    "lower_cholesky": (constraints.lower_cholesky, (2, 2)),
    "positive_definite": (constraints.positive_definite, (2, 2)),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latent(name, support, batch_shape=(), site="z"):
    constraint, event_shape = (SUPPORTS | MATRICES)[support]
    plates = tuple((f"plate_{-dim}", batch_shape[dim], dim) for dim in range(-len(batch_shape), 0))
    return Latent(name, batch_shape, event_shape, constraint, plates)


def mixture_sites():
    """Three sites in the shape of a mixture: two of them share a plate."""
    vector = constraints.independent(constraints.real, 1)
    positive = constraints.independent(constraints.positive, 1)
    plate = (("components", 3, -1),)
    return [
        Latent("weights", (), (3,), constraints.simplex),
        Latent("locs", (3,), (2,), vector, plate),
        Latent("scales", (3,), (2,), positive, plate),
    ]


def bound(kind, latents, seed=0, dtype=torch.float64, nesting=2):
    """A guide somewhere: frame and parameters drawn at random."""
    guide = kind().bind(latents, max_plate_nesting=nesting, dtype=dtype)
    source = generator(seed)
    with torch.no_grad():
        for tensor in (guide.offset, *guide.parameters()):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=source))
        guide.frame.mul_(1 + torch.rand(guide.num_latents, generator=source).to(dtype))
        if kind is FullRank:
            guide.frame.add_(0.2 * torch.randn(guide.frame.shape, generator=source).tril(-1))
    return guide


def moments(guide):
    """Mean and covariance of u = c + A (m + L eps), in NumPy and from the formula."""
    p = {k: v.detach().double().numpy() for k, v in guide.state_dict().items()}
    if isinstance(guide, MeanField):
        frame, tril = np.diag(p["frame"]), np.diag(np.exp(p["log_scale"]))
    else:
        frame, tril = p["frame"], np.tril(p["lower"], -1) + np.diag(np.exp(p["log_scale"]))
    factor = frame @ tril
    return p["offset"] + frame @ p["loc"], factor @ factor.T


def reference(guide):
    """The distribution of the only site of a guide, as torch would write it."""
    mean, covariance = map(torch.from_numpy, moments(guide))
    (site,) = guide.latents
    reshape = ReshapeTransform((len(mean),), site.free_shape)
    bend = IndependentTransform(bijection(site.support), len(site.batch_shape))
    return TransformedDistribution(MultivariateNormal(mean, covariance), [reshape, bend])


def draws_of(guide, num_particles=7, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return guide.draw(num_particles)


# ---- density ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GAUSSIAN)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 3)])
def test_density_is_that_of_a_transformed_gaussian(kind, support, batch_shape):
    guide = bound(kind, [latent("z", support, batch_shape)])
    draws = draws_of(guide)
    expected = reference(guide).log_prob(draws.values["z"].reshape(7, *guide.latents[0].shape))
    torch.testing.assert_close(draws.log_q, expected)
    torch.testing.assert_close(guide.log_prob(draws.values), expected)
    torch.testing.assert_close(guide.site_log_prob(draws.values)["z"], expected)


@pytest.mark.parametrize("kind", GAUSSIAN)
@pytest.mark.parametrize("support", MATRICES)
def test_density_of_matrices_is_the_gaussian_over_the_volume(kind, support):
    """The lower triangle has three numbers: their Jacobian by autograd."""
    guide = bound(kind, [latent("z", support)])
    draws = draws_of(guide)
    mean, covariance = moments(guide)
    transform, lower = guide.latents[0].transform, tuple(torch.tril_indices(2, 2))
    for z, log_q in zip(draws.values["z"], draws.log_q, strict=True):
        u = transform.inv(z.squeeze(0).squeeze(0))
        matrix = torch.autograd.functional.jacobian(lambda v: transform(v)[lower], u)
        expected = stats.multivariate_normal(mean, covariance).logpdf(u)
        assert float(log_q) == pytest.approx(expected - float(torch.linalg.slogdet(matrix)[1]))
    torch.testing.assert_close(guide.log_prob(draws.values), draws.log_q)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_joint_and_marginal_densities_of_several_sites(kind):
    guide = bound(kind, mixture_sites())
    draws = draws_of(guide)
    mean, covariance = moments(guide)
    parts, u, volume = {}, [], {}
    for site, width in zip(guide.latents, (2, 6, 6), strict=True):
        value = draws.values[site.name].reshape(7, *site.shape)
        transform = bijection(site.support)
        free = transform.inv(value)
        volume[site.name] = transform.log_abs_det_jacobian(free, value).reshape(7, -1).sum(1)
        start = sum(part.shape[1] for part in u)
        parts[site.name] = slice(start, start + width)
        u.append(free.reshape(7, width))
    u = torch.cat(u, 1).numpy()
    joint = stats.multivariate_normal(mean, covariance).logpdf(u) - sum(volume.values()).numpy()
    np.testing.assert_allclose(draws.log_q, joint)
    np.testing.assert_allclose(guide.log_prob(draws.values).detach(), joint)
    for name, found in guide.site_log_prob(draws.values).items():
        part = parts[name]
        marginal = stats.multivariate_normal(mean[part], covariance[part, part]).logpdf(u[:, part])
        np.testing.assert_allclose(found.detach(), marginal - volume[name].numpy())


def test_elements_of_a_mean_field_guide_add_up():
    guide = bound(MeanField, [latent("z", "simplex", (2, 3)), latent("y", "real")])
    draws = draws_of(guide)
    elements = guide.element_log_prob(draws.values)
    assert elements["z"].shape == (7, 2, 3)
    assert elements["y"].shape == (7, 1, 1)
    total = sum(part.flatten(1).sum(1) for part in elements.values())
    torch.testing.assert_close(total, draws.log_q, check_dtype=False)
    alone = bound(MeanField, [latent("z", "simplex")])
    mean, scale = guide.free_mean()[4:6], guide.covariance().diagonal()[4:6].sqrt()
    with torch.no_grad():
        alone.start(mean, scale)
    values = {"z": draws.values["z"][:, 0, 2].reshape(7, 1, 1, 3)}
    torch.testing.assert_close(elements["z"][:, 0, 2], alone.log_prob(values))


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_nearly_dependent_latents_keep_their_density_in_single_precision(kind):
    """Two latents with correlation 1 - 1e-7: their covariance has no Cholesky factor left."""
    guide = bound(kind, [latent("z", "real", (3,))], dtype=torch.float32)
    if kind is FullRank:
        with torch.no_grad():
            guide.lower.copy_(torch.tensor([[0.0, 0, 0], [3000.0, 0, 0], [3000.0, 1, 0]]))
    draws = draws_of(guide)
    values = {"z": draws.values["z"].double()}
    expected = reference(guide.double()).log_prob(values["z"].reshape(7, 3))
    torch.testing.assert_close(draws.log_q.double(), expected, rtol=1e-3, atol=1e-3)
    marginal = guide.float().site_log_prob(draws.values)["z"]
    assert torch.isfinite(marginal).all()


# ---- as a Pyro program --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("num_particles", [None, 5])
def test_program_scores_what_it_draws(kind, num_particles):
    others = latent("alone", "positive"), latent("vector", "real", (2,))
    guide = bound(kind, [*mixture_sites(), *others])
    with pyro.validation_enabled(), torch.no_grad():
        if num_particles is None:
            trace = poutine.trace(guide).get_trace(torch.zeros(3))
        else:
            with pyro.plate("particles", num_particles, dim=-3):
                trace = poutine.trace(guide).get_trace(torch.zeros(3), size=3)
        total = trace.log_prob_sum()
    lead = () if num_particles is None else (num_particles, 1, 1)
    values = {}
    for site in guide.latents:
        value = trace.nodes[site.name]["value"]
        batch = lead[: len(lead) - len(site.batch_shape)] + site.batch_shape
        assert value.shape == batch + site.event_shape
        frames = {(f.name, f.size, f.dim) for f in trace.nodes[site.name]["cond_indep_stack"]}
        assert set(site.plates) <= frames
        values[site.name] = value.reshape(num_particles or 1, *site.shape)
    torch.testing.assert_close(total, guide.log_prob(values).sum())


@pytest.mark.parametrize("parallel", [False, True])
def test_program_serves_pyros_own_predictive(parallel):
    def model(x=None):
        pyro.sample("weights", dist.Dirichlet(torch.ones(3).double()))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("scales", dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(locs.sum(-1), 1e-6))

    guide = bound(FullRank, mixture_sites(), nesting=1)
    predictive = Predictive(model, guide=guide, num_samples=4, parallel=parallel)
    draws = predictive()
    assert draws["weights"].reshape(4, 3).unique(dim=0).shape == (4, 3)
    sums = draws["locs"].reshape(4, 3, 2).sum(-1)
    torch.testing.assert_close(draws["x"].reshape(4, 3), sums, rtol=0, atol=1e-4)


def test_program_without_latents_is_empty():
    guide = MeanField().bind([], max_plate_nesting=0)
    assert guide(torch.zeros(3)) == {}


# ---- gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GAUSSIAN)
@pytest.mark.parametrize("support", ["real", "positive", "simplex"])
def test_gradient_vanishes_under_the_exact_posterior_draw_by_draw(kind, support):
    guide = bound(kind, [latent("z", support, (2,))])
    target = reference(guide)
    torch.manual_seed(0)
    draws = guide.draw(3)
    log_p = target.log_prob(draws.values["z"].reshape(3, *guide.latents[0].shape))
    loss = (draws.log_q - log_p).mean()
    for gradient in torch.autograd.grad(loss, list(guide.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_gradient_is_on_average_that_of_the_divergence(kind):
    """Against a normal target the KL divergence and its gradient have a closed form."""
    guide = bound(kind, [latent("z", "real", (3,))], nesting=1)
    target = MultivariateNormal(torch.ones(3).double(), 2.0 * torch.eye(3).double() + 0.5)
    mean, covariance = guide.free_mean(), guide.covariance()
    kl = torch.distributions.kl_divergence(MultivariateNormal(mean, covariance), target)
    parameters = list(guide.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(kl, parameters)])
    torch.manual_seed(0)
    found = []
    for _ in range(100):
        draws = guide.draw(100)
        loss = (draws.log_q - target.log_prob(draws.values["z"])).mean()
        gradients = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([g.flatten() for g in gradients]))
    found = torch.stack(found)
    se = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() <= 5 * se).all()


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_plain_gradient_steps_reach_the_exact_posterior(kind):
    """The noise of the gradient dies out with the distance, so that no rate has to fall."""
    guide = bound(kind, [latent("z", "real", (3,))], nesting=1)
    covariance = torch.tensor([[2.0, 0.9, 0.0], [0.9, 1.0, -0.3], [0.0, -0.3, 0.5]]).double()
    if kind is MeanField:
        covariance = covariance.diagonal().diag()
    target = MultivariateNormal(torch.tensor([3.0, -2.0, 0.5]).double(), covariance)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.03)
    torch.manual_seed(0)
    for _ in range(1500):
        draws = guide.draw(4)
        loss = (draws.log_q - target.log_prob(draws.values["z"])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(guide.free_mean().detach(), target.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(guide.covariance().detach(), covariance, rtol=0, atol=1e-3)


# ---- the frame ----------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(GAUSSIAN))
def test_recentring_leaves_the_distribution_as_it_was(seed, kind):
    guide = bound(kind, mixture_sites(), seed)
    draws = draws_of(guide, 3)
    before = moments(guide), guide.log_prob(draws.values)
    guide.recentre()
    assert all((parameter == 0).all() for parameter in guide.parameters())
    np.testing.assert_allclose(moments(guide)[0], before[0][0])
    np.testing.assert_allclose(moments(guide)[1], before[0][1], atol=1e-12)
    torch.testing.assert_close(guide.log_prob(draws.values), before[1])


def test_recentring_a_point_keeps_the_point_and_its_units():
    guide = bound(Point, mixture_sites())
    point, units = guide.free_mean().detach().clone(), guide.frame.clone()
    guide.recentre()
    torch.testing.assert_close(guide.free_mean(), point)
    assert torch.equal(guide.frame, units)
    assert (guide.loc == 0).all()


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_start_puts_the_guide_where_it_is_told(kind):
    guide = bound(kind, mixture_sites())
    center, unit = torch.arange(14.0).double(), 0.1 + torch.arange(14.0).double()
    guide.start(center, unit)
    mean, covariance = moments(guide)
    np.testing.assert_allclose(mean, center)
    np.testing.assert_allclose(covariance, np.diag(unit.numpy() ** 2))


def test_laid_over_a_mode_a_guide_is_the_best_gaussian():
    """The full one has the inverse of the precision; the best diagonal one its diagonal."""
    r = np.random.default_rng(0)
    root = r.normal(size=(14, 14)) * 10.0 ** r.uniform(-4, 4, size=(14, 1))  # units apart
    precision, center = root @ root.T, r.normal(size=14)
    for kind in ALL:
        guide = bound(kind, mixture_sites())
        guide.lay(torch.from_numpy(center), torch.from_numpy(precision))
        np.testing.assert_allclose(guide.free_mean().detach(), center)
        covariance = guide.covariance().detach().numpy()
        if kind is FullRank:
            scale = np.sqrt(np.diag(precision))
            product = covariance * scale * scale[:, None] @ (precision / scale / scale[:, None])
            np.testing.assert_allclose(product, np.eye(14), atol=1e-6)
        if kind is MeanField:
            np.testing.assert_allclose(covariance, np.diag(1 / np.diag(precision)))


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_moments_are_those_of_the_draws(kind):
    guide = bound(kind, [latent("z", "real", (4,))], nesting=1)
    num = 100_000
    z = draws_of(guide, num).values["z"].numpy()
    mean, covariance = guide.free_mean().detach().numpy(), guide.covariance().detach().numpy()
    np.testing.assert_allclose((mean, *covariance), (moments(guide)[0], *moments(guide)[1]))
    variance = np.diag(covariance)
    assert (np.abs(z.mean(0) - mean) < 5 * np.sqrt(variance / num)).all()
    se = np.sqrt((np.outer(variance, variance) + covariance**2) / num)
    assert (np.abs(np.cov(z.T) - covariance) < 5 * se).all()
    np.testing.assert_allclose(guide.covariance(slice(1, 3)).detach(), covariance[1:3, 1:3])


# ---- layout -------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    names = draw(st.lists(st.sampled_from(sorted(SUPPORTS | MATRICES)), min_size=1, max_size=4))
    shapes = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1)])
    return [latent(f"site_{i}", name, draw(shapes)) for i, name in enumerate(names)]


@given(layouts(), st.sampled_from(ALL), st.integers(2, 3), SEEDS)
def test_packing_undoes_unpacking(latents, kind, nesting, seed):
    guide = kind().bind(latents, max_plate_nesting=nesting, dtype=torch.float64)
    u = torch.randn(4, guide.num_latents, generator=generator(seed), dtype=torch.float64)
    values, _ = guide.unpack(u)
    for site in latents:
        batch = (1,) * (nesting - len(site.batch_shape)) + site.batch_shape
        assert values[site.name].shape == (4, *batch, *site.event_shape)
        assert site.support.check(values[site.name]).all()
    torch.testing.assert_close(guide.pack(values), u, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ALL)
def test_a_simplex_of_one_component_has_no_freedom(kind):
    one = Latent("weights", (), (1,), constraints.simplex)
    for latents, numbers in (([one], 0), ([one, latent("z", "real")], 1)):
        guide = kind().bind(latents, max_plate_nesting=1)
        assert guide.num_latents == numbers
        draws = draws_of(guide)
        assert torch.equal(draws.values["weights"], torch.ones(7, 1, 1))
        assert draws.log_q.shape == (7,)
        torch.testing.assert_close(guide.log_prob(draws.values), draws.log_q)
        assert torch.equal(guide.site_log_prob(draws.values)["weights"], torch.zeros(7))
        assert guide()["weights"].tolist() == [1.0]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_has_the_dtype_that_was_asked_for(kind, dtype):
    guide = bound(kind, mixture_sites(), dtype=dtype)
    draws = draws_of(guide)
    tensors = [*guide.state_dict().values(), *draws.values.values(), draws.log_q]
    tensors += [guide.log_prob(draws.values), guide.covariance(), guide.free_mean()]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    with torch.no_grad():
        exact = guide.double().log_prob({k: v.double() for k, v in draws.values.items()})
    torch.testing.assert_close(draws.log_q.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_guide_may_be_bound_again():
    guide = bound(FullRank, mixture_sites())
    guide.bind([latent("z", "real")], max_plate_nesting=0, dtype=torch.float32)
    assert guide.num_latents == 1
    assert guide.covariance().tolist() == [[1.0]]
    assert guide.draw(2).values["z"].shape == (2,)


def test_a_site_without_a_bijection_is_named():
    direction = Latent("direction", (), (3,), constraints.sphere)
    with pytest.raises(ValueError, match="site 'direction': no bijection"):
        MeanField().bind([direction], max_plate_nesting=0)


# ---- a point ------------------------------------------------------------------------------------


def test_a_point_is_drawn_without_noise_and_without_a_volume():
    guide = bound(Point, mixture_sites())
    draws = draws_of(guide)
    for value in draws.values.values():
        assert torch.equal(value, value[:1].expand_as(value))
    zero = torch.zeros(7, dtype=torch.float64)
    for found in (draws.log_q, guide.log_prob(draws.values)):
        assert torch.equal(found, zero)
    assert all(torch.equal(v, zero) for v in guide.site_log_prob(draws.values).values())
    assert torch.equal(guide.covariance(), torch.zeros(14, 14).double())


# ---- stored and copied --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_guide_built_from_its_description_draws_the_same(kind):
    guide = bound(kind, mixture_sites())
    again = guide_from_spec(json.loads(json.dumps(guide.spec())), torch.float64)
    again.load_state_dict(guide.state_dict())
    assert type(again) is kind
    one, other = draws_of(guide), draws_of(again)
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
    assert torch.equal(one.log_q, other.log_q)


def test_an_unknown_guide_is_refused():
    with pytest.raises(ValueError, match=r"expected one of .*'FullRank', 'LowRank'.*'Structured'"):
        guide_from_spec({"class": "Oracle", "latents": [], "max_plate_nesting": 0}, torch.float32)


def test_a_copy_is_a_guide_of_its_own():
    guide = bound(FullRank, mixture_sites())
    other, before = copy.deepcopy(guide), draws_of(guide)
    other.start(torch.zeros(14).double(), torch.ones(14).double())
    assert torch.equal(draws_of(guide).log_q, before.log_q)
    assert not torch.equal(draws_of(other).log_q, before.log_q)


def test_draws_are_taken_in_part():
    rows = {"rows": torch.arange(2)}
    draws = Draws({"z": torch.arange(6.0).reshape(3, 2)}, torch.arange(3.0).requires_grad_(), rows)
    part = draws[1:]
    assert len(draws) == 3
    assert len(part) == 2
    assert part.values["z"].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert part.indices is rows
    assert part.log_q.requires_grad
    assert not part.detached().log_q.requires_grad


# ---- what is in reach is reached: a fit against closed forms ------------------------------------


def normal_model(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(2.0, 3.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.5), obs=x)


def regression_model(features, y=None, size=None):
    num = features.shape[-1]
    slopes = pyro.sample("slopes", dist.Normal(features.new_zeros(num), 5.0).to_event(1))
    with ll.rows(features, size):
        return pyro.sample("y", dist.Normal((features * slopes).sum(-1), 0.7), obs=y)


@pytest.fixture(scope="module")
def rows_of_numbers():
    return 4 + 1.5 * torch.randn(30, generator=generator(), dtype=torch.float64)


@pytest.fixture(scope="module")
def conjugate(rows_of_numbers):
    return ll.fit(normal_model, rows_of_numbers, guide="full_rank", progress=False)


@pytest.fixture(scope="module")
def correlated():
    """Two features that nearly agree, in units of their own."""
    r = np.random.default_rng(0)
    features = (r.normal(size=(40, 1)) + 0.7 * r.normal(size=(40, 2))) * [1.0, 10.0]
    return features, features @ [1.0, -0.2] + 0.7 * r.normal(size=40)


def test_posterior_of_a_conjugate_normal_is_exact(conjugate, rows_of_numbers):
    loc, sd, _ = oracles.conjugate_normal(rows_of_numbers, 2.0, 3.0, 1.5)
    guide = conjugate.guide
    assert guide.free_mean().item() == pytest.approx(loc, abs=1e-3 * sd)
    assert guide.covariance().item() ** 0.5 == pytest.approx(sd, rel=1e-3)


def test_every_importance_weight_is_the_evidence(conjugate, rows_of_numbers):
    _, _, log_evidence = oracles.conjugate_normal(rows_of_numbers, 2.0, 3.0, 1.5)
    weights = conjugate.log_weights(1000)
    assert float(weights.mean()) == pytest.approx(log_evidence, abs=1e-6)
    assert float(weights.std()) < 1e-6
    assert conjugate.elbo.value == pytest.approx(log_evidence, abs=1e-6)


def test_a_perfect_guide_is_to_be_used(conjugate):
    verdict = conjugate.check()
    assert verdict.level == "use"
    assert "exact" in str(verdict)
    assert conjugate.converged


def test_posterior_of_a_linear_regression_is_exact(correlated):
    features, y = correlated
    data = {"features": torch.from_numpy(features), "y": torch.from_numpy(y)}
    posterior = ll.fit(regression_model, data, guide="full_rank", progress=False)
    loc, covariance, log_evidence = oracles.linear_regression(features, y, 5.0, 0.7)
    sd = np.sqrt(np.diag(covariance))
    mean = posterior.guide.free_mean().detach().numpy()
    np.testing.assert_allclose(mean / sd, loc / sd, rtol=0, atol=1e-3)
    found = posterior.guide.covariance().detach().numpy() / np.outer(sd, sd)
    np.testing.assert_allclose(found, covariance / np.outer(sd, sd), rtol=0, atol=1e-3)
    assert posterior.log_weights(100).numpy() == pytest.approx(log_evidence, abs=1e-3)


def test_mean_field_is_too_narrow_by_what_theory_says(correlated):
    """Its precisions are the diagonal of the precision matrix, its k-hat the correlation."""
    features, y = correlated
    data = {"features": torch.from_numpy(features), "y": torch.from_numpy(y)}
    posterior = ll.fit(regression_model, data, guide="mean_field", progress=False)
    loc, covariance, log_evidence = oracles.linear_regression(features, y, 5.0, 0.7)
    narrow = np.diag(np.linalg.inv(covariance)) ** -0.5
    sd = posterior.guide.covariance().detach().diagonal().sqrt().numpy()
    np.testing.assert_allclose(sd, narrow, rtol=0.05)  # the fit stops within 0.03 sd
    found = psis(posterior.log_weights(200_000))
    khat = oracles.mean_field_khat(covariance)
    correlation = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert khat == pytest.approx(abs(correlation))
    assert found.khat == pytest.approx(khat, abs=4 * found.se + 0.05)
    assert posterior.elbo.value < log_evidence


def test_weights_of_an_inexact_guide_average_to_the_evidence():
    def coins(x=None, size=None):
        probs = pyro.sample("probs", dist.Beta(2.0, 3.0))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Bernoulli(probs), obs=x)

    x = torch.tensor([1.0, 0, 1, 1, 0, 1, 1], dtype=torch.float64)
    posterior = ll.fit(coins, x, guide="full_rank", progress=False)
    evidence = math.exp(oracles.beta_bernoulli_evidence(x.numpy(), 2.0, 3.0))
    weights = posterior.log_weights(20_000).exp()
    se = float(weights.std()) / len(weights) ** 0.5
    assert abs(float(weights.mean()) - evidence) < 5 * se
    assert se < 0.01 * evidence
