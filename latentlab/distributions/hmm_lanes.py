r"""Hidden Markov chains in lanes: many chains abreast, one step in time after the other.

.. math::
    \hat\alpha_t = \frac{(A^\top \hat\alpha_{t-1}) \odot e_t}{c_t}, \qquad
    \hat\beta_{t-1} = A \, \frac{e_t \odot \hat\beta_t}{c_t}, \qquad
    \log p(x_{1:T}) = \sum_t \log c_t + \max_k \ell_{tk}, \qquad
    e_{tk} = \exp(\ell_{tk} - \max_k \ell_{tk})

with :math:`c_t` such that :math:`\hat\alpha_t` sums to one. Arrays are laid out in time first and
chains last, (T, G, K, L), so that a step is one small matrix product for all chains that share
their transitions. A step that does not exist has e = 0 and adds one to c, and one to beta before
it: that leaves every sum as it should be without a branch.

Letters: T time, K states, G groups of chains that share their transitions, L chains of a group.

References:
    | A tutorial on hidden Markov models (Rabiner, 1989)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Size, Tensor

__all__ = [
    "Layout",
    "Likelihoods",
    "absent_steps",
    "backward",
    "forward",
    "is_dense",
    "lost_lanes",
    "scaled",
]

# Powers of the least normal number. A lane is trusted if nothing in it came near the point where
# numbers vanish: see ``lost_lanes``.
_DENSE, _FLOOR_DENSE = 1 / 5, 4 / 5
_FLOOR, _LEAST, _LEAST_SUM = 1 / 3, 1 / 5, 1 / 8


@dataclass(frozen=True)
class Layout:
    """Which batch dimensions are groups, and which are chains within a group.

    Arguments:
        batch: the common batch shape of all arrays.
        groups: the dimensions along which transitions differ.
        chains: the others.
    """

    batch: Size
    groups: tuple[int, ...]
    chains: tuple[int, ...]

    @classmethod
    def of(
        cls, initial: Tensor, transitions: Tensor, log_likelihoods: Tensor, lengths: Tensor | None
    ) -> Layout:
        """The layout for arrays of shapes (..., K), (..., K, K), (..., T, K) and (...,)."""
        own = transitions.shape[:-2]
        shapes = [initial.shape[:-1], own, log_likelihoods.shape[:-2]]
        batch = torch.broadcast_shapes(*shapes, () if lengths is None else lengths.shape)
        own = Size([1] * (len(batch) - len(own))) + own
        groups = tuple(d for d, size in enumerate(own) if size > 1)
        return cls(batch, groups, tuple(d for d in range(len(batch)) if d not in groups))

    @property
    def sizes(self) -> tuple[int, int]:
        """G and L."""
        return self._size(self.groups), self._size(self.chains)

    def into(self, x: Tensor, before: Sequence[int] = (), after: Sequence[int] = ()) -> Tensor:
        """An array (*batch, *tail) as (*before, G or 1, *after, L).

        Arguments:
            x: an array; its batch dimensions broadcast.
            before: dimensions of the tail, from 0, to go to the front.
            after: those to go between groups and chains.
        """
        n, tail = len(self.batch), len(before) + len(after)
        x = x.reshape((*[1] * (n + tail - x.dim()), *x.shape))
        shared = all(x.shape[d] == 1 for d in self.groups)
        shape = [1 if shared and d in self.groups else size for d, size in enumerate(self.batch)]
        order = (*(n + d for d in before), *self.groups, *(n + d for d in after), *self.chains)
        sizes = [x.shape[n + d] for d in before], [x.shape[n + d] for d in after]
        G, L = self.sizes
        x = x.expand((*shape, *x.shape[n:])).permute(order)
        return x.reshape((*sizes[0], 1 if shared else G, *sizes[1], L))

    def matrices(self, transitions: Tensor) -> Tensor:
        """Transitions (..., K, K), which no chain has of its own, as (G, K, K)."""
        K = transitions.shape[-1]
        return transitions.reshape(-1, K, K).contiguous()

    def out_of(self, x: Tensor, before: int = 0, after: int = 0) -> Tensor:
        """The way back, as a view: (*before, G or 1, *after, L) as (*batch, *before, *after)."""
        shared = x.shape[before] != self.sizes[0]
        groups = [1 if shared else self.batch[d] for d in self.groups]
        chains = [self.batch[d] for d in self.chains]
        middle = x.shape[before + 1 : before + 1 + after]
        x = x.reshape((*x.shape[:before], *groups, *middle, *chains))
        place = {d: before + i for i, d in enumerate(self.groups)}
        place |= {d: before + len(groups) + after + i for i, d in enumerate(self.chains)}
        order = [place[d] for d in range(len(self.batch))] + [*range(before)]
        return x.permute((*order, *(before + len(groups) + i for i in range(after))))

    def _size(self, dims: tuple[int, ...]) -> int:
        size = 1
        for d in dims:
            size *= self.batch[d]
        return size


@dataclass(frozen=True)
class Likelihoods:
    r"""What a chain sees, in lanes.

    Arguments:
        scaled: :math:`e_t`, shape (T, G, K, L), zero at a step that does not exist.
        log_scale: :math:`\sum_t \max_k \ell_{tk}` in float64, shape (G, L).
        absent: one at a step that does not exist, shape (T, G or 1, L); ``None``: all exist.
    """

    scaled: Tensor
    log_scale: Tensor
    absent: Tensor | None


def absent_steps(
    layout: Layout, lengths: Tensor | None, like: Tensor, num_steps: int
) -> Tensor | None:
    """One where a step does not exist, else zero: shape (T, G or 1, L)."""
    if lengths is None:
        return None
    time = torch.arange(num_steps, device=like.device)[:, None, None]
    return (time >= layout.into(lengths)).to(like.dtype)


def is_dense(initial: Tensor, transitions: Tensor) -> bool:
    """Whether every state is within one step of every other one, and may be the first."""
    least = torch.finfo(transitions.dtype).tiny ** _DENSE
    return min(initial.min().item(), transitions.min().item()) >= least


def scaled(
    log_likelihoods: Tensor, absent: Tensor | None, dense: bool, out: Tensor
) -> Likelihoods:
    """Log-likelihoods in lanes (T, G or 1, K, L) as factors of at most one, in ``out``.

    Factors are kept off zero: in a dense chain the floor is too low to be seen, in another one
    a lane that touches it is not trusted. Only an impossible observation is exactly zero.
    """
    away = out.copy_(log_likelihoods)
    gaps = None if absent is None else absent.unsqueeze(2) > 0
    if gaps is not None:
        away.masked_fill_(gaps, 0.0)
    top = away.amax(2, keepdim=True)
    away.sub_(torch.where(top == -torch.inf, 0.0, top))
    floor = math.log(torch.finfo(away.dtype).tiny) * (_FLOOR_DENSE if dense else _FLOOR)
    if away.min() < floor:
        away.copy_(torch.where(away == -torch.inf, away, away.clamp_min(floor)))
    factors = _exp(away)
    if gaps is not None:
        factors.masked_fill_(gaps, 0.0)
    return Likelihoods(factors, top.squeeze(2).sum(0, dtype=torch.float64), absent)


def _exp(x: Tensor) -> Tensor:
    """Exponentials in place: numpy's take half the time of torch's with AVX-512, twice without."""
    if x.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return x.exp_()
    values = x.detach().numpy()
    np.exp(values, out=values)
    return x


def forward(initial: Tensor, transitions: Tensor, seen: Likelihoods, out: Tensor) -> Tensor:
    """The recursion forwards in time.

    Arguments:
        initial: shape (G or 1, K, L).
        transitions: shape (G, K, K).
        seen: the likelihoods.
        out: where filtered probabilities go, shape (T, G, K, L).

    Returns:
        The normalisers, shape (T, G, L).
    """
    factors, absent, probs = seen.scaled, seen.absent, out
    T, G, _, L = factors.shape
    sums = factors.new_empty(T, G, 1, L)
    product, transposed = torch.bmm, transitions.mT.contiguous()
    nows, cs, es = probs, sums, factors
    if G == 1:
        product, transposed, initial = torch.mm, transposed[0], initial[0]
        nows, cs, es = probs[:, 0], sums[:, 0], factors[:, 0]
    past: Tensor | None = None
    gaps = absent.unsqueeze(-2) if absent is not None and G > 1 else absent
    for t, (now, c, e) in enumerate(zip(nows.unbind(0), cs.unbind(0), es.unbind(0), strict=True)):
        if past is None:
            torch.mul(initial, e, out=now)
        else:
            product(transposed, past, out=now)
            now.mul_(e)
        torch.sum(now, -2, keepdim=True, out=c)
        if gaps is not None:
            c.add_(gaps[t])
        past = now.div_(c)
    return sums.squeeze(2)


def backward(
    transitions: Tensor, seen: Likelihoods, probs: Tensor, sums: Tensor, seeds: Tensor, dense: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The recursion backwards in time, for a weighted sum of log-likelihoods of chains.

    Arguments:
        transitions: shape (G, K, K).
        seen: the likelihoods.
        probs: filtered probabilities, shape (T, G, K, L).
        sums: their normalisers, shape (T, G, L).
        seeds: the weight of each chain, shape (G, L).
        dense: whether no number can overflow.

    Returns:
        Derivatives in the initial probabilities (G, K, L), in the transitions (G, K, K), and in
        the log-likelihoods (T, G, K, L): posterior probabilities times weights.
    """
    T, G, K, L = probs.shape
    factors, absent = seen.scaled, seen.absent
    A, counts = transitions, probs.new_zeros(G, K, K)
    out, cap = torch.empty_like(probs), torch.finfo(probs.dtype).tiny ** -_FLOOR
    gaps = None if absent is None else (absent * seeds).unsqueeze(-2)  # (T, G, 1, L)
    seeds, sums = seeds.unsqueeze(-2), sums.unsqueeze(2)
    beta, u = seeds.expand(G, K, L).contiguous(), probs.new_empty(G, K, L)
    lists, multiply, accumulate = [probs, sums, factors, out], torch.bmm, _add_products
    if G == 1:
        A, counts, beta, u = A[0], counts[0], beta[0], u[0]
        lists, multiply, accumulate = [x[:, 0] for x in lists], torch.mm, _add_product
        gaps = None if gaps is None else gaps[:, 0]
    als, cs, es, outs = (x.unbind(0) for x in lists)
    for t in range(T - 1, -1, -1):
        torch.mul(als[t], beta, out=outs[t])
        torch.mul(beta, es[t], out=u)
        u.div_(cs[t])
        if t == 0:
            break
        accumulate(counts, als[t - 1], u)
        multiply(A, u, out=beta)
        if gaps is not None:
            beta.add_(gaps[t])
        if not dense:
            beta.clamp_(-cap, cap)
    return u.reshape(G, K, L), counts.reshape(G, K, K), out


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(into, a, b.mT, out=into)


def _add_products(into: Tensor, a: Tensor, b: Tensor) -> None:
    torch.baddbmm(into, a, b.mT, out=into)


def lost_lanes(probs: Tensor, sums: Tensor, dense: bool) -> Tensor:
    r"""Chains whose scaled recursion may have lost a path, shape (G, L).

    In a dense chain every path that vanishes is one step from one that does not, so that only a
    zero or a missing number can spoil it. Else a path that vanished may be the only one that goes
    on: a chain is trusted if each of its numbers is an exact zero or far above the least one.
    Factors are at least :math:`\tau^{1/3}`, so that one at the floor gives a probability below
    :math:`\tau^{1/3 - 1/8}`, and is found.
    """
    least, most = sums.aminmax(dim=0)  # a missing number is both
    lost = ~((least > 0) & (most < torch.inf))
    if not dense:
        tiny = torch.finfo(probs.dtype).tiny
        lost |= ((probs > 0) & (probs < tiny**_LEAST)).any(2).any(0)
        lost |= least < tiny**_LEAST_SUM
    return lost
