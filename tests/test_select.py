"""Selection scores each value on data that its fits have not seen, and says how sure it is."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import latentlab as ll
from latentlab.diagnostics import Estimate
from latentlab.inference.sandbox import stream
from latentlab.inference.select import Candidate, Selection

QUICK = {"num_restarts": 1, "max_steps": 400, "progress": False}


def rows_of(num_rows, seed=0):
    r = np.random.default_rng(seed)
    return torch.from_numpy(r.normal(size=(num_rows, 1)) + 8 * (np.arange(num_rows) % 2)[:, None])


@pytest.fixture(scope="module")
def found():
    x = rows_of(80)
    return ll.select(ll.GaussianMixture, x, num_components=[1, 2], num_folds=2, settings=QUICK)


class Normal:
    """A normal of known scale around a mean whose prior has this scale: all in closed form."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x=None, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, self.scale))
        with ll.rows(x, size):
            return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def normal(scale):
    return Normal(scale).__call__


def test_two_clusters_have_two_components(found):
    assert found.best == found.highest == 2
    one, two = found.candidates
    assert one.difference.value < -3 * one.difference.se
    assert one.bic_difference.value > 3 * one.bic_difference.se
    assert (two.difference, two.bic_difference) == (Estimate(0.0, 0.0), Estimate(0.0, 0.0))
    assert [c.num_numbers for c in found.candidates] == [2, 5]


def test_the_bic_is_that_of_the_mode(found):
    """With one component and 80 rows the mode is next to the maximum of the likelihood."""
    x = rows_of(80).numpy()
    by_row = stats.norm(x.mean(), x.std()).logpdf(x)[:, 0]
    bic = found.candidates[0].bic
    assert bic.value == pytest.approx(-2 * by_row.sum() + 2 * math.log(80), abs=0.5)
    assert bic.se == pytest.approx(2 * math.sqrt(80) * by_row.std(ddof=1), rel=0.1)


def test_held_out_scores_are_the_predictive_density_in_closed_form():
    x = torch.from_numpy(np.random.default_rng(1).normal(2.0, 1.0, size=12))
    found = ll.select(normal, x, scale=[0.1, 5.0], num_folds=3, settings=QUICK)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(stream(0, "folds")))
    for candidate in found.candidates:
        expected = np.zeros(12)
        for fold in (order[f::3] for f in range(3)):
            rest = np.delete(x.numpy(), fold.numpy())
            precision = candidate.value**-2 + len(rest)
            spread = math.sqrt(1 + 1 / precision)
            expected[fold] = stats.norm(rest.sum() / precision, spread).logpdf(x[fold])
        held_out = candidate.held_out
        rows_se = math.sqrt(12) * expected.std(ddof=1)
        assert held_out.se >= rows_se * 0.9
        monte_carlo = math.sqrt(max(held_out.se**2 - rows_se**2, 0)) + 0.03
        assert held_out.value == pytest.approx(expected.sum(), abs=5 * monte_carlo)
    assert found.best == 5.0


def test_differences_are_taken_datum_by_datum(found):
    one = found.candidates[0]
    assert one.difference.value == pytest.approx(
        one.held_out.value - found.candidates[1].held_out.value
    )
    assert one.difference.se < math.hypot(one.held_out.se, found.candidates[1].held_out.se)


def candidate(value, gap, se, bic=0.0):
    held_out = None if gap is None else Estimate(-100 + gap, 9.0)
    difference = None if gap is None else Estimate(gap, se)
    return Candidate(value, held_out, difference, Estimate(bic, 1.0), Estimate(0.0, 0.0), 1, "use")


@pytest.mark.parametrize(
    ("gaps", "best"),
    [
        ([(-5.0, 1.0), (-0.9, 1.0), (0.0, 0.0)], 1),
        ([(-5.0, 1.0), (-1.1, 1.0), (0.0, 0.0)], 2),
        ([(0.0, 0.0), (-0.1, 1.0), (-0.2, 1.0)], 0),
        ([(None, None), (None, None), (None, None)], 1),
    ],
)
def test_the_first_within_one_standard_error_is_taken(gaps, best):
    bics = [3.0, 1.0, 2.0]
    candidates = [candidate(i, *gap, bics[i]) for i, gap in enumerate(gaps)]
    assert Selection("k", tuple(candidates), 10, 5).best == best


def test_it_is_shown_as_text_frame_and_picture(found):
    text = str(found)
    assert text.startswith("num_components = 2: the first within one standard error")
    assert "±" in text
    frame = found.frame()
    assert frame["num_components"].tolist() == [1, 2]
    assert not frame.isna().any(axis=None)
    assert (frame.filter(like="_se").iloc[0] > 0).all()
    ax = found.plot()
    assert "components" in ax.get_xlabel()
    ax.figure.canvas.draw()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answer(found):
    again = ll.select(
        ll.GaussianMixture, rows_of(80), num_components=[1, 2], num_folds=2, settings=QUICK
    )
    assert again == found


@pytest.mark.slow
def test_other_keywords_and_names_are_handed_on():
    x = ll.data.simulate.eruptions(40)
    made = []

    def make(num_features, covariance, **settings):
        made.append((num_features, covariance))
        return ll.GaussianMixture(num_features, 1, covariance=covariance, **settings)

    fixed = functools.partial(make, prior="weak")
    kinds = ["spherical", "diag"]
    found = ll.select(fixed, x, covariance=kinds, num_folds=2, settings=QUICK)
    assert found.best == "diag"
    assert set(made) == {(2, "spherical"), (2, "diag")}


@pytest.mark.slow
def test_weights_are_parted_with_their_rows():
    x = rows_of(40)
    weights = torch.ones(40, dtype=torch.float64)
    settings = {"settings": QUICK, "num_folds": 2}
    plain = ll.select(ll.GaussianMixture, x, num_components=[1], **settings)
    data = {"x": x, "weights": weights}
    counted = ll.select(ll.GaussianMixture, data, num_components=[1], **settings)
    one, other = plain.candidates[0].held_out, counted.candidates[0].held_out
    assert one.value == pytest.approx(other.value, abs=0.05)


def test_one_datum_cannot_be_parted():
    """Rows that depend on each other: there is a BIC, and no held-out score."""

    def chain(scale):
        def model(x=None):
            rate = pyro.sample("rate", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(rate, 1.0).expand([20]).to_event(1), obs=x)

        return model

    found = ll.select(chain, torch.ones(20).double(), scale=[1.0, 2.0], settings=QUICK)
    assert all(c.held_out is None and c.verdict == "-" for c in found.candidates)
    assert all(math.isfinite(c.bic.value) and math.isnan(c.bic.se) for c in found.candidates)
    assert "nothing could be held out" in str(found)
    assert found.frame()["held_out"].isna().all()
    found.plot().figure.canvas.draw()


def test_latents_of_each_row_have_no_bic():
    def model(scale):
        def local(x=None, size=None):
            with ll.rows(x, size):
                z = pyro.sample("z", dist.Normal(0.0, scale))
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return local

    found = ll.select(model, rows_of(20)[:, 0], scale=[1.0], num_folds=2, settings=QUICK)
    assert found.candidates[0].bic is None
    assert found.candidates[0].held_out.se > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one keyword with several values, .* got none"),
        ({"a": [1], "b": [2]}, "exactly one keyword with several values, .* got a and b"),
        ({"num_components": []}, "num_components: expected different values"),
        ({"num_components": [2, 2]}, "num_components: expected different values"),
        ({"num_components": [1], "num_folds": 1}, "num_folds must be an int >= 2"),
        ({"num_components": [1], "num_folds": 30}, "num_folds: expected at most the 20 data"),
        ({"num_components": [1], "seed": -1}, "seed must be an int >= 0"),
        ({"num_components": [0, 1]}, "num_components must be an int >= 1"),
    ],
)
def test_faults_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ll.select(ll.GaussianMixture, rows_of(20), settings=QUICK, **arguments)


@pytest.mark.slow
def test_a_weight_of_two_is_the_row_twice():
    """In the score, its error, and the penalty, not in the fit alone."""
    x = ll.data.simulate.eruptions(num_rows=60)
    times = torch.ones(60, dtype=torch.long)
    times[::3] = 3
    again = x.x[torch.arange(60).repeat_interleave(times)]
    settings = QUICK | {"max_steps": 4000}
    model = functools.partial(ll.GaussianMixture, num_features=2, prior="flat")
    scores = [
        ll.select(model, data, "point", num_components=[1], num_folds=2, settings=settings)
        for data in ({"x": x.x, "weights": times.double()}, again)
    ]
    weighted, repeated = (found.candidates[0] for found in scores)
    assert weighted.bic.value == pytest.approx(repeated.bic.value, abs=0.02)
    assert weighted.bic.se == pytest.approx(repeated.bic.se, rel=1e-3)
    assert weighted.held_out.se == pytest.approx(repeated.held_out.se, rel=0.25)


def test_the_density_of_a_weighted_row_is_the_log_of_a_mean_once():
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    times = torch.ones(20, dtype=torch.long)
    times[:5] = 4
    posterior = ll.fit(ll.GaussianMixture(num_features=1, num_components=1), x, **QUICK)
    weighted = posterior.log_prob({"x": x, "weights": times.double()}, seed=1)
    repeated = posterior.log_prob(x.repeat_interleave(times, 0), seed=1)
    assert weighted.value == pytest.approx(repeated.value, rel=1e-10)
    assert weighted.se == pytest.approx(repeated.se, rel=1e-10)
    none = posterior.log_prob({"x": x, "weights": torch.tensor([1.0, 1] + [0.0] * 18)}, seed=1)
    assert none.value == pytest.approx(posterior.log_prob(x[:2], seed=1).value, rel=1e-10)


@pytest.mark.slow
def test_a_chain_is_judged_by_its_steps():
    """One sequence is one datum, but the BIC goes by its observations, as hmmlearn's does."""
    counts = torch.poisson(
        torch.where(torch.arange(120) % 40 < 20, 2.0, 9.0),
        generator=torch.Generator().manual_seed(0),
    ).double()[:, None]
    model = functools.partial(ll.HiddenMarkovModel, emissions="poisson", prior="flat")
    found = ll.select(model, [counts], num_states=[1, 2, 3], settings=QUICK)
    one = found.candidates[0]
    rate = float(counts.mean())
    expected = -2 * stats.poisson.logpmf(counts, rate).sum() + math.log(120)
    assert one.bic.value == pytest.approx(expected, abs=0.01)
    assert found.best == 2


def test_settings_of_the_fit_have_a_place_of_their_own():
    with pytest.raises(TypeError, match=r"^max_steps: .*settings=\{'max_steps': ...\}"):
        ll.select(ll.GaussianMixture, torch.zeros(9, 2), num_components=[1, 2], max_steps=300)


def test_a_model_that_draws_its_rows_again_has_nothing_to_compare():
    with pytest.raises(ValueError, match="^model: Autoencoder .* no density of new rows"):
        ll.select(ll.Autoencoder, torch.randn(20, 3), latent_dim=[1, 2])


def test_networks_are_compared_by_held_out_score_alone():
    x = torch.randn(60, 1) @ torch.randn(1, 4) + 0.1 * torch.randn(60, 4)
    model = functools.partial(ll.VariationalAutoencoder, hidden_dims=(8,))
    settings = {"max_steps": 60, "progress": False}
    found = ll.select(model, x, latent_dim=[1, 2], num_folds=2, settings=settings)
    assert [c.bic for c in found.candidates] == [None, None]
    assert all(math.isfinite(c.held_out.value) for c in found.candidates)
