"""The hidden Markov model is a pair like any other, and exact in what it sums out."""

import itertools
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from oracles import hidden_chain
from scipy import stats

import latentlab as ll
from latentlab.diagnostics import align
from latentlab.distributions import Cells, hmm
from latentlab.models.hmm_chain import stationary
from latentlab.models.hmm_remarks import dwell_times
from latentlab.report.sequences import plot_dwell_times

DATA = Path(__file__).parents[2] / "shared" / "data" / "classic" / "earthquakes.csv"
R = np.random.default_rng(3)
K, T = 3, 6


def counts():
    if not DATA.exists():
        pytest.skip("the earthquake counts are not at hand")
    return np.loadtxt(DATA, delimiter=",", skiprows=1)[:, 1]


def simulate(num_steps, rates, stay=0.9, seed=0):
    r = np.random.default_rng(seed)
    z = [0]
    for _ in range(num_steps - 1):
        z.append(z[-1] if r.random() < stay else int(r.integers(len(rates))))
    return r.poisson(np.asarray(rates)[z]).astype(float), np.array(z)


def prior_values(model, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trace = poutine.trace(model).get_trace(lengths=torch.tensor([T, 2, 4]))
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and name != "x"
        and not name.startswith(("states", "seq"))
        and name != "moves"
    }, trace.nodes["x"]["value"]


def brute_force(model, values, x, length):
    """Everything about one sequence: sums over all K^T paths."""
    data = {name: value[None] for name, value in values.items()}
    initial, moves = (
        v.reshape(v.shape[-n:]) for n, v in zip((1, 2), chain_of(model, data), strict=True)
    )
    rows = model.emission.distribution(**{s: values[s] for s in model.emission.sites()})
    seen = torch.zeros(length, model.num_states).double()
    for step in range(length):
        if not x[step].isnan().all():
            seen[step] = rows.log_prob(x[step])
    return initial, moves, seen, hidden_chain(initial, moves, seen)


def chain_of(model, draws):
    chain = model.chain(draws, ll.data.as_sequences(torch.zeros(1, 2, model.num_features)))
    return chain.initial, chain.transitions


KINDS = {
    "gaussian": {"num_features": 2, "emissions": "gaussian"},
    "gaussian_full": {"num_features": 2, "emissions": "gaussian_full"},
    "poisson": {"emissions": "poisson"},
    "categorical": {"emissions": "categorical", "num_categories": 4},
    "bernoulli": {"num_features": 3, "emissions": "bernoulli"},
    "mixed": {"emissions": ["gaussian", "poisson", "bernoulli"]},
    "stationary": {"emissions": "poisson", "initial": "stationary"},
    "left_right": {"emissions": "poisson", "left_right": True},
}


# ---- the density --------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_sums_over_all_paths(kind, holes):
    model = ll.HiddenMarkovModel(K, **KINDS[kind])
    values, x = prior_values(model)
    if holes:
        x = x.clone()
        x[0, 2], x[2, 1, 0] = torch.nan, torch.nan
    lengths = torch.tensor([T, 2, 4])
    conditioned = poutine.condition(model, data=values)
    trace = poutine.trace(conditioned).get_trace(x, lengths)
    trace.compute_log_prob()
    wanted = [brute_force(model, values, x[b], n)[-1] for b, n in enumerate(lengths.tolist())]
    found = trace.nodes["x"]["log_prob"].numpy()
    np.testing.assert_allclose(found, [chain.log_prob for chain in wanted], rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_all_paths(kind):
    model = ll.HiddenMarkovModel(K, **KINDS[kind])
    values, x = prior_values(model, seed=1)
    x = x.clone()
    x[0, 2], x[2, 1, 0] = torch.nan, torch.nan
    lengths = torch.tensor([T, 2, 4])
    draws = {name: value[None] for name, value in values.items()}
    smoothed, filtered = model.smooth(x, draws, lengths), model.filter(x, draws, lengths)
    paths = model.decode(x, draws, lengths)
    for b, n in enumerate(lengths.tolist()):
        *arrays, wanted = brute_force(model, values, x[b], n)
        np.testing.assert_allclose(smoothed[b, :n], wanted.smoothed, atol=1e-10)
        np.testing.assert_allclose(filtered[b, :n], wanted.filtered, atol=1e-10)
        np.testing.assert_allclose(hmm.pairwise(*arrays), wanted.pairwise, atol=1e-10)
        assert paths[b, :n].tolist() == wanted.best.tolist()
        assert (paths[b, n:] == -1).all()
    drawn = hmm.sample_paths(*arrays, num_samples=20_000)
    codes = (drawn * K ** torch.arange(n - 1, -1, -1)).sum(-1)
    expected = 20_000 * wanted.path_probs
    counts = np.bincount(codes, minlength=K**n)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi2 < likely.sum() - 1 + 5 * np.sqrt(2 * max(likely.sum() - 1, 1))


def test_a_batch_stands_for_the_whole_data_set():
    model = ll.HiddenMarkovModel(2, emissions="poisson")
    values, x = prior_values(model)
    lengths = torch.tensor([T, 2, 4])

    def total(*args):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args)
        trace.compute_log_prob()
        return float(trace.nodes["x"]["log_prob_sum"])

    parts = [total(x[b : b + 1], lengths[b : b + 1], 3) for b in range(3)]
    assert np.mean(parts) == pytest.approx(total(x, lengths))


def test_states_have_no_order():
    """A permutation of rows and columns alike leaves the density, and alignment undoes it."""
    model = ll.HiddenMarkovModel(K, emissions="poisson")
    values, x = prior_values(model)
    draws = {name: value[None] for name, value in values.items()}
    order = [2, 0, 1]
    other = {name: value[:, order] for name, value in draws.items()}
    other["transitions"] = other["transitions"][:, :, order]
    lengths = torch.tensor([T, 2, 4])
    a, b = (model.log_prob(x, d, lengths) for d in (draws, other))
    torch.testing.assert_close(a, b)
    both = {name: torch.cat([draws[name], other[name]]) for name in draws}
    reference = {name: value[0] for name, value in draws.items()}
    aligned = align(both, model.exchangeable, reference).draws
    for name, value in aligned.items():
        torch.testing.assert_close(value[0], value[1])
        torch.testing.assert_close(value[:1], draws[name])


def test_the_stationary_law_is_left_as_it_is():
    moves = torch.from_numpy(R.dirichlet(np.ones(4), (5, 4)))
    law = stationary(moves)
    torch.testing.assert_close((law.unsqueeze(-2) @ moves).squeeze(-2), law)
    torch.testing.assert_close(law.sum(-1), torch.ones(5).double())


def test_a_chain_from_left_to_right_never_goes_back():
    model = ll.HiddenMarkovModel(4, emissions="poisson", left_right=True)
    values, _ = prior_values(model)
    initial, moves = chain_of(model, {name: value[None] for name, value in values.items()})
    assert initial.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    move = moves.reshape(4, 4)
    assert (move == move.triu().tril(1)).all()
    torch.testing.assert_close(move.sum(-1), torch.ones(4).double())
    assert model.exchangeable == {}


def test_stickiness_favours_to_stay():
    draws = [
        torch.stack([prior_values(model, s)[0]["transitions"].diagonal() for s in range(200)])
        for model in (
            ll.HiddenMarkovModel(K, emissions="poisson", stickiness=kappa) for kappa in (0.0, 12.0)
        )
    ]
    for drawn, mean in zip(draws, (1 / 3, 13 / 15), strict=True):
        error = (drawn.mean() - mean) / (drawn.std() / drawn.numel() ** 0.5)
        assert abs(error) < 5


# ---- fits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_states", "initial", "loss"),
    [
        (1, "free", 391.9189),
        pytest.param(2, "free", 341.8787, marks=pytest.mark.slow),
        pytest.param(3, "free", 328.5275, marks=pytest.mark.slow),
        pytest.param(4, "free", 326.285, marks=pytest.mark.slow),
        (2, "stationary", 342.3183),
    ],
)
def test_earthquakes_have_their_maximum(num_states, initial, loss):
    model = ll.HiddenMarkovModel(num_states, emissions="poisson", prior="flat", initial=initial)
    posterior = ll.fit(model, counts(), guide="point", max_steps=2000)
    assert -posterior.elbo.value == pytest.approx(loss, abs=1e-3)
    if num_states == 2:
        rates = posterior.sample(1)["rates"].flatten().sort().values
        assert rates.tolist() == pytest.approx([15.42, 26.02], rel=1e-2)
    if (num_states, initial) == (2, "free"):
        draw = {name: value.squeeze() for name, value in posterior.sample(1).items()}
        order = draw["rates"].argsort()
        moves = draw["transitions"][order][:, order]
        assert [moves[0, 1], moves[1, 0]] == pytest.approx([0.071626, 0.11903], abs=2e-3)


@pytest.mark.slow
def test_the_default_fit_on_earthquakes_is_to_be_used():
    posterior = ll.fit(ll.HiddenMarkovModel(2, emissions="poisson"), counts())
    assert posterior.pair.vectorised
    assert posterior.check().level in ("use", "use with care")
    rates = posterior.sample(2000)["rates"][..., 0].sort(1).values.mean(0)
    assert rates.tolist() == pytest.approx([15.4, 26.0], abs=0.8)


FORMS = simulate(40, [2.0, 15.0])[0], simulate(30, [2.0, 15.0], seed=1)[0]


@pytest.fixture(scope="module")
def fitted():
    model = ll.HiddenMarkovModel(2, emissions="poisson")
    return ll.fit(model, [*FORMS], num_restarts=1, max_steps=500)


def test_a_fit_takes_sequences_in_any_form(fitted):
    assert fitted.pair.vectorised
    wanted = fitted.log_prob([*FORMS])
    padded = np.full((2, 40, 1), np.nan)
    padded[0, :, 0], padded[1, :30, 0] = FORMS
    sequences = ll.data.as_sequences([*FORMS])
    for data in (sequences, (padded, [40, 30]), {"x": padded, "lengths": [40, 30]}):
        args = data if isinstance(data, tuple) else (data,)
        assert fitted.log_prob(*args).value == pytest.approx(wanted.value)
    flat = np.concatenate(FORMS)[:, None]
    assert fitted.log_prob(flat, [40, 30]).value == pytest.approx(wanted.value)


def test_new_sequences_may_have_other_lengths(fitted):
    new = [np.zeros(7), np.zeros(3), np.zeros(5)]
    drawn = fitted.predict(4, new)["x"]
    assert drawn.shape == (4, 3, 7, 1)
    assert drawn.isnan().sum() == 4 * (4 + 2)
    assert fitted.log_prob(new).value < 0
    assert fitted.predict(3, {"size": 2})["x"].shape == (3, 2, 40, 1)


def test_replicates_look_like_the_data(fitted):
    """The mean count per step of replicates has the data's within their spread."""
    drawn = fitted.predict(300)["x"][:, 0].squeeze(-1).mean(1)
    assert abs(drawn.mean() - FORMS[0].mean()) < 4 * drawn.std()


def test_mini_batches_take_sequences():
    data = [simulate(15, [2.0, 15.0], seed=s)[0] for s in range(8)]
    model = ll.HiddenMarkovModel(2, emissions="poisson")
    posterior = ll.fit(model, data, batch_size=4, num_restarts=1, max_steps=450)
    rates = posterior.sample(200)["rates"].sort(1).values.mean(0).flatten()
    assert rates.tolist() == pytest.approx([2.0, 15.0], rel=0.4)


def test_a_saved_posterior_comes_back(fitted, tmp_path):
    fitted.save(tmp_path)
    again = ll.load(tmp_path, data=[*FORMS])
    assert torch.equal(again.sample(5)["rates"], fitted.sample(5)["rates"])
    assert again.check().level == fitted.check().level


def test_names_of_columns_are_kept():
    table = ll.data.Table(torch.from_numpy(R.normal(size=(30, 2))), ("depth", "size"))
    posterior = ll.fit(ll.HiddenMarkovModel(1, 2), table, num_restarts=1, max_steps=420)
    assert posterior.names == ("depth", "size")
    assert "0, depth" in set(posterior.summary()["index"])
    swapped = table.select(["size", "depth"])
    assert posterior.log_prob(swapped).value == pytest.approx(posterior.log_prob(table).value)


class Durations:
    """An emission of a user's own."""

    num_features = 1

    def sites(self):
        return {"means": dist.LogNormal(0.0, 2.0).expand([1]).to_event(1)}

    def distribution(self, means):
        return Cells(dist.Exponential(1 / means), event_dim=1, fill=1.0)


class Tilted:
    """One whose cells depend on each other, and whose distribution function is not known."""

    num_features = 2

    def sites(self):
        return {"locs": dist.Normal(torch.zeros(2), 1.0).to_event(1)}

    def distribution(self, locs):
        return dist.MultivariateNormal(locs, torch.eye(2).to(locs))


def test_an_emission_of_ones_own_is_fitted_like_ours():
    z = simulate(150, [0.0, 1.0], stay=0.95)[1]
    x = np.random.default_rng(1).exponential(np.array([0.2, 20.0])[z])
    model = ll.HiddenMarkovModel(2, emissions=Durations())
    posterior = ll.fit(model, x, num_restarts=1, max_steps=420)
    draws = posterior.sample(100)
    means = draws["means"].mean(0).flatten().sort().values
    assert means.tolist() == pytest.approx([0.2, 20.0], rel=0.5)
    path = posterior.model.decode(x, draws)[0].numpy()
    agree = (path == z).mean()
    assert max(agree, 1 - agree) > 0.95


# ---- what a fit says ----------------------------------------------------------------------------


def test_states_are_bayes_rule_averaged_over_draws(fitted):
    draws = fitted.sample(3)
    x = [FORMS[0][:4], FORMS[1][:3]]
    probs = fitted.model.smooth(x, draws)
    for b, one in enumerate(x):
        wanted = np.zeros((len(one), 2))
        for s in range(3):
            d = {k: v[s].numpy() for k, v in draws.items()}
            joint = {}
            for path in itertools.product(range(2), repeat=len(one)):
                p = d["initial"][path[0]]
                for i, j in itertools.pairwise(path):
                    p = p * d["transitions"][i, j]
                joint[path] = p * np.prod(stats.poisson.pmf(one, d["rates"][list(path), 0]))
            total = sum(joint.values())
            for path, p in joint.items():
                for step, k in enumerate(path):
                    wanted[step, k] += p / total / 3
        np.testing.assert_allclose(probs[b, : len(one)], wanted, atol=1e-10)


def test_the_last_step_is_filtered_and_smoothed_alike(fitted):
    draws = fitted.sample(5)
    smoothed, filtered = fitted.model.smooth(FORMS[0], draws), fitted.model.filter(FORMS[0], draws)
    torch.testing.assert_close(smoothed[0, -1], filtered[0, -1])
    ahead = fitted.model.predict_next(FORMS[0], {k: v[:1] for k, v in draws.items()})
    one = fitted.model.filter(FORMS[0], {k: v[:1] for k, v in draws.items()})
    torch.testing.assert_close(ahead[:, 1:], one[:, :-1] @ draws["transitions"][0])
    torch.testing.assert_close(ahead[0, 0], draws["initial"][0])


def test_rows_get_a_state_each(fitted):
    columns = fitted.model.label_rows(fitted._aligned(50).draws, [*FORMS])
    assert {len(column) for column in columns.values()} == {70}
    torch.testing.assert_close(
        columns["probability_0"] + columns["probability_1"], torch.ones(70).double()
    )


@pytest.mark.parametrize("kind", ["gaussian", "gaussian_full", "poisson", "categorical", "mixed"])
def test_residuals_of_the_truth_are_standard_normal(kind):
    model = ll.HiddenMarkovModel(2, **KINDS[kind])
    values, _ = prior_values(model, seed=1)
    draws = {name: value[None] for name, value in values.items()}
    empty = ll.data.Sequences(
        torch.zeros(1, 1500, model.num_features).double(), torch.tensor([1500])
    )
    x = model.chain(draws, empty).sample()[0].double()
    r = model.residuals(x, draws)
    for d in range(model.num_features):
        assert stats.kstest(r[0, :, d].numpy(), "norm").pvalue > 1e-5
        lag = np.corrcoef(r[0, 1:, d], r[0, :-1, d])[0, 1]
        assert abs(lag) < 5 / 1500**0.5


def test_dwell_times_are_those_of_a_geometric_law():
    assert dwell_times(torch.tensor([[0.75, 0.25], [1.0, 0.0]])).tolist() == [4.0, 1.0]


def test_states_that_are_none_are_named():
    model = ll.HiddenMarkovModel(3, emissions="poisson")
    draws = {
        "initial": torch.tensor([[0.4, 0.3, 0.3]]),
        "transitions": torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]),
        "rates": torch.tensor([[[3.0], [3.0], [90.0]]]),
    }
    draws = {name: value.double() for name, value in draws.items()}
    text = " ".join(model.remarks(draws, R.poisson(3, 50).astype(float)))
    assert "state 2 holds fewer than 2 steps" in text
    assert "states 0 and 1 emit the same" in text
    assert model.remarks(draws) == []


def test_the_fit_is_drawn(fitted):
    shown = " ".join(str(ax.get_label()) for ax in fitted.plot("fit").axes)
    for needle in ("sequence over time", "each move", "mean number of steps", "pseudo-residuals"):
        assert needle in shown
    assert fitted.plot("predictive") is not None


def test_a_state_that_is_never_left_has_no_mean_stay():
    moves = np.array([[[0.9, 0.1, 0.0], [0.0, 0.999, 0.001], [0.0, 0.0, 1.0]]] * 5)
    ax = plot_dwell_times(moves)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["state 0", "state 1"]
    said = [text.get_text() for text in ax.texts]
    assert [float(text) for text in said] == pytest.approx([10, 1000])
    assert ax.get_xscale() == "log"


def test_one_state_and_an_emission_without_a_distribution_function_are_drawn():
    """What is not known is left out: moves of one state, residuals of correlated cells."""
    model = ll.HiddenMarkovModel(1, emissions=Tilted())
    draws = {"locs": torch.zeros(4, 1, 2).double(), "transitions": torch.ones(4, 1, 1).double()}
    draws["initial"] = torch.ones(4, 1).double()
    figure = model.plot_fit(draws, ("a", "b"), torch.randn(1, 9, 2).double())
    shown = " ".join(str(ax.get_label()) for ax in figure.axes)
    assert "sequence over time" in shown
    assert "move" not in shown
    assert "residuals" not in shown


# ---- bad inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_states": 0}, "num_states must be an int >= 1, got 0"),
        ({"num_states": 2.5}, "num_states must be an int"),
        ({"num_features": True}, "num_features must be an int"),
        ({"initial": "last"}, 'initial: expected "free" or "stationary"'),
        ({"prior": "none"}, "prior: expected"),
        ({"stickiness": -1.0}, "stickiness: expected a finite number >= 0, got -1.0"),
        ({"concentration": 0.0}, "concentration"),
        ({"left_right": True, "initial": "stationary"}, "initial"),
        ({"emissions": "normal"}, "emissions: expected one of"),
        ({"emissions": "categorical"}, "num_categories"),
    ],
)
def test_arguments_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ll.HiddenMarkovModel(**({"num_states": 2} | changes))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.5, 3.0], r"counts, whole numbers from 0 on, got 2.5 at \[0, 1, 0\]"),
        ([1.0, -2.0, 3.0], r"got -2 at"),
        ([1.0], "at least 2 rows"),
        (np.zeros((4, 2)), "num_features=1"),
        (np.full(4, np.nan), "all NaN"),
        ([1.0, np.inf], "inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*equal")
def test_data_that_cannot_be_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        ll.fit(ll.HiddenMarkovModel(1, emissions="poisson"), x, max_steps=10)


def test_more_states_than_steps_are_refused():
    with pytest.raises(ValueError, match="4 states for 3 steps"):
        ll.fit(ll.HiddenMarkovModel(4, emissions="poisson"), [1, 2, 3], max_steps=10)


@pytest.mark.parametrize("x", [np.full(30, 4.0), np.r_[np.zeros(29), 1e8]])
def test_odd_data_give_finite_numbers(x):
    expected = (
        pytest.warns(UserWarning, match="rows are equal") if np.ptp(x) == 0 else nullcontext()
    )
    with expected:
        posterior = ll.fit(ll.HiddenMarkovModel(2), x, num_restarts=1, max_steps=410)
    assert all(value.isfinite().all() for value in posterior.sample(50).values())


@pytest.mark.parametrize(
    ("scale", "kind"),
    [pytest.param(1e-200, "gaussian_full", marks=pytest.mark.slow), (1e12, "gaussian")],
)
def test_the_unit_does_not_matter(scale, kind):
    x = np.r_[R.normal(0, 1, (30, 2)), R.normal(9, 1, (30, 2))]
    x[3, 0] = np.nan
    model = ll.HiddenMarkovModel(2, 2, kind)
    settings = {"num_restarts": 1, "max_steps": 410, "guide": "mean_field"}
    posteriors = [ll.fit(model, y, **settings) for y in (x, x * scale)]
    found = [posterior.sample(200)["locs"] for posterior in posteriors]
    draws = posteriors[0].sample(50)
    moved = draws | {site: draws[site] * scale for site in ("locs", "scales")}
    residuals = [
        posteriors[0].model.residuals(x, draws),
        posteriors[1].model.residuals(x * scale, moved),
    ]
    torch.testing.assert_close(*residuals, rtol=1e-3, atol=1e-3, equal_nan=True)
    ordered = [f.mean(0).flatten().sort().values for f in found]
    torch.testing.assert_close(ordered[0] * scale, ordered[1], rtol=0.05, atol=0.05 * scale)


def test_columns_are_called_by_their_names():
    frame = pd.DataFrame({"a": R.normal(size=20), "b": np.full(20, 3.0)})
    model = ll.HiddenMarkovModel(2, 2)
    with pytest.warns(UserWarning, match="constant column 'b'"):
        ll.fit(model, frame, num_restarts=1, max_steps=50, guide="mean_field")
    with pytest.raises(ValueError, match="column 'b' is all NaN"):
        ll.fit(model, frame.assign(b=np.nan))


def test_sequences_of_one_step_say_nothing_of_transitions():
    """Rows in no order: a mixture, and transitions are as their prior has them."""
    x = np.r_[R.normal(0, 1, (30, 1)), R.normal(9, 1, (30, 1))]
    posterior = ll.fit(ll.HiddenMarkovModel(2), [row[None] for row in x], num_restarts=1)
    draws = posterior._aligned(1000).draws
    assert draws["locs"].mean(0).flatten().sort().values.tolist() == pytest.approx([0, 9], abs=0.8)
    assert float(draws["transitions"].mean()) == pytest.approx(0.5, abs=0.1)
    assert float(draws["transitions"].std()) > 0.15
    with pytest.raises(TypeError, match="expected sequences, got None"):
        posterior.model.smooth(None, draws)


def test_a_far_step_is_named():
    x = R.normal(0, 1, (40, 2))
    x[5, 1] = 1e8
    with pytest.warns(UserWarning, match=r"row 5 of column 'x1' \(1e\+08\)"):
        ll.HiddenMarkovModel(2, 2).scale_to(torch.from_numpy(x)[None])


def test_a_very_long_sequence_does_not_underflow():
    model = ll.HiddenMarkovModel(2, emissions="poisson")
    values, _ = prior_values(model)
    x = torch.ones(1, 100_000, 1).double()
    draws = {name: value[None] for name, value in values.items()}
    long = model.log_prob(x, draws, torch.tensor([100_000]))
    assert long.isfinite().all()
    assert (long < -10_000).all()


# ---- peers --------------------------------------------------------------------------------------


@pytest.mark.peer
def test_the_likelihood_is_that_of_hmmlearn():
    peers = pytest.importorskip("hmmlearn.hmm")
    x = np.concatenate(FORMS)[:, None].astype(int)
    model = ll.HiddenMarkovModel(2, emissions="poisson")
    values, _ = prior_values(model)
    peer = peers.PoissonHMM(2)
    peer.startprob_, peer.transmat_ = values["initial"].numpy(), values["transitions"].numpy()
    peer.lambdas_, peer.n_features = values["rates"].numpy(), 1
    ours = model.log_prob([*FORMS], {k: v[None] for k, v in values.items()}).sum()
    assert float(ours) == pytest.approx(peer.score(x, [40, 30]), rel=1e-9)


def test_columns_of_several_kinds_keep_their_names():
    generator = np.random.default_rng(0)
    columns = {
        "temp": generator.normal(size=60),
        "wind": generator.normal(size=60),
        "count": generator.poisson(4.0, size=60),
    }
    model = ll.HiddenMarkovModel(1, num_features=3, emissions=["gaussian", "gaussian", "poisson"])
    posterior = ll.fit(
        model, pd.DataFrame(columns), "point", max_steps=2, num_restarts=1, progress=False
    )
    found = posterior.summary()
    assert {("locs", "0, temp"), ("locs", "0, wind"), ("rates", "0, count")} <= set(
        zip(found["site"], found["index"], strict=True)
    )
