r"""Hidden Markov chains in logarithms: slower than scaled ones, and never at a loss.

.. math::
    \log \alpha_{tj} = \ell_{tj} + \log \sum_i \exp(\log \alpha_{t-1,i} + \log A_{ij}), \qquad
    \log \beta_{t-1,i} = \log \sum_j \exp(\log A_{ij} + \ell_{tj} + \log \beta_{tj})

For chains with transitions that are impossible, where a path may fall behind by hundreds of nats
and still be the only one that goes on.

Letters: T time, K states, G groups of chains that share their transitions, L chains of a group,
n chains that take logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentlab.distributions.hmm_lanes import Layout, absent_steps

__all__ = ["LogChains", "log_backward", "log_forward"]

_CAP = 230.0  # nats: derivatives in an impossible transition stay finite


@dataclass(frozen=True)
class LogChains:
    """Some chains in logarithms and float64.

    Arguments:
        transitions: shape (n, K, K).
        seen: log-likelihoods, shape (T, n, K), -inf at a step that does not exist.
        exists: whether a step exists, shape (T, n).
        alphas: log-probabilities of the past and the state, shape (T, n, K).
        betas: log-probabilities of the future given the state, shape (T, n, K).
    """

    transitions: Tensor
    seen: Tensor
    exists: Tensor
    alphas: Tensor
    betas: Tensor

    @classmethod
    def of(
        cls,
        layout: Layout,
        which: Tensor,
        initial: Tensor,
        transitions: Tensor,
        log_likelihoods: Tensor,
        lengths: Tensor | None,
    ) -> LogChains:
        """The chains ``which`` of all G L, by their numbers, from arrays as users hand them in."""
        G, L = layout.sizes
        group, chain = which // L, which % L

        def chosen(x: Tensor) -> Tensor:  # (..., G or 1, K, L) to (..., n, K)
            x = x.expand(*x.shape[:-3], G, *x.shape[-2:])
            return x.movedim(-1, -2)[..., group, chain, :].double()

        start = chosen(layout.into(initial, after=[0])).log()
        moves = layout.matrices(transitions).double().log()[group]
        seen = chosen(layout.into(log_likelihoods, [0], [1]))
        absent = absent_steps(layout, lengths, seen, len(seen))
        if absent is None:
            exists = torch.ones_like(seen[..., 0], dtype=torch.bool)
        else:
            exists = absent.expand(-1, G, L)[:, group, chain] == 0
        seen = torch.where(exists.unsqueeze(-1), seen, -torch.inf)
        alphas = log_forward(start, moves, seen, exists)
        return cls(moves, seen, exists, alphas, log_backward(moves, seen, exists))

    @property
    def total(self) -> Tensor:
        """Log-likelihoods, shape (n,)."""
        return self.alphas[-1].logsumexp(-1)

    def filtered(self) -> Tensor:
        """Log-probabilities of states given the past, shape (T, n, K); -inf for the impossible."""
        norm = self.alphas.logsumexp(-1, keepdim=True)
        found = self.alphas - torch.where(norm == -torch.inf, torch.inf, norm)
        return torch.where(self.exists.unsqueeze(-1), found, -torch.inf)

    def starts(self) -> Tensor:
        """Derivatives in the initial probabilities, shape (n, K)."""
        return (self.seen[0] + self.betas[0] - self._base).clamp_max(_CAP).exp()

    def marginals(self) -> Tensor:
        """Probabilities of states given all, shape (T, n, K)."""
        return (self.alphas + self.betas - self._base).exp() * self.exists.unsqueeze(-1)

    def moves(self, t: int) -> Tensor:
        """Derivatives in the transitions from step t to the next, shape (n, K, K)."""
        ahead = (self.seen[t + 1] + self.betas[t + 1] - self._base).unsqueeze(-2)
        return (self.alphas[t].unsqueeze(-1) + ahead).clamp_max(_CAP).exp()

    def counts(self) -> Tensor:
        """Derivatives in the transitions, summed over time, shape (n, K, K)."""
        counts = torch.zeros_like(self.transitions)
        for t in range(len(self.alphas) - 1):
            counts += self.moves(t)
        return counts

    def pairs(self) -> Tensor:
        """Probabilities of states at two successive steps given all, (T - 1, n, K, K)."""
        steps = (self.moves(t) * self.transitions.exp() for t in range(len(self.alphas) - 1))
        return torch.stack(list(steps)) if len(self.alphas) > 1 else self.transitions[None][:0]

    @property
    def _base(self) -> Tensor:
        """Log-likelihoods, shape (n, 1); what is impossible then has probability and slope 0."""
        total = self.total.unsqueeze(-1)
        return torch.where(total == -torch.inf, torch.inf, total)


def log_forward(
    log_initial: Tensor, log_transitions: Tensor, log_likelihoods: Tensor, exists: Tensor
) -> Tensor:
    """Log-probabilities of what was seen and the state, shape (T, n, K).

    Arguments:
        log_initial: shape (n, K).
        log_transitions: shape (n, K, K).
        log_likelihoods: shape (T, n, K).
        exists: whether a step exists, bool, shape (T, n); behind the last one values stay.
    """
    now = torch.where(exists[0, :, None], log_initial + log_likelihoods[0], log_initial)
    found = [now]
    for seen, here in zip(log_likelihoods[1:], exists[1:, :, None], strict=True):
        moved = torch.logsumexp(now.unsqueeze(-1) + log_transitions, -2) + seen
        now = torch.where(here, moved, now)
        found.append(now)
    return torch.stack(found)


def log_backward(log_transitions: Tensor, log_likelihoods: Tensor, exists: Tensor) -> Tensor:
    """Log-probabilities of what is yet to be seen, given the state, shape (T, n, K)."""
    now = torch.zeros_like(log_likelihoods[0])
    found = [now]
    for t in range(len(log_likelihoods) - 1, 0, -1):
        ahead = (log_likelihoods[t] + now).unsqueeze(-2)
        moved = torch.logsumexp(log_transitions + ahead, -1)
        now = torch.where(exists[t, :, None], moved, 0.0)
        found.append(now)
    return torch.stack(found[::-1])
