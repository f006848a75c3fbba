"""What holds for every guide over every kind of site, and for every flow: laws over the lists.

A new guide or flow is a line in a list here. L numbers on the real line, P particles.
"""

import copy
import json
import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions import constraints
from torch.distributions import MultivariateNormal
from torch.fx.experimental.proxy_tensor import make_fx

import latentlab as ll
from latentlab import flows
from latentlab.diagnostics import psis
from latentlab.guides import (
    Amortised,
    Flow,
    FullRank,
    Latent,
    LowRank,
    MeanField,
    Point,
    Structured,
    guide_from_spec,
)
from latentlab.guides.layout import Given

SMALL = {"hidden_dims": (8, 8), "num_transforms": 2}
FLOWS = [kind for kind in flows.KINDS if kind != "maf"]  # it is the iaf under another name
GUIDES = {
    "Point": Point,
    "MeanField": MeanField,
    "LowRank": lambda: LowRank(rank=2),
    "FullRank": FullRank,
    "Structured": Structured,
    "Amortised": lambda: Amortised(hidden_dims=(8,), num_inputs=2),
} | {f"Flow {kind}": lambda kind=kind: Flow(kind, num_transforms=2) for kind in FLOWS}
SPREAD = [name for name in GUIDES if name != "Point"]
GAUSSIAN = ["MeanField", "LowRank", "FullRank", "Structured"]

VECTOR = constraints.independent(constraints.positive, 1)
SUPPORTS = {
    "real": (constraints.real, ()),
    "real_vector": (constraints.real_vector, (3,)),
    "positive": (constraints.positive, ()),
    "unit_interval": (constraints.unit_interval, ()),
    "interval": (constraints.interval(-1.0, 2.5), ()),
    "greater_than": (constraints.greater_than(3.0), ()),
    "independent": (VECTOR, (2,)),
    "simplex": (constraints.simplex, (3,)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "lower_cholesky": (constraints.lower_cholesky, (2, 2)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "positive_definite": (constraints.positive_definite, (2, 2)),
}
PLATES = {
    "alone": (),
    "in a plate": (("groups", 3, -1),),
    "nested": (("schools", 2, -2), ("groups", 3, -1)),
    "outer": (("schools", 2, -2),),
    "of rows": (("rows", 4, -1),),
    "of rows and more": (("schools", 2, -2), ("rows", 4, -1)),
}
ROWS = torch.randn(4, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
DATA = Given((ROWS,))
LOCAL = Latent("local", (4,), (), constraints.real, PLATES["of rows"])


def latent(name, support="real", plates="alone"):
    constraint, event_shape = SUPPORTS[support]
    frames = PLATES[plates]
    sizes = {dim: size for _, size, dim in frames}
    batch_shape = tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))
    return Latent(name, batch_shape, event_shape, constraint, frames)


WORLD = [
    latent("loc"),
    latent("scales", "positive", "in a plate"),
    LOCAL,
    latent("weights", "simplex"),
    latent("shares", "simplex", "of rows and more"),
]
PLAIN = [latent("m"), LOCAL, latent("slopes", "real_vector")]


def bound(name, latents=WORLD, seed=0, dtype=torch.float64):
    """A guide somewhere: everything that moves is moved at random."""
    guide = GUIDES[name]()
    if isinstance(guide, Amortised):
        guide.look_at(DATA)
    guide.bind(latents, max_plate_nesting=2, dtype=dtype, local_plate="rows")
    source, strength = torch.Generator().manual_seed(seed), 0.1 if "Flow" in name else 0.2
    units = 0.5 + torch.rand(guide.num_latents, generator=source).to(dtype)
    guide.start(torch.randn(guide.num_latents, generator=source).to(dtype), units)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(strength * torch.randn(parameter.shape, generator=source).to(dtype))
    return guide


def draws_of(guide, num_particles=5, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return guide.draw(num_particles, DATA)


def fresh(values):
    """The same values in other tensors, which no cache knows."""
    return {name: value.clone() for name, value in values.items()}


# ---- every guide: draws and densities -----------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_draw_is_in_its_support_and_scored_as_it_was_drawn(name, support):
    plates = "nested" if support in ("positive", "simplex") else "alone"
    guide = bound(name, [latent("z", support, plates), LOCAL])
    draws = draws_of(guide)
    for site in guide.latents:
        ones = (1,) * (2 - len(site.batch_shape))
        assert draws.values[site.name].shape == (5, *ones, *site.shape)
        assert site.support.check(draws.values[site.name]).all()
    scored = guide.log_prob(fresh(draws.values), DATA).detach()
    torch.testing.assert_close(scored, draws.log_q, rtol=1e-6, atol=1e-6)


@st.composite
def layouts(draw):
    supports, plates = st.sampled_from(sorted(SUPPORTS)), st.sampled_from(sorted(PLATES))
    num = draw(st.integers(0, 3))
    sites = [latent(f"z{i}", draw(supports), draw(plates)) for i in range(num)]
    return draw(st.permutations([*sites, LOCAL]))


@given(layouts(), st.sampled_from(sorted(GUIDES)), st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_any_sites_in_any_order_are_scored_as_they_were_drawn(latents, name, seed, num_particles):
    guide = bound(name, latents, seed)
    draws = draws_of(guide, num_particles, seed)
    assert draws.log_q.shape == (num_particles,)
    scored = guide.log_prob(fresh(draws.values), DATA).detach()
    torch.testing.assert_close(scored, draws.log_q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("num_particles", [None, 3])
def test_the_pyro_program_scores_what_it_draws(name, num_particles):
    guide = bound(name)
    with pyro.validation_enabled(), torch.no_grad():
        if num_particles is None:
            trace = poutine.trace(guide).get_trace(ROWS)
        else:
            with pyro.plate("_particles", num_particles, dim=-3):
                trace = poutine.trace(guide).get_trace(ROWS)
        total = trace.log_prob_sum()
    values = {}
    for site in guide.latents:
        node = trace.nodes[site.name]
        values[site.name] = node["value"].reshape(num_particles or 1, *site.shape)
        frames = {(f.name, f.size, f.dim) for f in node["cond_indep_stack"]}
        assert set(site.plates) <= frames
    scored = guide.log_prob(values, DATA).sum().detach()
    torch.testing.assert_close(total, scored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GUIDES)
def test_moments_on_the_real_line_are_those_of_the_draws(name):
    guide, num = bound(name, PLAIN), 10_000
    u = guide.pack(draws_of(guide, num).values)
    mean, sd = guide.free_mean().detach(), guide.free_sd().detach()
    if name == "Point":
        torch.testing.assert_close(u, mean.expand_as(u))
        assert not guide.covariance().any()
        return
    covariance = guide.covariance().detach()
    torch.testing.assert_close(covariance.diagonal().sqrt(), sd)
    share = 1 / num + (1 / 4000 if "Flow" in name else 0)  # a flow knows its own by draws
    off = u - u.mean(0)
    assert ((u.mean(0) - mean).abs() < 5 * sd * share**0.5).all()
    products = off[:, :, None] * off[:, None]
    error = 5 * products.std(0) * share**0.5
    assert ((products.mean(0) - covariance).abs() < error).all()
    torch.testing.assert_close(guide.covariance(slice(1, 3)).detach(), covariance[1:3, 1:3])


# ---- every guide: gradients ---------------------------------------------------------------------


def leaves(guide):
    return [parameter for parameter in guide.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", GUIDES)
def test_draws_have_the_gradient_of_a_finite_difference(name):
    """At the same noise a draw is a function of the parameters, and nothing is detached."""
    guide = bound(name, PLAIN)

    def figure():
        torch.manual_seed(0)
        values = guide.draw(3, DATA).values
        return sum(value.sin().sum() for value in values.values())

    parameters = leaves(guide)
    slopes = torch.autograd.grad(figure(), parameters, allow_unused=True)
    source, step = torch.Generator().manual_seed(1), 1e-6
    ways = [torch.randn(p.shape, generator=source).double() for p in parameters]
    found = sum(float((s * w).sum()) for s, w in zip(slopes, ways, strict=True) if s is not None)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter.add_(sign * step * way)
            ends.append(float(figure()))
            for parameter, way in zip(parameters, ways, strict=True):
                parameter.sub_(sign * step * way)
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", SPREAD)
def test_log_q_has_the_gradient_along_the_path_and_no_other(name):
    """That of the density of the guide held fixed, at the draws: zero under an exact posterior."""
    guide = bound(name, PLAIN)
    fixed = copy.deepcopy(guide).requires_grad_(False)
    torch.manual_seed(0)
    draws = guide.draw(3, DATA)
    loss = (draws.log_q - fixed.log_prob(draws.values, DATA)).sum()
    for slope in torch.autograd.grad(loss, leaves(guide), allow_unused=True):
        if slope is not None:
            torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", GUIDES)
def test_a_draw_is_traced(name):
    guide = bound(name)

    def drawn(rows):
        draws = guide.draw(3, Given((rows,)))
        return draws.log_q + sum(v.flatten(1).sum(1) for v in draws.values.values())

    torch.manual_seed(0)
    graph = make_fx(drawn)(ROWS)
    torch.manual_seed(1)
    traced = graph(ROWS)
    torch.manual_seed(1)
    torch.testing.assert_close(traced, drawn(ROWS))


# ---- every guide: built again, and started from another -----------------------------------------


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guide_is_built_again_from_plain_values(name, dtype):
    guide = bound(name, dtype=dtype)
    again = guide_from_spec(json.loads(json.dumps(guide.spec())), dtype)
    again.load_state_dict(guide.state_dict())
    assert type(again) is type(guide)
    one, other = draws_of(guide), draws_of(again)
    assert {value.dtype for value in (*one.values.values(), one.log_q)} == {dtype}
    assert all(torch.equal(one.values[site], other.values[site]) for site in one.values)
    assert torch.equal(one.log_q, other.log_q)


@pytest.mark.parametrize("upper", GUIDES)
@pytest.mark.parametrize("lower", GUIDES)
def test_started_from_another_a_guide_takes_over_what_it_can_hold(upper, lower):
    below, guide = bound(lower, PLAIN, seed=1), bound(upper, PLAIN, seed=2)
    guide.start_from(below)
    mean, sd = below.free_mean().detach(), below.free_sd().detach()
    if upper == "Amortised":  # what it says of a row it has to learn from the rows
        outer = guide.layout.outer
        torch.testing.assert_close(guide.free_mean().detach()[outer], mean[outer])
        torch.testing.assert_close(guide.free_sd().detach()[outer], sd[outer])
        return
    by_draws = 5 / 4000**0.5 if "Flow" in upper else 1e-6
    assert ((guide.free_mean().detach() - mean).abs() <= by_draws * sd).all()
    if upper == "Point":
        return
    assert ((guide.free_sd().detach() / sd).log().abs() <= 2 * by_draws).all()
    if lower == "Point":
        return
    whole = upper == "FullRank" or "Flow" in upper
    if whole or upper == lower or lower == "MeanField":
        expected = below.covariance().detach()
        off = (guide.covariance().detach() - expected) / sd / sd[:, None]
        assert (off.abs() <= 2 * by_draws).all()


# ---- what a family holds, it reaches ------------------------------------------------------------


def test_a_low_rank_guide_is_exact_where_a_few_factors_are_behind_all_correlations():
    source = torch.Generator().manual_seed(0)
    factor = torch.randn(12, 2, generator=source, dtype=torch.float64)
    own = 0.3 + torch.rand(12, generator=source, dtype=torch.float64)
    loc = torch.randn(12, generator=source, dtype=torch.float64)

    def model(x):
        # A likelihood of no consequence: the target is the prior, its evidence that of x alone.
        pyro.sample("z", dist.LowRankMultivariateNormal(loc, factor, own))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.tensor(0.7).double()
    with pytest.warns(UserWarning, match="nothing depends on it"):
        posterior = ll.fit(model, x, LowRank(rank=2), num_restarts=1, progress=False)
    assert posterior.elbo.value == pytest.approx(
        -0.5 * 0.7**2 - 0.5 * math.log(2 * math.pi), abs=1e-3
    )
    covariance = factor @ factor.T + own.diag()
    sd = covariance.diagonal().sqrt()
    found = posterior.guide.covariance().detach()
    assert (((found - covariance) / sd / sd[:, None]).abs() < 0.02).all()
    assert (((posterior.guide.free_mean().detach() - loc) / sd).abs() < 0.02).all()


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8, -0.8])
def test_khat_of_the_best_mean_field_guide_is_the_correlation(rho):
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]]).double()
    guide = MeanField().bind(
        [latent("z", "real"), latent("y", "real")], max_plate_nesting=0, dtype=torch.float64
    )
    guide.lay(torch.zeros(2).double(), covariance.inverse())
    torch.manual_seed(0)
    with torch.no_grad():
        draws = guide.draw(100_000)
    z = torch.stack([draws.values["z"], draws.values["y"]], -1)
    target = MultivariateNormal(torch.zeros(2).double(), covariance)
    # Pareto's shape shows in the far tail: the deeper, the less of it is something else.
    found = psis(target.log_prob(z) - draws.log_q, 300)
    assert found.khat == pytest.approx(abs(rho), abs=3 * found.se)


# ---- every flow ---------------------------------------------------------------------------------

SHAPES = [(kind, way) for kind in FLOWS for way in ("sample", "density")]
SHAPES.remove(("planar", "density"))


def stirred(kind, num_features, orientation, num_context=0):
    """A flow away from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        flow = flows.make(
            kind, num_features, orientation=orientation, num_context=num_context, **SMALL
        ).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def log_density(flow, value, context=None):
    noise, log_det = flow.pull(value, context)
    return -0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1) + log_det


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
@pytest.mark.parametrize("num_context", [0, 2])
def test_the_density_of_one_feature_integrates_to_one(kind, orientation, num_context):
    if kind == "planar" and num_context:
        return  # it takes no context
    flow = stirred(kind, 1, orientation, num_context)
    grid = torch.linspace(-40, 40, 40_001).double()
    context = torch.tensor([0.5, -1.0]).double() if num_context else None
    with torch.no_grad():
        density = log_density(flow, grid[:, None], context).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("kind", "orientation"), SHAPES)
def test_the_density_of_two_features_integrates_to_one(kind, orientation):
    flow = stirred(kind, 2, orientation)
    grid = torch.linspace(-14, 14, 225).double()
    points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    with torch.no_grad():
        density = log_density(flow, points).exp()
    mass = torch.trapezoid(torch.trapezoid(density, grid), grid)
    assert float(mass) == pytest.approx(1, abs=1e-2)


# ---- the rest of the process --------------------------------------------------------------------

SCRIPT = """
import torch, pyro.distributions as dist
def refused():
    try:
        dist.Normal(0.0, torch.tensor(-1.0))
    except ValueError:
        return True
import latentlab.flows
assert refused(), "after the import"
from latentlab.guides import Flow, Latent
z = Latent("z", (), (2,), dist.constraints.real_vector)
guide = Flow("nsf").bind([z], max_plate_nesting=0)
assert refused(), "after it was built"
draws = guide.draw(5)
draws.log_q.sum().backward()
guide.log_prob({"z": draws.values["z"].detach()})
guide()
assert refused(), "after it was used"
print("fine")
"""


def test_a_negative_scale_is_refused_whatever_was_done_with_flows(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "fine", ended.stderr[-2000:]
