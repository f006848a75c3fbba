r"""The objective of a step where draws of the guide do not move with its parameters.

Where the guide draws a site z from a distribution without a reparameterised gradient, a discrete
one among them, the gradient is that of the score function,

.. math::
    \nabla_\phi \, \mathbb{E}_q f = \mathbb{E}_q \left[ \nabla_\phi f
        + \sum_z \nabla_\phi \log q_\phi(z) \, (f_z - b_z) \right],
    \qquad f = \log p(x, z) - \log q(z),

the first term along the path of all other sites. What :math:`f_z` may leave out is what does not
depend on z: of terms that share a plate with it, all other elements of the plate, which Pyro takes
for independent; that they are is looked at once, and where they are not, :math:`f_z` is all of f.
The baseline :math:`b_z` is the mean over the other draws of the step, which are independent of
this one, or, with a single draw, a decaying mean of past steps: either leaves the mean of the
gradient as it is, and takes most of its noise.

Letters: P particles.

References:
    | Simple statistical gradient-following algorithms (Williams, 1992)
    | Black box variational inference (Ranganath et al., 2014)
    | Buy 4 REINFORCE samples, get a baseline for free! (Kool et al., 2019)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from latentlab.guides import Draws
from latentlab.inference import objectives
from latentlab.inference.pair import Arguments, Pair

__all__ = ["apart", "loss_of", "note"]

_KEPT = 0.9  # of a decaying mean, from step to step
_TRIES = 10  # draws, until one is another


class _Term(NamedTuple):
    """A part of f: its site, and its values (P or 1, ..., batch)."""

    site: str
    value: Tensor


class _Scales(Messenger):
    """Keep how often each site counts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:  # noqa: ANN401
        self.found[msg["name"]] = msg["scale"]


def loss_of(
    pair: Pair, num_particles: int, data: Arguments, kl_weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The loss at new draws of the guide, and their ELBO, in nats per data set.

    The gradient of the loss is that of the negative ELBO without bias; its value is the ELBO's.

    Arguments:
        pair: the pair, entered, some sites of its guide scored.
        num_particles: number of draws P.
        data: the data of the step.
        kl_weight: of the KL.
    """
    draws = objectives.draw(pair, num_particles, data)
    log_p = objectives.site_log_probs(pair, draws, data)
    with _Scales() as scales:
        log_q = objectives.guide_log_probs(pair, draws, data)
    weights = {n: kl_weight if n in draws.values else 1.0 for n in log_p}
    of_model = [_Term(n, weights[n] * value) for n, value in log_p.items()]
    of_guide = [_Term(n, -kl_weight * value) for n, value in log_q.items()]

    def total(terms: list[_Term], kept: tuple[str, ...] = ()) -> Tensor:
        parts = [_over(t, pair, kept, num_particles) for t in terms]
        return sum(parts[1:], parts[0])

    # The score of q is zero on average: of the sites that are scored it is left out of the path.
    gain = total([*of_model, *(t for t in of_guide if t.site not in pair.scored)]).mean()
    for site, plates in pair.scored.items():
        scale = torch.as_tensor(scales.found[site])
        once = log_q[site] / torch.where(scale > 0, scale, 1.0)
        score = total([_Term(site, once)], plates)
        cost = total([*of_model, *of_guide], plates).detach()
        gain = gain + (score * (cost - _baseline(pair, site, cost))).sum() / num_particles
    every = [_Term(n, v) for n, v in log_p.items()] + [_Term(n, -v) for n, v in log_q.items()]
    elbo = total(every).mean().detach()
    return gain.detach() - gain - elbo, elbo


def _over(term: _Term, pair: Pair, kept: tuple[str, ...], num_particles: int) -> Tensor:
    """A part of f added up over all but some plates: (P, ..., plate or 1)."""
    value, dims = term.value, {name: dim for name, _, dim in pair.plates.get(term.site, ())}
    value = value.reshape((1,) * (pair.nesting + 1 - value.dim()) + tuple(value.shape))
    stay = {value.dim() + dims[name] for name in kept if name in dims}
    gone = [d for d in range(1, value.dim()) if d not in stay]
    value = value.sum(gone, keepdim=True) if gone else value
    return value.expand(num_particles, *value.shape[1:])


def _baseline(pair: Pair, site: str, cost: Tensor) -> Tensor:
    """What is taken from f, for each draw (P, ...): it knows nothing of this draw."""
    if len(cost) > 1:
        return (cost.sum(0, keepdim=True) - cost) / (len(cost) - 1)
    past = pair.baselines[site]  # the sum of what was seen, and of its weights
    found = past[0] / past[1].clamp_min(1e-12)
    seen = cost.mean()
    if bool(seen.isfinite()):
        past.mul_(_KEPT).add_((1 - _KEPT) * torch.stack([seen, torch.ones_like(seen)]).to(past))
    return found


def apart(pair: Pair) -> dict[str, tuple[str, ...]]:
    """The plates of each scored site whose elements are independent given all other sites.

    One element of the site is given another value, and the log-densities of all other elements of
    the plate have to stay as they are.

    Arguments:
        pair: the pair, entered; of its scored sites the names count.

    Returns:
        Site -> names of plates.
    """
    with torch.no_grad():
        draws = objectives.draw(pair, 1)
        before = [*_terms(pair, draws)]
        return {
            site: tuple(
                name
                for name, size, dim in pair.plates[site]
                if size > 1 and _is_apart(pair, draws, before, site, name, dim)
            )
            for site in pair.scored
        }


def _terms(pair: Pair, draws: Draws) -> Iterator[_Term]:
    for found in (objectives.site_log_probs, objectives.guide_log_probs):
        for name, value in found(pair, draws).items():
            yield _Term(name, value)


def _is_apart(
    pair: Pair, draws: Draws, before: list[_Term], site: str, plate: str, dim: int
) -> bool:
    value = draws.values[site]
    latent = next((z for z in pair.latents if z.name == site), None)
    if latent is None:
        return False  # of the guide alone
    axis = value.dim() - len(latent.event_shape) + dim
    for _ in range(_TRIES):
        other = objectives.draw(pair, 1).values[site].expand_as(value)
        rest = [d for d in range(value.dim()) if d != axis]
        differs = (other != value).sum(rest).nonzero()
        if len(differs):
            break
    else:
        return False  # nothing is known of it
    place = int(differs[0])
    changed = value.clone()
    changed.select(axis, place).copy_(other.select(axis, place))
    after = _terms(pair, replace(draws, values={**draws.values, site: changed}))
    return all(
        _same_elsewhere(a.value, b.value, dim, place)
        for a, b in zip(before, after, strict=True)
        if plate in {name for name, _, _ in pair.plates.get(a.site, ())}
    )


def _same_elsewhere(before: Tensor, after: Tensor, dim: int, place: int) -> bool:
    """Whether log-densities differ at one place along a dimension only."""
    if before.shape[dim] == 1:
        return True  # it is of all elements, and counts for each
    others = torch.arange(before.shape[dim]) != place
    was, now = (x.movedim(dim, 0)[others] for x in (before, after))
    return torch.allclose(was, now, rtol=1e-6, atol=1e-6, equal_nan=True)


def note(pair: Pair) -> str | None:
    """How the gradient of scored sites is taken, in words; ``None`` where there are none."""
    if not pair.scored:
        return None
    sites = ", ".join(map(repr, pair.scored))
    return (
        f"site{'s' * (len(pair.scored) > 1)} {sites}: drawn by the guide without a "
        "reparameterised gradient, so that the score function takes its place, less a baseline "
        "(the other draws of a step, or past steps where it has one draw); a discrete site of few "
        "values that is left out of the guide is summed out, without noise"
    )
