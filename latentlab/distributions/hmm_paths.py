r"""Paths through hidden Markov chains: the likeliest, and draws.

.. math::
    \delta_{tj} = \ell_{tj} + \max_i (\delta_{t-1,i} + \log A_{ij}), \qquad
    p(z_t = i \mid z_{t+1} = j, x) \propto p(z_t = i \mid x_{1:t}) \, A_{ij}

Letters: T time, K states, G groups of chains that share their transitions, L chains of a group,
S draws.

References:
    | Error bounds for convolutional codes (Viterbi, 1967)
    | Bayesian methods for hidden Markov models (Scott, 2002)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_paths", "draw_paths"]


def best_paths(
    log_initial: Tensor, log_transitions: Tensor, log_likelihoods: Tensor, exists: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest path of each chain.

    Arguments:
        log_initial: shape (G, K, L).
        log_transitions: shape (G, K, K).
        log_likelihoods: shape (T, G, K, L).
        exists: whether a step exists, shape (T, G, L).

    Returns:
        Paths, shape (T, G, L), -1 where there is none, and their log joint densities (G, L).
    """
    T, K = len(log_likelihoods), log_initial.shape[1]
    stay = torch.arange(K, dtype=torch.int32, device=log_initial.device)[:, None]
    moves = log_transitions.mT.unsqueeze(-1)  # (G, to, from, 1)
    best = torch.where(exists[0].unsqueeze(1), log_initial + log_likelihoods[0], log_initial)
    origins = []
    for t in range(1, T):
        value, origin = (best.unsqueeze(1) + moves).max(2)
        here = exists[t].unsqueeze(1)
        best = torch.where(here, value + log_likelihoods[t], best)
        origins.append(torch.where(here, origin.int(), stay))
    log_joint, state = best.max(1)
    path = [state]
    for origin in reversed(origins):
        state = origin.gather(1, state.unsqueeze(1).long()).squeeze(1).long()
        path.append(state)
    paths = torch.stack(path[::-1])
    return torch.where(exists & (log_joint > -torch.inf), paths, -1), log_joint


def draw_paths(
    log_filtered: Tensor, log_transitions: Tensor, exists: Tensor, uniforms: Tensor
) -> Tensor:
    """Draws of the states given all observations, backwards in time.

    Arguments:
        log_filtered: log-probabilities of states given the past, shape (T, G, K, L).
        log_transitions: shape (G, K, K).
        exists: whether a step exists, shape (T, G, L).
        uniforms: numbers from [0, 1), shape (T, S, G, L).

    Returns:
        Shape (T, S, G, L), -1 where there is no state.
    """
    T, S, G, L = uniforms.shape
    last = torch.cat([~exists[1:], torch.ones_like(exists[:1])])  # the next step does not exist
    groups = torch.arange(G, device=uniforms.device)[:, None]
    by_next = log_transitions.mT  # (G, to, from)
    state, path = torch.zeros(S, G, L, dtype=torch.long, device=uniforms.device), []
    for t in range(T - 1, -1, -1):
        onward = by_next[groups, state].movedim(-1, -2)  # (S, G, K, L)
        logits = log_filtered[t] + torch.where(last[t].unsqueeze(1), 0.0, onward)
        found = _draw(logits, uniforms[t])
        there = exists[t] & (log_filtered[t] > -torch.inf).any(1)
        state = torch.where(there, found, 0)
        path.append(torch.where(there, state, -1))
    return torch.stack(path[::-1])


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Positions along the dimension before the last, one for each uniform number."""
    weights = logits.softmax(-2)
    heights = weights.cumsum(-2)
    found = (heights <= (uniforms * heights[..., -1, :]).unsqueeze(-2)).sum(-2)
    # Rounding must not take a draw past the last state that is possible.
    places = torch.arange(logits.shape[-2], device=logits.device).unsqueeze(-1)
    highest = torch.where(weights > 0, places, 0).amax(-2)
    return found.minimum(highest)
