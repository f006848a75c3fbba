"""Bounds other than the ELBO: Pyro's values, quadrature, closed forms, the same mean gradient."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import RenyiELBO

import latentlab as ll
from latentlab import rows
from latentlab.guides import Flow, FullRank, MeanField
from latentlab.inference import objectives
from latentlab.inference.bounds import height_at, loss_of, values_of
from latentlab.inference.check import prepare
from latentlab.inference.pair import Arguments
from latentlab.inference.sandbox import manual_seed
from latentlab.inference.settings import bound_of
from latentlab.objectives import ELBO, IWAE, DReG, Objective, Renyi, StickingTheLanding

F64 = torch.float64
X = torch.tensor([1.2, -0.4, 0.3, 2.0, -1.1], dtype=F64)


def model(x):
    """A global latent, a local one for each row, and a parameter of its own."""
    theta = pyro.param("theta", torch.tensor(0.3, dtype=F64))
    mu = pyro.sample("mu", dist.Normal(theta, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, theta.exp()), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.1, dtype=F64))
    scale = pyro.param("scale", torch.tensor(0.7, dtype=F64), constraints.positive)
    mu = pyro.sample("mu", dist.Normal(loc, scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(mu + scale * x, scale))


def local_model(x=None, size=None):
    theta = pyro.param("theta", torch.tensor(0.3, dtype=F64))
    with rows(x, size):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, theta.exp()), obs=x)


def local_guide(x=None, size=None):
    slope = pyro.param("slope", torch.tensor(0.2, dtype=F64))
    scale = pyro.param("scale", torch.tensor(0.5, dtype=F64), constraints.positive)
    with rows(x, size):
        pyro.sample("z", dist.Normal(slope * x, scale))


def conjugate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def conjugate_guide(x):
    """The posterior, and free to leave it."""
    precision = 1.0 + len(x)
    loc = pyro.param("loc", x.sum() / precision)
    scale = pyro.param("scale", torch.tensor(precision**-0.5, dtype=F64), constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def log_evidence(x):
    cov = torch.eye(len(x), dtype=F64) + 1.0
    return float(dist.MultivariateNormal(torch.zeros_like(x), cov).log_prob(x))


def bound_to(objective, model, guide, data=X):
    pair, report = prepare(model, data, guide)
    assert report.ok, report
    pair.bound = bound_of(pair, objective)
    return pair


def loss_at(pair, num_particles, seed, data=None):
    """The loss and its gradient, with the noise of a seed."""
    with pair.entered(0):
        manual_seed(seed)
        loss, elbo = loss_of(pair, num_particles, data or pair.data, 1.0)
        parameters = [*pair.parameters().values()]
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, slopes, strict=True)
    ]
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in flat]), float(elbo)


def mean_slope(pair, num_particles, repeats):
    found = torch.stack([loss_at(pair, num_particles, seed)[1] for seed in range(repeats)])
    return found.mean(0), found.std(0) / math.sqrt(repeats)


@pytest.mark.parametrize(
    ("objective", "alpha"), [(IWAE(4), 0.0), (Renyi(0.5, 4), 0.5), (Renyi(2.0, 4), 2.0)]
)
def test_equal_to_pyros_on_the_same_noise(objective, alpha):
    pair = bound_to(objective, model, guide)
    loss, slope, _ = loss_at(pair, 4, seed=3)
    with pair.entered(0):
        manual_seed(3)
        theirs = RenyiELBO(alpha, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        for p in pair.parameters().values():
            p.grad = None
        expected = theirs.loss_and_grads(pair.model, pair.guide, X)
        slopes = torch.stack([p.grad for p in pair.parameters().values()])
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(slope, slopes, rtol=1e-10, atol=1e-12)


def test_each_row_has_weights_of_its_own():
    pair = bound_to(IWAE(6), local_model, local_guide)
    assert pair.bound.plate is not None
    loss, _, elbo = loss_at(pair, 6, seed=1)
    manual_seed(1)
    z = (0.2 * X + 0.5 * torch.randn(6, 5, dtype=F64)).numpy()
    assert loss == pytest.approx(-_by_hand(z, 0.2 * X.numpy(), 0.5), rel=1e-10)
    assert elbo <= -loss


def _by_hand(z, loc, scale):
    total = 0.0
    for n in range(z.shape[1]):
        weights = []
        for k in range(len(z)):
            log_p = _normal(z[k, n], 0.3, 1.0) + _normal(float(X[n]), z[k, n], math.exp(0.3))
            weights.append(math.exp(log_p - _normal(z[k, n], loc[n], scale)))
        total += math.log(np.mean(weights))
    return total


def _normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def test_a_global_latent_or_a_factor_joins_all_rows():
    def with_factor(x=None, size=None):
        local_model(x, size)
        pyro.factor("prior", -(pyro.param("theta") ** 2))

    assert bound_to(IWAE(4), model, guide).bound.plate is None
    assert bound_to(IWAE(4), with_factor, local_guide).bound.plate is None


@pytest.mark.parametrize("objective", [IWAE(4), DReG(4), Renyi(0.3, 4), StickingTheLanding()])
def test_a_mini_batch_stands_for_all_rows(objective):
    pair = bound_to(objective, local_model, local_guide)
    some = Arguments((X[:3],))
    scaled = Arguments((X[:3],), {"size": 12})
    loss, slope, elbo = loss_at(pair, 4, 5, some)
    of_all = loss_at(pair, 4, 5, scaled)
    assert of_all[0] == pytest.approx(4 * loss, rel=1e-12)
    assert of_all[2] == pytest.approx(4 * elbo, rel=1e-12)
    torch.testing.assert_close(of_all[1], 4 * slope)


@pytest.mark.parametrize("pair_of", [(model, guide), (local_model, local_guide)])
@pytest.mark.parametrize(("plain", "other"), [(IWAE(3), DReG(3)), (ELBO(), StickingTheLanding())])
def test_the_mean_gradient_is_the_same_without_the_score(pair_of, plain, other):
    pair = bound_to(other, *pair_of)
    found, its_error = mean_slope(pair, 600, 100)
    if isinstance(plain, ELBO):  # a bound of one draw each
        plain = Objective()
    object.__setattr__(pair.bound, "objective", plain)
    expected, error = mean_slope(pair, 600, 100)
    assert ((found - expected).abs() <= 4.5 * (error**2 + its_error**2).sqrt() + 1e-12).all()


@pytest.mark.parametrize("objective", [DReG(4), StickingTheLanding(), IWAE(4), Renyi(0.5, 4)])
def test_at_the_posterior_every_bound_is_the_evidence(objective):
    pair = bound_to(objective, conjugate, conjugate_guide)
    loss, slope, elbo = loss_at(pair, 4, seed=2)
    assert loss == pytest.approx(-log_evidence(X), rel=1e-12)
    assert elbo == pytest.approx(log_evidence(X), rel=1e-12)
    if objective.leaves_out_score:  # draw by draw
        assert slope.abs().max() < 1e-12


def exact_slope(alpha, loc, log_scale):
    """Of the bound of two draws in the mean and log-sd of q = N(loc, scale), by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    eps, w = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    at = torch.tensor([loc, log_scale], dtype=F64, requires_grad=True)
    z = at[0] + at[1].exp() * eps
    log_q = -0.5 * eps**2 - at[1] - 0.5 * math.log(2 * math.pi)
    log_p = dist.Normal(0.0, 1.0).log_prob(z)
    log_p = log_p + dist.Normal(z.unsqueeze(-1), 1.0).log_prob(X).sum(-1)
    powers = (1 - alpha) * (log_p - log_q)
    value = (torch.logaddexp(powers[:, None], powers) - math.log(2)) / (1 - alpha)
    (slope,) = torch.autograd.grad((w[:, None] * w * value).sum(), at)
    return slope


@pytest.mark.parametrize("objective", [IWAE(2), Renyi(0.6, 2), Renyi(-0.5, 2)])
@pytest.mark.parametrize("kind", [MeanField, FullRank, lambda: Flow("iaf")])
def test_guides_of_ours_have_the_gradient_of_quadrature(objective, kind):
    pair = bound_to(objective, conjugate, kind())
    center, unit = torch.tensor([0.4], dtype=F64), torch.tensor([0.6], dtype=F64)
    pair.guide.start(center, unit)  # parameters are in units of the frame
    expected = -exact_slope(objective.alpha, 0.4, math.log(0.6))
    expected[0] *= 0.6
    found, error = mean_slope(pair, 2000, 60)
    names = [n for n, p in pair.parameters().items() for _ in range(p.numel())]
    where = [names.index("guide.loc"), names.index("guide.log_scale")]
    assert ((found[where] - expected).abs() <= 4.5 * error[where]).all(), (found, expected)


def test_of_many_draws_a_flow_has_its_score_and_the_same_mean(monkeypatch):
    pair = bound_to(IWAE(2), conjugate, Flow("iaf"))
    pair.guide.start(torch.tensor([0.4], dtype=F64), torch.tensor([0.6], dtype=F64))
    found, error = mean_slope(pair, 2000, 60)
    monkeypatch.setattr("latentlab.guides.flow._JACOBIAN_ROWS", 0)
    for objective in (IWAE(2), DReG(2)):
        object.__setattr__(pair.bound, "objective", objective)
        other, its_error = mean_slope(pair, 2000, 60)
        assert ((found - other).abs() <= 4.5 * (error**2 + its_error**2).sqrt() + 1e-12).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 2.0])
def test_renyis_divergence_in_closed_form(alpha):
    r"""Of q = N(m, s) from p = N(0, 1): the bound of infinitely many draws is its negative.

    Gil, Alajaji and Linder (2013), table 2.
    """
    m, s = 0.3, 0.8
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(400_000, 1, generator=generator, dtype=F64)
    z = m + s * eps
    log_weights = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(m, s).log_prob(z)
    objective = Renyi(alpha, 1000) if alpha else IWAE(1000)
    values = values_of(log_weights, objective)[:, 0]
    spread = alpha + (1 - alpha) * s**2  # variance of the mixture of exponents
    divergence = alpha * m**2 / (2 * spread) - math.log(s) - math.log(spread) / (2 * (alpha - 1))
    error = float(values.std()) / math.sqrt(len(values))
    bias = float(log_weights.exp().var()) * 2 / 1000
    assert abs(float(values.mean()) + divergence) <= 4.5 * error + bias


def test_more_draws_are_a_tighter_bound():
    values = []
    for num in (1, 2, 8, 64):
        objective = StickingTheLanding() if num == 1 else IWAE(num)
        pair = bound_to(objective, model, guide)
        found = [-loss_at(pair, 64 * 4, seed)[0] for seed in range(40)]
        values.append((np.mean(found), np.std(found) / math.sqrt(40)))
    for (low, a), (high, b) in zip(values, values[1:], strict=False):
        assert low <= high + 4 * math.hypot(a, b)
    theta = torch.tensor(0.3, dtype=F64)
    cov = torch.eye(5, dtype=F64) * (1 + (2 * theta).exp()) + 1.0
    exact = float(dist.MultivariateNormal(theta.expand(5), cov).log_prob(X))
    assert values[-1][0] <= exact + 4 * values[-1][1]
    assert exact - values[-1][0] < 0.3 * (exact - values[0][0])


@pytest.mark.parametrize(
    "pair_of", [(model, guide), (local_model, local_guide), (model, "full_rank")]
)
@pytest.mark.parametrize("objective", [IWAE(4), Renyi(0.5, 4), StickingTheLanding()])
def test_the_height_of_a_climb_is_its_bound(objective, pair_of):
    pair = bound_to(objective, *pair_of)
    loss, _, _ = loss_at(pair, 32, seed=4)
    with pair.entered(0):
        manual_seed(4)
        draws = objectives.draw(pair, 32).detached()
        whole, parts = (height_at(pair, draws, chunk) for chunk in (32, 5))
    assert whole.value == pytest.approx(-loss, rel=1e-10)
    assert parts.value == pytest.approx(-loss, rel=1e-10)
    assert 0 < whole.se < 10


def test_the_weight_of_the_kl_is_in_the_weights():
    pair = bound_to(IWAE(4), local_model, local_guide)
    with pair.entered(0):
        manual_seed(7)
        loss, _ = loss_of(pair, 4, pair.data, 0.25)
        manual_seed(7)
        z = 0.2 * X + 0.5 * torch.randn(4, 5, dtype=F64)
        log_lik = dist.Normal(z, math.exp(0.3)).log_prob(X)
        kl = dist.Normal(0.2 * X, 0.5).log_prob(z) - dist.Normal(0.3, 1.0).log_prob(z)
    expected = ((log_lik - 0.25 * kl).logsumexp(0) - math.log(4)).sum()
    assert float(loss.detach()) == pytest.approx(-float(expected), rel=1e-10)


# ---- in a fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        IWAE(4),
        DReG(4),
        pytest.param(Renyi(0.5, 4), marks=pytest.mark.slow),
        pytest.param(StickingTheLanding(), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("of", ["rows", "ours", pytest.param("global", marks=pytest.mark.slow)])
def test_a_record_is_what_the_pair_does(objective, of):
    """XLA compares itself with torch in every fit, and is refused where they differ."""
    pytest.importorskip("jax")
    pairs = {"global": (model, guide), "rows": (local_model, local_guide), "ours": (model, "auto")}
    posterior = ll.fit(
        pairs[of][0], X, pairs[of][1], objective=objective, backend="xla", max_steps=100
    )
    assert posterior.backend == "xla"


@pytest.mark.parametrize("backend", ["eager", "xla"])
def test_vae_with_a_warm_up(backend):
    if backend == "xla":
        pytest.importorskip("jax")
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    vae = ll.VariationalAutoencoder(num_features=4, hidden_dims=(8,), warm_up=20)
    posterior = ll.fit(vae, x, objective=IWAE(4), batch_size=20, max_steps=60, backend=backend)
    assert any("IWAE(num_samples=4)" in note for note in posterior.notes)


def test_the_elbo_is_what_is_reported():
    posterior = ll.fit(conjugate, X, conjugate_guide, objective=IWAE(4), max_steps=300)
    elbo = posterior.elbo
    assert abs(elbo.value - log_evidence(X)) <= 5 * elbo.se + 0.01
    assert any("ELBO is reported" in note for note in posterior.notes)


def summed(x):
    """Of two latents only the sum is seen: correlated by -0.92."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=x)


def best_scale(alpha):
    """The sd of the best N(m, s I) by Renyi's divergence, in closed form but for a search in s.

    The integral of q^a p^(1 - a) is |s^2 I|^(-a/2) |P|^((1 - a)/2) |a / s^2 I + (1 - a) P|^(-1/2),
    P the precision of p.
    """
    precision = np.eye(2) + 1 / 0.09
    s = np.linspace(0.1, 1.5, 20_000)
    own = np.linalg.eigvalsh(precision)[:, None]
    if alpha == 1:
        return 1 / math.sqrt(precision[0, 0])
    joint = alpha / s**2 + (1 - alpha) * own
    exists = (joint > 0).all(0)  # else the integral is infinite
    log_integral = -2 * alpha * np.log(s) - 0.5 * np.log(np.where(exists, joint, 1.0)).sum(0)
    return s[np.where(exists, log_integral / (1 - alpha), -np.inf).argmax()]


@pytest.mark.parametrize("objective", [ELBO(), Renyi(0.2, 512), Renyi(2.0, 128)])
def test_a_climb_ends_at_the_top_of_its_bound(objective):
    """Below the top of the ELBO, which is not what decides."""
    x = torch.tensor(0.7, dtype=F64)
    settings = {"num_particles": 64} if isinstance(objective, ELBO) else {}
    posterior = ll.fit(
        summed, x, "mean_field", objective=objective, num_restarts=1, backend="eager", **settings
    )
    assert posterior.converged, posterior.stop_reason
    sd = posterior.pair.guide.free_sd().detach().numpy()
    assert sd == pytest.approx([best_scale(objective.alpha)] * 2, rel=0.06)


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["iwae", IWAE, None, Objective()])
def test_what_is_no_objective(given):
    with pytest.raises(ValueError, match="objective: expected one of latentlab.objectives"):
        ll.fit(conjugate, X, objective=given)


def test_a_point_has_nothing_to_weigh():
    with pytest.raises(ValueError, match="objective: IWAE weighs draws"):
        ll.fit(conjugate, X, "point", objective=IWAE(4))


@pytest.mark.parametrize("num_samples", [1, 0, 2.5, True, "8"])
@pytest.mark.parametrize("kind", [IWAE, DReG, lambda n: Renyi(0.5, n)])
def test_too_few_draws(kind, num_samples):
    with pytest.raises(ValueError, match="num_samples: expected an int >= 2"):
        kind(num_samples)


@pytest.mark.parametrize("alpha", [1, 1.0, math.nan, math.inf, "0.5", True])
def test_an_alpha_that_is_none(alpha):
    with pytest.raises(ValueError, match="alpha: expected a finite number other than 1"):
        Renyi(alpha)
