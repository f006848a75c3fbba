"""Missing cells of sequences are what all other cells make of them, under every emission."""

import pandas as pd
import pyro.distributions as dist
import pytest
import torch

from latentlab import HiddenMarkovModel
from latentlab.distributions import Cells, Parts
from latentlab.distributions.emissions import GaussianEmission
from latentlab.distributions.normal_row import NormalRow

NAN = torch.nan
CODES = ["gaussian", "poisson", "bernoulli", "categorical"]


def prior_draws(model, S=3, seed=0):
    """Parameters of S draws from the prior, in which states differ."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        parts = [model._draw_latents() for _ in range(S)]
    return {site: torch.stack([part[site].double() for part in parts]) for site in parts[0]}


def moments_on_a_grid(model, draws, x, place, grid):
    """Mean and sd of one cell by running through its values: no formula of the model's."""
    first = second = 0.0
    S = len(next(iter(draws.values())))
    for s in range(S):
        one = {site: value[s : s + 1] for site, value in draws.items()}
        log_p = []
        for part in grid.split(500):
            full = x.expand(len(part), *x.shape).clone()
            full[:, *place] = part
            log_p.append(model.log_prob(full, one))
        p = torch.cat(log_p).softmax(0)
        first, second = first + (p * grid).sum() / S, second + (p * grid.square()).sum() / S
    return first, (second - first.square()).sqrt()


GRIDS = {
    "gaussian": torch.linspace(-40, 40, 8001).double(),
    "poisson": torch.arange(150).double(),
    "bernoulli": torch.arange(2).double(),
}


@pytest.mark.parametrize(
    ("emissions", "columns", "row"),
    [
        ("gaussian", ["gaussian"] * 2, [0.4, -1.0]),
        ("gaussian_full", ["gaussian"] * 2, [0.4, -1.0]),
        ("poisson", ["poisson"] * 2, [0.0, 3.0]),
        ("bernoulli", ["bernoulli"] * 2, [0.0, 1.0]),
        (CODES, CODES, [0.3, 2.0, 1.0, 2.0]),
        (
            ["poisson", GaussianEmission(2, "full"), "bernoulli"],
            ["poisson", "gaussian", "gaussian", "bernoulli"],
            [1.0, 0.5, -0.5, 0.0],
        ),
    ],
)
def test_missing_cells_are_expected_where_the_density_sums_to(emissions, columns, row):
    codes = 3 if "categorical" in emissions else None
    model = HiddenMarkovModel(2, len(columns), emissions=emissions, num_categories=codes)
    draws = prior_draws(model)
    x = torch.tensor([row] * 4).double()
    x[2] = x[2].flip(0) if len(columns) == 2 else x[2]
    x[0, 0], x[1, 1], x[2, :2] = NAN, NAN, NAN
    mean, sd = model.impute(x, draws)
    for t, d in ((0, 0), (1, 1), (2, 0), (2, 1)):
        found = moments_on_a_grid(model, draws, x, (t, d), GRIDS[columns[d]])
        torch.testing.assert_close(mean[0, t, d], found[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(sd[0, t, d], found[1], atol=1e-6, rtol=1e-5)
    there = ~x.isnan()
    assert torch.equal(mean[0][there], x[there])
    assert not sd[0][there].any()


def test_columns_are_filled_by_their_part_in_any_order():
    full = torch.tensor([[1.0, 0.0], [1.6, 1.2]]).expand(1, 1, 2, 2)
    counts = Cells(dist.Poisson(torch.full((1, 1, 1), 9.0)), 1)
    parts = [counts, NormalRow(torch.zeros(1, 1, 2), full)]
    row = Parts(parts, torch.tensor([2, 0, 1]))  # columns: b, counts, a; a and b go together
    mean, sd = row.given_rest(torch.tensor([[NAN, NAN, 1.0]]).double(), torch.tensor([0, 1]))
    torch.testing.assert_close(mean[0, 0], torch.tensor([1.6, 9.0]).double())
    torch.testing.assert_close(sd[0, 0], torch.tensor([1.2, 3.0]).double())


def test_padding_stays_padding_and_other_sequences_do_not_matter():
    model = HiddenMarkovModel(2, 2, emissions="gaussian_full")
    draws = prior_draws(model, S=5)
    short, long = torch.randn(3, 2).double(), torch.randn(7, 2).double()
    short[1, 0], long[6], long[2, 1] = NAN, NAN, NAN
    both = model.impute([short, long], draws)
    for values, alone in zip(both, model.impute(short, draws), strict=True):
        torch.testing.assert_close(values[0, :3], alone[0])
        assert values[0, 3:].isnan().all()
        assert not values[1].isnan().any()


@pytest.mark.parametrize("shift", [0.0, 1e9])
@pytest.mark.parametrize("unit", [1e-150, 1.0, 1e120])
def test_units_and_origin_do_not_matter(unit, shift):
    model = HiddenMarkovModel(2, 2, emissions="gaussian_full")
    draws = prior_draws(model)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    x[2], x[4, 0] = NAN, NAN
    plain = model.impute(x, draws)
    moved = dict(draws, locs=(draws["locs"] + shift) * unit, scales=draws["scales"] * unit)
    other = HiddenMarkovModel(2, 2, emissions="gaussian_full")
    other.emission.center += shift * unit
    other.emission.spread *= unit
    mean, sd = other.impute((x + shift) * unit, moved)
    torch.testing.assert_close(mean / unit - shift, plain.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sd / unit, plain.sd, atol=1e-5, rtol=1e-5)


def test_nothing_missing_is_left_as_it_is():
    model = HiddenMarkovModel(2, 1)
    x = torch.randn(5, 1).double()
    mean, sd = model.impute(x, prior_draws(model))
    assert torch.equal(mean[0], x)
    assert not sd.any()


def test_codes_have_no_mean_and_say_so_only_where_they_are_missing():
    model = HiddenMarkovModel(2, emissions=CODES, num_categories=3)
    draws = prior_draws(model)
    frame = pd.DataFrame([[0.3, 2.0, 1.0, 2.0]] * 3, columns=["a", "b", "c", "kind"])
    frame.loc[1, "b"] = NAN
    assert not model.impute(frame, draws).mean.isnan().any()
    frame.loc[2, ["a", "kind"]] = NAN
    with pytest.raises(ValueError, match="'kind' misses cells, and has no mean"):
        model.impute(frame, draws)


class Tilted:
    """Two columns that depend on each other, by a distribution that does not say how."""

    num_features = 2

    def sites(self):
        return {"locs": dist.Normal(torch.zeros(2), 1.0).to_event(1)}

    def distribution(self, locs):
        tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]]).to(locs)
        return dist.MultivariateNormal(locs, scale_tril=tril)


def test_an_emission_of_your_own_fills_what_it_can():
    model = HiddenMarkovModel(2, emissions=Tilted())
    draws = prior_draws(model)
    x = torch.randn(5, 2).double()
    x[3] = NAN
    mean, sd = model.impute(x, draws)
    odds = model.smooth(x, {k: v[:1] for k, v in draws.items()})[0, 3]
    one = model.impute(x, {k: v[:1] for k, v in draws.items()}).mean[0, 3]
    torch.testing.assert_close(one, odds @ draws["locs"][0])
    assert (sd[0, 3] >= 1).all()
    x[1, 0] = NAN
    with pytest.raises(ValueError, match=r"MultivariateNormal does not say .* given_rest"):
        model.impute(x, draws)
