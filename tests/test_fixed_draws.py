"""The ELBO at fixed draws is the one that theory knows, with its first and second derivatives."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from latentlab.inference.check import prepare
from latentlab.inference.fixed_draws import FixedDraws, conjugate_gradients, paired_noise

MEAN = torch.tensor([1.0, -2.0, 0.5]).double()
COVARIANCE = torch.tensor([[1.0, 0.6, 0.1], [0.6, 2.0, -0.4], [0.1, -0.4, 0.5]]).double()


SEEN = torch.zeros((), dtype=torch.float64)


def normal(x):
    pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))
    pyro.sample("x", dist.Normal(SEEN, 1.0), obs=x)  # says nothing of z


def curved(x):
    """A positive latent and a bent one."""
    pyro.sample("x", dist.Normal(SEEN, 1.0), obs=x)
    a = pyro.sample("a", dist.Gamma(MEAN[0] * 3, MEAN[0]))
    pyro.sample("b", dist.Normal(a**2, a))


def moved(pair, seed):
    """The pair, its guide somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pair.guide.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.3 * noise)
    return pair


@pytest.mark.parametrize(("num_draws", "num_latents"), [(8, 3), (4, 7), (64, 20)])
def test_pairs_integrate_odd_functions_and_squares_exactly(num_draws, num_latents):
    eps = paired_noise(num_draws, num_latents, seed=5)
    assert eps.shape == (num_draws, num_latents)
    for odd in (eps, eps**3, eps[:, :1] * eps[:, 1:2] ** 2, eps.sinh()):
        assert float(odd.reshape(num_draws // 2, 2, -1).sum(1).abs().max()) < 1e-12
    moments = eps.T @ eps / num_draws
    assert float((moments.diagonal() - 1).abs().max()) < 1e-12
    if num_draws > 2 * num_latents:
        assert float((moments - torch.eye(num_latents)).abs().max()) < 1e-12


def test_draws_are_normal():
    eps = paired_noise(4096, 4, seed=1).numpy()
    assert abs((eps**4).mean() - 3) < 0.4
    assert abs((np.abs(eps) < 0.6745).mean() - 0.5) < 0.02
    assert not np.array_equal(eps, paired_noise(4096, 4, seed=2).numpy())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_the_elbo_of_a_normal_is_that_of_theory_for_any_draws(guide, seed):
    pair = moved(prepare(normal, SEEN, guide)[0], seed)
    with pair.entered(seed=0):
        draws = FixedDraws(pair, paired_noise(8, 3, seed))
        found = float(draws.values().mean())
        mean, covariance = (x.detach() for x in (pair.guide.free_mean(), pair.guide.covariance()))
        q = torch.distributions.MultivariateNormal(mean, covariance)
    p = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    expected = -torch.distributions.kl_divergence(q, p)
    log_evidence = -0.5 * math.log(2 * math.pi)
    assert found == pytest.approx(float(expected) + log_evidence, abs=1e-7)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_derivatives_are_those_of_differences(guide):
    pair = moved(prepare(curved, SEEN, guide)[0], 3)
    with pair.entered(seed=0):
        draws = FixedDraws(pair, paired_noise(16, 2, 1))
        at = torch.cat([p.detach().flatten() for p in draws.parameters]).clone()
        slope, product = draws.slope()[1], draws.curvature()
        eye = torch.eye(len(at), dtype=at.dtype)
        by_product = torch.stack([product(row) for row in eye])

        def moved_by(step):
            draws.set(at + step)
            terms, gradient = draws.slope()
            return float(terms.mean()), gradient

        for k, row in enumerate(1e-5 * eye):
            (up, slope_up), (down, slope_down) = moved_by(row), moved_by(-row)
            assert float(slope[k]) == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-6)
            second = (slope_down - slope_up) / 2e-5
            assert torch.allclose(by_product[k], second, rtol=1e-5, atol=1e-5)


def test_in_parts_it_is_the_same(monkeypatch):
    pair = moved(prepare(curved, SEEN, "mean_field")[0], 3)
    with pair.entered(seed=0):
        draws = FixedDraws(pair, paired_noise(16, 2, 1))
        whole = draws.values(), *draws.slope(), draws.curvature()(torch.arange(4.0).double())
        monkeypatch.setattr("latentlab.inference.fixed_draws.particle_chunk", lambda *_: 3)
        parts = draws.values(), *draws.slope(), draws.curvature()(torch.arange(4.0).double())
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_another_guide_is_refused():
    pair = prepare(normal, SEEN, "point")[0]
    with pytest.raises(TypeError, match="expected a MeanField or FullRank, got Point"):
        FixedDraws(pair, paired_noise(8, 3, 0))


@pytest.mark.parametrize("size", [1, 5, 40])
def test_conjugate_gradients_are_the_dense_solution(size):
    r = np.random.default_rng(size)
    root = r.normal(size=(size, size))
    matrix, target = root @ root.T + np.eye(size), r.normal(size=size)
    dense = torch.from_numpy(matrix)
    found = conjugate_gradients(lambda v: dense @ v, torch.from_numpy(target), tol=1e-12)
    assert np.allclose(found.numpy(), np.linalg.solve(matrix, target), rtol=1e-8, atol=1e-10)


def test_a_matrix_that_is_not_positive_definite_is_told():
    matrix = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double()
    assert conjugate_gradients(lambda v: matrix @ v, torch.ones(2).double()) is None
    assert conjugate_gradients(lambda v: v * math.nan, torch.ones(2).double()) is None
    assert float(conjugate_gradients(lambda v: v, torch.zeros(2)).abs().max()) == 0
