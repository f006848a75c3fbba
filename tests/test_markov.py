"""The distribution of a sequence is the sum over all paths of its states."""

import itertools

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from latentlab.distributions import Cells
from latentlab.distributions.emissions import (
    BernoulliEmission,
    CategoricalEmission,
    GaussianEmission,
    PoissonEmission,
    ProductEmission,
    emission_of,
)
from latentlab.distributions.markov import HiddenMarkov
from latentlab.distributions.normal_row import NormalRow

K, T = 3, 6
R = np.random.default_rng(5)
INITIAL = R.dirichlet(np.ones(K))
MOVES = R.dirichlet(np.ones(K), K)


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def over_paths(log_seen, length):
    """log p(x) by brute force from log-likelihoods (T, K)."""
    joint = [
        np.log(INITIAL[path[0]])
        + sum(np.log(MOVES[i, j]) for i, j in itertools.pairwise(path))
        + sum(log_seen[step, k] for step, k in enumerate(path))
        for path in itertools.product(range(K), repeat=length)
    ]
    return logsumexp(joint)


# Each: the emission, its values, rows (T, D), and scipy's log-density of a cell in state k.
LOCS, SCALES = R.normal(size=(K, 2)), R.uniform(0.5, 2, (K, 2))
RATES, PROBS, ONES = (
    R.uniform(1, 6, (K, 2)),
    R.dirichlet(np.ones(4), (K, 2)),
    R.uniform(size=(K, 2)),
)
NORMAL = R.normal(size=(T, 2)), lambda x, k, d: stats.norm.logpdf(x, LOCS[k, d], SCALES[k, d])
COUNTS = R.poisson(3, (T, 2)), lambda x, k, d: stats.poisson.logpmf(x, RATES[k, d])
CODES = R.integers(0, 4, (T, 2)), lambda x, k, d: np.log(PROBS[k, d, int(x)])
BITS = R.integers(0, 2, (T, 2)), lambda x, k, d: stats.bernoulli.logpmf(x, ONES[k, d])


def without_floor(emission):
    emission.spread.fill_(1e-9)
    return emission


CASES = {
    "gaussian": (without_floor(GaussianEmission(2)), {"locs": LOCS, "scales": SCALES}, *NORMAL),
    "poisson": (PoissonEmission(2), {"rates": RATES}, *COUNTS),
    "categorical": (CategoricalEmission(2, 4), {"probs": PROBS}, *CODES),
    "bernoulli": (BernoulliEmission(2), {"probs": ONES}, *BITS),
    "product": (
        ProductEmission([PoissonEmission(2), BernoulliEmission(2)]),
        {"rates": RATES, "probs": ONES},
        np.concatenate([COUNTS[0], BITS[0]], 1),
        lambda x, k, d: COUNTS[1](x, k, d) if d < 2 else BITS[1](x, k, d - 2),
    ),
}


@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
@pytest.mark.parametrize("length", [1, 4, T])
@pytest.mark.parametrize("kind", CASES)
def test_log_prob_sums_over_all_paths(kind, length, holes):
    emission, values, x, log_cell = CASES[kind]
    x = x.astype(float)
    if holes:
        x[0, 0] = x[2] = np.nan
    log_seen = np.array(
        [
            [
                sum(log_cell(x[s, d], k, d) for d in range(x.shape[1]) if not np.isnan(x[s, d]))
                for k in range(K)
            ]
            for s in range(length)
        ]
    )
    padded = x.copy()
    padded[length:] = np.nan
    rows = emission.distribution(**{site: t(value) for site, value in values.items()})
    chain = HiddenMarkov(t(INITIAL), t(MOVES), rows, T, torch.tensor(length))
    assert float(chain.log_prob(t(padded))) == pytest.approx(
        over_paths(log_seen, length), abs=1e-10
    )


def test_a_full_gaussian_leaves_out_missing_cells():
    emission = without_floor(GaussianEmission(3, "full"))
    tril = np.tril(R.normal(size=(K, 3, 3))) + 2 * np.eye(3)
    locs, x = R.normal(size=(K, 3)), R.normal(size=(T, 3))
    x[1, 0] = x[3, 1:] = x[4] = np.nan
    rows = NormalRow(t(locs), t(tril))
    log_seen = np.zeros((T, K))
    for s, k in itertools.product(range(T), range(K)):
        there = np.flatnonzero(~np.isnan(x[s]))
        if len(there):
            cov = (tril[k] @ tril[k].T)[np.ix_(there, there)]
            log_seen[s, k] = stats.multivariate_normal.logpdf(x[s, there], locs[k, there], cov)
    chain = HiddenMarkov(t(INITIAL), t(MOVES), rows, T)
    assert float(chain.log_prob(t(x))) == pytest.approx(over_paths(log_seen, T), abs=1e-10)
    assert emission.distribution(t(locs), torch.ones(K, 3).double(), torch.zeros(K, 3).double())


def test_a_row_of_a_stranger_is_left_out_as_a_whole():
    rows = dist.LogNormal(t(LOCS), 1.0).to_event(1)
    x = np.exp(NORMAL[0])
    gone = x.copy()
    x[2, 0], gone[2] = np.nan, np.nan
    chain = HiddenMarkov(t(INITIAL), t(MOVES), rows, T)
    assert chain.log_prob(t(x)) == chain.log_prob(t(gone))
    locs = t(LOCS).requires_grad_()
    rows = dist.LogNormal(locs, 1.0).to_event(1)
    HiddenMarkov(t(INITIAL), t(MOVES), rows, T).log_prob(t(x)).backward()
    assert locs.grad.isfinite().all()


def test_draws_have_the_moments_of_the_chain():
    rows = Cells(dist.Normal(t(LOCS), t(SCALES)), 1)
    chain = HiddenMarkov(t(INITIAL), t(MOVES), rows, T, torch.tensor([T, 2]))
    assert chain.batch_shape == (2,)
    S = 20_000
    drawn, states = chain.sample_with_states((S,))
    assert drawn.shape == (S, 2, T, 2)
    assert drawn[:, 1, 2:].isnan().all()
    assert not drawn[:, 0].isnan().any()
    law = INITIAL
    for step in range(T):
        mean = law @ LOCS
        variance = law @ (SCALES**2 + LOCS**2) - mean**2
        error = (drawn[:, 0, step].mean(0).numpy() - mean) / np.sqrt(variance / S)
        assert abs(error).max() < 5
        share = np.bincount(states[:, 0, step], minlength=K) / S
        assert (abs(share - law) < 5 * np.sqrt(law * (1 - law) / S)).all()
        law = law @ MOVES


def test_no_state_of_probability_zero_is_drawn():
    rows = Cells(dist.Normal(t(LOCS), t(SCALES)), 1)
    moves = torch.eye(K, dtype=torch.float64).roll(1, 1)
    chain = HiddenMarkov(t([0.0, 1.0, 0.0]), moves, rows, T)
    assert (chain.sample_states((50,)) == torch.tensor([1, 2, 0, 1, 2, 0])).all()


def test_draws_of_parameters_go_through_at_once():
    S, B = 4, 5
    initial, moves = t(R.dirichlet(np.ones(K), (S, 1))), t(R.dirichlet(np.ones(K), (S, 1, K)))
    rates = t(R.uniform(1, 6, (S, 1, 1, K, 2)))
    x = t(R.poisson(3, (B, T, 2)).astype(float))
    chain = HiddenMarkov(initial, moves, Cells(dist.Poisson(rates), 1), T).expand((S, B))
    single = [
        HiddenMarkov(initial[s, 0], moves[s, 0], Cells(dist.Poisson(rates[s, 0, 0]), 1), T)
        for s in range(S)
    ]
    both = torch.stack([one.log_prob(x) for one in single])
    torch.testing.assert_close(chain.log_prob(x), both)
    assert chain.sample((2,)).shape == (2, S, B, T, 2)


def test_shapes_have_to_agree():
    rows = Cells(dist.Poisson(torch.ones(2, 1)), 1)
    with pytest.raises(ValueError, match="to match initial"):
        HiddenMarkov(t(INITIAL), t(MOVES), rows, T)


def test_names_stand_for_emissions():
    mixed = emission_of(["gaussian", "gaussian", "poisson", "categorical"], num_categories=3)
    assert [type(part).__name__ for part in mixed.parts] == [
        "GaussianEmission",
        "PoissonEmission",
        "CategoricalEmission",
    ]
    assert mixed.num_features == 4
    twice = emission_of(["bernoulli", "poisson", "bernoulli"])
    assert {"probs_0", "probs_2", "rates"} == set(twice.sites())
    with pytest.raises(ValueError, match="emissions: expected one of"):
        emission_of("normal")
    with pytest.raises(ValueError, match="num_categories"):
        emission_of("categorical")
    with pytest.raises(TypeError, match="emissions"):
        emission_of(3)


@pytest.mark.parametrize(
    ("emission", "x"),
    [
        (PoissonEmission(1), [[1.0], [2.5]]),
        (PoissonEmission(1), [[1.0], [-1.0]]),
        (CategoricalEmission(1, 3), [[1.0], [3.0]]),
        (BernoulliEmission(1), [[1.0], [2.0]]),
        (ProductEmission([GaussianEmission(1), PoissonEmission(1)]), [[0.5, 1.0], [0.5, 0.5]]),
    ],
)
def test_cells_that_cannot_be_are_named(emission, x):
    with pytest.raises(ValueError, match=r"x: expected .*, got .* at \[1, 0\]"):
        emission.check(t(x))


@pytest.mark.parametrize(
    "kind", ["gaussian", "gaussian_full", "poisson", "categorical", "bernoulli"]
)
def test_estimates_recover_what_rows_were_drawn_with(kind):
    """One state with all the weight: the estimate is near the truth, and no number is missing."""
    emission = emission_of(kind, 2, 4)
    truth = {site: prior.sample()[None] for site, prior in emission.sites().items()}
    x = emission.distribution(**truth).sample((4000,))[:, 0].double()
    weights = torch.stack([torch.ones(4000), torch.zeros(4000)], 1).double()
    found = emission.estimate(x, weights)
    assert set(found) == set(truth)
    for site, value in found.items():
        assert value.shape == (2, *truth[site].shape[1:])
        assert value.isfinite().all()
    best = emission.distribution(**{s: v[:1] for s, v in found.items()}).log_prob(x).mean()
    true = emission.distribution(**truth).log_prob(x).mean()
    assert best > true - 0.01


@pytest.mark.parametrize("T", [1, 2, 3, 8, 21])
def test_drawn_states_are_those_of_a_plain_loop(T):
    generator = torch.Generator().manual_seed(T)
    initial = torch.rand(2, 3, generator=generator).double()
    transitions = torch.rand(2, 3, 3, generator=generator).double()
    transitions[..., 1] = 0  # a state that is never moved to
    initial = initial / initial.sum(-1, keepdim=True)
    transitions = transitions / transitions.sum(-1, keepdim=True)
    emission = dist.Normal(torch.zeros(3, 1).double(), 1.0).to_event(1)
    chain = HiddenMarkov(initial, transitions, emission, num_steps=T)
    torch.manual_seed(0)
    found = chain.sample_states((4,))
    torch.manual_seed(0)
    noise = torch.rand(4, 2, T, dtype=torch.float64)
    for s, b in itertools.product(range(4), range(2)):
        state, path = None, []
        for t in range(T):
            probs = initial[b] if state is None else transitions[b, state]
            state = int((noise[s, b, t] >= probs.cumsum(0)).sum())
            path.append(state)
        assert found[s, b].tolist() == path
