"""A mixture has the density of its docstring, in any units, whatever cells are missing."""

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import logsumexp

import latentlab as ll
from latentlab import protocols
from latentlab.data import Table
from latentlab.guides import FullRank, MeanField
from latentlab.models import gmm, gmm_em, gmm_remarks, gmm_starts

SEEDS = st.integers(0, 2**32 - 1)
NAN = float("nan")


@pytest.fixture(scope="module")
def eruptions():
    return ll.data.simulate.eruptions(200)


@pytest.fixture(scope="module")
def posterior(eruptions):
    return fit(ll.GaussianMixture(2, 2), eruptions)


def fit(model, x, max_steps=2500, **others):
    return ll.fit(model, x, num_restarts=1, max_steps=max_steps, progress=False, **others)


def latents(rng, K, D, batch=()):
    """Values of all latents, float64."""
    return {
        "weights": torch.from_numpy(rng.dirichlet(np.full(K, 2.0), size=batch)),
        "locs": torch.from_numpy(2 * rng.normal(size=(*batch, K, D))),
        "scales": torch.from_numpy(rng.gamma(3.0, size=(*batch, K, D)) / 3),
    }


def rows_of(rng, N, D, missing=0.0):
    x = rng.normal(size=(N, D)) * (1 + np.arange(D))
    x[rng.random((N, D)) < missing] = NAN
    return x


def log_joint(model, values, x, size=None, site=None):
    trace = poutine.trace(poutine.condition(model, values)).get_trace(x, size=size)
    return trace.log_prob_sum(lambda name, _: site in (None, name)).item()


def joint_by_hand(x, values, spread):
    """Log-joints (N, K) of rows and labels, the floor on scales included, NaN cells left out."""
    weights, locs, scales = (values[site].numpy() for site in ("weights", "locs", "scales"))
    sd = np.sqrt(scales**2 + (1e-3 * spread) ** 2)
    cells = stats.norm(locs, sd).logpdf(x[:, None, :])
    return np.log(weights) + np.where(np.isnan(cells), 0.0, cells).sum(-1)


# ---- the density --------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.floats(0.1, 5), st.floats(0, 0.4))
def test_the_log_joint_is_that_of_the_docstring(seed, K, D, concentration, missing):
    rng = np.random.default_rng(seed)
    x = rows_of(rng, 12, D)
    center, spread = x.mean(0), x.std(0)
    model = ll.GaussianMixture(D, K, concentration=concentration).scale_to(torch.from_numpy(x))
    x[rng.random(x.shape) < missing] = NAN
    values = latents(rng, K, D)
    weights, locs, scales = (values[site].numpy() for site in ("weights", "locs", "scales"))
    expected = stats.norm(center, 3 * spread).logpdf(locs).sum()
    expected += stats.lognorm(1.0, scale=spread / 2).logpdf(scales).sum()
    if K > 1:  # a simplex of one is a point
        expected += stats.dirichlet(np.full(K, concentration)).logpdf(weights)
    expected += logsumexp(joint_by_hand(x, values, spread), axis=1).sum()
    assert log_joint(model, values, torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)


def test_a_prior_draw_has_the_shape_of_rows():
    torch.manual_seed(0)
    model = ll.GaussianMixture(3, 2)
    assert model(size=5).shape == (5, 3)
    trace = poutine.trace(model).get_trace(size=4)
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in ("weights", "locs", "x")}
    assert shapes == {"weights": (2,), "locs": (2, 3), "x": (4, 3)}
    with pytest.raises(ValueError, match="call the model with size="):
        model()


def test_prior_draws_span_the_units_of_the_data():
    """Of columns far from each other in unit, each has a prior predictive sd of 3.3 of its own."""
    torch.manual_seed(0)
    x = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([1e-6, 1e6]).double() + 5e6
    model = ll.GaussianMixture(2, 2).scale_to(x)
    draws = torch.cat([model(size=1) for _ in range(400)])
    standard = (draws - x.mean(0)) / x.std(0, correction=0)
    assert (standard.abs().median(0).values > 1.5).all()
    assert ((standard.abs() < 12).double().mean(0) > 0.95).all()


def test_a_batch_stands_for_the_whole_data_set():
    """Batches that part the rows have, on average, the log-likelihood of all of them."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rows_of(rng, 12, 2, missing=0.2))
    model, values = ll.GaussianMixture(2, 3).scale_to(x), latents(rng, 3, 2)
    whole = log_joint(model, values, x, site="x")
    parts = [log_joint(model, values, part, size=12, site="x") for part in x.split(4)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-12)
    assert np.std(parts) > 1
    prior = log_joint(model, values, x) - whole
    assert log_joint(model, values, x[:4], size=12) - parts[0] == pytest.approx(prior, rel=1e-12)


@given(SEEDS)
def test_components_are_exchangeable(seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rows_of(rng, 9, 2))
    model, values = ll.GaussianMixture(2, 4).scale_to(x), latents(rng, 4, 2)
    order = torch.from_numpy(rng.permutation(4))
    swapped = {
        site: value.index_select(model.exchangeable[site], order) for site, value in values.items()
    }
    assert log_joint(model, swapped, x) == pytest.approx(log_joint(model, values, x), rel=1e-12)


def test_a_component_on_one_row_has_a_bounded_density():
    """Without the floor the likelihood has no maximum; scales below it gain nothing."""
    x = torch.from_numpy(rows_of(np.random.default_rng(1), 30, 1))
    model, values = ll.GaussianMixture(1, 2).scale_to(x), latents(np.random.default_rng(2), 2, 1)
    values["locs"][0] = x[3]

    def value_at(scale):
        values["scales"][0] = scale
        return log_joint(model, values, x, site="x")

    floor = 1e-3 * float(x.std(correction=0))
    assert value_at(1e-9 * floor) == pytest.approx(value_at(1e-6 * floor), abs=1e-9)
    assert value_at(floor) < value_at(1e-9 * floor) < value_at(floor) + 0.4


# ---- units --------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([-2.0, 1e-200, 1e-30, 3.7, 1e6, 1e140]), st.floats(-1e3, 1e3))
def test_units_change_the_log_joint_by_the_jacobian_alone(seed, unit, shift):
    """Rows add log |a| a cell; so do locs and scales, whose guide takes that back."""
    rng = np.random.default_rng(seed)
    N, K, D = 10, 2, 2
    x = torch.from_numpy(rows_of(rng, N, D, missing=0.2))
    x[:2] = torch.eye(2) - 1  # no column is constant or missing
    values, factor = latents(rng, K, D), torch.tensor([unit, 3.0], dtype=torch.float64)
    shift = torch.tensor([shift * unit, -5.0], dtype=torch.float64)
    moved = {
        "weights": values["weights"],
        "locs": factor * values["locs"] + shift,
        "scales": factor.abs() * values["scales"],
    }
    y = factor * x + shift
    plain = log_joint(ll.GaussianMixture(D, K).scale_to(x), values, x)
    other = log_joint(ll.GaussianMixture(D, K).scale_to(y), moved, y)
    log_units = factor.abs().log()
    jacobian = ((~x.isnan()) * log_units).sum() + 2 * K * log_units.sum()
    assert other + jacobian.item() == pytest.approx(plain, rel=1e-9, abs=1e-7)


def test_a_fit_follows_the_units_of_the_data(posterior, eruptions):
    """Rows 23 to 25 as people meet them: columns times 1e6, and 1e9 away."""
    moved = fit(ll.GaussianMixture(2, 2), 1e6 * eruptions.x + 1e9)
    log_units = eruptions.x.numel() * math.log(1e6)
    error = math.hypot(moved.elbo.se, posterior.elbo.se)
    assert abs(moved.elbo.value + log_units - posterior.elbo.value) < 0.02 + 4 * error
    plain, other = posterior.sample(1000), moved.sample(1000)
    sd = plain["locs"].std(0)
    assert (((other["locs"] - 1e9) / 1e6 - plain["locs"]).mean(0).abs() < 0.15 * sd).all()
    ratio = (other["scales"] / 1e6).mean(0) / plain["scales"].mean(0)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=0.01, rtol=0)


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e135])
@pytest.mark.parametrize("offset", [0.0, -30.0, 1e12])
def test_priors_sit_on_mean_and_sd_of_the_columns(unit, offset):
    x = rows_of(np.random.default_rng(3), 50, 3, missing=0.1) + offset
    model = ll.GaussianMixture(3, 2).scale_to(torch.from_numpy(x * unit))
    exact = x - offset  # what float64 holds of it, less the offset
    np.testing.assert_allclose(
        (model.center / unit - offset), np.nanmean(exact, 0), atol=1e-15 * abs(offset) + 1e-12
    )
    np.testing.assert_allclose(
        model.spread / unit, np.nanstd(exact, 0), rtol=1e-16 * abs(offset) + 1e-9
    )


def test_float32_rows_far_from_the_origin_keep_their_spread():
    x = (torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 40 + 1e6).float()
    model = ll.GaussianMixture(2, 2).scale_to(x)
    assert model.spread.dtype == torch.float32
    np.testing.assert_allclose(model.spread, x.double().std(0, correction=0), rtol=1e-5)
    assert log_joint(model, model.starting_values(x), x) == pytest.approx(
        log_joint(
            ll.GaussianMixture(2, 2).scale_to(x.double()),
            {k: v.double() for k, v in model.starting_values(x).items()},
            x.double(),
        ),
        abs=0.1,
    )


@pytest.mark.parametrize(("value", "scale"), [(1e12, 1e12), (-0.1, 0.1), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_a_constant_column_stands_in_for_its_spread(value, scale, dtype):
    x = torch.randn(20, 2, dtype=dtype)
    x[:, 0] = value
    x[3, 0] = NAN
    with pytest.warns(UserWarning, match="constant column 'x0'"):
        model = ll.GaussianMixture(2, 2).scale_to(x)
    assert model.spread[0].item() == pytest.approx(scale, rel=1e-6)


def test_rounding_is_no_spread():
    x = torch.randn(20, 2, dtype=torch.float64)
    x[:, 0] = torch.tensor([0.3, 0.1 + 0.2] * 10, dtype=torch.float64)
    x[0, 0] = np.nextafter(0.3, 1)
    assert ll.GaussianMixture(2, 2).scale_to(x).spread[0].item() == pytest.approx(0.3)
    x[:, 1] = 1e12 + 0.01 * x[:, 1]  # 80 times the rounding: there is something to see
    assert ll.GaussianMixture(2, 2).scale_to(x).spread[1] < 0.02


def test_scaling_twice_is_scaling_once():
    one, other = torch.randn(20, 2, dtype=torch.float64), torch.rand(30, 2).double()
    model = ll.GaussianMixture(2, 2).scale_to(one).scale_to(other, size=500)
    torch.testing.assert_close(model.center, other.mean(0))
    assert model.num_rows == 500


# ---- values too far away ------------------------------------------------------------------------


def test_row_26_a_far_value_is_named_with_its_row_and_column():
    x = torch.from_numpy(rows_of(np.random.default_rng(4), 100, 2, missing=0.1))
    x[17, 1] = 2e8
    with pytest.warns(UserWarning, match=r"^x: row 17 of column 'mass' \(2e\+08\) ") as caught:
        ll.GaussianMixture(2, 2).scale_to(Table(x, ("length", "mass")))
    assert len(caught) == 1
    assert "interquartile ranges from the median" in str(caught[0].message)


@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(5).standard_t(3, size=(2000, 2)),
        np.random.default_rng(6).lognormal(size=(2000, 2)),
        np.random.default_rng(7).normal(size=(300, 1)) + 50 * (np.arange(300) % 2)[:, None],
        np.where(np.random.default_rng(8).random((300, 1)) < 0.9, 0.0, 5.0),
        np.array([[1.0], [2.0]]),
    ],
    ids=["t", "lognormal", "two clusters", "mostly zero", "two rows"],
)
def test_ordinary_columns_are_no_cause_for_a_warning(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.GaussianMixture(x.shape[1], 2).scale_to(torch.from_numpy(x))


# ---- starting values ----------------------------------------------------------------------------


def clusters(rng, N, missing=0.0):
    """Rows of three clusters, so far apart that their means are beyond doubt, and these means."""
    locs = np.array([[0.0, 0.0], [100.0, 3000.0], [200.0, -3000.0]])
    labels = np.arange(N) % 3
    x = locs[labels] + rng.normal(size=(N, 2)) * [1.0, 30.0]
    lost = rng.random((N, 2)) < missing
    lost[lost.all(1)] = False
    x[lost] = NAN
    return torch.from_numpy(x), locs


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_start_finds_separate_clusters(missing):
    """Cells that are missing are left out, not filled in: means and scales do not shrink."""
    x, locs = clusters(np.random.default_rng(9), 300, missing)
    found = 0
    for seed in range(10):
        values = ll.GaussianMixture(2, 3).scale_to(x).starting_values(x, seed=seed)
        order = values["locs"][:, 0].argsort()
        off = (values["locs"][order] - torch.from_numpy(locs)) / torch.tensor([1.0, 30.0])
        # A pseudo-count of half a row pulls a mean of 100 rows by 0.5 %; 5 standard errors.
        found += bool((off.abs() < 0.005 * torch.tensor([100, 100]) + 5 / 70**0.5).all())
        assert values["weights"].sum().item() == pytest.approx(1)
    assert found >= 8


def test_starts_of_shuffled_rows_are_as_good():
    x, _ = clusters(np.random.default_rng(10), 150)
    model = ll.GaussianMixture(2, 3).scale_to(x)
    best = []
    for rows in (x, x.flip(0), x[torch.randperm(150)]):
        starts = [model.starting_values(rows, seed=seed) for seed in range(5)]
        best.append(max(log_joint(model, values, rows) for values in starts))
    assert max(best) - min(best) < 1e-3


def test_a_start_is_near_the_maximum_of_the_likelihood(eruptions):
    from sklearn.mixture import GaussianMixture

    x = eruptions.x
    peer = GaussianMixture(2, covariance_type="diag", n_init=5, random_state=0).fit(x.numpy())
    model = ll.GaussianMixture(2, 2).scale_to(x)
    starts = [model.starting_values(x, seed=seed) for seed in range(3)]
    best = max(log_joint(model, values, x, site="x") for values in starts)
    assert 0 <= peer.score(x.numpy()) - best / len(x) < 0.03


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_a_seed_fixes_a_start_and_another_gives_another(init, eruptions):
    model = ll.GaussianMixture(2, 3, init=init).scale_to(eruptions)
    before = torch.get_rng_state()
    one, again, other = (model.starting_values(eruptions, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(one[site], again[site]) for site in one)
    assert not torch.allclose(one["locs"], other["locs"])
    assert torch.equal(torch.get_rng_state(), before)


def test_far_rows_are_chosen_by_squared_distance():
    """Of two rows left, at distances 1 and 3, the far one is chosen nine times in ten."""
    y = torch.tensor([[0.0], [1.0], [-3.0]], dtype=torch.float64)
    counts = np.zeros(2)
    for seed in range(3000):
        chosen = gmm_starts.far_rows(
            y, torch.ones(3).double(), 2, torch.Generator().manual_seed(seed)
        )[:, 0]
        if chosen[0] == 0:
            counts[int(chosen[1] == -3)] += 1
    share, total = counts[1] / counts.sum(), counts.sum()
    assert total == pytest.approx(1000, abs=150)
    assert abs(share - 0.9) < 4.5 * math.sqrt(0.9 * 0.1 / total)


COVARIANCES = ["full", "tied", "diag", "spherical"]


def matrices(point):
    """Covariances (K, D, D) of a start."""
    spreads = point.spreads
    return (spreads if spreads.dim() == 3 else spreads.diag_embed()).numpy()


def normal_joint(y, weights, locs, covariances):
    """Log-joints (N, K) of the cells that are there, one row and label at a time."""
    joint = np.tile(np.log(weights), (len(y), 1))
    for n, row in enumerate(y):
        seen = ~np.isnan(row)
        for k in range(len(weights)):
            if seen.any():
                part = covariances[k][np.ix_(seen, seen)]
                joint[n, k] += stats.multivariate_normal(locs[k, seen], part).logpdf(row[seen])
    return joint


def shaped(moments, held, covariance):
    """Covariances of the shape that was asked for, nearest to those of single components."""
    if covariance == "tied":
        return np.repeat(np.average(moments, 0, held)[None], len(held), 0)
    if covariance == "full":
        return moments
    variances = np.array([np.diag(m) for m in moments])
    if covariance == "spherical":
        variances = np.repeat(variances.mean(1, keepdims=True), variances.shape[1], 1)
    return np.array([np.diag(v) for v in variances])


def em_step(y, counts, at, covariance):
    """The point a step leads to, and the log-likelihood before it."""
    moments = gmm_em.expected(at, y, counts)
    return gmm_em.maximum(moments, covariance, pseudo=0.5), float(moments.log_likelihood)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_step_of_expectation_maximisation_by_hand(covariance):
    """Missing cells get their conditional mean and covariance; half a pseudo-row is added."""
    rng = np.random.default_rng(11)
    y, counts = rows_of(rng, 20, 3, missing=0.3), rng.integers(1, 4, size=20).astype(float)
    seeds = torch.from_numpy(rng.normal(size=(3, 3)))
    start = gmm_starts.around(seeds, covariance)
    rows = torch.from_numpy(y), torch.from_numpy(counts)
    at = em_step(*rows, em_step(*rows, start, covariance)[0], covariance)[0]
    again, height = em_step(*rows, at, covariance)
    weights, locs, covariances = at.log_weights.exp().numpy(), at.locs.numpy(), matrices(at)
    joint = normal_joint(y, weights, locs, covariances)
    assert height == pytest.approx(counts @ logsumexp(joint, axis=1))
    odds = counts[:, None] * np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    held = odds.sum(0) + 0.5
    np.testing.assert_allclose(again.log_weights.exp(), held / (counts.sum() + 1.5))
    means, moments = np.zeros((3, 3)), np.zeros((3, 3, 3))
    for k in range(3):
        first, second = np.zeros(3), 0.5 * 0.25 * np.eye(3)
        for row, share in zip(y, odds[:, k], strict=True):
            seen = ~np.isnan(row)
            whole, rest = np.where(seen, row, 0.0), np.zeros((3, 3))
            lost, blocks = np.ix_(~seen, ~seen), covariances[k]
            slope = blocks[np.ix_(~seen, seen)] @ np.linalg.inv(blocks[np.ix_(seen, seen)])
            whole[~seen] = locs[k, ~seen] + slope @ (row - locs[k])[seen]
            rest[lost] = blocks[lost] - slope @ blocks[np.ix_(seen, ~seen)]
            first += share * whole
            second += share * (np.outer(whole, whole) + rest)
        means[k] = first / held[k]
        moments[k] = second / held[k] - np.outer(means[k], means[k])
    np.testing.assert_allclose(again.locs, means, rtol=1e-9, atol=1e-9)
    expected = shaped(moments, held, covariance)
    np.testing.assert_allclose(matrices(again), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
@settings(max_examples=15)
@given(SEEDS, st.integers(1, 4), st.floats(0, 0.4))
def test_no_step_of_expectation_maximisation_goes_down(covariance, seed, K, missing):
    """The likelihood, with half a pseudo-row a component, never falls."""
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rows_of(rng, 40, 2, missing))
    y = (y - y.nanmean(0)) / torch.from_numpy(np.nanstd(y.numpy(), 0))
    at, counts, previous = gmm_starts.around(y[:K].nan_to_num(0.0), covariance), None, -math.inf
    counts = torch.ones(len(y), dtype=torch.float64)
    for _ in range(8):
        at = em_step(y, counts, at, covariance)[0]
        spreads = torch.from_numpy(matrices(at))
        value = float(gmm_em.expected(at, y).log_likelihood)
        inverse = torch.linalg.inv(spreads)
        square = (at.locs.unsqueeze(1) @ inverse @ at.locs.unsqueeze(-1)).flatten()
        square = square + 0.25 * inverse.diagonal(dim1=1, dim2=2).sum(1)
        pseudo = at.log_weights - 0.5 * (torch.logdet(spreads) + square)
        value += 0.5 * float(pseudo.sum())
        assert value > previous - 1e-9
        previous = value


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_starts_do_not_depend_on_the_order_of_rows_or_on_how_they_are_counted(covariance):
    x, _ = clusters(np.random.default_rng(12), 60, missing=0.1)
    weights = torch.arange(60) % 3
    model = ll.GaussianMixture(2, 3, covariance=covariance)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = []
    for rows, counts in (
        (x, weights),
        (x[order], weights[order]),
        (x.repeat_interleave(weights, 0), None),
    ):
        model.scale_to(rows, counts)
        found.append(model.starting_values(rows, counts, seed=3))
    for other in found[1:]:
        for site, value in found[0].items():
            torch.testing.assert_close(other[site], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_start_is_a_value_of_every_latent(covariance):
    x, _ = clusters(np.random.default_rng(13), 60, missing=0.1)
    model = ll.GaussianMixture(2, 3, covariance=covariance).scale_to(x)
    trace = poutine.trace(model).get_trace(x)
    values = model.starting_values(x)
    for site, value in values.items():
        assert value.shape == trace.nodes[site]["value"].shape
        assert trace.nodes[site]["fn"].support.check(value).all()
    assert set(values) == set(model.dims) - {"x"}


@pytest.mark.parametrize("seed", range(5))
def test_two_components_on_one_cluster_do_not_stay_there(seed):
    """Of six clusters each gets a component, where a single set of seeds often shares some."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [8, 0], [0, 8], [8, 8], [16, 4], [-8, 4]])
    x = torch.from_numpy(centres[np.arange(240) % 6] + rng.normal(size=(240, 2)))
    values = ll.GaussianMixture(2, 6).scale_to(x).starting_values(x, seed=seed)
    nearest = torch.cdist(torch.from_numpy(centres).double(), values["locs"]).min(1)
    assert (nearest.values < 1).all()


@pytest.mark.filterwarnings("ignore:x. (constant|all)")
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize(
    "x",
    [
        torch.ones(10, 2),
        torch.cat([torch.ones(10, 1), torch.randn(10, 1)], 1),
        torch.randn(3, 2).repeat(4, 1),
        torch.randn(4, 2),
        torch.tensor([[0.0, NAN], [NAN, 1.0], [2.0, NAN], [NAN, NAN], [1.0, 2.0]]),
        1e-200 * torch.randn(10, 2).double(),
    ],
    ids=["equal rows", "constant column", "duplicates", "K = N", "missing", "tiny"],
)
def test_starts_are_finite_whatever_the_rows(init, x):
    model = ll.GaussianMixture(2, 4, init=init).scale_to(x)
    for seed in range(3):
        values = model.starting_values(x, seed=seed)
        assert all(value.isfinite().all() for value in values.values())
        assert (values["scales"] > 0).all()
        assert (values["weights"] > 0).all()
        assert math.isfinite(log_joint(model, values, x))


def test_many_rows_are_thinned_by_chance():
    """Every second row from one cluster: rows at even distances would see half of them."""
    x = torch.randn(40_000, 1) + 50 * (torch.arange(40_000) % 2)[:, None]
    values = ll.GaussianMixture(1, 2).scale_to(x).starting_values(x)
    torch.testing.assert_close(
        values["locs"].sort(0).values, torch.tensor([[0.0], [50.0]]), atol=0.1, rtol=0
    )


# ---- rows and draws -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [gmm._CHUNK, 1, 40])
def test_labels_and_densities_are_averages_over_draws(chunk, monkeypatch):
    monkeypatch.setattr(gmm, "_CHUNK", chunk)
    rng = np.random.default_rng(12)
    x, draws = rows_of(rng, 9, 2, missing=0.2), latents(rng, 3, 2, batch=(7,))
    model = ll.GaussianMixture(2, 3).scale_to(torch.from_numpy(x))
    spread = model.spread.numpy()
    each = np.stack(
        [joint_by_hand(x, {k: v[s] for k, v in draws.items()}, spread) for s in range(7)]
    )  # (S, N, K)
    odds = np.exp(each - logsumexp(each, axis=2, keepdims=True)).mean(0)
    log_prob = logsumexp(each, axis=(0, 2)) - np.log(7)
    np.testing.assert_allclose(model.responsibilities(torch.from_numpy(x), draws), odds)
    found = model.log_prob(torch.from_numpy(x), draws)
    np.testing.assert_allclose(found, log_prob, rtol=1e-10, atol=1e-10)
    columns = model.label_rows(draws, torch.from_numpy(x))
    names = ["component", "probability_0", "probability_1", "probability_2", "log_prob"]
    assert list(columns) == names
    np.testing.assert_array_equal(columns["component"], odds.argmax(1))
    np.testing.assert_allclose(columns["probability_1"], odds[:, 1])
    assert torch.equal(columns["log_prob"], found)


def test_no_rows_have_no_labels():
    model, draws = ll.GaussianMixture(2, 3), latents(np.random.default_rng(13), 3, 2, (4,))
    assert model.responsibilities(torch.zeros(0, 2), draws).shape == (0, 3)
    assert model.log_prob(torch.zeros(0, 2), draws).shape == (0,)


def test_the_predictive_density_integrates_to_one_in_the_units_of_the_data():
    x = 1e6 * torch.randn(60, 1, dtype=torch.float64) + 3e7
    model = ll.GaussianMixture(1, 2).scale_to(x)
    draws = latents(np.random.default_rng(14), 2, 1, (5,))
    draws = draws | {"locs": 3e7 + 1e6 * draws["locs"], "scales": 1e6 * draws["scales"]}
    grid = torch.linspace(0, 6e7, 20_001, dtype=torch.float64)
    density = model.log_prob(grid[:, None], draws).exp()
    assert (density.sum() * (grid[1] - grid[0])).item() == pytest.approx(1, abs=1e-6)


def test_the_posterior_scores_new_rows_as_the_model_does(posterior):
    x = ll.data.simulate.eruptions(20, seed=7)
    total = posterior.log_prob(x, num_samples=4000)
    by_row = posterior.model.log_prob(x, posterior.sample(4000))
    assert total.value == pytest.approx(by_row.sum().item(), abs=5 * 2**0.5 * total.se)


# ---- how many components ------------------------------------------------------------------------


@settings(max_examples=20)
@given(SEEDS)
def test_affinity_is_the_integral_of_the_root_of_both_densities(seed):
    rng = np.random.default_rng(seed)
    locs, scales = rng.normal(size=(3, 2)), rng.uniform(0.3, 3, size=(3, 2))
    trils = torch.from_numpy(scales).diag_embed()
    found = gmm_remarks.affinity(torch.from_numpy(locs), trils)
    np.testing.assert_allclose(found.diagonal(), 1.0)
    np.testing.assert_allclose(found, found.T)
    expected = 1.0
    for d in range(2):
        one, other = (stats.norm(locs[k, d], scales[k, d]) for k in (0, 1))
        expected *= integrate.quad(
            lambda v, p=one, q=other: math.sqrt(p.pdf(v) * q.pdf(v)), -40, 40, points=[0.0]
        )[0]
    assert found[0, 1].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "locs", "expected"),
    [
        ([0.5, 0.5], [0.0, 5.0], []),
        ([1.0], [0.0], []),
        ([0.985, 0.015], [0.0, 5.0], ["component 1 holds fewer than 2 rows .* 1.1 of 2"]),
        ([0.5, 0.5], [0.0, 0.01], ["components 0 and 1 are the same .* 1.0 of 2"]),
        ([0.25, 0.25, 0.5], [0.0, 0.0, 9.0], ["components 0 and 1 are the same .* 2.0 of 3"]),
        ([0.98, 0.01, 0.01], [0.0, 9.0, 9.0], ["1 holds .*, component 2 holds .* rows .eff"]),
    ],
)
def test_components_that_are_none_are_remarked_on(weights, locs, expected):
    K, S = len(weights), 3
    model = ll.GaussianMixture(1, K).scale_to(torch.arange(100.0)[:, None])
    draws = {
        "weights": torch.tensor(weights).expand(S, K),
        "locs": torch.tensor(locs)[:, None].expand(S, K, 1),
        "scales": torch.ones(S, K, 1),
    }
    remarks = model.remarks(draws)
    assert len(remarks) == len(expected)
    for remark, text in zip(remarks, expected, strict=True):
        assert re.search(text, remark)


def test_a_sound_fit_is_not_remarked_on(posterior):
    assert posterior.model.remarks(posterior.sample(500)) == []
    assert not any("component" in reason for reason in posterior.check().reasons)


def test_more_components_than_clusters_are_not_for_use():
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fit(ll.GaussianMixture(2, 3), x, max_steps=800).check(1000).level != "use"


# ---- fits ---------------------------------------------------------------------------------------


def test_a_fit_finds_the_truth_behind_the_data(posterior):
    draws = posterior.sample(2000)
    order = draws["locs"].mean(0)[:, 0].argsort()
    truth = {
        "weights": [0.36, 0.64],
        "locs": [[2.04, 54.5], [4.29, 80.0]],
        "scales": [[0.27, 5.9], [0.41, 6.0]],
    }
    for site, value in truth.items():
        mean, sd = draws[site].mean(0)[order], draws[site].std(0)[order]
        assert ((mean - torch.tensor(value)).abs() < 4 * sd).all()


def test_a_fit_with_missing_cells_finds_it_too(posterior):
    """One cell in five is lost: means stay, and are less certain."""
    x = ll.data.simulate.eruptions(200).x.clone()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.2] = NAN
    lossy = fit(ll.GaussianMixture(2, 2), x)
    draws, whole = lossy.sample(2000)["locs"], posterior.sample(2000)["locs"]
    draws, whole = (d[:, d.mean(0)[:, 0].argsort()] for d in (draws, whole))
    truth = torch.tensor([[2.04, 54.5], [4.29, 80.0]])
    assert ((draws.mean(0) - truth).abs() < 4 * draws.std(0)).all()
    assert (draws.std(0) / whole.std(0)).mean() > 1.02
    values = {site: value[0] for site, value in lossy.sample(1).items()}
    seen = log_joint(lossy.model, values, x, site="x")
    by_hand = joint_by_hand(x.numpy(), values, lossy.model.spread.numpy())
    assert seen == pytest.approx(logsumexp(by_hand, axis=1).sum(), rel=1e-9)


def test_a_mixture_of_one_is_fitted_checked_and_stored(tmp_path):
    """A simplex of one has no freedom: what is left is a normal, whose posterior is known."""
    x = ll.data.simulate.eruptions(100)
    one = fit(ll.GaussianMixture(2, 1), x)
    draws = one.sample(4000)
    assert (draws["weights"] == 1).all()
    mean, sd = x.x.mean(0), x.x.std(0)
    se = sd / len(x) ** 0.5
    assert ((draws["locs"].mean(0)[0] - mean).abs() < 0.1 * se).all()
    torch.testing.assert_close(draws["locs"].std(0)[0], se, rtol=0.06, atol=0)
    torch.testing.assert_close(draws["scales"].mean(0)[0], sd, rtol=0.03, atol=0)
    verdict = one.check()
    assert verdict.level != "do not use"
    assert "KL to prior, weights" not in verdict.evidence  # there is nothing to learn of it
    table = one.summary()
    assert table["site"].tolist() == ["weights", *["locs"] * 2, *["scales"] * 2]
    assert table["index"].tolist()[1:3] == ["0, eruptions", "0, waiting"]
    assert not table.isna().any(axis=None)
    one.save(tmp_path)
    again = ll.load(tmp_path)
    assert all(torch.equal(value, draws[site]) for site, value in again.sample(4000).items())
    assert again.check() == verdict
    assert (one.model.responsibilities(x, draws) == 1).all()


def test_a_stored_mixture_keeps_its_units(posterior, tmp_path):
    posterior.save(tmp_path)
    again = ll.load(tmp_path)
    for name, buffer in posterior.model.named_buffers():
        assert torch.equal(dict(again.model.named_buffers())[name], buffer)
    x = ll.data.simulate.eruptions(5, seed=3)
    draws = posterior.sample(10)
    assert torch.equal(again.model.log_prob(x, draws), posterior.model.log_prob(x, draws))


# ---- covariances, flat priors, rows that count more than once -----------------------------------

FAITHFUL = Path(__file__).parents[2] / "shared" / "data" / "classic" / "faithful.csv"
MAXIMA = [(1, 1, -1289.797), (2, 1, -1130.264)]
SLOW_MAXIMA = [(3, 4, -1119.214), (4, 10, -1114.687)]


@pytest.mark.skipif(not FAITHFUL.exists(), reason="the shared data are not here")
@pytest.mark.parametrize(
    ("K", "num_restarts", "maximum"),
    [*MAXIMA, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_MAXIMA)],
)
def test_with_flat_priors_a_point_is_the_maximum_of_the_likelihood(K, num_restarts, maximum):
    """Old Faithful, as published (one part in 1e3 of a nat for K = 4, from best of ten starts)."""
    x = ll.data.load(FAITHFUL, columns=["eruptions", "waiting"])
    model = ll.GaussianMixture(2, K, covariance="full", prior="flat")
    point = ll.fit(model, x, guide="point", num_restarts=num_restarts, progress=False)
    log_likelihood = float(point.model.log_prob(x, point.sample(1)).sum())
    assert log_likelihood == pytest.approx(maximum, abs=1e-3)
    assert point.elbo.value == pytest.approx(log_likelihood, abs=1e-6)


def values_of(model, rng, x):
    """A draw of every latent from the prior, in the units of the data."""
    torch.manual_seed(int(rng.integers(2**31)))
    nodes = poutine.trace(model).get_trace(size=1).nodes
    return {site: nodes[site]["value"] for site in model.dims if site != "x"}


def covariances_by_hand(model, values):
    """Covariances (K, D, D): scales around correlations, and the floor."""
    K, D = model.num_components, model.num_features
    scales = np.broadcast_to(
        values["scales"].numpy()[:, None]
        if model.covariance == "spherical"
        else values["scales"].numpy(),
        (K, D),
    )
    unit = model.spread.numpy()
    unit = np.full(D, unit.mean()) if model.covariance == "spherical" else unit
    found = []
    for k in range(K):
        R = np.eye(D)
        if "correlations" in values:
            own = values["correlations"] if model.covariance == "tied" else None
            own = values["correlations"][k] if own is None else own
            L, place = np.eye(D), 0
            for i in range(1, D):  # row by row, what is left of the unit length goes on
                left = 1.0
                for j in range(i):
                    L[i, j] = own[place] * math.sqrt(left)
                    left *= 1 - float(own[place]) ** 2
                    place += 1
                L[i, i] = math.sqrt(left)
            R = L @ L.T
        found.append(np.outer(scales[k], scales[k]) * R + np.diag((1e-3 * unit) ** 2))
    return np.array(found)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("prior", ["weak", "flat"])
@settings(max_examples=10)
@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.floats(0, 0.4))
def test_every_covariance_has_the_density_of_the_docstring(covariance, prior, seed, K, D, missing):
    rng = np.random.default_rng(seed)
    x = rows_of(rng, 12, D)
    model = ll.GaussianMixture(D, K, covariance=covariance, prior=prior)
    model.scale_to(torch.from_numpy(x))
    x[rng.random(x.shape) < missing] = NAN
    values = values_of(model, rng, x)
    weights, locs = values["weights"].numpy(), values["locs"].numpy()
    joint = normal_joint(x, weights, locs, covariances_by_hand(model, values))
    expected = logsumexp(joint, axis=1)
    rows = torch.from_numpy(x)
    seen = log_joint(model, values, rows, site="x")
    assert seen == pytest.approx(expected.sum(), rel=1e-9, abs=1e-8)
    draws = {site: value[None] for site, value in values.items()}
    np.testing.assert_allclose(model.log_prob(rows, draws), expected, rtol=1e-8, atol=1e-8)
    whole = log_joint(model, values, rows)
    if prior == "flat":
        assert whole == pytest.approx(seen, rel=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_many_draws_go_through_at_once(covariance, eruptions):
    model = ll.GaussianMixture(2, 2, covariance=covariance)
    posterior = fit(model, eruptions, max_steps=500)
    assert posterior.pair.vectorised
    axes = posterior.model.exchangeable
    assert set(axes) == {k for k, dims in posterior.model.dims.items() if "component" in dims}
    assert posterior.model.remarks(posterior.sample(50)) == []
    posterior.plot("fit").figure.canvas.draw()
    again = ll.GaussianMixture(**posterior.model.spec()["arguments"])
    assert again.spec() == posterior.model.spec()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_weight_of_two_is_the_row_twice(covariance):
    rng = np.random.default_rng(20)
    x = torch.from_numpy(rows_of(rng, 12, 2, missing=0.2))
    weights = torch.tensor([2.0, 0.0, 1.0] * 4, dtype=torch.float64)
    repeated = x.repeat_interleave(weights.long(), 0)
    one = ll.GaussianMixture(2, 2, covariance=covariance).scale_to(x, weights)
    other = ll.GaussianMixture(2, 2, covariance=covariance).scale_to(repeated)
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])
    values = values_of(one, rng, x)
    trace = poutine.trace(poutine.condition(one, values)).get_trace(x, weights)
    expected = log_joint(other, values, repeated)
    assert trace.log_prob_sum().item() == pytest.approx(expected, rel=1e-10)
    parts = [
        poutine.trace(poutine.condition(one, values))
        .get_trace(x[part], weights[part], size=12)
        .log_prob_sum(lambda name, _: name == "x")
        .item()
        for part in torch.arange(12).split(4)
    ]
    whole = log_joint(other, values, repeated, site="x")
    assert np.mean(parts) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("data", [lambda x, w: {"x": x, "weights": w}, lambda x, w: (x, w)])
def test_a_fit_takes_weights_and_keeps_the_names(data, eruptions):
    weights = torch.ones(200, dtype=torch.float64)
    plain = fit(ll.GaussianMixture(2, 1), eruptions, max_steps=500)
    counted = fit(ll.GaussianMixture(2, 1), data(eruptions, weights), max_steps=500)
    assert counted.names == eruptions.names
    assert counted.elbo.value == pytest.approx(plain.elbo.value, abs=0.01)
    assert counted.summary()["index"].tolist() == plain.summary()["index"].tolist()
    counted.plot("fit")
    small = fit(ll.GaussianMixture(2, 1), data(eruptions, weights), 300, batch_size=50)
    assert small.elbo.value == pytest.approx(plain.elbo.value, abs=5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(5), r"weights: expected shape \(6,\), one for each row of x, got \(5,\)"),
        (torch.tensor([1.0, -1, 1, 1, 1, 1]), "weights: .* got -1 for row 1"),
        (torch.tensor([1.0, NAN, 1, 1, 1, 1]), "weights: .* got nan for row 1"),
        (torch.tensor([1.0, math.inf, 1, 1, 1, 1]), "weights has 1 inf"),
        (torch.zeros(6), "weights: expected at least one above 0"),
        (torch.tensor([1.0, 0, 0, 0, 0, 0]), "2 components for 1 rows with a weight above 0"),
    ],
)
def test_row_45_weights_that_cannot_be(weights, message):
    x = torch.arange(6.0).double()[:, None]
    with pytest.raises(ValueError, match=message):
        fit(ll.GaussianMixture(1, 2), {"x": x, "weights": weights.double()}, max_steps=10)


def test_a_number_in_place_of_weights_is_pointed_out():
    with pytest.raises(TypeError, match="weights: expected a tensor .* write size="):
        ll.GaussianMixture(1, 1)(torch.zeros(3, 1), 10)


@pytest.mark.parametrize("name", ["covariance", "prior"])
def test_a_choice_is_one_of_those_there_are(name):
    with pytest.raises(ValueError, match=f'^{name}: expected ".*" or ".*", got \'round\''):
        ll.GaussianMixture(2, 2, **{name: "round"})


# ---- what the model lends -----------------------------------------------------------------------


PROTOCOLS = [
    "Describes",
    "DrawsFit",
    "Exchangeable",
    "LabelsRows",
    "NamesDims",
    "OffersGuide",
    "Rebuildable",
    "ScalesToData",
    "StartsFrom",
    "ToleratesMissing",
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_mixture_lends_what_it_knows(protocol):
    assert isinstance(ll.GaussianMixture(2, 2), getattr(protocols, protocol))


@pytest.mark.parametrize(
    ("D", "K", "kind"),
    [(1, 1, FullRank), (2, 2, FullRank), (200, 1, FullRank), (100, 2, MeanField)],
)
def test_the_default_guide_has_all_correlations_where_they_are_few(D, K, kind):
    assert type(ll.GaussianMixture(D, K).default_guide()) is kind


def test_a_mixture_is_built_again_from_its_description():
    model = ll.GaussianMixture(3, 4, concentration=0.5, init="random")
    spec = json.loads(json.dumps(model.spec()))
    assert spec["class"] == "GaussianMixture"
    assert ll.GaussianMixture(**spec["arguments"]).spec() == model.spec()


def test_dims_name_every_axis_of_every_site():
    model = ll.GaussianMixture(3, 2)
    trace = poutine.trace(model).get_trace(size=4)
    for site, dims in model.dims.items():
        assert len(dims) == trace.nodes[site]["value"].dim()


def test_few_components_are_favoured_by_a_small_concentration():
    torch.manual_seed(0)
    largest = [
        torch.stack(
            [
                poutine.trace(ll.GaussianMixture(1, 5, concentration=c))
                .get_trace(size=1)
                .nodes["weights"]["value"]
                .max()
                for _ in range(200)
            ]
        ).mean()
        for c in (0.1, 1.0, 10.0)
    ]
    assert largest[0] > largest[1] + 0.1 > largest[2] + 0.2


@pytest.mark.parametrize("D", [1, 2, 3])
def test_a_picture_of_the_fit(D):
    rng = np.random.default_rng(15)
    x = torch.from_numpy(rows_of(rng, 40, D, missing=0.1))
    names = [f"column {d}" for d in range(D)]
    ax = ll.GaussianMixture(D, 2).scale_to(x).plot_fit(latents(rng, 2, D, (5,)), names, x)
    assert ax.get_xlabel() in names
    assert ax.lines
    ax.figure.canvas.draw()


# ---- faults -------------------------------------------------------------------------------------

COUNTS = [0, -1, 2.5, "3", True, None]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["num_features", "num_components"])
def test_row_8_counts_are_whole_numbers_of_at_least_one(name, count):
    arguments = {"num_features": 2, "num_components": 2} | {name: count}
    with pytest.raises(ValueError, match=rf"^{name} must be an int >= 1, got .* \(\w+\)"):
        ll.GaussianMixture(**arguments)


@pytest.mark.parametrize("concentration", [0, -1.0, NAN, math.inf, "1", None, [1.0]])
def test_the_concentration_is_a_positive_number(concentration):
    with pytest.raises(ValueError, match="^concentration: expected a number > 0, got "):
        ll.GaussianMixture(2, 2, concentration=concentration)


def test_the_initialiser_is_one_of_two():
    with pytest.raises(ValueError, match='^init: expected "k-means\\+\\+" or "random", got 5'):
        ll.GaussianMixture(2, 2, init=5)


def test_row_7_more_components_than_rows():
    with pytest.raises(ValueError, match="num_components: .* got 3 components for 2 rows"):
        ll.GaussianMixture(1, 3).scale_to(torch.tensor([[0.0], [1.0]]))


def test_row_22_every_method_names_both_widths():
    model, draws = ll.GaussianMixture(2, 2), latents(np.random.default_rng(16), 2, 2, (3,))
    x = torch.zeros(5, 3)
    calls = {
        "scale_to": lambda: model.scale_to(x),
        "starting_values": lambda: model.starting_values(x),
        "responsibilities": lambda: model.responsibilities(x, draws),
        "log_prob": lambda: model.log_prob(x, draws),
        "forward": lambda: model(x),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"\(N, 2\) to match num_features=2, got \(5, 3\)"):
            call()


def test_a_refused_table_leaves_the_model_as_it_was():
    model = ll.GaussianMixture(2, 3).scale_to(torch.randn(10, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for wrong in (torch.randn(10, 3), torch.randn(2, 2), torch.full((5, 2), NAN)):
        with pytest.raises(ValueError, match=r"^x|num_components"):
            model.scale_to(wrong)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
