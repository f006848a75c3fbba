"""Latents of single rows follow the rows through mini-batches."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import latentlab as ll
from latentlab.guides import (
    Amortised,
    FullRank,
    Latent,
    LowRank,
    MeanField,
    Point,
    Structured,
    guide_from_spec,
)
from latentlab.inference.lazy_adam import LazyAdam
from latentlab.inference.pair import Arguments

NOISE, SPREAD = 0.15, 1.0
FOLLOW = [Point, MeanField, Structured]


def hierarchy(x=None, size=None):
    """z_n ~ N(m, 1), x_n ~ N(z_n, 0.15)."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(loc, SPREAD))
        return pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def simulated(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, num_rows, generator=generator, dtype=torch.float64)
    z = 2.0 + SPREAD * draw[0]
    return z, z + NOISE * draw[1]


def exact(x):
    """Mean and sd of loc, and of z: the posterior in closed form."""
    total = SPREAD**2 + NOISE**2
    precision = len(x) / total + 1 / 100
    loc, sd = float(x.sum()) / total / precision, precision**-0.5
    weight = SPREAD**2 / total
    z = weight * x + (1 - weight) * loc
    z_sd = math.sqrt(weight * NOISE**2 + ((1 - weight) * sd) ** 2)
    return loc, sd, z, z_sd


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.fixture(
    scope="module", params=[pytest.param("mean_field", marks=pytest.mark.slow), "structured"]
)
def batched(request):
    z, x = simulated(400)
    posterior = ll.fit(
        hierarchy, x, guide=request.param, batch_size=50, num_restarts=1, progress=False
    )
    return posterior, z, x


def test_local_latents_follow_their_rows(batched):
    posterior, z, x = batched
    loc, sd, z_mean, z_sd = exact(x)
    assert posterior.converged
    draws = posterior.sample(2000)
    assert draws["z"].shape == (2000, 400)
    assert correlation(draws["z"].mean(0), z) >= 0.98
    assert (posterior.guide.free_mean()[1:] - z_mean).abs().max() < 0.1 * z_sd
    assert abs(posterior.guide.free_mean()[0].item() - loc) < 0.1 * sd
    assert posterior.guide.free_sd()[0].item() == pytest.approx(sd, rel=0.12)


def test_everything_works_at_all_rows_after_a_fit_in_batches(batched):
    posterior, _, x = batched
    assert posterior.predict(5)["x"].shape == (5, 400)
    assert len(posterior.summary(50)) == 401
    assert posterior.log_weights(20).std() < 2.0
    verdict = posterior.check()
    assert verdict.level == "use"
    total = SPREAD**2 + NOISE**2
    covariance = total * torch.eye(400).double() + 100.0
    normal = torch.distributions.MultivariateNormal(torch.zeros(400).double(), covariance)
    assert posterior.elbo.value == pytest.approx(float(normal.log_prob(x)), abs=0.5)


def test_a_structured_guide_is_exact_for_a_gaussian_hierarchy():
    _, x = simulated(30)
    posterior = ll.fit(hierarchy, x, guide="structured", num_restarts=1, progress=False)
    covariance = (SPREAD**2 + NOISE**2) * torch.eye(30).double() + 100.0
    normal = torch.distributions.MultivariateNormal(torch.zeros(30).double(), covariance)
    weights = posterior.log_weights(200)
    assert float(weights.mean()) == pytest.approx(float(normal.log_prob(x)), abs=1e-4)
    assert float(weights.std()) < 1e-3


def test_a_point_follows_its_rows():
    _, x = simulated(200)
    posterior = ll.fit(hierarchy, x, guide="point", batch_size=40, num_restarts=1, progress=False)
    _, _, z_mean, z_sd = exact(x)
    assert (posterior.guide.free_mean()[1:] - z_mean).abs().max() < 0.1 * z_sd


@pytest.mark.slow
def test_an_amortised_guide_reads_the_latents_off_the_rows():
    z, x = simulated(300)
    posterior = ll.fit(
        hierarchy,
        x,
        Amortised(hidden_dims=(16,)),
        batch_size=60,
        num_restarts=1,
        max_steps=2500,
        progress=False,
    )
    loc, sd, z_mean, z_sd = exact(x)
    draws = posterior.sample(1000)
    assert correlation(draws["z"].mean(0), z) >= 0.98
    assert abs(float(draws["loc"].mean()) - loc) < 0.5 * sd
    mean_error = (draws["z"].mean(0) - z_mean).square().mean().sqrt()
    assert mean_error < 0.3 * z_sd


def test_an_amortised_guide_takes_an_encoder_of_your_own(tmp_path):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(1, 2)

        def forward(self, x):
            return self.line(x[:, None])

    _, x = simulated(60)
    torch.manual_seed(0)
    encoder = Encoder()
    posterior = ll.fit(
        hierarchy, x, Amortised(encoder), num_restarts=1, max_steps=400, progress=False
    )
    posterior.save(tmp_path)
    with pytest.raises(ValueError, match=r"guide=Amortised\(encoder\)"):
        ll.load(tmp_path, model=hierarchy, data=x)
    without = ll.load(tmp_path, model=hierarchy, guide=Amortised(encoder))
    with pytest.raises(ValueError, match="loaded without its data"):
        without.sample(3)
    loaded = ll.load(tmp_path, model=hierarchy, guide=Amortised(encoder), data=x)
    assert torch.equal(loaded.sample(3)["z"], posterior.sample(3)["z"])


@pytest.mark.parametrize("guide", ["full_rank", "low_rank", "flow"])
def test_guides_that_cannot_follow_rows_are_refused(guide):
    _, x = simulated(20)
    with pytest.raises(ValueError, match=r"batch_size: latents are local.*mean_field.*Amortised"):
        ll.fit(hierarchy, x, guide=guide, batch_size=5, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["mean_field", "structured"])
def test_ten_thousand_local_latents_in_batches(guide):
    z, x = simulated(10_000)
    loc, sd, _, _ = exact(x)
    posterior = ll.fit(hierarchy, x, guide=guide, batch_size=256, progress=False)
    assert correlation(posterior.sample(200)["z"].mean(0), z) >= 0.98
    assert abs(posterior.guide.free_mean()[0].item() - loc) < 0.1 * sd
    assert posterior.guide.free_sd()[0].item() == pytest.approx(sd, rel=0.12)
    assert posterior.check().level == "use"


# ---- what a batch draws ------------------------------------------------------------------------


def latents(num_rows=6):
    rows = ("rows", num_rows, -1)
    groups = ("groups", 2, -2)
    simplex = constraints.simplex
    return [
        Latent("loc", (), (2,), constraints.real_vector),
        Latent("z", (2, num_rows), (), constraints.positive, (groups, rows)),
        Latent("share", (num_rows,), (3,), simplex, (rows,)),
        Latent("scale", (2, 1), (), constraints.positive, (groups,)),
    ]


def bound(kind, seed=0, num_rows=6):
    guide = kind().bind(
        latents(num_rows), max_plate_nesting=2, dtype=torch.float64, local_plate="rows"
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):  # frame and parameters both away from where they begin
        with torch.no_grad():
            for parameter in guide.parameters():
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * value)
        if _ == 0:
            guide.recentre()
    return guide


def batch(rows):
    return Arguments(rows=torch.tensor(rows))


@pytest.mark.parametrize("kind", FOLLOW)
def test_batches_have_the_density_of_all_rows_on_average(kind):
    """A partition of the rows: its scaled log-densities average to that of the whole."""
    guide = bound(kind)
    torch.manual_seed(0)
    with torch.no_grad():
        whole = guide.draw(4)
    u = guide.pack(whole.values)
    found = []
    for rows in ([0, 3], [1, 5], [4, 2]):
        part = guide._part(batch(rows))
        values, _ = guide.unpack(u[:, part.places], part.layout)
        for name, value in values.items():
            expected = whole.values[name]
            axis = {"z": -1, "share": -2}.get(name)
            if axis is not None:
                expected = expected.index_select(axis, torch.tensor(rows))
            torch.testing.assert_close(value, expected)
        found.append(log_prob_of_batch(guide, kind, u, rows))
    torch.testing.assert_close(torch.stack(found).mean(0), whole.log_q)


def log_prob_of_batch(guide, kind, u, rows):
    """The scaled log-density of some rows, from the marginal covariance: a plain formula."""
    if kind is Point:
        return u.new_zeros(len(u))
    outer, inner = guide.layout.outer, guide.layout.inner[rows]
    with torch.no_grad():
        mean, covariance = guide.free_mean(), guide.covariance()

        def normal(places):
            mvn = torch.distributions.MultivariateNormal(
                mean[places], covariance[places[:, None], places]
            )
            return mvn.log_prob(u[:, places])

        total = normal(outer)
        for places in inner:
            given = normal(torch.cat([outer, places])) - normal(outer)
            total = total + 6 / len(rows) * given
        _, log_det = guide.unpack(u)
    for name, value in log_det.items():
        axis = {"z": -1, "share": -1}.get(name)
        if axis is None:
            total = total - value.flatten(1).sum(1)
        else:
            some = value.index_select(axis, torch.tensor(rows))
            total = total - 6 / len(rows) * some.flatten(1).sum(1)
    return total


@pytest.mark.parametrize("kind", FOLLOW)
def test_a_batch_draws_its_rows_with_their_density(kind):
    guide, rows = bound(kind), [4, 1, 3]
    torch.manual_seed(1)
    with torch.no_grad():
        draws = guide.draw(5, batch(rows))
        part = guide._part(batch(rows))
    assert draws.values["z"].shape == (5, 2, 3)
    assert draws.values["share"].shape == (5, 1, 3, 3)
    free = [guide._free(site, draws.values[site.latent.name]) for site in part.layout.sites]
    u = torch.zeros(5, guide.num_latents, dtype=torch.float64)
    u[:, part.places] = torch.cat(free, -1)
    torch.testing.assert_close(draws.log_q, log_prob_of_batch(guide, kind, u, rows))


@pytest.mark.parametrize("kind", FOLLOW)
def test_rows_that_are_not_in_a_batch_get_no_gradient(kind):
    guide = bound(kind)
    torch.manual_seed(0)
    draws = guide.draw(3, batch([1, 2]))
    loss = draws.log_q.sum() + sum(v.square().sum() for v in draws.values.values())
    (slope,) = torch.autograd.grad(loss, guide.loc)
    resting = guide.layout.inner[[0, 3, 4, 5]]
    assert (slope[resting] == 0).all()
    assert (slope[guide.layout.inner[[1, 2]]] != 0).all()


@pytest.mark.parametrize("kind", [MeanField, Structured])
def test_elements_add_up_to_the_density(kind):
    guide = bound(kind)
    torch.manual_seed(0)
    draws = guide.draw(4)
    parts = guide.element_log_prob(draws.values).values()
    total = sum(part.reshape(4, -1).sum(1) for part in parts)
    torch.testing.assert_close(total, draws.log_q)


@pytest.mark.parametrize("kind", [MeanField, Structured])
def test_rows_are_drawn_anew_for_the_same_global_latents(kind):
    guide = bound(kind)
    torch.manual_seed(0)
    draws = guide.draw(4)
    kept = {name: draws.values[name] for name in ("loc", "scale")}
    again = guide.draw_local(4, kept).values
    assert all(torch.allclose(again[name], kept[name]) for name in kept)
    assert not torch.allclose(again["z"], draws.values["z"])


def test_draws_of_a_batch_are_those_of_a_full_rank_guide_in_law():
    """The covariance of a structured guide's draws is the one that it says."""
    guide = bound(Structured)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = guide.draw(40_000, batch([5, 0]))
        part = guide._part(batch([5, 0]))
        free = [guide._free(s, draws.values[s.latent.name]) for s in part.layout.sites]
        covariance = guide.covariance()[part.places[:, None], part.places]
    found = torch.cov(torch.cat(free, -1).T)
    variance = covariance.diagonal()
    se = ((variance[:, None] * variance + covariance**2) / 40_000).sqrt()
    assert ((found - covariance).abs() < 5 * se).all()


@pytest.mark.parametrize("kind", [FullRank, LowRank])
def test_other_guides_say_that_they_cannot_draw_some_rows(kind):
    with pytest.raises(ValueError, match="MeanField, Structured or Amortised"):
        bound(kind).draw(2, batch([0, 1]))


def test_a_guide_with_local_latents_is_built_again_from_its_description():
    for kind in (MeanField, Structured, LowRank, FullRank, Point):
        guide = bound(kind)
        again = guide_from_spec(guide.spec(), torch.float64)
        again.load_state_dict(guide.state_dict())
        torch.manual_seed(0)
        one = guide.draw(2)
        torch.manual_seed(0)
        other = again.draw(2)
        assert torch.equal(one.log_q, other.log_q)


# ---- the optimiser ---------------------------------------------------------------------------


def test_lazy_adam_is_adam_where_every_number_moves():
    generator = torch.Generator().manual_seed(0)
    one = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    other = one.detach().clone().requires_grad_()
    lazy, adam = LazyAdam([one], lr=0.1, eps=0.01), torch.optim.Adam([other], lr=0.1, eps=0.01)
    for _ in range(20):
        one.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        other.grad = one.grad.clone()
        lazy.step()
        adam.step()
    torch.testing.assert_close(one, other)
    assert lazy.often_moved().all()


def test_a_number_without_a_gradient_rests_and_remembers():
    """Seen in every fourth step only, it moves as one that sees these steps alone."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, generator=generator, dtype=torch.float64)
    rare = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    alone = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    lazy, adam = LazyAdam([rare], lr=0.1), torch.optim.Adam([alone], lr=0.1)
    for step, gradient in enumerate(gradients):
        seen = step % 4 == 0
        before = rare[0].item()
        rare.grad = torch.stack([gradient * seen, gradient])
        lazy.step()
        if seen:
            alone.grad = gradient[None].clone()
            adam.step()
        else:
            assert rare[0].item() == before
    torch.testing.assert_close(rare[:1], alone)
    assert lazy.often_moved().tolist() == [False, True]
