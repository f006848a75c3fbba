"""Calibration finds posteriors that are off, and passes those that are not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference.calibrate import _in_order
from latentlab.inference.check import prepare
from latentlab.inference.simulate import simulate

X = torch.zeros(10, dtype=torch.float64)


def normal(x):
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def exact(x, width=1.0):
    """The posterior of ``normal``, so many times as wide."""
    precision = 1 / 4 + len(x)
    pyro.sample("loc", dist.Normal((x.sum() + 1 / 4) / precision, width * precision**-0.5))


def line(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with ll.rows(x):
        pyro.sample("y", dist.Normal((slope * x).sum(-1), 0.5), obs=y)


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("jax")
    return ll.calibrate(normal, X, num_simulations=200, progress=False)


def test_a_good_guide_is_calibrated(found):
    assert found.ok, found
    assert found.how == "200 as one"
    assert found.unsettled == 0
    assert found.names == ("loc", "log-likelihood")
    assert "calibrated: all 2 uniform" in str(found)


def test_refits_are_the_exact_posteriors(found):
    pair, _ = prepare(normal, X, "full_rank")
    with pair.entered(seed=0):
        simulations = simulate(pair, 5, seed=3)
    assert {*simulations.observed} == {0}
    # The draws of ``found`` have the variance that every posterior of this model has.
    variance = found.draws[..., 0].var(1)
    error = variance.mean() * (10 + 1 / 4) - 1
    assert abs(float(error)) < 5 * math.sqrt(2 / 99 / 200) + 0.02


@pytest.mark.parametrize(("width", "reading"), [(0.5, "too narrow"), (2.0, "too wide")])
def test_a_guide_of_the_wrong_width_is_found_out(width, reading):
    found = ll.calibrate(
        normal, X, lambda x: exact(x, width), num_simulations=300, backend="auto", progress=False
    )
    assert not found.ok
    assert f"loc {reading}" in str(found)
    # P(outer 20 %) = 2 Phi(c Phi^-1(0.1)) for an sd that is c times right
    share = 2 * float(dist.Normal(0.0, 1.0).cdf(torch.tensor(width * -1.2815515655)))
    assert abs(float(found.sbc.outer[0]) - share) < 5 * math.sqrt(share * (1 - share) / 300) + 0.02


def test_a_posterior_that_is_the_prior_is_found_out_by_the_likelihood():
    def prior(x):
        pyro.sample("loc", dist.Normal(1.0, 2.0))

    found = ll.calibrate(normal, X, prior, num_simulations=100, progress=False)
    assert not found.ok
    assert float(found.sbc.p_values[0]) > 1e-4
    assert float(found.sbc.p_values[1]) < 1e-10


def test_data_are_drawn_where_they_are_observed_and_covariates_stay():
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    pair, _ = prepare(line, (x, torch.zeros(7).double()), "mean_field")
    with pair.entered(seed=0):
        simulations = simulate(pair, 400, seed=0)
    assert {*simulations.observed} == {1}
    assert torch.equal(simulations[3].args[0], x)
    noise = simulations.observed[1] - simulations.truth["slope"] @ x.T
    assert abs(float(noise.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * noise.numel())
    assert simulations.truth["slope"].shape == (400, 2)


@pytest.mark.slow
def test_in_turn_and_as_one_agree():
    x = torch.randn(15, 2, generator=torch.Generator().manual_seed(0)).double()
    data = (x, torch.zeros(15).double())
    both = [
        ll.calibrate(line, data, num_simulations=20, backend=backend, progress=False)
        for backend in ("xla", "eager")
    ]
    one, turn = (each.draws.mean(1) for each in both)
    assert torch.equal(both[0].truth, both[1].truth)
    sd = both[1].draws.std(1)
    assert float(((one - turn)[:, :2] / sd[:, :2]).abs().max()) < 6 * math.sqrt(2 / 99)


@pytest.mark.slow
def test_around_a_posterior_both_data_count():
    x = 1 + torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    posterior = ll.fit(normal, x, guide="full_rank", progress=False)
    found = ll.calibrate(normal, x, around=posterior, num_simulations=100, progress=False)
    assert found.ok, found
    variance = float(found.draws[..., 0].var(1).mean())
    assert variance * (40 + 1 / 4) == pytest.approx(1, abs=0.1)


def test_components_are_sorted_whatever_their_labels():
    value = torch.tensor([[[3.0, 1.0], [2.0, 5.0]]])
    assert torch.equal(_in_order(value, (-2,)), torch.tensor([[[2.0, 1.0], [3.0, 5.0]]]))
    assert torch.equal(_in_order(value, (-2, -1)), torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]))


def test_the_same_seed_gives_the_same_ranks():
    runs = [
        ll.calibrate(normal, X, exact, num_simulations=20, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].draws, runs[1].draws)
    assert not torch.equal(runs[0].draws, runs[2].draws)


def test_it_is_drawn(found):
    assert len(found.plot().axes) == 3


def computed(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x * 2 + 1)


def learned(x):
    scale = pyro.param("scale", torch.ones(()).double())
    loc = pyro.sample("loc", dist.Normal(0.0, scale))
    with ll.rows(x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (computed, {}, "observe an argument of the model as it is"),
        (learned, {}, "'scale' is optimised"),
        (normal, {"guide": "point"}, "a point has no draws to rank"),
        (normal, {"num_simulations": 3}, "num_simulations"),
        (normal, {"num_draws": 3}, "num_draws"),
        (normal, {"backend": "jax"}, 'backend: expected one of "auto"'),
        (normal, {"guide": "flow", "backend": "xla"}, "a flow is laid over a normal guide"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model, settings, message):
    x = torch.arange(5.0).double()
    with pytest.raises(ValueError, match=message):
        ll.calibrate(model, x, progress=False, **settings)


def test_a_conjugate_posterior_that_is_exact_is_calibrated():
    """With one component the updates end at the posterior itself."""
    x = torch.randn(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ll.GaussianMixture(1, 1, prior="conjugate").scale_to(x)
    found = ll.calibrate(model, x, num_simulations=40, progress=False)
    assert found.ok, found
    assert "conjugate updates" in found.how
    assert found.names == ("scales in order[0, 0]", "locs in order[0, 0]", "log-likelihood")
    # Posteriors of data sets that differ: a guide that was left where it began has one place.
    z = (found.truth[:, 1] - found.draws[..., 1].mean(1)) / found.draws[..., 1].std(1)
    assert float(found.draws[..., 1].mean(1).std()) > 0.5 * float(found.truth[:, 1].std())
    assert 0.5 < float(z.std()) < 2


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ll.GaussianMixture(2, 2, prior="conjugate"), (20, 2)),
        (ll.HiddenMarkovModel(2, 1, prior="conjugate"), (2, 8, 1)),
    ],
)
def test_a_guide_that_is_set_by_updates_is_refitted_in_turn(model, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ll.calibrate(model, x, num_simulations=10, num_draws=9, progress=False)
    assert found.how.startswith("10 in turn: ")
    assert "in order" in found.names[0]
    assert bool((found.draws.mean(1).std(0) > 0).all())
    with pytest.raises(ValueError, match=r'backend: "xla" cannot refit this pair: .* updates'):
        ll.calibrate(model, x, num_simulations=10, backend="xla", progress=False)


def test_priors_keep_the_units_of_the_data_that_were_given(monkeypatch):
    from latentlab.inference import calibrate as module

    units, own_fit = [], module.fit

    def noted(*args, **settings):
        posterior = own_fit(*args, **settings)
        units.append(posterior.model.spread.clone())
        return posterior

    monkeypatch.setattr(module, "fit", noted)
    x = 7 * torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ll.GaussianMixture(1, 1, prior="conjugate")
    ll.calibrate(model, x, num_simulations=10, num_draws=9, progress=False)
    expected = ll.GaussianMixture(1, 1, prior="conjugate").scale_to(x).spread
    assert len(units) == 10
    assert all(torch.equal(found, expected) for found in units)
    assert not torch.equal(ll.fit(model, 2 * x, progress=False).model.spread, expected)


def test_whole_numbers_may_be_given_for_what_is_none(found):
    again = ll.calibrate(normal, X.long(), num_simulations=200, progress=False)
    assert again.ok, again


def test_rows_that_count_twice_are_refused():
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="count more or less than once"):
        ll.calibrate(ll.GaussianMixture(2, 1), (x, 2 * torch.ones(20)), progress=False)


def test_a_model_that_observes_nothing_is_refused():
    def prior(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        ll.calibrate(prior, X, num_simulations=10, progress=False)


def test_only_a_posterior_of_these_data_is_taken():
    posterior = ll.fit(normal, X + 1, guide="full_rank", progress=False, num_restarts=1)
    with pytest.raises(ValueError, match="expected a posterior of these data"):
        ll.calibrate(normal, X, around=posterior, progress=False)
    with pytest.raises(ValueError, match="expected a posterior of this model"):
        ll.calibrate(line, (X[:, None].expand(10, 2), X), around=posterior, progress=False)
    with pytest.raises(TypeError, match="expected a Posterior, got str"):
        ll.calibrate(normal, X, around="posterior", progress=False)
