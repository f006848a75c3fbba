"""Where a climb stands: its objective at draws of the guide, and what is wrong where it has none.

Letter: P particles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws
from latentlab.inference import objectives
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.training import SINGULAR

__all__ = ["chunks", "evaluate", "first_bad", "first_bad_site", "particle_chunk"]

_TOGETHER = 16  # particles where rows are added up


def evaluate(pair: Pair, draws: Draws) -> Estimate:
    """The ELBO at draws of the guide, with its standard error, in nats per data set.

    Arguments:
        pair: the pair, entered.
        draws: P draws of its guide.

    Returns:
        Mean and standard error of log p(x, z) - log q(z), NaN where a matrix is singular.
    """
    try:
        with torch.no_grad():
            weights = torch.cat(
                [
                    objectives.log_joint_of_all(pair, part) - part.log_q
                    for part in chunks(pair, draws, True)
                ]
            )
    except SINGULAR:
        return Estimate(math.nan, math.nan)
    return Estimate.from_draws(weights) if len(weights) > 1 else Estimate(float(weights[0]), 0.0)


def chunks(pair: Pair, draws: Draws, summed: bool = False) -> list[Draws]:
    """Draws in parts that go through the model at once; ``summed`` as for the size of these."""
    size = particle_chunk(pair, len(draws), summed=summed)
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def particle_chunk(
    pair: Pair, num_particles: int, elements: int = 2**22, summed: bool = False
) -> int:
    """How many particles go through the model at once, so that memory stays bounded.

    Arguments:
        pair: the pair.
        num_particles: how many there are.
        elements: numbers that may go through it at once.
        summed: whether no more than log p(x, z) is asked for, which may be added up in parts.
    """
    if not pair.vectorised:
        return num_particles
    if pair.in_parts and summed:
        return min(num_particles, _TOGETHER)
    size = sum(t.numel() for t in pair.data.tensors()) + sum(
        math.prod(shape) for shape in pair.shapes.values()
    )
    return max(1, min(num_particles, elements // max(size, 1)))


def first_bad_site(pair: Pair, num_particles: int, data: Arguments) -> tuple[str, float]:
    """The first site whose log-density is not finite at new draws of the guide, and that value.

    Arguments:
        pair: the pair, entered.
        num_particles: how many draws.
        data: what it is called with.
    """
    try:
        with torch.no_grad():
            draws = objectives.draw(pair, num_particles, data)
            found = objectives.site_log_probs(pair, draws, data)
    except SINGULAR:
        return "the matrix that could not be factorised", math.nan
    return first_bad(found | {"the guide": draws.log_q})


def first_bad(log_probs: dict[str, Tensor]) -> tuple[str, float]:
    """The first site with a log-density that is not finite, and that value."""
    for name, value in log_probs.items():
        bad = value[~torch.isfinite(value)] if isinstance(value, Tensor) else value
        if isinstance(bad, Tensor) and bad.numel():
            return name, float(bad.flatten()[0])
    return "the parameters", math.nan
