r"""The objective of a step for bounds other than the ELBO.

.. math::
    \nabla_\theta L = \sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k), \qquad
    \nabla_\phi L = \sum_k \left( \alpha \tilde w_k + (1 - \alpha) \tilde w_k^2 \right)
        \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d \phi}, \qquad
    \tilde w_k = \frac{w_k^{1 - \alpha}}{\sum_j w_j^{1 - \alpha}}

is the gradient that leaves out the score of q: its mean is that of the plain one, for the mean of
the score is zero where its coefficient does not depend on the draw, and else becomes, by another
reparameterisation, a gradient along the path. For :math:`\alpha = 1` this is sticking the
landing, for 0 the doubly reparameterised gradient. A guide of ours draws with the path of
:math:`\log q` alone, and so has no other.

Letters: P particles in groups of K, M rows.

References:
    | Doubly reparameterized gradient estimators for Monte Carlo objectives (Tucker et al., 2019)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, Guide
from latentlab.inference import objectives
from latentlab.inference.pair import Arguments, Pair
from latentlab.objectives import Objective

__all__ = ["Bound", "draws_for", "height_at", "loss_of", "values_of"]

_Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bound:
    """A bound, and whose weights it has.

    Arguments:
        objective: the bound.
        plate: of the rows that have weights of their own; ``None``: one weight for all data.
    """

    objective: Objective
    plate: str | None


def loss_of(
    pair: Pair, num_particles: int, data: Arguments, kl_weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The negative of the bound of a pair at new draws, and their ELBO, in nats per data set.

    Arguments:
        pair: the pair, entered, with a bound.
        num_particles: number of draws P, a multiple of the bound's.
        data: the data of the step.
        kl_weight: of the KL in the weights.
    """
    bound = _bound(pair)
    draws = objectives.draw(pair, num_particles, data)
    is_path = isinstance(pair.guide, Guide) and pair.guide.leaves_out_score(num_particles)
    # Each row of a mini-batch stands for so many; its weights are those of one.
    each = 1.0
    if bound.plate is not None and "size" in data.kwargs:
        each = data.kwargs["size"] / len(data.tensors()[0])

    def terms(values: _Values, with_q: bool) -> _Terms:
        return _terms(pair, replace(draws, values=dict(values)), data, bound.plate, each, with_q)

    if is_path or bound.objective.leaves_out_score:
        path_log_q = draws.log_q.unsqueeze(-1) if is_path else None
        found, loss = _without_score(draws.values, terms, path_log_q, bound.objective, kl_weight)
    else:
        found = terms(draws.values, bound.plate is not None)
        if bound.plate is None:
            found = found._replace(log_q=draws.log_q.unsqueeze(-1))
        loss = -values_of(found.log_weights(kl_weight), bound.objective).mean(0).sum()
    elbo = found.log_weights(1.0).detach().mean(0).sum()
    return each * loss, each * elbo


def draws_for(bound: Bound | None, least: int, groups: int = 1) -> int:
    """How many draws make whole groups of a bound's.

    Arguments:
        bound: the bound; ``None`` for the ELBO.
        least: draws that are wanted.
        groups: groups that are.
    """
    size = 1 if bound is None else bound.objective.num_samples
    return size * max(groups, math.ceil(least / size))


def height_at(pair: Pair, draws: Draws, chunk: int) -> Estimate:
    """The bound at draws of the guide, with its standard error, in nats per data set.

    Arguments:
        pair: the pair, entered, with a bound.
        draws: P draws of its guide at all data, a multiple of the bound's and more than one time
            these.
        chunk: draws that go through the model at once.
    """
    bound = _bound(pair)
    size = bound.objective.num_samples
    step, parts = size * max(1, chunk // size), []
    with torch.no_grad():
        for start in range(0, len(draws), step):
            some = draws[start : start + step]
            found = _terms(pair, some, pair.data, bound.plate, 1.0, bound.plate is not None)
            if bound.plate is None:
                found = found._replace(log_q=some.log_q.unsqueeze(-1))
            parts.append(values_of(found.log_weights(1.0), bound.objective).sum(-1))
    return Estimate.from_draws(torch.cat(parts))


def values_of(log_weights: Tensor, objective: Objective) -> Tensor:
    """The bound at each group of draws: log-weights (P, M) to (P / K, M).

    Arguments:
        log_weights: of P draws, M rows.
        objective: the bound.
    """
    if objective.alpha == 1:
        return log_weights
    groups = log_weights.unflatten(0, (-1, objective.num_samples))
    power = 1 - objective.alpha
    return ((power * groups).logsumexp(1) - math.log(objective.num_samples)) / power


class _Terms(NamedTuple):
    """Log-densities of P draws, of all data (P, 1) or of each row (P, M)."""

    log_lik: Tensor
    log_prior: Tensor
    log_q: Tensor

    def log_p(self, kl_weight: float | Tensor) -> Tensor:
        return self.log_lik + kl_weight * self.log_prior

    def log_weights(self, kl_weight: float | Tensor) -> Tensor:
        return self.log_p(kl_weight) - kl_weight * self.log_q


def _bound(pair: Pair) -> Bound:
    if pair.bound is None:
        raise RuntimeError("a pair without a bound climbs the ELBO")
    return pair.bound


def _terms(
    pair: Pair, draws: Draws, data: Arguments, plate: str | None, each: float, with_q: bool
) -> _Terms:
    """At draws of the latents; log q is left at zero where it is known already."""
    num = len(draws)

    def total(log_probs: Mapping[str, Tensor]) -> Tensor:
        if plate is None:
            return objectives.per_particle(log_probs, num, pair.nesting).unsqueeze(-1)
        parts = [objectives.by_row(pair, *site, plate, num) for site in log_probs.items()]
        return sum(parts[1:], parts[0]) / each if parts else draws.log_q.new_zeros(num, 1)

    of_model = objectives.site_log_probs(pair, draws, data)
    log_lik = total({n: v for n, v in of_model.items() if n not in draws.values})
    log_prior = total({n: v for n, v in of_model.items() if n in draws.values})
    if not with_q:
        return _Terms(log_lik, log_prior, torch.zeros_like(log_prior))
    if plate is None:
        return _Terms(log_lik, log_prior, objectives.log_q(pair, draws, data).unsqueeze(-1))
    return _Terms(log_lik, log_prior, total(objectives.guide_log_probs(pair, draws, data)))


def _without_score(
    values: _Values,
    terms: Callable[[_Values, bool], _Terms],
    log_q: Tensor | None,
    objective: Objective,
    kl_weight: float | Tensor,
) -> tuple[_Terms, Tensor]:
    """The terms, and the loss with a gradient along the path of the draws.

    Arguments:
        values: the draws.
        terms: the log-densities at some values.
        log_q: of the draws (P, 1), with a gradient along their path alone; ``None`` if unknown.
        objective: the bound.
        kl_weight: of the KL in the weights.
    """
    moving = {n: z for n, z in values.items() if z.is_floating_point()}
    names = [*moving]

    def at(*leaves: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = terms({**values, **dict(zip(names, leaves, strict=True))}, log_q is None)
        given = found.log_weights(kl_weight)
        log_weights = given if log_q is None else given - kl_weight * log_q.detach()
        shares = _shares(log_weights.detach(), objective)
        path = (objective.alpha * shares + (1 - objective.alpha) * shares**2) * given
        return path.sum(), (shares, *found)

    slopes = _slopes if get_proxy_mode() is None else _recorded_slopes
    slope, (shares, *parts) = slopes(at, [z.detach() for z in moving.values()])
    found = _Terms(*parts)
    if log_q is not None:
        found = found._replace(log_q=log_q)
    path = sum(
        ((g.detach() * z).sum() for g, z in zip(slope, moving.values(), strict=True)),
        shares.new_zeros(()),
    )
    if log_q is not None:
        weight = objective.alpha * shares + (1 - objective.alpha) * shares**2
        path = path - (weight * kl_weight * log_q).sum()
    gain = path + (shares * found.log_p(kl_weight)).sum()
    num_groups = len(found.log_lik) // objective.num_samples
    value = values_of(found.log_weights(kl_weight).detach(), objective).mean(0).sum()
    return found, -(value + (gain - gain.detach()) / num_groups)


def _shares(log_weights: Tensor, objective: Objective) -> Tensor:
    """How much of its bound each draw is: one in all for each group and row, (P, M)."""
    groups = (1 - objective.alpha) * log_weights.unflatten(0, (-1, objective.num_samples))
    return groups.softmax(1).flatten(0, 1)


_At = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def _slopes(at: _At, leaves: list[Tensor]) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """The gradient of what a function gives first in its arguments, and the rest of it."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value, rest = at(*leaves)
    return torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True), rest


def _recorded_slopes(at: _At, leaves: list[Tensor]) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """The same; slower than torch's own tape, of which no record can be made."""
    value, pull_back, rest = torch.func.vjp(at, *leaves, has_aux=True)  # type: ignore[misc]
    return pull_back(torch.ones_like(value)), rest
