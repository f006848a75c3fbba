"""Chains of the no-U-turn sampler are draws of the posterior, and say where they are not."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference import density
from latentlab.inference.check import prepare
from latentlab.inference.program import UntraceableError
from tests import posteriordb

X = torch.tensor([1.0, 2.0, 4.0, 3.5, -0.5], dtype=torch.float64)


def normal(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def exact():
    """Mean and sd of the posterior of ``normal``."""
    precision = 1 / 4 + len(X)
    return float(X.sum()) / precision, precision**-0.5


@pytest.fixture(scope="module")
def chains():
    return ll.nuts(normal, X, num_samples=500, num_warmup=300)


def jax_or_skip():
    pytest.importorskip("jax")
    pytest.importorskip("blackjax")


def expect_exact(chains):
    row = chains.summary().iloc[0]
    mean, sd = exact()
    assert abs(row["mean"] - mean) < 5 * row["mcse"]
    assert abs(math.log(row["sd"] / sd)) < 5 / math.sqrt(2 * row["ess_bulk"]) + 0.05


def test_draws_are_those_of_the_exact_posterior(chains):
    expect_exact(chains)
    assert chains.check().level == "use"


@pytest.mark.slow
def test_draws_of_pyro_are_those_of_the_exact_posterior():
    found = ll.nuts(normal, X, num_samples=500, num_warmup=300, num_chains=2, backend="pyro")
    expect_exact(found)
    assert found.backend == "pyro"


def test_all_supports_come_back_in_their_own_units():
    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with ll.rows(counts):
            pyro.sample("n", dist.Poisson(rate), obs=counts[:, 0])
        pyro.sample("k", dist.Multinomial(10, share), obs=torch.tensor([7.0, 2.0, 1.0]))

    counts = torch.tensor([[3.0], [5.0], [4.0]], dtype=torch.float64)
    found = ll.nuts(model, counts, num_samples=1000, num_warmup=300, num_chains=2)
    assert found.draws["share"].shape == (2, 1000, 3)
    frame = found.summary()
    truth = [14 / 4, 8 / 13, 3 / 13, 2 / 13]  # conjugate: Gamma(14, 4), Dirichlet(8, 3, 2)
    assert ((frame["mean"] - truth).abs() < 5 * frame["mcse"]).all()


def test_labels_that_are_enumerated_are_summed_out():
    from pyro.infer import config_enumerate

    @config_enumerate
    def model(x):
        share = pyro.sample("share", dist.Beta(1.0, 1.0))
        with ll.rows(x):
            z = pyro.sample("z", dist.Bernoulli(share)).long()
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 50.0]).to(x)[z], 1.0), obs=x)

    x = torch.tensor([0.0, 0.1, 50.0, 0.3], dtype=torch.float64)  # no doubt about the labels
    found = ll.nuts(model, x, num_samples=1000, num_warmup=300, num_chains=2)
    row = found.summary().iloc[0]
    assert abs(row["mean"] - 2 / 6) < 5 * row["mcse"]  # Beta(2, 4)


def test_same_seed_same_bytes_and_nothing_else_moves(chains):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = ll.nuts(normal, X, num_samples=500, num_warmup=300)
    other = ll.nuts(normal, X, num_samples=500, num_warmup=300, seed=1)
    assert torch.equal(again.draws["loc"], chains.draws["loc"])
    assert not torch.equal(other.draws["loc"], chains.draws["loc"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_the_density_written_down_is_the_pairs_and_a_wrong_one_is_told(monkeypatch):
    jax_or_skip()
    pair, _ = prepare(normal, X, ll.guides.MeanField())
    points = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    with pair.entered(seed=0):
        found = density.log_density(pair, pair.guide, points)
        assert density.trace_density(pair, pair.guide, points).program.num_learned == 0
        monkeypatch.setattr(
            "latentlab.inference.xla.read", lambda program: lambda u, *rest: (-(u**2).sum(),)
        )
        with pytest.raises(UntraceableError, match="differs"):
            density.trace_density(pair, pair.guide, points)
    truth = [
        dist.Normal(0.0, 2.0).log_prob(u) + dist.Normal(u, 1.0).log_prob(X).sum() for u in points
    ]
    torch.testing.assert_close(found, torch.cat(truth))


def test_a_model_that_cannot_be_written_down_is_drawn_by_pyro():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        scale = 1.0 if float(loc.detach().sum()) < 1e6 else 2.0  # reads a value
        with ll.rows(x):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    found = ll.nuts(model, X, num_samples=20, num_warmup=20, num_chains=1)
    assert found.backend.startswith("pyro: ")
    assert "energy" not in found.told
    with pytest.raises(ValueError, match='"xla" cannot run this model'):
        ll.nuts(model, X, backend="xla")


def test_chains_that_are_apart_are_not_to_be_used(chains):
    moved = chains.draws["loc"] + torch.arange(chains.num_chains)[:, None]
    verdict = replace(chains, draws={"loc": moved}).check()
    assert verdict.level == "do not use"
    assert "R-hat of loc" in verdict.reasons[0]


def test_divergences_and_lonely_chains_are_told(chains):
    diverging = torch.zeros_like(chains.told["diverging"])
    diverging[0, 0] = True
    some = replace(chains, told=chains.told | {"diverging": diverging})
    assert some.check().level == "use with care"
    assert "1 of 2000 draws diverged" in str(some.check())
    many = replace(chains, told=chains.told | {"diverging": ~diverging})
    assert many.check().level == "do not use"
    one = replace(
        chains,
        draws={k: v[:1] for k, v in chains.draws.items()},
        told={k: v[:1] for k, v in chains.told.items()},
    )
    assert "one chain" in str(one.check())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model observes nothing")
def test_a_funnel_is_not_believed():
    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("all", 9):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    assert ll.nuts(funnel, num_samples=500, num_warmup=500).check().level != "use"


def test_figures_are_those_of_arviz(chains):
    arviz = pytest.importorskip("arviz")
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x names its groups otherwise")
    data = chains.to_arviz()
    assert data.sample_stats["diverging"].shape == (4, 500)
    theirs = arviz.summary(data, round_to="none").iloc[0]
    ours = chains.summary().iloc[0]
    for mine, other in {"mean": "mean", "ess_bulk": "ess_bulk", "rhat": "r_hat"}.items():
        assert ours[mine] == pytest.approx(theirs[other], rel=1e-8)


def test_draws_of_all_chains_are_each_taken_once(chains):
    pooled = chains.sample()["loc"]
    assert torch.equal(pooled.sort().values, chains.draws["loc"].flatten().sort().values)
    assert chains.sample(7)["loc"].shape == (7,)
    assert chains.sample(5000)["loc"].shape == (5000,)


def test_ranks_are_drawn(chains):
    figure = chains.plot()
    assert [axes.get_title() for axes in figure.axes if axes.axison] == ["loc"]


def no_latents(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)


def with_parameter(x):
    scale = pyro.param("scale", torch.ones(()).double())
    loc = pyro.sample("loc", dist.Normal(0.0, scale))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (no_latents, {}, "no continuous latent"),
        (with_parameter, {}, "'scale' are optimised, not drawn"),
        (normal, {"num_samples": 0}, "num_samples"),
        (normal, {"num_warmup": 3}, "num_warmup"),
        (normal, {"num_chains": 0}, "num_chains"),
        (normal, {"target_accept": 1.0}, "target_accept: expected a number in"),
        (normal, {"backend": "jax"}, 'backend: expected one of "auto"'),
        (normal, {"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ll.nuts(model, X, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", posteriordb.NAMES)
def test_reference_posteriors_are_met(name):
    if not posteriordb.FOLDER.exists():
        pytest.skip("posteriordb's data are not part of the project")
    case = posteriordb.case(name)
    chains = ll.nuts(case.model, case.data)
    assert chains.check().level == "use"
    fewest = min(chains.summary()["ess_bulk"].min(), 10_000)
    error, low, high = posteriordb.errors(chains.sample(), case)
    allowed = 4 * math.sqrt(1 / fewest + 1 / 10_000)
    assert error < allowed
    assert math.log(high / low) < 2 * allowed
