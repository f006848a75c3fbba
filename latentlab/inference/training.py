r"""The objective of a step of training, for guides that are not written from their noise.

.. math::
    -\mathbb{E}_q \log p(x \mid z)
        + \beta_t \sum_j \max(\lambda, \mathrm{KL}_j), \qquad
    \mathrm{KL}_j = \mathbb{E}_{q} \, \mathrm{KL}(q(z_j \mid \cdot) \,\|\, p(z_j \mid \cdot))

The KL of a site is taken in closed form where torch knows one, and by a draw elsewhere. In closed
form it has no bias where the guide draws the latents in the order of the model: all that the two
distributions of a site depend on is then drawn before it. :math:`\beta_t` and :math:`\lambda` are
1 and 0 but for a model that :class:`latentlab.protocols.Anneals`; the floor is on the mean over
the data of each latent dimension. What is recorded has neither.

Letters: P particles, j latent dimensions, t steps.

References:
    | Auto-encoding variational Bayes (Kingma and Welling, 2014)
    | Improved variational inference with inverse autoregressive flow (Kingma et al., 2016)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from latentlab.guides import Guide
from latentlab.inference import bounds, objectives, score
from latentlab.inference.guards import Gauge
from latentlab.inference.pair import Arguments, Pair
from latentlab.protocols import Anneals, owner_of

__all__ = ["SINGULAR", "Objective", "blind_step_of", "kl_weight", "objective", "step_of"]

SINGULAR: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What torch raises where a matrix cannot be factorised."""


def step_of(
    pair: Pair,
    num_particles: int,
    data: Arguments,
    step: int,
    optimiser: torch.optim.Optimizer,
    gauge: Gauge,
) -> float:
    """Take a step, unless it leads nowhere.

    Arguments:
        pair: the pair, entered.
        num_particles: number of draws P.
        data: the data of the step.
        step: its number.
        optimiser: of the pair's parameters.
        gauge: of the climb.

    Returns:
        The ELBO at the draws of the step; NaN where no step could be taken.
    """
    optimiser.zero_grad(set_to_none=True)
    try:
        loss, elbo = objective(pair, num_particles, data, step)
        value, descended = torch.stack([elbo, loss.detach()]).tolist()
        if not (math.isfinite(value) and math.isfinite(descended)):
            return math.nan if math.isfinite(value) else value
        loss.backward()
    except SINGULAR:  # a matrix that is singular here may not be a step before
        return math.nan
    grads = {name: p.grad for name, p in pair.parameters().items()}
    found = {name: g for name, g in grads.items() if g is not None and g.numel()}
    if found:
        slopes = torch.stack([*torch._foreach_norm([*found.values()], math.inf)]).tolist()
        slope, name = max(zip(map(_or_inf, slopes), found, strict=True))
        if not gauge.accepts(name, slope, value):
            return math.nan  # the step is not taken, but tried again
    optimiser.step()
    return value


def _or_inf(slope: float) -> float:
    """Of a NaN, which no maximum finds, infinity."""
    return math.inf if math.isnan(slope) else slope


def blind_step_of(
    pair: Pair,
    num_particles: int,
    data: Arguments,
    step: int,
    optimiser: torch.optim.Optimizer,
) -> Tensor:
    """Take a step without a look at its numbers, for which a GPU would have to be waited for.

    Several processes take the mean of their steps: where one of them fails, all do.

    Arguments:
        pair: as for :func:`step_of`.
        num_particles: as for :func:`step_of`.
        data: as for :func:`step_of`.
        step: as for :func:`step_of`.
        optimiser: as for :func:`step_of`.

    Returns:
        The ELBO at the draws of the step, a scalar on the device of the pair; NaN where the step
        led nowhere, which it then did.
    """
    optimiser.zero_grad(set_to_none=True)
    try:
        loss, elbo = objective(pair, num_particles, data, step)
        loss.backward()
    except SINGULAR:
        loss = elbo = torch.full((), math.nan)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if pair.ranks:
        loss, elbo = _shared(pair, parameters, loss.detach(), elbo)
    slopes = [p.grad.sum() for p in parameters if p.grad is not None]
    is_sound = torch.stack([loss.detach(), *slopes]).isfinite().all()
    optimiser.step()
    return torch.where(is_sound | ~elbo.isfinite(), elbo, math.nan)


def _shared(
    pair: Pair, parameters: list[Tensor], loss: Tensor, elbo: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and the ELBO of all processes; the gradients become those of all, in place."""
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in own) else pair.dtype
    flat = torch.cat([x.detach().flatten().to(dtype) for x in (*own, loss, elbo)])
    flat = pair.ranks.mean(flat)
    sizes = [g.numel() for g in own]
    *parts, loss, elbo = flat.split([*sizes, 1, 1])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return loss[0], elbo[0]


class Objective(NamedTuple):
    """What a step descends, and what it reports."""

    loss: Tensor
    elbo: Tensor


class _Site(NamedTuple):
    """A site that was run: its distribution and value, how it counts, how many data it has."""

    fn: Any
    value: Tensor
    scale: Any
    mask: Any


class _Run(Messenger):
    """Put given values at the latent sites, keep the sites; no log-density is computed."""

    def __init__(self, given: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given, self.indices = given, dict(indices)
        self.latents: dict[str, _Site] = {}
        self.observed: dict[str, _Site] = {}

    def _pyro_sample(self, msg: Any) -> None:  # noqa: ANN401
        name = msg["name"]
        if name in self.indices:
            msg["value"], msg["done"] = self.indices[name], True
        elif name in self.given and not msg["is_observed"]:
            msg["value"], msg["done"] = self.given[name], True

    def _pyro_post_sample(self, msg: Any) -> None:  # noqa: ANN401
        name = msg["name"]
        if site_is_subsample(msg):
            drawn = msg["fn"].subsample_size
            if drawn is not None and drawn < msg["fn"].size:
                self.indices[name] = msg["value"]
            return
        site = _Site(msg["fn"], msg["value"], msg["scale"], msg["mask"])
        (self.observed if msg["is_observed"] else self.latents)[name] = site


def kl_weight(pair: Pair, step: int) -> float:
    """Weight of the KL in a step: one, but for a model that anneals."""
    owner = owner_of(pair.model)
    return float(owner.kl_weight(step)) if isinstance(owner, Anneals) else 1.0


def objective(
    pair: Pair, num_particles: int, data: Arguments, step: int, weight: Tensor | None = None
) -> Objective:
    """The objective at new draws of the guide.

    Arguments:
        pair: the pair, entered.
        num_particles: number of draws P.
        data: the data of the step.
        step: its number, for a model that anneals.
        weight: of the KL, where it is not that of the step.

    Returns:
        The loss, and the ELBO in nats per data set, of which no gradient is to be taken.
    """
    owner = owner_of(pair.model)
    free_bits = float(owner.free_bits) if isinstance(owner, Anneals) else 0.0
    charge = kl_weight(pair, step) if weight is None else weight
    if pair.bound is not None:
        return Objective(*bounds.loss_of(pair, num_particles, data, charge))
    if pair.scored:
        return Objective(*score.loss_of(pair, num_particles, data, charge))
    if isinstance(pair.guide, Guide) or not pair.vectorised or pair.summed_out:
        return _by_draws(pair, num_particles, data, charge, free_bits)
    with objectives.particles(num_particles, pair), _Run({}, {}) as q:
        data.call(pair.guide)
    values = {
        name: site.value.clone() if isinstance(site.fn, Delta) else site.value
        for name, site in q.latents.items()
    }
    with _Run(values, q.indices) as p:
        data.call(pair.model)
    log_lik = sum((_total(_log_prob(s), num_particles, pair) for s in p.observed.values()), 0.0)
    closed = [n for n in q.latents if n in p.latents] == [*p.latents]
    spent, charged = torch.zeros(()), torch.zeros(())
    for name, site in q.latents.items():
        kl = _kl(site, p.latents.get(name), pair, closed)
        spent = spent + kl.sum()
        charged = charged + _floored(kl, site, pair, free_bits).sum()
    for site in q.observed.values():  # a factor that the guide adds to its density
        extra = _total(_log_prob(site), num_particles, pair)
        spent, charged = spent + extra, charged + extra
    log_lik = torch.as_tensor(log_lik, dtype=spent.dtype)
    return Objective(charge * charged - log_lik, (log_lik - spent).detach())


def _by_draws(
    pair: Pair, num_particles: int, data: Arguments, weight: float | Tensor, free_bits: float
) -> Objective:
    """From the log-densities of draws only, the KL of all latents in one."""
    draws = objectives.draw(pair, num_particles, data)
    if not isinstance(weight, Tensor) and weight == 1.0 and not free_bits:
        elbo = (objectives.log_joint(pair, draws, data) - draws.log_q).mean()
        return Objective(-elbo, elbo.detach())
    sites = objectives.site_log_probs(pair, draws, data)
    parts = {n: _spread(v, num_particles, pair.nesting) for n, v in sites.items()}
    log_prior = sum(parts[z.name] for z in pair.latents if z.name in parts)
    log_lik = sum((v for n, v in parts.items() if n not in draws.values), torch.zeros(()))
    kl, log_lik = (draws.log_q - log_prior).mean(), log_lik.mean()
    free = free_bits * sum(math.prod(z.shape) for z in pair.latents)
    charged = kl.clamp_min(free) if free else kl
    return Objective(weight * charged - log_lik, (log_lik - kl).detach())


def _kl(q: _Site, p: _Site | None, pair: Pair, closed: bool) -> Tensor:
    """KL of a site in nats per data set, one for each latent dimension where that is known."""
    if p is None or isinstance(q.fn, Delta):  # what the guide alone draws, and points
        log_q = 0.0 if isinstance(q.fn, Delta) else _log_prob(q)
        log_p = _log_prob(p) if p is not None else 0.0
        return torch.as_tensor(log_q - log_p).mean(0).sum()
    own, prior = _split(q.fn), _split(p.fn)
    if own.dims != prior.dims:
        own, prior = _Parts(q.fn, 0), _Parts(p.fn, 0)
    kl = _divergence(own.base, prior.base) if closed else None
    if kl is None:
        kl = own.base.log_prob(q.value) - prior.base.log_prob(q.value)
    else:
        # The distributions may be narrower than the values, as a prior without a batch is.
        batch = q.value.shape[: q.value.dim() - q.fn.event_dim]
        kl = kl.expand(*batch, *kl.shape[kl.dim() - own.dims :])
    mask = q.mask
    if isinstance(mask, Tensor) and own.dims:
        mask = mask.reshape(*mask.shape, *(1,) * own.dims)
    scale = q.scale
    if isinstance(scale, Tensor) and scale.dim() and own.dims:
        scale = scale.reshape(*scale.shape, *(1,) * own.dims)
    kl = scale_and_mask(kl, scale, mask)
    num_batch = kl.dim() - own.dims
    num_particles = max(1, kl.shape[0]) if num_batch > pair.nesting else 1
    return kl.sum(tuple(range(num_batch))) / num_particles if num_batch else kl


class _Parts(NamedTuple):
    base: Any
    dims: int


def _split(fn: Any) -> _Parts:  # noqa: ANN401
    """A distribution of independent numbers as that of one of them, and over how many axes."""
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == len(fn.event_shape):
        return _Parts(fn.base_dist, fn.reinterpreted_batch_ndims)
    return _Parts(fn, 0)


def _divergence(q: Any, p: Any) -> Tensor | None:  # noqa: ANN401
    """The KL in closed form, where torch knows it."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _floored(kl: Tensor, site: _Site, pair: Pair, free_bits: float) -> Tensor:
    """Each dimension's KL, at least what it may spend for free over all data of the site."""
    if not free_bits:
        return kl
    event = site.fn.event_dim
    batch = site.value.shape[: site.value.dim() - event]
    num_data = math.prod(batch[1:] if len(batch) > pair.nesting else batch)
    scale = (
        site.scale if isinstance(site.scale, int | float) else torch.as_tensor(site.scale).max()
    )
    per_entry = math.prod(site.value.shape[site.value.dim() - event :]) // max(kl.numel(), 1)
    return torch.maximum(kl, torch.as_tensor(free_bits * scale * num_data * per_entry).to(kl))


def _log_prob(site: _Site) -> Tensor:
    log_prob = torch.as_tensor(site.fn.log_prob(site.value))
    return scale_and_mask(log_prob, site.scale, site.mask)


def _total(log_prob: Tensor, num_particles: int, pair: Pair) -> Tensor:
    """Summed over the data, mean over the particles."""
    return _spread(log_prob, num_particles, pair.nesting).mean()


def _spread(log_prob: Tensor, num_particles: int, nesting: int) -> Tensor:
    if log_prob.dim() <= nesting:
        return log_prob.sum().expand(num_particles)
    flat = log_prob.flatten(1).sum(-1) if log_prob.dim() > 1 else log_prob
    return flat.expand(num_particles)
