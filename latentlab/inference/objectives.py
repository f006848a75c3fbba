r"""The evidence lower bound, from tensors only.

.. math::
    \mathrm{ELBO} = \mathbb{E}_{q(z)} \left[ \log p(x, z) - \log q(z) \right] \le \log p(x)

One pass of the model takes P particles at once (in a leading batch dimension), where the model is
written so that this is right; that is verified once, against the same particles one by one.
Nothing here reads a value back from a tensor, so that a pair can be traced.

Letters: P particles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from latentlab.guides import Draws, GaussianGuide
from latentlab.inference.pair import Arguments, Pair

__all__ = ["draw", "log_joint", "log_weights", "particles", "site_log_probs", "verify_vectorised"]


class Substitute(Messenger):
    """Put given values at the latent sites; keep the values of all sites."""

    def __init__(self, values: Mapping[str, Tensor], enumerated: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.given, self.enumerated = values, enumerated
        self.values: dict[str, Tensor] = {}
        self.indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.enumerated:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
        elif name in self.given and not msg["is_observed"]:
            msg["value"], msg["done"] = self.given[name], True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            if msg["fn"].subsample_size != msg["fn"].size:
                self.indices[msg["name"]] = msg["value"]
        elif not msg["is_observed"]:
            self.values[msg["name"]] = msg["value"]


class Record(Substitute):
    """Put given values at the latent sites; keep the log-densities of all sites, too."""

    def __init__(self, values: Mapping[str, Tensor], enumerated: tuple[str, ...] = ()) -> None:
        super().__init__(values, enumerated)
        self.log_prob: dict[str, Tensor] = {}
        self.sites: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_post_sample(msg)
        name = msg["name"]
        if site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        if not isinstance(log_prob, Tensor):  # pyro.deterministic scores a plain zero
            log_prob = torch.as_tensor(log_prob)
        if self.enumerated:  # the scale belongs outside of a sum over labels
            self.log_prob[name] = scale_and_mask(log_prob, 1.0, msg["mask"])
            self.sites[name] = (msg["scale"], msg["cond_indep_stack"], msg["infer"])
        else:
            self.log_prob[name] = scale_and_mask(log_prob, msg["scale"], msg["mask"])


def particles(num_particles: int, pair: Pair) -> pyro.plate:
    """The plate of particles, to the left of all plates of the pair."""
    return pyro.plate("_particles", num_particles, dim=-1 - pair.nesting)


def draw(pair: Pair, num_particles: int, data: Arguments | None = None) -> Draws:
    """Draw all latents from the guide.

    Arguments:
        pair: the pair, entered.
        num_particles: number of draws P.
        data: what the guide is called with, by default the pair's own data.

    Returns:
        Values, shape (P, 1, ..., batch, event), and log q (P,).
    """
    if isinstance(pair.guide, GaussianGuide):
        return pair.guide.draw(num_particles)
    data = data or pair.data
    if pair.vectorised:
        with particles(num_particles, pair), Record({}) as record:
            data.call(pair.guide)
        log_q = _per_particle(record.log_prob, num_particles, pair.nesting)
        return Draws(record.values, log_q, record.indices)
    singles: list[Record] = []
    for _ in range(num_particles):
        with Record(singles[0].indices if singles else {}) as record:
            data.call(pair.guide)
        singles.append(record)
    values = {name: torch.stack([s.values[name] for s in singles]) for name in record.values}
    log_q = torch.stack([_total(s.log_prob) for s in singles])
    return Draws(values, log_q, singles[0].indices)


def log_q(pair: Pair, draws: Draws, data: Arguments | None = None) -> Tensor:
    """Log-density (P,) of the guide at draws of it, or of another guide of its shape."""
    if isinstance(pair.guide, GaussianGuide):
        return pair.guide.log_prob(draws.values)
    kept = {name: value for name, value in draws.values.items() if name not in pair.points}
    return _score(pair, pair.guide, replace(draws, values=kept), data or pair.data)


def log_joint(pair: Pair, draws: Draws, data: Arguments | None = None) -> Tensor:
    """Log-density log p(x, z) of the model, shape (P,), discrete latents summed out.

    Arguments:
        pair: the pair, entered.
        draws: draws of the latents, as :func:`draw` returns them.
        data: the observations, by default the pair's own data.
    """
    return _score(pair, pair.model, draws, data or pair.data)


def log_weights(pair: Pair, num_particles: int) -> Tensor:
    """Log importance weights log p(x, z) - log q(z) of P draws; their mean is the ELBO."""
    draws = draw(pair, num_particles)
    return log_joint(pair, draws) - draws.log_q


def site_log_probs(
    pair: Pair, draws: Draws, data: Arguments | None = None
) -> dict[str, Tensor]:
    """Log-density of each site of the model, with its batch: (P or 1, ..., batch).

    A discrete latent that is summed out is summed out within its plate; its log-density and those
    that depend on it stand together under the name of the last of them, an observed site.
    """
    data = data or pair.data
    if pair.vectorised:
        return _recorded(pair, pair.model, _given(draws), data)
    parts = [
        _recorded(pair, pair.model, _given(draws, p, pair), data) for p in range(len(draws))
    ]
    return {
        name: torch.stack([_padded(part[name], pair.nesting) for part in parts])
        for name in parts[0]
    }


def _score(pair: Pair, function: Callable, draws: Draws, data: Arguments) -> Tensor:
    if pair.vectorised:
        recorded = _recorded(pair, function, _given(draws), data)
        return _per_particle(recorded, len(draws), pair.nesting)
    singles = (
        _recorded(pair, function, _given(draws, p, pair), data) for p in range(len(draws))
    )
    return torch.stack([_total(single) for single in singles])


def _given(draws: Draws, p: int | None = None, pair: Pair | None = None) -> dict[str, Tensor]:
    """Values to put at the sites: of all particles, or of one without what only many need."""
    if p is None or pair is None:
        return {**draws.values, **draws.indices}
    single = {
        name: value[p].reshape(pair.shapes.get(name, value.shape[1:]))
        for name, value in draws.values.items()
    }
    return {**single, **draws.indices}


def _recorded(
    pair: Pair, function: Callable, values: Mapping[str, Tensor], data: Arguments
) -> dict[str, Tensor]:
    """Log-densities of the sites of a model or guide, discrete latents summed out."""
    if function is not pair.model or not pair.summed_out:
        with Record(values) as record:
            data.call(function)
        return record.log_prob
    first_dim = -2 - pair.nesting
    with Record(values, pair.summed_out) as record, poutine.enum(first_available_dim=first_dim):
        data.call(function)
    return _sum_out(record, pair)


def _sum_out(record: Record, pair: Pair) -> dict[str, Tensor]:
    """Eliminate the enumerated dimensions one by one, those in the deepest plates first.

    A factor that depends on a label is summed over the plates that the label does not live in,
    then all factors of the label are added and summed out in log space. What is left stands under
    the name of the last factor, where an observed site comes after what it depends on.
    """
    factors = {name: (log_prob, record.sites[name][0]) for name, log_prob in record.log_prob.items()}
    plates = {
        name: {f.dim for f in stack if f.vectorized} for name, (_, stack, _) in record.sites.items()
    }
    dims = {name: record.sites[name][2]["_enumerate_dim"] for name in pair.summed_out}
    for label in sorted(pair.summed_out, key=lambda name: -len(plates[name])):
        dim = dims[label]
        touched = [n for n, (f, _) in factors.items() if f.dim() >= -dim and f.shape[dim] > 1]
        if any(factors[n][1] != factors[touched[0]][1] for n in touched):
            raise ValueError(f"site {label}: its factors are scaled differently by their plates")
        scale = factors[touched[0]][1]
        total: Tensor | float = 0.0
        for name in touched:
            factor = factors.pop(name)[0]
            for plate in sorted(plates[name] - plates[label]):
                factor = factor.sum(plate, keepdim=True)
            total = total + factor
        total = torch.as_tensor(total).logsumexp(dim, keepdim=True)
        factors[touched[-1]] = (total, scale)
        plates[touched[-1]] = plates[label]
    keep = 1 + pair.nesting
    return {
        name: scale_and_mask(f.reshape(f.shape[max(f.dim() - keep, 0) :]), scale)
        for name, (f, scale) in factors.items()
    }


def _per_particle(
    log_prob: Mapping[str, Tensor], num_particles: int, nesting: int
) -> Tensor:
    """Add the sites' log-densities, each summed over its batch but not over particles: (P,)."""
    total: Tensor | None = None
    for value in log_prob.values():
        if value.dim() <= nesting:
            value = value.sum()
        elif value.dim() > 1:
            value = value.flatten(1).sum(-1)
        total = value if total is None else total + value
    return torch.zeros(num_particles) if total is None else total.expand(num_particles)


def _total(log_prob: Mapping[str, Tensor]) -> Tensor:
    """Add the sites' log-densities, all summed: a scalar."""
    return sum((value.sum() for value in log_prob.values()), torch.zeros(()))


def _padded(value: Tensor, nesting: int) -> Tensor:
    """A batch with all its dimensions, so that those of several draws line up."""
    return value.reshape((1,) * (nesting - value.dim()) + tuple(value.shape))


def verify_vectorised(pair: Pair, num_particles: int = 3) -> str | None:
    """Whether P particles at once are P particles one by one; call it with the pair entered.

    Arguments:
        pair: the pair; ``vectorised`` is set, in place.
        num_particles: how many particles are compared.

    Returns:
        ``None`` where it holds, else the reason why the pair runs one particle at a time.
    """
    pair.vectorised = True
    try:
        with torch.no_grad():
            draws = draw(pair, num_particles)
            if draws.log_q.shape != (num_particles,):
                raise ValueError("the guide mixes its particles")
            together = torch.stack([log_joint(pair, draws), log_q(pair, draws)])
            pair.vectorised = False
            one_by_one = torch.stack([log_joint(pair, draws), log_q(pair, draws)])
    except (RuntimeError, ValueError, IndexError) as error:
        pair.vectorised = False
        return f"one particle at a time: {str(error).splitlines()[0]}"
    if not torch.allclose(together, one_by_one, rtol=1e-4, atol=1e-4, equal_nan=True):
        return "one particle at a time: the model's density differs when particles share a batch"
    pair.vectorised = True
    return None
