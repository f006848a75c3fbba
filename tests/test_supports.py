"""Every support is kept as plain values, and reached from the real line by a bijection."""

import copy
import json

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from scipy import special, stats
from torch.autograd.functional import jacobian

from latentlab.supports import Latent, bijection, is_identity, support_from_spec, support_spec

LOW = torch.tensor([0.1, -2.0, 3.0], dtype=torch.float64)

# name -> support, shape of a value
BIJECTIVE = {
    "real": (constraints.real, ()),
    "positive": (constraints.positive, ()),
    "nonnegative": (constraints.nonnegative, ()),
    "unit_interval": (constraints.unit_interval, ()),
    "softplus_positive": (constraints.softplus_positive, ()),
    "simplex": (constraints.simplex, (4,)),
    "real_vector": (constraints.real_vector, (3,)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "positive_ordered_vector": (constraints.positive_ordered_vector, (3,)),
    "lower_cholesky": (constraints.lower_cholesky, (3, 3)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "corr_matrix": (constraints.corr_matrix, (3, 3)),
    "positive_definite": (constraints.positive_definite, (3, 3)),
    "interval": (constraints.interval(-1.0, 2.5), ()),
    "half_open_interval": (constraints.half_open_interval(-1.0, 2.5), ()),
    "greater_than": (constraints.greater_than(0.5), ()),
    "greater_than_eq": (constraints.greater_than_eq(0.5), ()),
    "less_than": (constraints.less_than(0.5), ()),
    "bounds": (constraints.interval(LOW, LOW + 1), (3,)),
    "bound": (constraints.greater_than(torch.tensor(0.1)), ()),
    "independent": (constraints.independent(constraints.positive, 2), (2, 3)),
    "nested": (constraints.independent(constraints.positive_definite, 1), (2, 3, 3)),
}
OTHERS = {
    "sphere": constraints.sphere,
    "unit_lower_cholesky": constraints.unit_lower_cholesky,
    "softplus_lower_cholesky": constraints.softplus_lower_cholesky,
}
ALL = {name: support for name, (support, _) in BIJECTIVE.items()} | OTHERS
DISCRETE = {
    "integer_interval": constraints.integer_interval(0, 3),
    "boolean": constraints.boolean,
    "one_hot": constraints.one_hot,
    "nonnegative_integer": constraints.nonnegative_integer,
    "positive_integer": constraints.positive_integer,
    "multinomial": constraints.multinomial(5),
}
ALL |= DISCRETE


def free_of(shape, support, num=None):
    transform = bijection(support)
    lead = () if num is None else (num,)
    size = transform.inverse_shape(torch.Size(lead + shape))
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return transform, noise


# ---- as plain values ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_support_comes_back_from_json(name):
    spec = json.loads(json.dumps(support_spec(ALL[name])))
    again = support_from_spec(spec)
    assert type(again) is type(ALL[name])
    assert again.event_dim == ALL[name].event_dim
    assert support_spec(again) == spec


@pytest.mark.parametrize("name", ALL)
def test_a_copy_of_a_support_is_known(name):
    assert support_spec(copy.deepcopy(ALL[name])) == support_spec(ALL[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_keep_every_bit_and_their_dtype(dtype):
    low = LOW.to(dtype)
    again = support_from_spec(json.loads(json.dumps(support_spec(constraints.greater_than(low)))))
    assert again.lower_bound.dtype == dtype
    assert torch.equal(again.lower_bound, low)


def test_bounds_may_come_from_a_parameter():
    low = torch.tensor(0.25, requires_grad=True)
    assert support_spec(constraints.greater_than(low))["lower_bound"] == 0.25


def test_an_unknown_support_is_refused():
    with pytest.raises(ValueError, match=r"cannot be stored; expected one of real, positive"):
        support_spec(constraints.dependent)


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discrete_site_has_no_place_on_the_real_line(name):
    latent = Latent("z", (2,), (3,), DISCRETE[name])
    assert latent.is_discrete
    assert latent.free_shape == (2, 3)
    with pytest.raises(ValueError, match="no bijection from the real line"):
        bijection(DISCRETE[name])


@pytest.mark.parametrize("spec", [{"name": "moon"}, {}, {"name": "dependent"}])
def test_unknown_names_are_refused(spec):
    with pytest.raises(ValueError, match="not known to this version of latentlab"):
        support_from_spec(spec)


@pytest.mark.parametrize("name", BIJECTIVE)
def test_site_comes_back_from_json(name):
    support, shape = BIJECTIVE[name]
    split = len(shape) - support.event_dim
    latent = Latent("z", shape[:split], shape[split:], support, (("rows", 2, -1),))
    again = Latent.from_spec(json.loads(json.dumps(latent.spec())))
    assert again.spec() == latent.spec()
    assert (again.shape, again.free_shape) == (latent.shape, latent.free_shape)
    assert (again.plates, again.name) == (latent.plates, "z")


# ---- from the real line ------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIJECTIVE)
def test_the_real_line_is_mapped_into_the_support_and_back(name):
    support, shape = BIJECTIVE[name]
    transform, u = free_of(shape, support, num=20)
    z = transform(u)
    assert z.shape == (20, *shape)
    assert support.check(z).all()
    torch.testing.assert_close(transform.inv(z), u, rtol=1e-8, atol=1e-8)


def coordinates(name, z):
    """As many numbers of z as it has degrees of freedom: those that its density is taken over."""
    if name == "simplex":
        return z[:-1]
    if name in ("lower_cholesky", "positive_definite"):
        return z[*torch.tril_indices(3, 3)]
    if name in ("corr_cholesky", "corr_matrix"):
        return z[*torch.tril_indices(3, 3, -1)]
    if name == "nested":
        return z[:, *torch.tril_indices(3, 3)].flatten()
    return z.flatten()


@pytest.mark.parametrize("name", BIJECTIVE)
def test_volume_is_the_determinant_of_the_jacobian(name):
    support, shape = BIJECTIVE[name]
    transform, u = free_of(shape, support)
    matrix = jacobian(lambda v: coordinates(name, transform(v.reshape(u.shape))), u.flatten())
    volume = transform.log_abs_det_jacobian(u, transform(u)).sum()
    torch.testing.assert_close(volume, torch.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_density_of_a_covariance_has_mass_one(n):
    """Importance sampling of a Wishart through its bijection finds the mass of the density."""
    wishart = dist.Wishart(torch.tensor(n + 4.0), torch.eye(n).double())
    latent = Latent("cov", (), (n, n), constraints.positive_definite)
    assert latent.free_shape == (n * (n + 1) // 2,)
    transform = latent.transform
    generator = torch.Generator().manual_seed(0)
    centre = transform.inv((n + 4.0) * torch.eye(n).double())
    scale = torch.full_like(centre, 1.0)
    scale[[i * (i + 1) // 2 + i for i in range(n)]] = 0.5
    noise = torch.randn(200_000, len(centre), generator=generator, dtype=torch.float64)
    u = centre + 1.2 * scale * noise
    log_q = dist.Normal(centre, 1.2 * scale).log_prob(u).sum(-1)
    z = transform(u)
    weights = (wishart.log_prob(z) + transform.log_abs_det_jacobian(u, z) - log_q).exp()
    assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / len(u) ** 0.5
    assert float(weights.std()) / len(u) ** 0.5 < 0.05


def pulled_back(density, support, u):
    transform = bijection(support)
    z = transform(u)
    return density.log_prob(z) + transform.log_abs_det_jacobian(u, z)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0)])
def test_what_is_uniform_is_standard_normal_on_the_line(low, high):
    u = torch.linspace(-8, 8, 33, dtype=torch.float64)
    uniform = dist.Uniform(torch.tensor(low).double(), high, validate_args=False)
    found = pulled_back(uniform, uniform.support, u)
    torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(u))


@given(st.lists(st.floats(0.2, 20.0), min_size=2, max_size=6), st.integers(0, 99))
def test_a_dirichlet_is_beta_breaks_of_a_stick_with_gaussian_tails(concentration, seed):
    K, u = len(concentration), 3 * np.random.default_rng(seed).normal(size=len(concentration) - 1)
    at = u + stats.norm.ppf(1 / np.arange(K, 1, -1))
    left = np.cumsum(concentration[::-1])[::-1]
    # Both sides of a break by the tail that has its digits.
    log_v, log_rest = stats.norm.logcdf(at), stats.norm.logsf(at)
    a, b = np.array(concentration[:-1]), left[1:]
    expected = (a - 1) * log_v + (b - 1) * log_rest - special.betaln(a, b) + stats.norm.logpdf(at)
    dirichlet = dist.Dirichlet(torch.tensor(concentration).double(), validate_args=False)
    found = pulled_back(dirichlet, constraints.simplex, torch.from_numpy(u))
    assert float(found) == pytest.approx(expected.sum(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_are_positive_and_add_up_however_far_out(dtype):
    transform = bijection(constraints.simplex)
    for u in 200 * torch.randn(50, 3, dtype=dtype):
        u.requires_grad_()
        shares = transform(u)
        (shares.log().sum() + transform.log_abs_det_jacobian(u, shares)).backward()
        assert (shares > 0).all()
        assert float(shares.detach().sum()) == pytest.approx(1, rel=1e-6)
        assert u.grad.isfinite().all()
        assert transform.inv(shares.detach()).isfinite().all()


def test_only_the_identity_is_one():
    assert is_identity(bijection(constraints.real))
    assert is_identity(bijection(constraints.independent(constraints.real, 2)))
    assert not is_identity(bijection(constraints.positive))
    assert not is_identity(bijection(constraints.independent(constraints.positive, 1)))


@pytest.mark.parametrize("support", [constraints.sphere, constraints.integer_interval(0, 3)])
def test_a_site_without_a_bijection_is_named(support):
    with pytest.raises(ValueError, match=r"site 'z': no bijection .* a guide of your own"):
        _ = Latent("z", (), (3,), support).transform
