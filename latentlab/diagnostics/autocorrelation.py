r"""Errors of means of correlated draws.

.. math:: \mathrm{se}^2 = \frac{\hat v \, \tau}{C S}, \qquad
          \tau = 1 + 2 \sum_{t \ge 1} \rho_t

:math:`\rho_t` is the correlation of draws t steps apart, summed while pairs of neighbours are
positive and fall (Geyer's initial monotone sequence); :math:`C S / \tau` is the effective number.

Letters: C chains, S draws in each, P quantities.

References:
    | Practical Markov chain Monte Carlo (Geyer, 1992)
    | Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["effective_size", "standard_error"]


def effective_size(chains: Tensor) -> Tensor:
    """Number of independent draws whose mean is as good as that of these.

    Arguments:
        chains: shape (C, S, P), double precision, S at least 8. Chains are cut into halves, so
            that a drift counts as correlation.

    Returns:
        Shape (P,); all C S of them for a column that is constant.

    Example:
        >>> x = torch.randn(1, 1000, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> effective_size(x.repeat_interleave(2, 1)) / 2000  # each draw twice
        tensor([0.5], dtype=torch.float64)
    """
    total, L = chains.shape[0] * chains.shape[1], chains.shape[1] // 2
    halves = torch.cat([chains[:, :L], chains[:, -L:]])  # (2 C, L, P)
    centred = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * L, dim=1)
    covariance = torch.fft.irfft(spectrum.abs() ** 2, n=2 * L, dim=1)[:, :L].mean(0) / L  # (L, P)
    within = covariance[0] * L / (L - 1)
    pooled = covariance[0] + halves.mean(1).var(0)
    rho = 1 - (within - covariance) / pooled
    rho[0] = 1.0
    pairs = rho[: L // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cummin(0).values
    tau = -1 + 2 * torch.where(positive, pairs, 0.0).cummin(0).values.sum(0)
    size = 2 * L * len(chains) / tau.clamp(min=1 / math.log10(2 * L * len(chains)))
    return torch.where(chains.amax((0, 1)) == chains.amin((0, 1)), float(total), size)


def standard_error(chains: Tensor) -> Tensor:
    """Standard errors of the means of correlated draws.

    Arguments:
        chains: shape (C, S, P), as for :func:`effective_size`.

    Returns:
        Shape (P,); 0 for a column that is constant.
    """
    return chains.flatten(0, 1).std(0) / effective_size(chains).sqrt()
