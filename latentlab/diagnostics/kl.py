r"""Kullback-Leibler divergence: what is lost by taking q for p.

.. math:: \mathrm{KL}(p \,\|\, q) = \mathrm{E}_{z \sim p} [\log p(z) - \log q(z)] \ge 0

In nats. Two normal distributions of equal width a tenth of a standard deviation apart are 0.005
nats apart, half a nat is a whole standard deviation, and 2 nats are two.

Letter: S draws.
"""

from __future__ import annotations

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from latentlab.diagnostics.arguments import to_tensor, whole
from latentlab.diagnostics.estimate import Estimate
from latentlab.seeds import seeded

__all__ = ["kl", "kl_from_draws"]


def kl(p: Distribution, q: Distribution, num_samples: int = 10_000, seed: int = 0) -> Estimate:
    """KL(p || q), in closed form where there is one, else by draws of p.

    Arguments:
        p: a distribution of torch or Pyro; where there is no closed form, one that can be sampled.
        q: one over the same event shape. Batch shapes broadcast, and their elements are summed:
            they are independent, so that is the divergence of the joint distributions.
        num_samples: draws S, if draws are needed.
        seed: of those draws. torch's global generators are left as they were found.

    Returns:
        The divergence in nats. Its error is 0 for a closed form, and for the value infinity, which
        says that p has mass where q has none.

    Raises:
        ValueError: for different event shapes, or fewer than two draws.

    Example:
        >>> from torch.distributions import Normal, StudentT
        >>> print(kl(Normal(1.0, 1.0), Normal(0.0, 1.0)))
        0.5
        >>> print(kl(Normal(0.0, 1.0), StudentT(5.0)))
        0.0318 ± 0.0019
    """
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"q: expected event shape {tuple(p.event_shape)} as of p, got {tuple(q.event_shape)}; "
            "to_event (Pyro) or Independent (torch) moves batch axes into the event"
        )
    with torch.no_grad():
        try:
            return Estimate(kl_divergence(p, q).double().sum().item(), 0.0)
        except NotImplementedError:
            num_samples = whole(num_samples, "num_samples", 2)
            return _by_draws(p, q, num_samples, whole(seed, "seed", 0))


def kl_from_draws(log_p: ArrayLike | Tensor, log_q: ArrayLike | Tensor) -> Estimate:
    """KL(p || q) from the log densities of both at draws of p.

    Arguments:
        log_p: log p(z) in nats at S draws z of p, shape (S,), S at least 2.
        log_q: log q(z) at the same draws, shape (S,).

    Returns:
        The divergence in nats. Infinity, without error, if q rules out a draw; NaN if a density
        is. A small negative value is noise: compare it with its error.

    Raises:
        ValueError: for different shapes, or fewer than two draws.

    Example:
        >>> z = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> print(kl_from_draws(-0.5 * z**2, -0.5 * (z - 1) ** 2))
        0.47 ± 0.03
    """
    log_p, log_q = to_tensor(log_p, "log_p").double(), to_tensor(log_q, "log_q").double()
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"log_q: expected shape {tuple(log_p.shape)} as of log_p, got {tuple(log_q.shape)}"
        )
    if ((log_q == -math.inf) & (log_p > -math.inf)).any():
        return Estimate(math.inf, 0.0)
    return Estimate.from_draws(log_p - log_q)


def _by_draws(p: Distribution, q: Distribution, num_samples: int, seed: int) -> Estimate:
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    with seeded(seed):
        draws = p.sample(torch.Size([num_samples]))
    # What p's own support refuses as well is rounding at an edge that they share.
    if (p.support.check(draws) & ~q.support.check(draws)).any():  # type: ignore[union-attr]
        return Estimate(math.inf, 0.0)
    log_p, log_q = (d.log_prob(draws).double().reshape(num_samples, -1).sum(1) for d in (p, q))
    return kl_from_draws(log_p, log_q)
