r"""One-step-ahead pseudo-residuals of a hidden Markov model.

.. math:: u_{td} = \sum_k p(z_t = k \mid x_{1:t-1}) \, F_{kd}(x_{td}), \qquad
          r_{td} = \Phi^{-1}(u_{td})

with F the distribution function of a column in a state. Of a discrete column, u is uniform between
the value and the one before. Where the model is right, the r of a column are independent standard
normal. Those of two columns are not independent of each other: a step has one state for both.

Letters: B sequences, T steps, D features, K states.

References:
    | Randomized quantile residuals (Dunn and Smyth, 1996)
    | Hidden Markov models for time series (Zucchini, MacDonald and Langrock, 2016)
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Generator, Tensor

from latentlab.distributions import hmm
from latentlab.distributions.cells import Cells, Parts
from latentlab.distributions.markov import HiddenMarkov
from latentlab.distributions.normal_row import NormalRow

__all__ = ["residuals_of"]

_EDGE = 1e-12  # u keeps this distance from 0 and 1: a residual is at most 7 in size


def residuals_of(chain: HiddenMarkov, x: Tensor, seed: int = 0) -> Tensor:
    """Residuals of each cell, NaN where it is missing.

    Arguments:
        chain: the model at one draw, batch shape (1, B).
        x: sequences, shape (B, T, D).
        seed: of the numbers that discrete cells are randomised with.

    Returns:
        Shape (B, T, D).

    Raises:
        ValueError: if the distribution function of a column is not known.
    """
    with torch.no_grad():
        args = (chain.initial, chain.transitions, chain.emitted(x), chain.lengths)
        ahead = hmm.predict_next(*args)[0].unsqueeze(-1)  # (B, T, K, 1)
        value = torch.where(x.isnan(), 0.0, x).unsqueeze(-2)  # (B, T, 1, D)
        low, high = (
            (ahead * bound.reshape(-1, *bound.shape[-3:])).sum(-2)
            for bound in _below(chain.emission, value)
        )
        generator = Generator(x.device).manual_seed(seed)
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        u = (low + noise * (high - low)).clamp(_EDGE, 1 - _EDGE)
        return torch.where(x.isnan(), torch.nan, torch.special.ndtri(u))


def _below(emission: Any, value: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Probability of less, and of no more, than a value in each column and state."""
    if isinstance(emission, Parts):
        sizes = [part.event_shape[0] for part in emission.parts]
        pieces = value.split(sizes, -1)
        found = [_below(part, v) for part, v in zip(emission.parts, pieces, strict=True)]
        low, high = (torch.cat(bounds, -1) for bounds in zip(*found, strict=True))
        return low, high
    if isinstance(emission, NormalRow):
        marginal = dist.Normal(emission.mean, emission.stddev)
        at = marginal.cdf(value)
        return at, at
    base = emission.base if isinstance(emission, Cells) else getattr(emission, "base_dist", None)
    if isinstance(emission, Cells):
        value = value if emission.origin is None else value - emission.origin
        value = value if emission.unit is None else value / emission.unit
    if isinstance(base, dist.Poisson):
        rate = base.rate
        high = torch.special.gammaincc(value + 1, rate)
        low = torch.special.gammaincc(value.clamp_min(0.5), rate)
        return torch.where(value > 0, low, 0.0), high
    if isinstance(base, dist.Bernoulli):
        none = 1 - base.probs
        return torch.where(value > 0, none, 0.0), torch.where(value > 0, 1.0, none)
    if isinstance(base, dist.Categorical):
        ends = base.probs.cumsum(-1)
        index = value.long().expand(*ends.shape[:-1][: -value.dim()], *value.shape)
        index = index.expand(torch.broadcast_shapes(index.shape, ends.shape[:-1])).unsqueeze(-1)
        ends = ends.expand(*index.shape[:-1], ends.shape[-1])
        high = ends.gather(-1, index).squeeze(-1)
        low = ends.gather(-1, (index - 1).clamp_min(0)).squeeze(-1)
        return torch.where(value > 0, low, 0.0), high
    try:
        at = (emission if base is None else base).cdf(value)
    except NotImplementedError as error:
        raise ValueError(
            f"residuals: expected an emission with a distribution function, got {emission}"
        ) from error
    return at, at
