"""Likelihood and gradient of hidden Markov chains against hmmlearn's E-step.

The same float64 numbers on both sides, chains in one array (B, T, K). latentlab takes
``hmm.log_prob`` and its backward pass, which gives state probabilities and expected transitions;
hmmlearn its scaled recursions as in its own E-step, chain by chain: forward, backward, posteriors,
expected transitions. Its default recursions in logarithms are the last column.
"""

import numpy as np
import torch
from hmmlearn import _hmmc

from latentlab.distributions import hmm

from . import Table, Timing, machine, take_turns

# T, K, B, and how many times as fast as hmmlearn's scaled recursions is asked
CASES = [
    (100, 3, 992, 1.3),
    (100, 8, 1000, 2.5),
    (50, 32, 992, 1.3),
    (1000, 5, 96, 1.5),
    (100, 5, 16, 1.3),
]


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
