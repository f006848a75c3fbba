"""The ELBO is Pyro's, particle by particle, and discrete latents are summed out exactly."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import conjugate_normal
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch.fx.experimental.proxy_tensor import make_fx

from latentlab import rows
from latentlab.guides import Draws
from latentlab.inference import objectives
from latentlab.inference.check import prepare
from latentlab.inference.sandbox import manual_seed

F64 = torch.float64


@pytest.fixture(autouse=True)
def double_precision():
    """What a test compares with is not to round more than what it tests."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def prepared(model, data, guide="mean_field"):
    pair, report = prepare(model, data, guide)
    assert report.ok, report
    return pair


def negative_elbo(pair, num_particles, data=None):
    draws = objectives.draw(pair, num_particles, data)
    return (draws.log_q - objectives.log_joint(pair, draws, data)).mean()


def in_turn(pair, function, *arguments):
    """The same, one particle at a time."""
    vectorised, pair.vectorised = pair.vectorised, False
    try:
        return function(pair, *arguments)
    finally:
        pair.vectorised = vectorised


# ---- four pairs whose guides are functions ----------------------------------------------------

EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=F64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=F64)


def normal(name, *shape, constraint=constraints.real, **settings):
    """A normal on the real line, moved to a support, with parameters of its own."""
    loc = pyro.param(f"{name}_loc", lambda: 0.3 * numbers(*shape, seed=len(name)), **settings)
    scale = pyro.param(f"{name}_scale", torch.full(shape, 0.4), constraints.positive, **settings)
    base = dist.Normal(loc, scale)
    if constraint is constraints.positive:
        return dist.TransformedDistribution(base, dist.transforms.ExpTransform())
    return base


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(effect, sigma), obs=y)


def schools_guide(y, sigma):
    pyro.sample("mu", normal("mu"))
    pyro.sample("tau", normal("tau", constraint=constraints.positive))
    with pyro.plate("schools", 8):
        pyro.sample("effect", normal("effect", 8))


def hierarchy(group, y):
    scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with pyro.plate("groups", 3):
        level = pyro.sample("level", dist.Normal(0.0, scales[..., 0]))
    with rows(y):
        pyro.sample("y", dist.Normal(level[..., group], scales[..., 1]), obs=y)


def hierarchy_guide(group, y):
    pyro.sample("scales", normal("scales", 2, constraint=constraints.positive).to_event(1))
    with pyro.plate("groups", 3):
        pyro.sample("level", normal("level", 3))


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with rows(x):
        pyro.sample("y", dist.Bernoulli(logits=(weights * x).sum(-1) + bias), obs=y)


def regression_guide(x, y):
    pyro.sample("weights", normal("weights", 2).to_event(1))
    pyro.sample("bias", normal("bias"))


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with rows(x):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[label], 1.0), obs=x)


def mixture_guide(x):
    concentration = pyro.param("concentration", torch.tensor([3.0, 2.0]), constraints.positive)
    pyro.sample("weights", dist.Dirichlet(concentration))
    with pyro.plate("components", 2):
        pyro.sample("locs", normal("locs", 2))


GROUPS = torch.tensor([0, 0, 1, 2, 2])
CHOICES = torch.tensor([0.0, 1, 1, 0, 1, 1], dtype=F64)
PAIRS = {
    "eight schools": (schools, (EFFECTS, ERRORS), schools_guide, Trace_ELBO),
    "hierarchy": (hierarchy, (GROUPS, numbers(5)), hierarchy_guide, Trace_ELBO),
    "regression": (regression, (numbers(6, 2), CHOICES), regression_guide, Trace_ELBO),
    "mixture": (config_enumerate(mixture), (numbers(6),), mixture_guide, TraceEnum_ELBO),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_particles", [1, 4])
def test_loss_and_gradient_are_those_of_pyro(name, num_particles):
    """With the same noise; the particles of Pyro come one after the other, or all at once."""
    model, data, guide, elbo = PAIRS[name]
    pair = prepared(model, data, guide)
    with pair.entered(0):
        names, parameters = zip(*pair.parameters().items(), strict=True)
        manual_seed(1)
        ours = negative_elbo(pair, num_particles)
        manual_seed(1)
        oracle = elbo(
            num_particles=num_particles,
            vectorize_particles=pair.vectorised and num_particles > 1,
            max_plate_nesting=pair.nesting,
        )
        theirs = oracle.differentiable_loss(pair.model, pair.guide, *data)
        gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    assert len(names) >= 3
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


# ---- discrete latents, summed out -------------------------------------------------------------


def independent_labels(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with rows(x):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one_label_for_all(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    z = pyro.sample("z", dist.Categorical(p))
    with rows(x):
        pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)


def label_under_a_label(x):
    """Both kinds at once: one label for all, and one for each row that depends on it."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    a = pyro.sample("a", dist.Bernoulli(p))
    with rows(x):
        b = pyro.sample("b", dist.Categorical(logits=torch.stack([a, 1 - a, p + 0 * a], -1)))
        pyro.sample("x", dist.Normal(a + 2.0 * b, 1.0), obs=x)


def two_labels_a_row(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with rows(x):
        a = pyro.sample("a", dist.Bernoulli(p))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))
        pyro.sample("x", dist.Normal(a - 2.0 * b, 1.0), obs=x)


def nested_plates(x):
    """x has a row of numbers for each group."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("groups", len(x), dim=-2):
        a = pyro.sample("a", dist.Bernoulli(p))
        with pyro.plate("members", x.shape[1], dim=-1):
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def two_observations(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with rows(x):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(-z, 2.0), obs=x)


def latent_under_a_label(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with rows(x):
        z = pyro.sample("z", dist.Bernoulli(p))
        u = pyro.sample("u", dist.Normal(z, 0.5))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


def chain(x):
    """A hidden chain, written with pyro.markov, which would use one dimension for many labels."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Bernoulli(p * (0.2 + 0.6 * z)))
        pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])


def star(x):
    """One label that six others depend on: summed out first, it would join all of them."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    a = pyro.sample("a", dist.Bernoulli(p))
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Bernoulli(0.2 + 0.6 * a))
        pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])


def a_single_value(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with rows(x):
        z = pyro.sample("z", dist.Categorical(torch.ones(1)))
        pyro.sample("x", dist.Normal(p + z, 1.0), obs=x)


LABELLED = [
    (independent_labels, numbers(4)),
    (one_label_for_all, numbers(4)),
    (label_under_a_label, numbers(3)),
    (two_labels_a_row, numbers(3)),
    (nested_plates, numbers(2, 2)),
    (two_observations, numbers(4)),
    (latent_under_a_label, numbers(4)),
    (chain, numbers(6)),
    (star, numbers(6)),
    (a_single_value, numbers(4)),
]
NAMES = [model.__name__ for model, _ in LABELLED]
NAMED = {"argnames": ("model", "x"), "argvalues": LABELLED, "ids": NAMES}


def brute_force(model, x, values):
    """The log joint density: a sum over every assignment of all labels, by Pyro's own traces."""
    trace = poutine.trace(poutine.condition(model, values)).get_trace(x)
    sizes = {
        name: (site["fn"].enumerate_support(expand=False).flatten(), site["value"].shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
        and site["fn"].__class__.__name__ in ("Bernoulli", "Categorical")
    }  # fmt: skip
    choices = [
        [torch.stack(combination).reshape(shape) for combination in itertools.product(
            support, repeat=math.prod(shape))]
        for support, shape in sizes.values()
    ]  # fmt: skip
    total = [
        poutine.trace(
            poutine.condition(model, values | dict(zip(sizes, labels, strict=True)))
        ).get_trace(x).log_prob_sum()
        for labels in itertools.product(*choices)
    ]  # fmt: skip
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize(**NAMED)
def test_summing_out_is_a_sum_over_every_labelling(model, x):
    pair = prepared(model, x)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 2)
        together = objectives.log_joint(pair, draws)
        one_by_one = in_turn(pair, objectives.log_joint, draws)
        expected = torch.stack([
            brute_force(model, x, {z.name: draws.values[z.name][p].reshape(z.shape)
                                   for z in pair.latents})
            for p in range(2)
        ])  # fmt: skip
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(**NAMED)
def test_summing_out_is_that_of_pyro(model, x):
    """Which needs to be told of pyro.markov, and of the labels."""
    pair = prepared(model, x)
    elbo = TraceEnum_ELBO(max_plate_nesting=pair.nesting, strict_enumeration_warning=False)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 1)
        found = objectives.log_joint(pair, draws)
        values = {z.name: draws.values[z.name].reshape(z.shape) for z in pair.latents}
        known = config_enumerate(poutine.condition(model, values))
        expected = -elbo.loss(known, lambda x: None, x)
    assert found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(**NAMED)
def test_an_observed_site_keeps_its_place_when_labels_are_summed_out(model, x):
    """What stands for several sites stands under one of them, the others are zero."""
    pair = prepared(model, x)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 2)
        sites = objectives.site_log_probs(pair, draws)
        joint = objectives.log_joint(pair, draws)
    assert set(pair.observed) <= set(sites)
    total = sum(site.reshape(len(site), -1).sum(1) for site in sites.values())
    torch.testing.assert_close(total, joint)


def test_rows_keep_their_own_log_density_when_their_labels_are_summed_out():
    x = numbers(5)
    pair = prepared(mixture, x)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 3)
        found = objectives.site_log_probs(pair, draws)["x"]
    weights, locs = (draws.values[name].reshape(3, 1, 2) for name in ("weights", "locs"))
    expected = (weights.log() + dist.Normal(locs, 1.0).log_prob(x[:, None])).logsumexp(-1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_a_mini_batch_of_labelled_rows_is_scaled_outside_of_the_sum():
    x = numbers(8)

    def model(x, size=None):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with rows(x, size):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair = prepared(model, {"x": x[:2], "size": 8})
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 3)
        found = objectives.log_joint(pair, draws)
    p = draws.values["p"].reshape(3, 1)
    parts = [(1 - p).log() + dist.Normal(0.0, 1.0).log_prob(x[:2]),
             p.log() + dist.Normal(1.0, 1.0).log_prob(x[:2])]  # fmt: skip
    likelihood = torch.stack(parts).logsumexp(0).sum(1)
    expected = dist.Beta(2.0, 2.0).log_prob(p[:, 0]) + 8 / 2 * likelihood
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_a_label_outside_of_a_mini_batch_is_refused():
    def model(x, size=None):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with rows(x, size):
            loc = pyro.sample("loc", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, size=None):
        with rows(x, size):
            pyro.sample("loc", dist.Normal(x, 1.0))

    pair = prepared(model, {"x": numbers(2)}, guide)
    part = type(pair.data)(kwargs={"x": numbers(2), "size": 8})
    with pair.entered(0), pytest.raises(ValueError, match="'z' cannot be summed out: .* scaled"):
        objectives.log_joint(pair, objectives.draw(pair, 1, part), part)


def test_labels_of_crossed_plates_are_refused():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        lines, columns = pyro.plate("lines", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with lines:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with lines, columns:
            pyro.sample("x", dist.Normal(loc + a * b, 1.0), obs=x)

    _, report = prepare(model, numbers(2, 3), "mean_field")
    assert not report.ok
    assert "'a' and 'b' cannot be summed out together" in str(report)


@pytest.mark.parametrize("mask", [torch.tensor([True, False, True, False]), True, False])
def test_masked_rows_are_not_there(mask):
    """Also where they have a label, which then adds nothing to the sum."""
    x = numbers(4)
    kept = x[mask.nonzero()[:, 0]] if isinstance(mask, torch.Tensor) else x if mask else x[:0]

    def model(x, mask=True):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair = prepared(model, (x, mask))
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 1)
        found = objectives.log_joint(pair, draws)[0]
        p = draws.values["p"].reshape(())
        prior = dist.Beta(2.0, 2.0).log_prob(p)
        expected = brute_force(model, kept, {"p": p}) if len(kept) else prior
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0), torch.arange(1.0, 5.0)])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_scale_counts_rows_several_times(scale, labelled):
    x = numbers(4)

    def model(x):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", 4), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Bernoulli(p)) if labelled else 0.5
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair = prepared(model, x)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 1)
        sites = objectives.site_log_probs(pair, draws)
    p = draws.values["p"].reshape(())
    row = dist.Normal(0.5, 1.0).log_prob(x)
    if labelled:
        zero, one = (dist.Normal(k, 1.0).log_prob(x) for k in (0.0, 1.0))
        row = torch.logaddexp((1 - p).log() + zero, p.log() + one)
    torch.testing.assert_close(sites["x"].reshape(4), scale * row, rtol=1e-10, atol=0)


def test_labels_are_drawn_from_their_exact_distribution_given_the_latents():
    """Also where a continuous latent depends on them; shares within 5 standard errors."""
    S, u = 4000, numbers(4)
    pair = prepared(latent_under_a_label, numbers(4))
    values = {"p": torch.full((S, 1), 0.3), "u": u.expand(S, 4)}

    def labelled():
        with objectives.particles(S, pair), objectives.Substitute(values, pair.summed_out):
            pair.data.call(pair.model)

    sampled = infer_discrete(labelled, first_available_dim=-2 - pair.nesting, temperature=1)
    with pair.entered(0):
        found = poutine.trace(sampled).get_trace().nodes["z"]["value"].mean(0)
    densities = [dist.Normal(loc, 0.5).log_prob(u).exp() for loc in (0.0, 1.0)]
    expected = 0.3 * densities[1] / (0.7 * densities[0] + 0.3 * densities[1])
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / S).sqrt()).all()


# ---- other kinds of sites ---------------------------------------------------------------------


def test_deterministic_sites_weigh_nothing_and_factors_what_they_say():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * loc)
        with rows(x):
            pyro.factor("penalty", -((x - loc) ** 2))

    x = numbers(4)
    pair = prepared(model, x)
    assert pair.observed == ()  # neither can be drawn anew
    assert pair.vectorised
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 3)
        found = objectives.log_joint(pair, draws)
    loc = draws.values["loc"].reshape(3, 1)
    expected = dist.Normal(0.0, 1.0).log_prob(loc)[:, 0] - ((x - loc) ** 2).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("vectorised", [True, False])
def test_model_and_guide_see_the_same_rows_of_a_plate_that_draws_them(vectorised):
    """Each row's posterior is exact, so that its weight is its evidence, N / B times."""
    x = numbers(10)

    def model(x):
        with pyro.plate("rows", 10, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("rows", 10, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, math.sqrt(0.5)))

    pair = prepared(model, x, guide)
    assert pair.vectorised
    pair.vectorised = vectorised
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 4)
        found = objectives.log_joint(pair, draws) - draws.log_q
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(x[draws.indices["rows"]]).sum()
    torch.testing.assert_close(found, (10 / 3 * evidence).expand(4), rtol=1e-10, atol=0)


def test_a_batch_of_another_size_than_the_data_goes_through():
    """Local latents then have the size of the batch, in either way of running particles."""

    def model(x, size=None):
        with rows(x, size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        with rows(x, size):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = numbers(10)
    pair = prepared(model, {"x": x}, guide)
    part = type(pair.data)(kwargs={"x": x[:2], "size": 10})
    evidence = 10 / 2 * dist.Normal(0.0, math.sqrt(2)).log_prob(x[:2]).sum()
    with pair.entered(0), torch.no_grad():
        for vectorised in (True, False):
            pair.vectorised = vectorised
            draws = objectives.draw(pair, 3, part)
            found = objectives.log_joint(pair, draws, part) - draws.log_q
            torch.testing.assert_close(found, evidence.expand(3), rtol=1e-10, atol=0)


# ---- the exact posterior ----------------------------------------------------------------------


def conjugate(x):
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with rows(x):
        pyro.sample("x", dist.Normal(loc, 0.5), obs=x)


def test_under_the_exact_posterior_every_weight_is_the_evidence():
    x = numbers(20)
    mean, sd, log_evidence = conjugate_normal(x, 1.0, 2.0, 0.5)

    def guide(x):
        pyro.sample("loc", dist.Normal(torch.tensor(mean), sd))

    for half in (guide, "mean_field", "full_rank"):
        pair = prepared(conjugate, x, half)
        with pair.entered(0), torch.no_grad():
            if half is not guide:
                pair.guide.start(torch.tensor([mean], dtype=F64), torch.tensor([sd], dtype=F64))
            weights = objectives.log_weights(pair, 100)
        assert weights.shape == (100,)
        assert float((weights - log_evidence).abs().max()) < 1e-9


# ---- many particles at once -------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "full_rank", "point", None])
@pytest.mark.parametrize("name", PAIRS)
def test_particles_at_once_are_particles_one_by_one(name, guide):
    model, data, its_own, _ = PAIRS[name]
    pair = prepared(model, data, guide or its_own)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 5)
        for function in (objectives.log_joint, objectives.log_q):
            one_by_one = in_turn(pair, function, draws)
            torch.testing.assert_close(function(pair, draws), one_by_one, rtol=1e-10, atol=1e-10)
        sites = in_turn(pair, objectives.site_log_probs, draws)
        for site, value in objectives.site_log_probs(pair, draws).items():
            torch.testing.assert_close(value.expand_as(sites[site]), sites[site])


def test_the_density_of_draws_is_what_the_guide_said_when_it_drew_them():
    for model, data, guide, _ in PAIRS.values():
        for half in (guide, "mean_field", "full_rank", "point"):
            pair = prepared(model, data, half)
            with pair.entered(0), torch.no_grad():
                draws = objectives.draw(pair, 5)
                log_q = objectives.log_q(pair, draws)
            torch.testing.assert_close(draws.log_q, log_q, rtol=1e-9, atol=1e-9)


def positive(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with rows(x):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_draws_have_a_density_under_a_guide_that_has_moved_on(kind, vectorised):
    """The points of an autoguide follow its noise; the noise is what has the density."""
    pair = prepared(positive, numbers(4), kind(positive))
    pair.vectorised = vectorised
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 5)
        for parameter in pair.parameters().values():
            parameter += 0.5
        found = objectives.log_q(pair, draws)
        pair.guide(numbers(4))
        moved = pair.guide.median()["scale"].log(), pair.guide.quantiles([0.8413447460685429])
    (noise,) = (value for name, value in draws.values.items() if name not in pair.points)
    loc, sd = moved[0], moved[1]["scale"].log().reshape(()) - moved[0]
    u = draws.values["scale"].log().reshape(5)
    torch.testing.assert_close(noise.reshape(5), u)
    expected = dist.LogNormal(loc, sd).log_prob(u.exp())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_points_that_have_moved_on_leave_the_density_of_the_others():
    def guide(x):
        pyro.sample("scale", dist.Delta(pyro.param("point", torch.tensor(2.0))))
        pyro.sample("loc", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with rows(x):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    pair = prepared(model, numbers(4), guide)
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 5)
        for parameter in pair.parameters().values():
            parameter += 0.5
        found = objectives.log_q(pair, draws)
    expected = dist.Normal(0.5, 1.0).log_prob(draws.values["loc"].reshape(5))
    torch.testing.assert_close(found, expected)
    assert (draws.values["scale"] == 2).all()


@pytest.mark.parametrize("vectorised", [True, False])
def test_draws_of_a_guide_that_knows_the_rows_score_other_rows(vectorised):
    def guide(x):
        with rows(x):
            pass
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    pair, other = prepared(conjugate, numbers(5), guide), numbers(3, seed=1)
    pair.vectorised = vectorised
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 4)
        found = objectives.log_joint(pair, draws, type(pair.data)((other,)))
    loc = draws.values["loc"].reshape(4, 1)
    expected = dist.Normal(loc, 0.5).log_prob(other).sum(1)
    expected = expected + dist.Normal(1.0, 2.0).log_prob(loc[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def mixes_by_its_mean(x):
    with pyro.plate("three", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with rows(x):
        pyro.sample("x", dist.Normal(loc.mean(), 1.0), obs=x)


def mixes_faintly(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with rows(x):
        pyro.sample("x", dist.Normal(loc + 0.1 * loc.mean(), 1.0), obs=x)


def counts_rows_of_a_latent(x):
    with pyro.plate("three", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with rows(x):
        pyro.sample("x", dist.Normal(loc.sum() / len(loc), 1.0), obs=x)


def indexes_from_the_left(x):
    with pyro.plate("three", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with rows(x):
        pyro.sample("x", dist.Normal(loc[0], 1.0), obs=x)


def multiplies_on_the_wrong_side(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with rows(x):
        pyro.sample("x", dist.Normal(x[:, None].expand(-1, 3) @ loc.squeeze(), 1.0), obs=x)


def decides_by_value(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with rows(x):
        pyro.sample("x", dist.Normal(loc if loc > 0 else 2 * loc, 1.0), obs=x)


@pytest.mark.parametrize(
    "model",
    [
        mixes_by_its_mean,
        mixes_faintly,
        counts_rows_of_a_latent,
        indexes_from_the_left,
        multiplies_on_the_wrong_side,
        decides_by_value,
        mixture,
    ],
)
def test_a_model_that_mixes_particles_runs_one_at_a_time_and_says_so(model):
    x = numbers(5)
    pair, report = prepare(model, x, "mean_field")
    assert report.ok
    assert not pair.vectorised
    assert [note.startswith("one particle at a time: ") for note in report.notes] == [True]
    with pair.entered(0), torch.no_grad():
        draws = objectives.draw(pair, 3)
        found = objectives.log_joint(pair, draws)
        expected = [
            brute_force(model, x, {z.name: draws.values[z.name][p].reshape(z.shape)
                                   for z in pair.latents})
            for p in range(3)
        ]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_a_site_that_adds_up_to_something_else_is_no_match():
    """Each of its elements has the value of one particle alone, but there are fewer of them."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", (-loc).expand(4) if loc.dim() == 0 else -loc)
        with rows(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    pair, _ = prepare(model, numbers(5), "mean_field")
    assert not pair.vectorised


def mixing_guide(x):
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    pyro.sample("second", dist.Normal(first.mean(), 1.0))


def guide_with_a_mixing_point(x):
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    pyro.sample("second", dist.Delta(first.mean()))


@pytest.mark.parametrize("guide", [mixing_guide, guide_with_a_mixing_point])
def test_a_guide_that_mixes_particles_runs_one_at_a_time_and_says_so(guide):
    def model(x):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        second = pyro.sample("second", dist.Normal(0.0, 1.0))
        with rows(x):
            pyro.sample("x", dist.Normal(first + second, 1.0), obs=x)

    pair, report = prepare(model, numbers(5), guide)
    assert not pair.vectorised
    assert "one particle at a time: with several, the guide's" in str(report)


def test_a_guide_that_is_narrow_at_first_does_not_hide_a_mixing_model():
    def guide(x):
        with pyro.plate("three", 3):
            pyro.sample("loc", dist.Normal(torch.zeros(3), 1e-12))

    pair, _ = prepare(mixes_by_its_mean, numbers(5), guide)
    assert not pair.vectorised


def test_rows_without_a_plate_do_not_stand_in_the_way():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    pair = prepared(model, numbers(3))
    assert pair.vectorised


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rounding_is_not_taken_for_mixing(dtype):
    """Products of matrices round differently for one particle and for several."""
    x = 100 * numbers(200, 30).to(dtype)

    def model(x):
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(30), 1.0).to_event(1))
        with rows(x):
            loc = (weights[..., None, :] @ x[..., None])[..., 0, 0]
            pyro.sample("y", dist.Normal(loc, 10.0), obs=x[:, 0])

    assert prepared(model, x).vectorised


# ---- for an engine that traces ----------------------------------------------------------------


def vector_mixture(x):
    """A mixture that takes many particles at once: its components are an event."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with rows(x):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(Vindex(locs)[..., label], 1.0), obs=x)


def scaled_mixture(x):
    with poutine.scale(scale=torch.tensor(2.0)):
        vector_mixture(x)


@pytest.mark.parametrize("model", [mixture, vector_mixture, scaled_mixture, schools, chain])
def test_no_value_is_read_back_so_that_the_loss_can_be_traced(model):
    data = (EFFECTS, ERRORS) if model is schools else (numbers(6),)
    pair = prepared(model, data)
    assert pair.vectorised == (model is not mixture)

    def loss(u):
        values, log_det = pair.guide.unpack(u)
        draws = Draws(values, u.new_zeros(len(u)))
        return objectives.log_joint(pair, draws), log_det

    with pair.entered(0):
        graph = make_fx(loss)(numbers(2, pair.guide.num_latents))
        other = numbers(2, pair.guide.num_latents, seed=1)
        torch.testing.assert_close(graph(other), loss(other), rtol=1e-10, atol=1e-10)
