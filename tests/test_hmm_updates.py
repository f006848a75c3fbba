"""Steps of hidden Markov models in closed form: equal to brute force, to a peer, never down.

Letters: K states, D features, B sequences, T steps.
"""

import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hidden_chain
from scipy import stats
from scipy.special import digamma

import latentlab as ll
from latentlab.guides import Families, FullRank, Point
from latentlab.inference import objectives
from latentlab.inference.check import prepare
from latentlab.protocols import OffersUpdates, PlacesStarts, Updates

KINDS = {
    "gaussian": {"num_features": 2, "emissions": "gaussian"},
    "gaussian_full": {"num_features": 3, "emissions": "gaussian_full"},
    "poisson": {"num_features": 2, "emissions": "poisson"},
    "categorical": {"num_features": 2, "emissions": "categorical", "num_categories": 3},
    "bernoulli": {"num_features": 3, "emissions": "bernoulli"},
    "mixed": {"emissions": ["gaussian", "poisson", "gaussian", "bernoulli"]},
    "left_right": {"num_features": 2, "emissions": "poisson", "left_right": True},
}
CONJUGATE = [kind for kind in KINDS if kind != "gaussian_full"]
LENGTHS = [4, 3, 1]


def sequences(kind, lengths, seed=0, holes=False):
    """Ragged sequences with states that stay for a while."""
    r = np.random.default_rng(seed)
    n, D = sum(lengths), ll.HiddenMarkovModel(2, **KINDS[kind]).num_features
    z = np.cumsum(r.random(n) < 0.2) % 3
    columns = {
        "gaussian": lambda: r.normal(size=n) + 2 * z,
        "poisson": lambda: r.poisson(1 + 4 * z),
        "categorical": lambda: np.where(r.random(n) < 0.7, z, r.integers(3, size=n)),
        "bernoulli": lambda: r.random(n) < 0.2 + 0.3 * z,
    }
    names = KINDS[kind]["emissions"]
    names = names if isinstance(names, list) else [names.removesuffix("_full")] * D
    x = np.stack([columns[name]() for name in names], 1).astype(float)
    if holes:
        x[r.random(n) < 0.1] = np.nan
        if kind != "gaussian_full":
            x[r.random(x.shape) < 0.1] = np.nan
        x[0] = 1.0  # no column is without a number
        x[-1] = 0.0
    return np.split(x, np.cumsum(lengths)[:-1])


def pair_of(kind, x, prior, guide="auto", num_states=3, **settings):
    model = ll.HiddenMarkovModel(num_states, **KINDS[kind], prior=prior, **settings)
    return prepare(model, x, guide)[0]


def climbed(pair, num_steps, seed=1):
    """The bounds of some steps from a start."""
    with pair.entered(seed=0):
        updates, data = pair.model.updates(pair.guide), pair.data.args
        updates.place(seed, *data)
        bounds = []
        for _ in range(num_steps):
            statistics, bound = updates.statistics(*data)
            updates.maximise(statistics)
            bounds.append(float(bound))
    return np.array(bounds)


def point_of(pair):
    return {k: v.detach().reshape(pair.shapes[k]) for k, v in pair.guide.draw(1).values.items()}


# ---- the point ----------------------------------------------------------------------------------


def test_a_model_offers_them_where_there_is_a_closed_form():
    x = sequences("gaussian", [20, 20])
    flat, conjugate = (pair_of("gaussian", x, prior) for prior in ("flat", "conjugate"))
    assert isinstance(flat.model, OffersUpdates)
    for pair in (flat, conjugate):
        updates = pair.model.updates(pair.guide)
        assert isinstance(updates, Updates)
        assert isinstance(updates, PlacesStarts)
    assert flat.model.updates(conjugate.guide) is None
    assert conjugate.model.updates(flat.guide) is None
    assert flat.model.updates(FullRank()) is None
    weak = ll.HiddenMarkovModel(3, emissions="poisson")
    assert weak.updates(Point()) is None
    assert weak.updates(conjugate.guide) is None
    stationary = ll.HiddenMarkovModel(3, emissions="poisson", initial="stationary", prior="flat")
    assert stationary.updates(Point()) is None


def test_correlated_cells_have_a_maximum_where_none_is_missing():
    x = np.concatenate(sequences("gaussian_full", [20, 20], holes=True))
    model = ll.HiddenMarkovModel(3, **KINDS["gaussian_full"], prior="flat")
    assert np.isnan(x).all(1).any()  # whole rows may miss
    assert model.scale_to(x).updates(Point()) is not None
    x[5, 1] = np.nan
    assert model.scale_to(x).updates(Point()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_all_paths(kind):
    """The E-step by brute force over all K^T paths; the M-step by numpy's own averages."""
    x = sequences(kind, LENGTHS, seed=3)
    pair = pair_of(kind, x, "flat", num_states=2)
    with pair.entered(seed=0):
        updates = pair.model.updates(pair.guide)
        updates.place(5, *pair.data.args)
        values = point_of(pair)
        chain = pair.model.likelihood(values, max(LENGTHS))
        sites = {s: values[s] for s in pair.model.emission.sites()}
        rows = pair.model.emission.distribution(**sites)
        chains = [
            hidden_chain(
                chain.initial, chain.transitions, rows.log_prob(torch.tensor(each)[:, None])
            )
            for each in x
        ]
        statistics, bound = updates.statistics(*pair.data.args)
        updates.maximise(statistics)
    assert float(bound) == pytest.approx(sum(c.log_prob for c in chains), rel=1e-12)
    found = point_of(pair)
    moves = sum(c.pairwise.sum(0) for c in chains)
    moves = moves / moves.sum(1, keepdims=True)
    if kind == "left_right":
        moves = moves[:1]
    else:
        starts = np.mean([c.smoothed[0] for c in chains], 0)
        np.testing.assert_allclose(found["initial"], starts, atol=1e-10)
    np.testing.assert_allclose(found["transitions"], moves, atol=1e-10)
    x, w = np.concatenate(x), np.concatenate([c.smoothed for c in chains])
    mean = w.T @ x / w.sum(0)[:, None]
    if kind in ("poisson", "left_right"):
        np.testing.assert_allclose(found["rates"], mean.clip(1e-300), atol=1e-10)
    elif kind == "bernoulli":
        np.testing.assert_allclose(found["probs"], mean, atol=1e-10)
    elif kind == "categorical":
        shares = np.stack([w.T @ (x == c) for c in range(3)], -1) / w.sum(0)[:, None, None]
        np.testing.assert_allclose(found["probs"], shares, atol=1e-10)
    elif kind == "mixed":
        np.testing.assert_allclose(found["locs_2"][:, 0], mean[:, 2], atol=1e-10)
        np.testing.assert_allclose(found["probs"][:, 0], mean[:, 3], atol=1e-10)
    else:
        np.testing.assert_allclose(found["locs"], mean, atol=1e-10)


@pytest.mark.parametrize("covariance", ["gaussian", "gaussian_full"])
def test_a_state_on_a_line_is_lifted_to_the_floor(covariance):
    """Nothing is likelier than what the rows lead to, though variances are at their floor."""
    r = np.random.default_rng(0)
    x = np.concatenate([r.normal(size=(30, 3)), np.repeat(r.normal(size=(1, 3)), 15, 0)])
    x[30:, 0] += np.arange(15)
    x[30:, 1] = 2 * x[30:, 0]
    emission = ll.HiddenMarkovModel(2, 3, emissions=covariance, prior="flat").scale_to(x).emission
    x, weights = torch.tensor(x), torch.zeros(45, 2, dtype=torch.float64)
    weights[:30, 0] = weights[30:, 1] = 1.0
    values = emission.maximise(emission.statistics(x, weights))

    def height(values):
        return float((weights * emission.distribution(**values).log_prob(x[:, None])).sum())

    best, edge = height(values), 1 - 1e-12
    assert math.isfinite(best)
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        size, other = 10.0 ** -(1 + trial % 4), {}
        for site, value in values.items():
            noise = size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if site == "correlations":
                other[site] = (value.clamp(-edge, edge).atanh() + noise).tanh().clamp(-edge, edge)
            else:
                other[site] = value + noise if site == "locs" else value * noise.exp()
        assert height(other) <= best + 1e-6


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from([*KINDS]),
    num_states=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda n: sum(n) > 7),
    holes=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_step_goes_down(kind, num_states, lengths, holes, seed):
    x = sequences(kind, lengths, seed, holes)
    for prior in ("flat", "conjugate"):
        if prior == "conjugate" and kind not in CONJUGATE:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of columns that are constant
            pair = pair_of(kind, x, prior, num_states=num_states)
        bounds = climbed(pair, 6, seed)
        assert np.isfinite(bounds).all()
        assert np.diff(bounds).min() > -1e-9 * max(1.0, np.abs(bounds).max())


def test_a_batch_stands_for_all_sequences():
    x = sequences("poisson", [5, 5])
    for prior in ("flat", "conjugate"):
        pair = pair_of("poisson", [*x, *x, *x], prior)
        with pair.entered(seed=0):
            updates, (data, lengths) = pair.model.updates(pair.guide), pair.data.args
            updates.place(0, data, lengths)
            whole, bound = updates.statistics(data, lengths)
            part, same = updates.statistics(data[:2], lengths[:2], size=6)
        assert float(bound) == pytest.approx(float(same), rel=1e-12)
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-12, atol=1e-12)


def test_an_emission_of_your_own_may_lend_its_maximum():
    class Waits:
        num_features = 1
        has_maximum = True

        def sites(self):
            return {"rates": dist.Gamma(torch.ones(1).double(), 1.0).to_event(1)}

        def distribution(self, rates):
            return dist.Exponential(rates).to_event(1)

        def statistics(self, x, weights):
            assert not x.isnan().any()
            return {"held": weights.sum(0), "total": weights.mT @ x}

        def maximise(self, statistics):
            return {"rates": statistics["held"][:, None] / statistics["total"]}

    r = np.random.default_rng(0)
    x = r.exponential(size=(60, 1)) * np.repeat([1.0, 9.0, 1.0], 20)[:, None]
    x[7] = np.nan
    posterior = ll.fit(
        ll.HiddenMarkovModel(2, emissions=Waits(), prior="flat"),
        [x[:25], x[25:]],
        num_restarts=2,
        progress=False,
    )
    assert posterior.method == "natural"
    assert posterior.converged
    rates = posterior.sample(1)["rates"][0, :, 0].sort().values
    np.testing.assert_allclose(1 / rates, [9.0, 1.0], rtol=0.4)


def test_a_fit_takes_them_to_where_the_likelihood_is_flat():
    x = sequences("poisson", [60, 50])
    model = ll.HiddenMarkovModel(3, **KINDS["poisson"], prior="flat")
    posterior = ll.fit(model, x, guide="point", progress=False)
    assert posterior.method == "natural"
    assert posterior.converged
    values = {k: v[0].requires_grad_() for k, v in posterior.sample(1).items()}
    data = ll.data.as_sequences(x)
    likelihood = model.likelihood(values, data.x.shape[1], data.lengths)
    total = likelihood.log_prob(data.x).sum()
    assert total.item() == pytest.approx(posterior.elbo.value, rel=1e-12)
    (slope,) = torch.autograd.grad(total, values["rates"])
    assert (slope * values["rates"]).abs().max().item() < 0.05  # nats for each unit of log rate


# ---- the posterior ------------------------------------------------------------------------------


def expected_by_hand(kind, factors, x):
    """E log p(x | theta_k) of rows (N, K), by integrals that scipy takes."""
    K = 2
    found = np.zeros((len(x), K))
    for (n, d), cell in np.ndenumerate(x):
        for k in range(K):
            found[n, k] += _cell(kind, factors, d, k, cell)
    return found


def _cell(kind, factors, d, k, cell):
    if np.isnan(cell):
        return 0.0
    site, at = (
        (("probs",), (k, d)) if kind in ("categorical", "bernoulli") else (("rates",), (k, d))
    )
    if kind == "categorical":
        alpha = factors[site].concentration[at].numpy()
        rest = alpha.sum() - alpha[int(cell)]
        return stats.beta(alpha[int(cell)], rest).expect(np.log, epsabs=1e-13)
    if kind == "bernoulli":
        beta = stats.beta(factors[site].ones[at].item(), factors[site].zeros[at].item())
        log = (lambda p: np.log(p)) if cell else (lambda p: np.log1p(-p))
        return beta.expect(log, epsabs=1e-13)
    if kind == "gaussian":
        q = factors["scales", "locs"]
        m, count, a, b = (
            getattr(q, f)[at].item() for f in ("loc", "count", "concentration", "rate")
        )

        def inner(precision):  # over the mean in closed form, over the precision by quadrature
            square = precision * (cell - m) ** 2 + 1 / count
            return 0.5 * (np.log(precision) - math.log(2 * math.pi) - square)

        return stats.gamma(a, scale=1 / b).expect(inner, epsabs=1e-13)
    a, b = (getattr(factors[site], f)[at].item() for f in ("concentration", "rate"))
    return stats.gamma(a, scale=1 / b).expect(
        lambda rate: stats.poisson.logpmf(cell, rate), epsabs=1e-13
    )


def expected_logs(alpha):
    return np.exp(digamma(alpha) - digamma(alpha.sum(-1, keepdims=True)))


@pytest.mark.parametrize("kind", ["gaussian", "poisson", "categorical", "bernoulli"])
def test_a_step_of_variational_bayes_is_that_of_all_paths(kind):
    x = sequences(kind, LENGTHS, seed=4)
    x[0][1, 0] = np.nan
    pair = pair_of(kind, x, "conjugate", num_states=2, stickiness=1.5)
    with pair.entered(seed=0):
        updates, data = pair.model.updates(pair.guide), pair.data.args
        updates.place(5, *data)
        before = {k: _detached(v) for k, v in pair.guide.factors().items()}
        statistics, bound = updates.statistics(*data)
        updates.maximise(statistics)
        after = {k: _detached(v) for k, v in pair.guide.factors().items()}
        priors = pair.model.emission.priors()
    start, move = (before[site,].concentration.numpy() for site in ("initial", "transitions"))
    with np.errstate(all="ignore"):
        chains = [
            hidden_chain(
                expected_logs(start), expected_logs(move), expected_by_hand(kind, before, e)
            )
            for e in x
        ]
    found = {k: after[k,].concentration.numpy() for k in ("initial", "transitions")}
    np.testing.assert_allclose(
        found["initial"], 1 + sum(c.smoothed[0] for c in chains), rtol=1e-10
    )
    moves = 1 + 1.5 * np.eye(2) + sum(c.pairwise.sum(0) for c in chains)
    np.testing.assert_allclose(found["transitions"], moves, rtol=1e-10)
    rows, w = np.concatenate(x), np.concatenate([c.smoothed for c in chains])
    there = ~np.isnan(rows)
    y = np.where(there, rows, 0.0)
    held, first, second = w.T @ there, w.T @ y, w.T @ y**2
    if kind == "gaussian":
        (prior,) = priors.values()
        m, count, a, b = (
            getattr(prior, f).numpy() for f in ("loc", "count", "concentration", "rate")
        )
        loc = (count * m + first) / (count + held)
        wanted = {"loc": loc, "count": count + held, "concentration": a + held / 2}
        wanted["rate"] = b + (second + count * m**2 - (count + held) * loc**2) / 2
    elif kind == "poisson":
        wanted = {"concentration": 1 + first, "rate": 1 / np.nanmean(rows, 0) + held}
    elif kind == "bernoulli":
        wanted = {"ones": 1 + first, "zeros": 1 + held - first}
    else:
        counts = np.stack([w.T @ (rows == c) for c in range(3)], -1)
        wanted = {"concentration": 1 + counts}
    (own,) = (factor for sites, factor in after.items() if sites[0] not in found)
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(own, name), value, rtol=1e-9, atol=1e-10)
    # The bound: what paths weigh, less what the parameters cost.
    cost = sum(float(before[s].kl(prior)) for s, prior in (priors | updates_priors(pair)).items())
    assert float(bound) == pytest.approx(sum(c.log_prob for c in chains) - cost, abs=1e-8)


def updates_priors(pair):
    return pair.model.free_chain.priors(pair.model.like)


def _detached(factor):
    numbers = {name: getattr(factor, name).detach().clone() for name in factor.names()}
    return type(factor)(**numbers)


@pytest.mark.parametrize("kind", ["gaussian", "poisson", "categorical", "bernoulli", "mixed"])
def test_of_one_state_the_guide_is_the_posterior(kind):
    """Then every importance weight is the evidence, and the bound is tight."""
    x = sequences(kind, LENGTHS, seed=5, holes=True)
    pair = pair_of(kind, x, "conjugate", num_states=1)
    bounds = climbed(pair, 3)
    with pair.entered(seed=3), torch.no_grad():
        weights = objectives.log_weights(pair, 50)
    np.testing.assert_allclose(weights, bounds[-1], rtol=1e-10)


def test_the_bound_is_below_the_elbo_with_states_summed_out():
    x = sequences("poisson", [40, 30])
    posterior = ll.fit(
        ll.HiddenMarkovModel(2, **KINDS["poisson"], prior="conjugate"), x, progress=False
    )
    assert posterior.method == "natural"
    assert posterior.converged
    assert isinstance(posterior.guide, Families)
    assert -posterior.losses[-1] < posterior.elbo.value
    gains = -posterior.losses[1:] + posterior.losses[:-1]
    last = gains[posterior.stage_starts[-1] :] if len(posterior.stage_starts) else gains
    assert last.min() > -1e-8


def test_it_is_saved_and_loaded(tmp_path):
    x = sequences("mixed", [30, 20])
    posterior = ll.fit(
        ll.HiddenMarkovModel(2, **KINDS["mixed"], prior="conjugate"),
        x,
        num_restarts=2,
        progress=False,
    )
    posterior.save(tmp_path)
    again = ll.load(tmp_path)
    for site, draws in posterior.sample(20, seed=3).items():
        torch.testing.assert_close(again.sample(20, seed=3)[site], draws, rtol=0, atol=0)


def test_what_has_no_conjugate_prior_is_refused():
    with pytest.raises(ValueError, match='prior: expected "weak" or "flat" for these emissions'):
        ll.HiddenMarkovModel(2, 2, emissions="gaussian_full", prior="conjugate")
    with pytest.raises(ValueError, match='with initial="stationary"'):
        ll.HiddenMarkovModel(2, emissions="poisson", initial="stationary", prior="conjugate")


# ---- a peer -------------------------------------------------------------------------------------

PEER_LENGTHS = [30, 50, 7, 1]


def peer_of(kind, values, rows, hmm, n_iter):
    """A model of hmmlearn with its priors switched off, at values of the sites."""
    free = {"init_params": "", "n_iter": n_iter, "tol": -np.inf}
    flat = {"covars_prior": 0, "covars_weight": 1, "means_weight": 0, "min_covar": 0}
    K, D = (
        len(values["initial"]),
        values.get("locs", values.get("rates", torch.zeros(1, 1))).shape[1],
    )
    make = {
        "gaussian": lambda: hmm.GaussianHMM(K, "diag", **flat, **free),
        "gaussian_full": lambda: hmm.GaussianHMM(K, "full", **flat, **free),
        "poisson": lambda: hmm.PoissonHMM(K, lambdas_prior=0, lambdas_weight=0, **free),
        "categorical": lambda: hmm.CategoricalHMM(K, **free),
    }
    peer = make[kind]()
    peer.n_features = D
    peer.startprob_, peer.transmat_ = values["initial"].numpy(), values["transitions"].numpy()
    if kind == "gaussian":
        peer.means_, peer.covars_ = values["locs"].numpy(), rows.variance.numpy()
    elif kind == "gaussian_full":
        peer.means_ = values["locs"].numpy()
        peer.covars_ = (rows.scale_tril @ rows.scale_tril.mT).numpy()
    elif kind == "poisson":
        peer.lambdas_ = values["rates"].numpy()
    else:
        peer.n_features, peer.emissionprob_ = 3, values["probs"][:, 0].numpy()
    return peer


def own_numbers(pair, values):
    return pair.model.emission.distribution(
        **{site: values[site] for site in pair.model.emission.sites()}
    )


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["gaussian", "gaussian_full", "poisson", "categorical"])
def test_eight_steps_are_those_of_hmmlearn(kind):
    hmm = pytest.importorskip("hmmlearn.hmm")
    x = sequences(kind, PEER_LENGTHS, seed=2)
    if kind == "categorical":  # hmmlearn takes one column
        x = [each[:, :1] for each in x]
        model = ll.HiddenMarkovModel(3, emissions=kind, num_categories=3, prior="flat")
    else:
        model = ll.HiddenMarkovModel(3, **KINDS[kind], prior="flat")
    pair = prepare(model, x, "point")[0]
    with pair.entered(seed=0):
        updates, data = pair.model.updates(pair.guide), pair.data.args
        updates.place(1, *data)
        values = point_of(pair)
        peer = peer_of(kind, values, own_numbers(pair, values), hmm, n_iter=8)
        bounds = []
        for _ in range(8):
            statistics, bound = updates.statistics(*data)
            updates.maximise(statistics)
            bounds.append(float(bound))
    rows = np.concatenate(x)
    peer.fit(rows.astype(int) if kind in ("poisson", "categorical") else rows, PEER_LENGTHS)
    np.testing.assert_allclose(bounds, peer.monitor_.history, rtol=1e-12)
    values = point_of(pair)
    wanted = peer_of(kind, values, own_numbers(pair, values), hmm, n_iter=1)
    names = {"poisson": ["lambdas_"], "categorical": ["emissionprob_"]}
    for name in ["startprob_", "transmat_", *names.get(kind, ["means_", "covars_"])]:
        np.testing.assert_allclose(getattr(wanted, name), getattr(peer, name), atol=1e-10)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_steps_of_variational_bayes_are_those_of_hmmlearn(kind):
    vhmm = pytest.importorskip("hmmlearn.vhmm")
    x = [each[:, :1] for each in sequences(kind, PEER_LENGTHS, seed=2)]
    settings = {"num_categories": 3} if kind == "categorical" else {}
    model = ll.HiddenMarkovModel(3, emissions=kind, prior="conjugate", **settings)
    pair = prepare(model, x)[0]
    free = {"init_params": "", "n_iter": 8, "tol": -np.inf, "implementation": "scaling"}
    with pair.entered(seed=0):
        updates, data = pair.model.updates(pair.guide), pair.data.args
        updates.place(1, *data)
        found, priors = pair.guide.factors(), pair.model.emission.priors()
        if kind == "categorical":
            peer = vhmm.VariationalCategoricalHMM(3, **free)
            peer.n_features, peer.emissionprob_prior_ = 3, np.ones((3, 3))
            peer.emissionprob_posterior_ = found["probs",].concentration.detach()[:, 0].numpy()
        else:
            peer = vhmm.VariationalGaussianHMM(3, "full", **free)
            peer.n_features = 1
            for when, of in (("prior", priors), ("posterior", found)):
                (own,) = (_detached(f) for s, f in of.items() if "locs" in s)
                ones = np.ones(3)
                setattr(peer, f"means_{when}_", own.loc.numpy() * ones.reshape(3, 1))
                setattr(peer, f"beta_{when}_", own.count.numpy().reshape(-1) * ones)
                setattr(peer, f"dof_{when}_", 2 * own.concentration.numpy().reshape(-1) * ones)
                rate = 2 * own.rate.numpy().reshape(-1) * ones
                setattr(peer, f"scale_{when}_", rate.reshape(3, 1, 1))
            peer._covars_ = np.ones((3, 1, 1))
        peer.startprob_prior_, peer.transmat_prior_ = np.ones(3), np.ones((3, 3))
        peer.startprob_posterior_ = found["initial",].concentration.detach().numpy()
        peer.transmat_posterior_ = found["transitions",].concentration.detach().numpy()
        bounds = []
        for _ in range(8):
            statistics, bound = updates.statistics(*data)
            updates.maximise(statistics)
            bounds.append(float(bound))
        found = pair.guide.factors()
    rows = np.concatenate(x)
    peer.fit(rows.astype(int) if kind == "categorical" else rows, PEER_LENGTHS)
    # hmmlearn leaves out a constant of each normal row.
    constant = 0.5 * len(rows) * math.log(2 * math.pi) if kind == "gaussian" else 0.0
    np.testing.assert_allclose(np.array(bounds) + constant, peer.monitor_.history, rtol=1e-11)
    moves = found["transitions",].concentration.detach()
    np.testing.assert_allclose(moves, peer.transmat_posterior_, rtol=1e-9)
    if kind == "gaussian":
        own = _detached(found["scales", "locs"])
        np.testing.assert_allclose(own.loc, peer.means_posterior_, rtol=1e-9)
        np.testing.assert_allclose(2 * own.rate[:, 0], peer.scale_posterior_[:, 0, 0], rtol=1e-9)
