"""What a posterior says of itself is what the diagnostics say of its draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll

G = torch.Generator().manual_seed(0)
FEATURES = torch.randn(40, 2, generator=G, dtype=torch.float64)
Y = FEATURES @ torch.tensor([1.0, -0.5]).double() + 0.7 * torch.randn(40, generator=G).double()
NOISE = 0.7


def line(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with ll.rows(x):
        pyro.sample("y", dist.Normal((slope * x).sum(-1), NOISE), obs=y)


def without(n=None):
    """Mean and covariance of the exact posterior, a row left out."""
    keep = torch.ones(40, dtype=torch.bool)
    if n is not None:
        keep[n] = False
    x, y = FEATURES[keep], Y[keep]
    covariance = torch.linalg.inv(x.T @ x / NOISE**2 + torch.eye(2).double())
    return covariance @ (x.T @ y) / NOISE**2, covariance


@pytest.fixture(scope="module", params=["full_rank", "mean_field"])
def posterior(request):
    return ll.fit(line, (FEATURES, Y), request.param, num_restarts=1, progress=False)


def test_rows_left_out_are_scored_exactly(posterior):
    found = posterior.loo(4000)
    expected = []
    for n in range(40):
        mean, covariance = without(n)
        variance = FEATURES[n] @ covariance @ FEATURES[n] + NOISE**2
        expected.append(dist.Normal(FEATURES[n] @ mean, variance.sqrt()).log_prob(Y[n]))
    assert abs(found.elpd.value - float(sum(expected))) < 0.3
    assert len(found.khat.khat) == 40


def test_the_evidence_is_between_its_bounds(posterior):
    covariance = FEATURES @ FEATURES.T + NOISE**2 * torch.eye(40)
    exact = dist.MultivariateNormal(torch.zeros(40).double(), covariance).log_prob(Y)
    found = posterior.sandwich()
    assert abs(found.evidence.value - float(exact)) < 0.05
    assert found.elbo.value < float(exact) + 5 * found.elbo.se + 1e-6


def test_the_elbo_is_the_sum_of_its_parts(posterior):
    found = posterior.elbo_parts()
    parts = sum(e.value for e in found.log_likelihood.values())
    parts -= sum(e.value for e in found.kl.values())
    assert {*found.log_likelihood} == {"y"}
    assert {*found.kl} == {"slope"}
    assert found.elbo.value == pytest.approx(parts)
    noise = math.hypot(found.elbo.se, posterior.elbo.se)
    assert abs(found.elbo.value - posterior.elbo.value) < 5 * noise + 1e-6


def test_parts_of_a_correlated_guide_add_up_site_by_site():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    fitted = ll.fit(model, Y, "full_rank", num_restarts=1, progress=False)
    found = fitted.elbo_parts(2000)
    assert {*found.kl} == {"loc", "scale"}
    noise = math.hypot(found.elbo.se, fitted.elbo.se)
    assert abs(found.elbo.value - fitted.elbo.value) < 5 * noise + 1e-3


def test_draws_of_a_reference_are_compared(posterior):
    mean, covariance = without()
    exact = dist.MultivariateNormal(mean, covariance)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        draws = exact.sample((4000,))
    fine = posterior.compare_draws({"slope": draws})
    assert float(fine.shift.abs().max()) < 0.12
    moved = posterior.compare_draws({"slope": draws + 1})
    assert float(moved.shift.abs().max()) > 1
    with pytest.raises(ValueError, match="expected draws of the posterior's sites"):
        posterior.compare_draws({"other": draws})
    with pytest.raises(ValueError, match=r"of shape \(2,\), got \(3,\)"):
        posterior.compare_draws({"slope": torch.randn(50, 3)})


def test_data_are_compared_with_replicates(posterior):
    assert posterior.ppc().p_value.value > 0.001
    with pytest.raises(ValueError, match="expected one of 'y', got 'z'"):
        posterior.ppc(site="z")


def test_a_wrong_model_is_seen_in_its_replicates():
    def poisson(n):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.1))
        with ll.rows(n):
            pyro.sample("n", dist.Poisson(rate), obs=n)

    counts = torch.cat([torch.zeros(30), torch.full((30,), 20.0)]).double()
    fitted = ll.fit(poisson, counts, "full_rank", num_restarts=1, progress=False)
    assert fitted.ppc().p_value.value < 0.01


def test_missing_cells_are_not_looked_at():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(2)).double()
    x[::5, 0] = math.nan
    fitted = ll.fit(ll.GaussianMixture(2, 1), x, num_restarts=1, progress=False)
    assert fitted.ppc().p_value.value > 0.001


def test_a_prior_that_pulls_the_other_way_is_told():
    def strong(x):
        loc = pyro.sample("loc", dist.Normal(-3.0, 0.3))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def weak(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 100.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = 2 + torch.randn(20, generator=torch.Generator().manual_seed(3)).double()
    pulled, free = (
        ll.fit(m, x, "full_rank", num_restarts=1, progress=False).sensitivity()
        for m in (strong, weak)
    )
    assert "conflict" in str(pulled)
    assert "conflict" not in str(free)
    assert pulled.names == ("loc",)


def test_models_are_compared_by_rows_left_out(posterior):
    def wide(x, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with ll.rows(x):
            pyro.sample("y", dist.Normal(loc, 5.0), obs=y)

    other = ll.fit(wide, (FEATURES, Y), "full_rank", num_restarts=1, progress=False)
    found = ll.compare({"line": posterior, "wide": other})
    assert found.best == "line"
    foreign = ll.fit(wide, (FEATURES, Y + 1), "full_rank", num_restarts=1, progress=False)
    with pytest.raises(ValueError, match="'foreign' was fitted to other rows"):
        ll.compare({"line": posterior, "foreign": foreign})
    with pytest.raises(TypeError, match="expected a dict"):
        ll.compare([posterior])


def test_what_has_no_rows_to_leave_out_is_refused():
    def one(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fitted = ll.fit(one, torch.tensor(1.0), "full_rank", num_restarts=1, progress=False)
    with pytest.raises(ValueError, match="loo: the data are one datum"):
        fitted.loo()
    point = ll.fit(line, (FEATURES, Y), "point", num_restarts=1, progress=False)
    with pytest.raises(ValueError, match="loo: a point has no draws"):
        point.loo()


def sequences():
    x = torch.randn(4, 10, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ll.data.Sequences(x, torch.tensor([10, 8, 10, 5]))


CONJUGATE = {
    "mixture": (lambda: ll.GaussianMixture(2, 2, prior="conjugate"), FEATURES),
    "one component": (
        lambda: ll.GaussianMixture(2, 1, covariance="full", prior="conjugate"),
        FEATURES,
    ),
    "chain": (lambda: ll.HiddenMarkovModel(2, 1, prior="conjugate"), sequences()),
}


@pytest.mark.parametrize("case", CONJUGATE)
def test_conjugate_posteriors_are_asked_like_others(case):
    make, data = CONJUGATE[case]
    fit = ll.fit(make(), data, num_restarts=1, progress=False)
    parts = fit.elbo_parts()
    total = sum(e.value for e in parts.log_likelihood.values())
    assert total - sum(e.value for e in parts.kl.values()) == pytest.approx(parts.elbo.value)
    assert parts.elbo.value == pytest.approx(fit.elbo.value, abs=8 * parts.elbo.se + 1e-6)
    wanted = {*fit.guide.families} if case == "chain" else {("all latents",)}
    assert {*parts.kl} == {site for sites in wanted for site in sites}
    assert fit.sensitivity().names
    assert math.isfinite(fit.loo().elpd.value)
    assert fit.ppc(num_samples=40).names


def test_parts_of_a_chain_are_the_divergences_of_its_factors():
    """That of a site with no other in its factor is known in closed form."""
    fit = ll.fit(CONJUGATE["chain"][0](), sequences(), num_restarts=1, progress=False)
    found = fit.elbo_parts(4000).kl["transitions"]
    with fit.pair.entered(0), torch.no_grad(), pyro.poutine.trace() as tape:
        fit.model(*fit.pair.data.args)
    prior = tape.trace.nodes["transitions"]["fn"]
    while not isinstance(prior, torch.distributions.Dirichlet):
        prior = prior.base_dist
    own = fit.guide.factors()[("transitions",)].concentration.detach()
    q = torch.distributions.Dirichlet(own)
    exact = torch.distributions.kl_divergence(q, type(q)(prior.concentration.expand_as(own)))
    assert abs(found.value - float(exact.sum())) < 6 * found.se


def test_steps_after_the_end_are_not_looked_at():
    fit = ll.fit(CONJUGATE["chain"][0](), sequences(), num_restarts=1, progress=False)
    inside = sequences().inside
    found = fit.ppc({"n": len, "mean": lambda x: x.mean()}, num_samples=40)
    assert float(found.observed[0]) == int(inside.sum())
    assert float(found.observed[1]) == pytest.approx(float(sequences().x[inside].mean()))


@pytest.mark.parametrize("what", ["elbo_parts", "sensitivity", "sandwich", "loo"])
def test_a_point_has_no_spread_to_speak_of(what):
    model = ll.GaussianMixture(2, 2, prior="flat")
    point = ll.fit(model, FEATURES, num_restarts=1, progress=False)
    with pytest.raises(ValueError, match=f"^{what}: a point has no "):
        getattr(point, what)()
    assert point.ppc(num_samples=40).names


def test_latents_of_rows_are_asked_what_can_be_said():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ll.VariationalAutoencoder(num_features=3, latent_dim=1, hidden_dims=(4,))
    fit = ll.fit(model, x, max_steps=60, num_restarts=1, progress=False)
    assert {*fit.elbo_parts().kl} == {"z"}
    assert fit.ppc(num_samples=40).names
    with pytest.raises(ValueError, match="loo: each row has latents of its own"):
        fit.loo()
    with pytest.raises(ValueError, match="sensitivity: no latent is shared"):
        fit.sensitivity()
