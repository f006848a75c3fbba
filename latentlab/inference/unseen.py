r"""Values of discrete latents that a guide never draws, though the model would.

Importance weights compare the draws of a guide with each other: a guide that draws one value
only, whichever it is, has weights that are all equal. So the values beside are tried: for a number
k of a site and a value v that no draw has, the odds

.. math:: r = \frac{1}{S} \sum_s \frac{p(x, z_s \mid z_{sk} = v)}{p(x, z_s)}

are what the guide leaves out of the posterior of that number.

Letter: S draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from latentlab.guides import Draws
from latentlab.inference import objectives
from latentlab.inference.figures import kinds_of
from latentlab.inference.pair import Pair

__all__ = ["unseen_values"]

_DRAWS, _COMPARED = 400, 16
_NUMBERS = 100  # of a site that are looked at


def unseen_values(pair: Pair) -> dict[str, float]:
    """Discrete sites of the guide -> log of the largest odds of a value that it never draws.

    Arguments:
        pair: the pair, entered.

    Returns:
        In nats: above 0 a value that is never drawn is more probable than what is.
    """
    sites = [latent for latent in pair.latents if latent.is_discrete]
    if not sites:
        return {}
    found = {}
    with torch.no_grad():
        draws = objectives.draw(pair, _DRAWS)
        some = draws[:_COMPARED]
        here = objectives.log_joint(pair, some)
        for latent in sites:
            flat = draws.values[latent.name].reshape(_DRAWS, -1)
            numbers = torch.linspace(0, flat.shape[1] - 1, min(flat.shape[1], _NUMBERS)).long()
            odds = [
                float((_with(pair, some, latent.name, k, value) - here).logsumexp(0))
                for k in numbers.tolist()
                for value in _beside(flat[:, k], latent.support)
            ]
            if odds:
                found[latent.name] = max(odds) - math.log(len(some))
    return found


def _beside(drawn: Tensor, support: object) -> Iterable[float]:
    """Values that no draw has: all kinds there are, or those next to what was drawn."""
    seen = set(drawn.tolist())
    kinds = kinds_of(support)
    if kinds is not None:
        return [float(kind) for kind in kinds if float(kind) not in {float(v) for v in seen}]
    around = (min(seen) - 1, max(seen) + 1)
    check = getattr(support, "check", None)
    inside = torch.tensor(around)
    return [v for v in around if check is None or bool(torch.as_tensor(check(inside)).all())] or [
        v for v in around if v >= 0
    ]


def _with(pair: Pair, draws: Draws, site: str, number: int, value: float) -> Tensor:
    """Log p(x, z) of draws with another value of a number of a site."""
    changed = draws.values[site].clone()
    changed.reshape(len(draws), -1)[:, number] = value
    found = objectives.log_joint(pair, replace(draws, values={**draws.values, site: changed}))
    return torch.where(found.isnan(), -math.inf, found)
