"""A posterior answers with what a closed form, an enumeration or NumPy says, and never changes."""

import copy
import dataclasses
import itertools
import math
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy import stats
from torch import nn

import latentlab as ll
from latentlab.inference import evidence, verdict
from tests.oracles import conjugate_normal, linear_regression

QUICK = {"num_restarts": 1, "max_steps": 600, "progress": False}


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def one_at_a_time(x=None, size=None):
    """As ``normal``, but it reads a value, so that its particles cannot share a pass."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with ll.rows(x, size):
        return pyro.sample("x", dist.Normal(loc if loc.item() > 0 else 1e-9 * loc, 1.0), obs=x)


def line(features, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(features)):
        mean = (features * slope.unsqueeze(-2)).sum(-1)
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def local(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        return pyro.sample("x", dist.Normal(z, 0.5), obs=x)


X = rng().normal(1.5, 1.0, 20)
FEATURES = rng(1).normal(size=(12, 2))
Y = FEATURES @ [1.0, -2.0] + 0.5 * rng(2).normal(size=12)
EIGHT = rng(3).normal(0.5, 1.2, 8)


@pytest.fixture(scope="module")
def conjugate():
    return ll.fit(normal, torch.from_numpy(X), **QUICK)


@pytest.fixture(scope="module")
def regression():
    return ll.fit(line, (FEATURES, Y), **QUICK)


@pytest.fixture(scope="module")
def with_locals():
    return ll.fit(local, EIGHT, guide="full_rank", **QUICK)


@pytest.fixture(scope="module")
def eruptions():
    return ll.data.simulate.eruptions(num_rows=120)


@pytest.fixture(scope="module")
def mixture(eruptions):
    return ll.fit(ll.GaussianMixture(2, 2), eruptions, **QUICK)


def agree(draws, distribution):
    """Draws have a distribution: chance alone puts them further from it once in 10,000 times."""
    assert stats.kstest(np.asarray(draws), distribution.cdf).pvalue > 1e-4


# ---- it does not change ----------------------------------------------------------------------


def test_a_posterior_is_frozen(conjugate):
    with pytest.raises(dataclasses.FrozenInstanceError):
        conjugate.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        conjugate.elbo = 0.0
    assert conjugate == conjugate
    assert conjugate != copy.deepcopy(conjugate)


def test_what_is_handed_out_is_not_what_is_inside(conjugate):
    before = conjugate.sample(3)["loc"]
    for name, value in conjugate.params.items():
        assert not value.requires_grad, name
        value.fill_(7.0)
    conjugate.sample(3)["loc"].fill_(7.0)
    assert torch.equal(conjugate.sample(3)["loc"], before)


def test_draws_of_a_point_are_not_its_parameters():
    def guide(x=None, size=None):
        pyro.sample("loc", dist.Delta(pyro.param("at", torch.zeros(()))))

    posterior = ll.fit(normal, X, guide, num_restarts=1, max_steps=450, progress=False)
    before = posterior.params["at"]
    posterior.sample(1)["loc"].fill_(7.0)
    assert torch.equal(posterior.params["at"], before)


def test_draws_of_a_point_do_not_move_together():
    draws = ll.fit(normal, X, "point", **QUICK).sample(3)["loc"]
    first = float(draws[0])
    draws[1] = 7.0
    assert draws.tolist() == [first, 7.0, first]


def test_the_same_seed_gives_the_same_draws_in_the_shapes_of_the_sites(mixture):
    one, same, other = mixture.sample(7), mixture.sample(7), mixture.sample(7, seed=5)
    assert {name: tuple(value.shape) for name, value in one.items()} == {
        "weights": (7, 2),
        "locs": (7, 2, 2),
        "scales": (7, 2, 2),
    }
    for name, value in one.items():
        assert torch.equal(value, same[name])
        assert not torch.equal(value, other[name])
        assert not value.requires_grad
    again = mixture.predict(3, seed=5)["x"]
    assert torch.equal(again, mixture.predict(3, seed=5)["x"])
    assert not torch.equal(again, mixture.predict(3)["x"])
    data = mixture.pair.data.args[0]
    assert mixture.log_prob(data) == mixture.log_prob(data) != mixture.log_prob(data, seed=5)


def test_nothing_in_the_process_changes(conjugate):
    state, flag = torch.get_rng_state(), torch.get_default_dtype()
    conjugate.sample(3)
    conjugate.predict(3)
    conjugate.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is flag
    assert not dict(pyro.get_param_store().items())


# ---- the exact posterior of a conjugate normal -----------------------------------------------


def test_every_weight_of_the_exact_posterior_is_the_evidence(conjugate):
    _, _, log_evidence = conjugate_normal(X, 0.0, 10.0, 1.0)
    weights = conjugate.log_weights(500)
    assert weights.shape == (500,)
    assert weights.numpy() == pytest.approx(np.full(500, log_evidence), abs=1e-3)
    assert conjugate.elbo.value == pytest.approx(log_evidence, abs=5 * conjugate.elbo.se + 1e-3)
    assert conjugate.elbo.se < 1e-3


def test_draws_have_the_mean_and_sd_of_the_exact_posterior(conjugate):
    loc, sd, _ = conjugate_normal(X, 0.0, 10.0, 1.0)
    agree(conjugate.sample(4000)["loc"], stats.norm(loc, sd))


def test_replicates_have_the_posterior_predictive_distribution(conjugate):
    loc, sd, _ = conjugate_normal(X, 0.0, 10.0, 1.0)
    rows = conjugate.predict(4000)["x"].numpy()
    assert rows.shape == (4000, 20)
    for n in (0, 7, 19):
        agree(rows[:, n], stats.norm(loc, math.hypot(sd, 1.0)))
    expected = sd**2 / (sd**2 + 1)  # two rows share the mean
    correlation = np.corrcoef(rows[:, 0], rows[:, 1])[0, 1]
    assert correlation == pytest.approx(expected, abs=5 / math.sqrt(4000))


def test_replicates_are_never_the_data(conjugate, mixture):
    assert not np.isin(conjugate.predict(50)["x"].numpy(), X).any()
    data = mixture.pair.data.args[0]
    assert not np.isin(mixture.predict(20)["x"].numpy(), data.numpy()).any()
    assert not np.isin(mixture.predict(20, data)["x"].numpy(), data.numpy()).any()


def test_held_out_density_is_that_of_the_predictive_distribution(conjugate):
    loc, sd, _ = conjugate_normal(X, 0.0, 10.0, 1.0)
    new = rng(9).normal(1.5, 1.0, 33)
    estimate = conjugate.log_prob(new, num_samples=4000)
    expected = stats.norm(loc, math.hypot(sd, 1.0)).logpdf(new).sum()
    assert abs(estimate.value - expected) < 5 * estimate.se
    assert 0 < estimate.se < 0.5


def test_the_error_of_the_held_out_density_is_its_spread_over_seeds(conjugate):
    new = rng(9).normal(1.5, 1.0, 10)
    estimates = [conjugate.log_prob(new, num_samples=200, seed=seed) for seed in range(60)]
    spread = np.std([e.value for e in estimates], ddof=1)
    assert spread == pytest.approx(np.mean([e.se for e in estimates]), rel=0.4)  # 4 se of 60


def test_own_data_given_or_not_are_the_same(conjugate):
    assert torch.equal(conjugate.predict(5)["x"], conjugate.predict(5, X)["x"])


def test_a_number_of_new_rows_can_be_asked_for(conjugate):
    assert conjugate.predict(3, {"size": 5})["x"].shape == (3, 5)


# ---- new covariates --------------------------------------------------------------------------


def test_new_covariates_have_the_predictive_distribution_of_the_regression(regression):
    loc, cov, log_evidence = linear_regression(FEATURES, Y, 3.0, 0.5)
    new = rng(5).normal(size=(3, 2))
    drawn = regression.predict(4000, new)["y"].numpy()
    assert drawn.shape == (4000, 3)
    for n in range(3):
        sd = math.sqrt(new[n] @ cov @ new[n] + 0.25)
        agree(drawn[:, n], stats.norm(new[n] @ loc, sd))
    assert regression.log_weights(50).numpy() == pytest.approx(log_evidence, abs=1e-2)


def test_observed_values_of_new_data_do_not_count(regression):
    new = rng(5).normal(size=(3, 2))
    one = regression.predict(4, new)["y"]
    assert torch.equal(one, regression.predict(4, new, np.zeros(3))["y"])
    assert torch.equal(one, regression.predict(4, {"features": new, "y": np.ones(3)})["y"])


def test_held_out_density_of_a_regression(regression):
    loc, cov, _ = linear_regression(FEATURES, Y, 3.0, 0.5)
    new = rng(5).normal(size=(5, 2))
    y = new @ [1.0, -2.0]
    sd = np.sqrt(np.einsum("nd,de,ne->n", new, cov, new) + 0.25)
    estimate = regression.log_prob(new, y, num_samples=4000)
    assert abs(estimate.value - stats.norm(new @ loc, sd).logpdf(y).sum()) < 5 * estimate.se


# ---- latents that are local to the rows ------------------------------------------------------


def local_posterior():
    """Mean and covariance of (loc, z_1, ..., z_8), and the sd of loc: Gaussian algebra."""
    N = len(EIGHT)
    prior = np.full((N + 1, N + 1), 9.0) + np.diag([0.0, *np.ones(N)])
    gain = prior[:, 1:] @ np.linalg.inv(prior[1:, 1:] + 0.25 * np.eye(N))
    return gain @ EIGHT, prior - gain @ prior[1:, :]


def test_replicates_of_fitted_rows_follow_their_own_latents(with_locals):
    mean, cov = local_posterior()
    rows = with_locals.predict(4000)["x"].numpy()
    for n in range(8):
        agree(rows[:, n], stats.norm(mean[n + 1], math.sqrt(cov[n + 1, n + 1] + 0.25)))


@pytest.mark.parametrize("num_rows", [8, 3])
def test_new_rows_have_local_latents_of_their_own(with_locals, num_rows):
    """Also where there are as many of them as were fitted."""
    mean, cov = local_posterior()
    fresh = stats.norm(mean[0], math.sqrt(cov[0, 0] + 1.25))
    new = rng(7).normal(0.5, 1.2, num_rows)
    rows = with_locals.predict(4000, new)["x"].numpy()
    assert rows.shape == (4000, num_rows)
    for n in range(3):
        agree(rows[:, n], fresh)
    estimate = with_locals.log_prob(new, num_samples=4000)
    assert abs(estimate.value - fresh.logpdf(new).sum()) < 5 * estimate.se


def test_a_datum_is_all_that_shares_its_local_latent():
    """Cells of a row share the row's latent: their densities multiply before the mean is taken."""

    def model(x=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        shape = (4, 3) if x is None else x.shape
        with pyro.plate("rows", shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            with pyro.plate("columns", shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    posterior = ll.fit(model, rng(4).normal(size=(4, 3)), guide="full_rank", **QUICK)
    loc, sd = (float(f(posterior.sample(20_000)["loc"])) for f in (torch.mean, torch.std))
    new = rng(5).normal(size=(6, 3))
    row = stats.multivariate_normal(np.full(3, loc), sd**2 + 1 + 0.25 * np.eye(3))
    estimate = posterior.log_prob(new, num_samples=4000)
    assert abs(estimate.value - row.logpdf(new).sum()) < 5 * estimate.se + 0.02  # error of loc, sd


def columns(x):
    with pyro.plate("columns", x.shape[1], dim=-1):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", x.shape[0], dim=-2):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


@pytest.mark.parametrize("num_rows", [30, 3])
def test_what_belongs_to_the_columns_is_the_same_in_new_rows(num_rows):
    """Also where there are as many columns as rows."""
    x = rng(4).normal([5.0, -5.0, 0.0], 1.0, size=(num_rows, 3))
    posterior = ll.fit(columns, x, **QUICK)
    exact = [conjugate_normal(column, 0.0, 2.0, 1.0) for column in x.T]
    means, sds = (np.array([e[i] for e in exact]) for i in (0, 1))
    fresh = stats.norm(means, np.sqrt(sds**2 + 1))
    new = rng(5).normal([5.0, -5.0, 0.0], 1.0, size=(3, 3))
    drawn = posterior.predict(2000, new)["x"].numpy()
    for d in range(3):
        agree(drawn[:, 0, d], stats.norm(means[d], math.hypot(sds[d], 1)))
    estimate = posterior.log_prob(new, num_samples=4000)
    assert abs(estimate.value - fresh.logpdf(new).sum()) < 5 * estimate.se


def test_a_latent_that_new_data_have_more_of_is_drawn_from_the_model():
    """Which of four columns are the two that were fitted, nobody knows."""
    posterior = ll.fit(columns, rng(4).normal(5.0, 1.0, size=(30, 2)), **QUICK)
    drawn = posterior.predict(2000, np.zeros((1, 4)))["x"]
    agree(drawn[:, 0, 0], stats.norm(0, math.sqrt(5)))


# ---- discrete latents ------------------------------------------------------------------------

SHIFTS, SIDES, PROBS = np.array([-1.0, 1.0]), np.array([0.0, 0.7, 3.0]), np.array([0.5, 0.3, 0.2])
LABELLED = np.array([-0.6, 1.4, 0.3])


def labelled(x=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    side = pyro.sample("side", dist.Categorical(torch.tensor(PROBS)))
    with ll.rows(x, size):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        mean = loc + torch.tensor(SHIFTS)[z] + torch.tensor(SIDES)[side]
        return pyro.sample("x", dist.Normal(mean, 0.8), obs=x)


def labelled_guide(x=None, size=None):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(pyro.param("loc_at", torch.tensor(0.0)), scale))


@pytest.fixture(scope="module", params=[True, False], ids=["at once", "one by one"])
def discrete(request):
    posterior = ll.fit(labelled, LABELLED, labelled_guide, **QUICK)
    return dataclasses.replace(
        posterior, pair=dataclasses.replace(posterior.pair, vectorised=request.param)
    )


def side_given(loc, x):
    """p(side | loc, x), shape (S, 3), labels z summed out."""
    mean = loc[:, None, None, None] + SIDES[:, None, None] + SHIFTS
    rows = (np.array([0.4, 0.6]) * stats.norm(mean, 0.8).pdf(x[:, None])).sum(-1)  # (S, 3, N)
    joint = PROBS * rows.prod(-1)
    return joint / joint.sum(-1, keepdims=True)


def test_labels_are_drawn_from_their_exact_conditional(discrete):
    num_samples = 1500
    draws = {name: value.numpy() for name, value in discrete.sample(num_samples).items()}
    assert draws["side"].shape == (num_samples,)
    assert draws["z"].shape == (num_samples, 3)
    assert draws["z"].dtype.kind == "i"
    counts, expected, variance = {}, {}, {}
    joint = []
    configurations = list(itertools.product(range(3), *[range(2)] * 3))
    for side, *z in configurations:
        mean = draws["loc"][:, None] + SIDES[side] + SHIFTS[z]
        rows = np.array([0.4, 0.6])[z] * stats.norm(mean, 0.8).pdf(LABELLED)
        joint.append(PROBS[side] * rows.prod(1))
        match = (draws["side"] == side) & (draws["z"] == z).all(1)
        counts[side, *z] = match.sum()
    probs = np.array(joint) / np.sum(joint, 0)  # (24, S)
    expected, variance = probs.sum(1), (probs * (1 - probs)).sum(1)
    gaps = (np.array(list(counts.values())) - expected) / np.sqrt(variance + 0.5)
    assert np.abs(gaps).max() < 4.5
    assert expected.max() > 50


def test_new_rows_keep_the_global_label_and_draw_their_own(discrete):
    num_samples = 4000 if discrete.pair.vectorised else 800
    guide = discrete.params
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    loc = float(guide["loc_at"]) + float(guide["scale"]) * nodes
    weights, side = weights / weights.sum(), side_given(loc, LABELLED)
    new = np.array([0.2, 4.0, 1.0, 2.5])

    mean = loc[:, None, None, None] + SIDES[:, None, None] + SHIFTS
    rows = (np.array([0.4, 0.6]) * stats.norm(mean, 0.8).pdf(new[:, None])).sum(-1)
    expected = np.log(np.einsum("q,qk,qkn->n", weights, side, rows)).sum()
    estimate = discrete.log_prob(new, num_samples=num_samples)
    assert abs(estimate.value - expected) < 5 * estimate.se

    drawn = discrete.predict(num_samples, new)["x"].numpy()
    grid = np.linspace(-5, 8, 40)
    cdf = (np.array([0.4, 0.6]) * stats.norm(mean, 0.8).cdf(grid[:, None])).sum(-1)
    expected = np.einsum("q,qk,qkn->n", weights, side, cdf)
    share = (drawn[:, 0] <= grid[:, None]).mean(1)
    assert np.abs(share - expected).max() < 2.3 / math.sqrt(num_samples)


def test_replicates_of_fitted_rows_follow_their_own_labels(discrete):
    """Mean of each row over draws: its own label's posterior moves it."""
    num_samples = 4000 if discrete.pair.vectorised else 800
    rows = discrete.predict(num_samples)["x"].numpy()
    draws = {name: value.numpy() for name, value in discrete.sample(num_samples, seed=8).items()}
    mean = draws["loc"][:, None] + SHIFTS[draws["z"]] + SIDES[draws["side"]][:, None]
    se = np.sqrt((rows.var(0) + mean.var(0)) / num_samples)
    assert (np.abs(rows.mean(0) - mean.mean(0)) < 5 * se).all()
    assert np.ptp(mean.mean(0)) > 20 * se.max()


def test_a_summary_holds_the_continuous_latents(discrete):
    assert discrete.summary(50)["site"].tolist() == ["loc"]


# ---- the summary -----------------------------------------------------------------------------


def test_summary_is_what_numpy_says_of_the_draws(regression):
    frame = regression.summary(1000)
    assert list(frame) == ["site", "index", "mean", "sd", "q05", "q50", "q95", "mcse"]
    assert frame["site"].tolist() == ["slope", "slope"]
    assert frame["index"].tolist() == ["0", "1"]
    draws = regression.sample(1000)["slope"].numpy()
    assert frame["mean"].to_numpy() == pytest.approx(draws.mean(0))
    assert frame["sd"].to_numpy() == pytest.approx(draws.std(0, ddof=1))
    quantiles = np.quantile(draws, [0.05, 0.5, 0.95], axis=0).T
    assert frame[["q05", "q50", "q95"]].to_numpy() == pytest.approx(quantiles)
    assert frame["mcse"].to_numpy() == pytest.approx(draws.std(0, ddof=1) / math.sqrt(1000))


def test_mcse_is_the_spread_of_the_mean_over_seeds(conjugate):
    frames = [conjugate.summary(200, seed=seed) for seed in range(60)]
    spread = np.std([float(frame["mean"][0]) for frame in frames], ddof=1)
    assert spread == pytest.approx(np.mean([float(f["mcse"][0]) for f in frames]), rel=0.4)


def test_summary_is_in_the_units_of_the_data_and_names_its_columns(mixture, eruptions):
    frame = mixture.summary().set_index(["site", "index"])
    for d, column in enumerate(eruptions.names):
        low, high = eruptions.x[:, d].min(), eruptions.x[:, d].max()
        for k in (0, 1):
            assert low < frame["mean"]["locs", f"{k}, {column}"] < high
    assert frame.loc["weights"].index.tolist() == ["0", "1"]
    assert frame["mean"]["weights"].sum() == pytest.approx(1)


def test_a_summary_of_very_many_latents_takes_fewer_draws(with_locals, monkeypatch):
    from latentlab.inference import posterior

    assert with_locals.summary().equals(with_locals.summary(4000))
    monkeypatch.setattr(posterior, "_DRAWN_ELEMENTS", 9 * 300)
    assert with_locals.summary().equals(with_locals.summary(300))
    monkeypatch.setattr(posterior, "_DRAWN_ELEMENTS", 9)
    assert with_locals.summary().equals(with_locals.summary(200))


def test_a_number_without_axes_has_no_index(conjugate):
    assert conjugate.summary(10)["index"].tolist() == [""]


def test_components_that_swap_labels_are_aligned_first(mixture):
    swapping = copy.deepcopy(mixture)
    draw = swapping.pair.guide.draw

    def draw_swapped(num_particles, data=None):
        draws = draw(num_particles)
        for name, value in draws.values.items():
            axis = {"weights": -1}.get(name, -2)
            value[::3] = value[::3].flip(axis)
        return draws

    swapping.pair.guide.draw = draw_swapped
    raw = swapping.sample(900)["locs"][:, :, 0]
    assert raw.std(0).min() > 5 * mixture.sample(900)["locs"][:, :, 0].std(0).max()
    one, other = mixture.summary(900), swapping.summary(900)
    assert other[["mean", "sd"]].to_numpy() == pytest.approx(one[["mean", "sd"]].to_numpy())


# ---- columns with names ----------------------------------------------------------------------


def test_columns_are_matched_by_name(mixture, eruptions):
    import pandas as pd

    frame = pd.DataFrame(eruptions.x[:30].numpy(), columns=eruptions.names)
    expected = mixture.log_prob(eruptions.x[:30])
    assert mixture.log_prob(frame[list(eruptions.names)[::-1]]) == expected
    assert mixture.log_prob(ll.data.load(frame)) == expected


def test_missing_and_extra_columns_are_listed(mixture, eruptions):
    import pandas as pd

    frame = pd.DataFrame(eruptions.x[:30].numpy(), columns=eruptions.names)
    first, second = eruptions.names
    with pytest.raises(ValueError, match=f"missing '{second}'"):
        mixture.log_prob(frame[[first]])
    with pytest.raises(ValueError, match="extra 'colour'"):
        mixture.predict(3, frame.assign(colour="red"))
    with pytest.raises(ValueError, match=f"missing '{first}' and extra 'third'"):
        mixture.log_prob(frame.rename(columns={first: "third"}))
    with pytest.raises(ValueError, match="expected 2 columns .*got 3"):
        mixture.predict(3, np.zeros((4, 3)))


def test_missing_cells_are_integrated_out(mixture, eruptions):
    row = eruptions.x[:1].clone()
    row[0, 1] = torch.nan
    draws = {name: value.numpy() for name, value in mixture.sample(4000, seed=3).items()}
    density = stats.norm(draws["locs"][:, :, 0], draws["scales"][:, :, 0]).pdf(float(row[0, 0]))
    expected = (draws["weights"] * density).sum(1)
    estimate = mixture.log_prob(row, num_samples=4000)
    se = math.hypot(estimate.se, expected.std() / expected.mean() / math.sqrt(4000))
    assert abs(estimate.value - math.log(expected.mean())) < 5 * se + 1e-4  # floor of the scales
    drawn = mixture.predict(3, row)["x"]
    assert drawn.shape == (3, 1, 2)
    assert drawn.isfinite().all()


def test_missing_cells_are_refused_where_they_are_not_known(conjugate):
    with pytest.raises(ValueError, match=r"1 NaN \(first at \[1\]\)"):
        conjugate.log_prob(np.array([1.0, np.nan]))


# ---- pairs of all forms ----------------------------------------------------------------------


def test_a_pair_that_reads_values_answers_everywhere():
    posterior = ll.fit(
        one_at_a_time, X, AutoNormal(one_at_a_time), num_restarts=1, max_steps=450, progress=False
    )
    assert not posterior.pair.vectorised
    assert posterior.sample(5)["loc"].shape == (5,)
    assert posterior.log_weights(5).shape == (5,)
    assert posterior.predict(6)["x"].shape == (6, 20)
    assert posterior.predict(6, X[:3])["x"].shape == (6, 3)
    new = rng(9).normal(1.5, 1.0, 4)
    frame = posterior.summary(400)
    expected = stats.norm(frame["mean"][0], math.hypot(frame["sd"][0], 1.0)).logpdf(new).sum()
    estimate = posterior.log_prob(new, num_samples=400)
    assert abs(estimate.value - expected) < 5 * math.hypot(estimate.se, 4 * frame["mcse"][0])
    assert posterior.check(num_samples=100).level in verdict.LEVELS


class Encoder(nn.Module):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1) and a guide N(a x_n, s): exact at a = 1/2, s^2 = 1/2."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    def model(self, x=None, size=None):
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x=None, size=None):
        pyro.module("encoder", self)
        with ll.rows(x, size):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()))


def test_a_guide_of_ones_own_fits_in_batches_and_speaks_of_all_rows():
    x, encoder = rng(6).normal(0, math.sqrt(2), 60), Encoder()
    posterior = ll.fit(
        encoder.model, x, encoder.guide, batch_size=20, max_steps=2500, num_restarts=1,
        progress=False,
    )  # fmt: skip
    draws = posterior.sample(2000)["z"].numpy()
    assert draws.shape == (2000, 60)
    slope, scale = float(posterior.params["encoder$$$slope"]), draws.std(0, ddof=1)
    assert slope == pytest.approx(0.5, abs=0.05)
    assert scale == pytest.approx(np.full(60, math.sqrt(0.5)), rel=0.15)
    log_evidence = stats.norm(0, math.sqrt(2)).logpdf(x).sum()
    assert posterior.log_weights(400).mean() == pytest.approx(log_evidence, abs=1.0)
    new = rng(8).normal(size=7)
    estimate = posterior.log_prob(new, num_samples=4000)
    assert abs(estimate.value - stats.norm(0, math.sqrt(2)).logpdf(new).sum()) < 5 * estimate.se
    assert encoder.slope.item() == pytest.approx(0.1)  # the fit has a copy


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1, bias=False)
        prior = dist.Normal(torch.zeros(1, 1), 10.0).to_event(2)
        self.linear.weight = PyroSample(prior)
        self.sigma = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        mean = self.linear(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.sigma), obs=y)


def test_two_posteriors_of_one_module_do_not_disturb_one_another():
    x = torch.linspace(-1, 1, 20)
    noise = 0.3 * torch.from_numpy(rng().normal(size=20)).float()
    module = Regression()
    guide = AutoNormal(module)
    quick = {"num_restarts": 1, "max_steps": 450, "progress": False}
    one = ll.fit(module, (x, 2 * x + noise), guide, **quick)
    before = one.sample(3), one.predict(3), one.params, one.log_weights(3)
    other = ll.fit(module, (x, -5 * x + noise), guide, **quick)
    after = one.sample(3), one.predict(3), one.params, one.log_weights(3)
    for first, second in zip(before[:3], after[:3], strict=True):
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
    assert torch.equal(before[3], after[3])
    slopes = [float(p.sample(50)["linear.weight"].mean()) for p in (one, other)]
    assert slopes[1] < 0 < slopes[0]
    assert module.sigma.item() == 1.0
    assert one.params["sigma"] > 0
    assert one.predict(4, x[:5])["y"].shape == (4, 5)


@pytest.mark.parametrize("form", ["module", "bound method", "function"])
def test_a_mixture_is_the_same_pair_in_each_form(form, eruptions):
    module = ll.GaussianMixture(2, 1)
    module.scale_to(eruptions)
    model = {
        "module": module,
        "bound method": module.forward,
        "function": lambda x=None, size=None: module(x, size),
    }[form]
    posterior = ll.fit(model, eruptions, guide="full_rank", **QUICK)
    new = eruptions.x[:5]
    assert posterior.predict(3, new)["x"].shape == (3, 5, 2)
    expected = stats.norm(eruptions.x.mean(0), eruptions.x.std(0)).logpdf(new).sum()
    assert posterior.log_prob(new).value == pytest.approx(expected, abs=0.5)


# ---- how it went -----------------------------------------------------------------------------


def test_the_text_says_the_sites_the_elbo_and_how_it_ended(mixture):
    assert repr(mixture).startswith("Posterior(weights, locs, scales; ELBO ")
    assert f"{len(mixture.losses)} steps)" in repr(mixture)
    assert "converged" in repr(mixture)


def test_losses_end_at_the_elbo(mixture):
    assert mixture.losses.shape == (len(mixture.losses),)
    last = mixture.losses[-50:]
    assert float(last.mean()) == pytest.approx(-mixture.elbo.value, abs=1.0)


def test_parameters_are_as_the_pair_sees_them(discrete):
    params = discrete.params
    assert set(params) == {"loc_at", "scale"}
    draws = discrete.sample(1000)["loc"]
    agree(draws, stats.norm(float(params["loc_at"]), float(params["scale"])))


def test_a_verdict_is_measured_once_and_anew_after_a_change(mixture, monkeypatch):
    posterior, calls = copy.deepcopy(mixture), []
    gather = evidence.gather
    monkeypatch.setattr(evidence, "gather", lambda *args: calls.append(args) or gather(*args))
    first = posterior.check()
    assert posterior.check() == first
    assert len(calls) == 1
    with torch.no_grad():
        posterior.pair.guide.log_scale.sub_(math.log(2))
    assert posterior.check().level == "do not use"
    assert len(calls) == 2
    posterior.check(seed=1)
    assert len(calls) == 3


def test_copies_and_pickles_draw_the_same(mixture):
    for again in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        for name, value in mixture.sample(4).items():
            assert torch.equal(again.sample(4)[name], value)
        assert again.check() == mixture.check()
        assert again.pair.guide is not mixture.pair.guide


def test_a_copy_leaves_a_guide_of_pyro_its_model(conjugate):
    posterior = ll.fit(
        normal, X, AutoNormal(normal), num_restarts=1, max_steps=450, progress=False
    )
    again = copy.deepcopy(posterior)
    assert posterior.guide._model is not None
    assert torch.equal(again.sample(4)["loc"], posterior.sample(4)["loc"])


# ---- faults are named ------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, "3", True])
def test_a_number_of_draws_is_an_int_above_zero(conjugate, num_samples):
    for method in (conjugate.sample, conjugate.log_weights, conjugate.predict, conjugate.summary):
        with pytest.raises(ValueError, match="num_samples must be an int >="):
            method(num_samples)
    with pytest.raises(ValueError, match="num_samples must be an int >= 2"):
        conjugate.log_prob(X, num_samples=num_samples)


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
def test_a_seed_is_an_int_from_zero(conjugate, seed):
    for method in (conjugate.sample, conjugate.log_weights, conjugate.predict, conjugate.check):
        with pytest.raises(ValueError, match="seed must be an int >= 0"):
            method(seed=seed)


def test_data_in_the_place_of_the_number_of_draws_are_named(conjugate):
    with pytest.raises(ValueError, match="num_samples must be an int >= 1, got array"):
        conjugate.predict(X)


def test_a_model_that_observes_nothing_predicts_nothing():
    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fit says that its posterior is the prior
        posterior = ll.fit(prior, **QUICK)
    with pytest.raises(ValueError, match="predict: the model observes nothing"):
        posterior.predict(3)


def test_data_of_another_structure_are_named():
    def coins(x):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        for i, value in enumerate(x):
            pyro.sample(f"x_{i}", dist.Bernoulli(p), obs=value)

    posterior = ll.fit(coins, torch.tensor([1.0, 0.0, 1.0]), **QUICK)
    draws = posterior.sample(2000, seed=4)["p"].double()
    new = torch.tensor([1.0, 1.0, 0.0])
    expected = draws.square().mul(1 - draws)  # without a plate, all data are one datum
    se = float(expected.std() / expected.mean()) / math.sqrt(2000)
    estimate = posterior.log_prob(new, num_samples=2000)
    gap = abs(estimate.value - math.log(expected.mean()))
    assert gap < 5 * math.hypot(estimate.se, se)
    with pytest.raises(ValueError, match="the model observed 'x_2' in the fit, but not here"):
        posterior.predict(3, new[:2])


def test_the_density_of_new_rows_uses_the_codes_a_guide_has_for_them():
    """Draws of the prior miss the rows where there are many latents; the encoder's do not."""
    torch.manual_seed(0)
    L, D, sd = 8, 20, 0.2
    W = torch.randn(L, D, dtype=torch.float64)
    cov = W.T @ W + sd**2 * torch.eye(D, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(torch.zeros(D, dtype=torch.float64), cov)
    old, new = law.sample((200,)), law.sample((50,))
    precision = torch.eye(L, dtype=torch.float64) + W @ W.T / sd**2
    tril = torch.linalg.cholesky(torch.linalg.inv(precision))

    def model(x=None, size=None):
        with ll.rows(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(L).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, sd).to_event(1), obs=x)

    def encoder(x=None, size=None):
        shift = pyro.param("shift", torch.full((L,), 0.05, dtype=torch.float64))
        loc = x @ W.T @ tril @ tril.T / sd**2 + shift * tril.diagonal()
        with ll.rows(x, size):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    posterior = ll.fit(model, old, encoder, max_steps=20, progress=False)
    found, exact = posterior.log_prob(new), float(law.log_prob(new).sum())
    assert found.se < 0.3
    assert found.value == pytest.approx(exact, abs=5 * found.se + 0.01)
