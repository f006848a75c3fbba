r"""What hidden chains are expected to have done: the sums that an M-step needs.

.. math::
    \sum_n p(z_{n1} = k \mid x_n), \qquad
    \sum_{n, t} p(z_{nt} = i, z_{n, t+1} = j \mid x_n), \qquad
    p(z_{nt} = k \mid x_n)

They are the derivatives of the log-likelihood in :math:`\log \pi_k`, :math:`\log A_{ij}` and
:math:`\ell_{ntk}`, so that the kernel's way back has them all at once.

Letters: T time, K states, B chains, J parameters side by side.

References:
    | A tutorial on hidden Markov models (Rabiner, 1989)
    | Variational algorithms for approximate Bayesian inference (Beal, 2003)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentlab.distributions import hmm_op

__all__ = ["Counts", "expected_counts"]


class Counts(NamedTuple):
    """Expected counts, summed over the chains that share their parameters.

    Arguments:
        log_prob: log-likelihoods, shape (..., B), in nats.
        starts: how many start in each state, of the shape of ``initial``.
        moves: how often one goes from row to column, of the shape of ``transitions``.
        states: probabilities of states, shape (..., B, T, K), zero past the end.
    """

    log_prob: Tensor
    starts: Tensor
    moves: Tensor
    states: Tensor


@torch.no_grad()
def expected_counts(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Counts:
    r"""One pass forwards and one backwards.

    Rows need not sum to one: with :math:`\exp \mathbb{E}_q \log \pi` and
    :math:`\exp \mathbb{E}_q \log A`, which sum to less, it is the E-step of variational Bayes,
    and ``log_prob`` the log of its normaliser.

    Arguments:
        initial: weights of the first state, shape (K,), or (J, 1, K) of J times all chains.
        transitions: weights of moves, shape (K, K), or (J, 1, K, K).
        log_likelihoods: shape (..., B, T, K), in nats, 0 where a step is missing.
        lengths: number of steps of each chain, shape (B,), or ``None``: all have T.

    Returns:
        The counts; those of chains that cannot be are zero.

    Example:
        >>> coin, stay = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> seen = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
        >>> counts = expected_counts(coin, stay, seen)
        >>> counts.starts, counts.moves
        (tensor([0.6744, 0.3256]), tensor([[0.6279, 0.0465],
                [0.0465, 0.2791]]))
    """
    arrays = (initial, transitions, log_likelihoods)
    log_prob, *kept = hmm_op.hmm_forward(*arrays, lengths, True)
    seeds = torch.ones_like(log_prob)
    batch = (*log_prob.shape, *log_likelihoods.shape[-2:])
    arrays = (initial, transitions, log_likelihoods.expand(batch))
    first, second, states = hmm_op.hmm_backward(seeds, *arrays, lengths, *kept)
    return Counts(log_prob, initial * first, transitions * second, states)
