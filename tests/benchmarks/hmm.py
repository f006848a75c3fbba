"""Likelihood and gradient of hidden Markov chains against hmmlearn's E-step.

The same float64 numbers on both sides, chains in one array (B, T, K). latentlab takes
``hmm.log_prob`` and its backward pass, which gives state probabilities and expected transitions;
hmmlearn its scaled recursions as in its own E-step, chain by chain: forward, backward, posteriors,
expected transitions. Its default recursions in logarithms are the last column.

Below these are whole steps of Baum and Welch, E and M, as ``fit(..., method="natural")`` takes
them and as ``GaussianHMM.fit`` does, from the same start.
"""

import numpy as np
import torch
from hmmlearn import _hmmc
from hmmlearn.hmm import GaussianHMM

import latentlab as ll
from latentlab.distributions import hmm
from latentlab.inference.check import prepare

from . import Table, Timing, machine, take_turns

# T, K, B, and how many times as fast as hmmlearn's scaled recursions is asked
CASES = [
    (100, 3, 992, 1.3),
    (100, 8, 1000, 2.5),
    (50, 32, 992, 1.3),
    (1000, 5, 96, 1.5),
    (100, 5, 16, 1.3),
]

STEPS = [(100, 5, 16), (100_000, 8, 1)]  # T, K, B of two columns, Gaussian without correlations


def ours(initial, transitions, seen):
    arrays = [torch.tensor(x).requires_grad_() for x in (initial, transitions, seen)]

    def work(number):
        for _ in range(number):
            torch.autograd.grad(hmm.log_prob(*arrays).sum(), arrays)

    return work


def scaling(initial, transitions, seen):
    """As in ``BaseHMM._do_estep`` with ``implementation="scaling"``."""

    def work(number):
        for _ in range(number):
            counts = 0.0
            for chain in seen:
                top = chain.max(1, keepdims=True)
                probs = np.exp(chain - top)
                _, forward, scales = _hmmc.forward_scaling(initial, transitions, probs)
                backward = _hmmc.backward_scaling(initial, transitions, probs, scales)
                posterior = forward * backward
                posterior /= posterior.sum(1, keepdims=True)
                counts += _hmmc.compute_scaling_xi_sum(forward, transitions, backward, probs)

    return work


def logarithms(initial, transitions, seen):
    """As in ``BaseHMM._do_estep`` with ``implementation="log"``."""

    def work(number):
        for _ in range(number):
            counts = 0.0
            for chain in seen:
                _, forward = _hmmc.forward_log(initial, transitions, chain)
                backward = _hmmc.backward_log(initial, transitions, chain)
                posterior = forward + backward
                posterior = np.exp(posterior - posterior.max(1, keepdims=True))
                posterior /= posterior.sum(1, keepdims=True)
                counts += np.exp(_hmmc.compute_log_xi_sum(forward, transitions, backward, chain))

    return work


def chains(T, K, B):
    """Rows of K states that stay for ten steps, and a start."""
    r = np.random.default_rng(0)
    z = np.zeros(B * T, dtype=int)
    for t, moves in enumerate(r.random(B * T) < 0.1):
        z[t] = r.integers(K) if moves else z[t - 1]
    x = r.normal(size=(B * T, 2)) + 3 * r.normal(size=(K, 2))[z]
    start = {
        "initial": np.full(K, 1 / K),
        "transitions": np.full((K, K), 0.1 / K) + 0.9 * np.eye(K),
        "locs": x[r.choice(B * T, K, replace=False)],
        "scales": np.full((K, 2), 2.0),
    }
    return x, start


def our_steps(x, start, T, K, B):
    model = ll.HiddenMarkovModel(K, 2, prior="flat")
    pair, _ = prepare(model, torch.tensor(x).reshape(B, T, 2), "point")

    def work(number):
        with pair.entered(seed=0):
            guide, updates = pair.guide, pair.model.updates(pair.guide)
            values = {site: torch.tensor(value)[None] for site, value in start.items()}
            guide.start(guide.pack(values)[0], guide.free_sd())
            for _ in range(number):
                updates.maximise(updates.statistics(*pair.data.args)[0])

    return work


def their_steps(x, start, T, K, B, implementation):
    flat = {"covars_prior": 0, "covars_weight": 1, "min_covar": 0, "init_params": ""}

    def work(number):
        peer = GaussianHMM(
            K, "diag", n_iter=number, tol=-np.inf, implementation=implementation, **flat
        )
        peer.n_features = 2
        peer.startprob_, peer.transmat_ = start["initial"], start["transitions"]
        peer.means_, peer.covars_ = start["locs"], start["scales"] ** 2
        peer.fit(x, [T] * B)

    return work


def rows_of_steps():
    """Milliseconds of a step of Baum and Welch."""
    rows = []
    for T, K, B in STEPS:
        problem = (*chains(T, K, B), T, K, B)
        works = {"latentlab": our_steps(*problem)}
        works |= {name: their_steps(*problem, name) for name in ("scaling", "log")}
        found = take_turns(works, turns=5)
        times = [f"{1e3 * found[name].median:.2f}" for name in works]
        ratios = [found[name].times(found["latentlab"]) for name in ("scaling", "log")]
        label = f"{T}, {K}, {B}: a step of Baum and Welch"
        rows.append([label, *times, spread(ratios[0]), "", spread(ratios[1])])
    return rows


def run():
    """Milliseconds for value and gradient, and how many times as fast latentlab is."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for T, K, B, asked in CASES:
            r = np.random.default_rng(0)
            initial, transitions = r.dirichlet(np.ones(K)), r.dirichlet(np.ones(K), size=K)
            arrays = (initial, transitions, 2 * r.normal(size=(B, T, K)))
            makers = {"latentlab": ours, "scaling": scaling, "log": logarithms}
            found = take_turns({name: make(*arrays) for name, make in makers.items()}, turns=9)
            times = [f"{1e3 * found[name].median:.2f}" for name in makers]
            ratios = [found[name].times(found["latentlab"]) for name in ("scaling", "log")]
            rows.append(
                [f"{T}, {K}, {B}", *times, spread(ratios[0]), f">= {asked}", spread(ratios[1])]
            )
        rows += rows_of_steps()
    finally:
        torch.set_num_threads(num_threads)
    return Table(
        "Value and gradient of hidden Markov chains: latentlab and hmmlearn",
        [
            *machine("torch", "jax", "hmmlearn", "numpy"),
            "float64, 1 thread; median CPU time of 9 turns, compilation not counted",
            "ratios: median of the turns, and from the least to the largest",
        ],
        [
            "T, K, B", "latentlab, ms", "hmmlearn scaling", "hmmlearn log",
            "times as fast as scaling", "asked", "as log",
        ],
        rows,
    )  # fmt: skip


def spread(ratio: Timing) -> str:
    return f"{ratio.median:.2f} ({min(ratio.seconds):.2f} to {max(ratio.seconds):.2f})"
