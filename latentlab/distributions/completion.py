r"""Missing cells of a row under a mixture of Gaussians, given the cells that are there.

.. math::
    \mathbb{E}[x_m \mid x_o] = \sum_k r_k(x_o) \,
        \bigl(\mu_{km} + \Sigma_{k,mo} \Sigma_{k,oo}^{-1} (x_o - \mu_{ko})\bigr)

with :math:`r_k(x_o)` the probability of component k given the observed cells o.

Letters: N rows, D features, K components, S draws.

Reference:
    | Supervised learning from incomplete data via an EM approach (Ghahramani and Jordan, 1994)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentlab.distributions.mixture import NormalMixture
from latentlab.distributions.normal_row import given_rest

__all__ = ["Completed", "completed"]

_CHUNK = 2**22  # numbers of (S, N, K, D) held at a time


class Completed(NamedTuple):
    """Rows, or steps of sequences, with their missing cells filled in.

    Arguments:
        mean: the cells, or what they are expected to be where missing, shape (..., D).
        sd: standard deviation of the latter, shape (..., D); zero where a cell is there.
    """

    mean: Tensor
    sd: Tensor


def completed(mixture: NormalMixture, x: Tensor) -> Completed:
    """Mean and standard deviation of missing cells given those that are there, shape (N, D) each.

    Arguments:
        mixture: batch shape (S, 1); the S draws count alike.
        x: rows, shape (N, D), NaN where a cell is missing.

    Returns:
        A cell that is there is its own mean, and has no spread.

    Example:
        >>> weights, locs = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 2)
        >>> tril = torch.tensor([[[[[1.0, 0.0], [0.8, 0.6]]]]])
        >>> mixture = NormalMixture(weights, locs, scale_trils=tril)
        >>> [v.tolist() for v in completed(mixture, torch.tensor([[2.0, torch.nan]]).double())]
        [[[2.0, 1.6...]], [[0.0, 0.6...]]]
    """
    mean, sd = x.double().clone(), torch.zeros_like(x, dtype=torch.float64)
    missing = x.isnan()
    open_rows = missing.any(1).nonzero()[:, 0]
    patterns, places = torch.unique(missing[open_rows], dim=0, return_inverse=True)
    S, K, D = len(mixture.locs), *mixture.locs.shape[-2:]
    step = max(1, _CHUNK // (S * K * D))
    with torch.no_grad():
        for m, pattern in enumerate(patterns):
            gap = pattern.nonzero()[:, 0]
            for part in open_rows[places == m].split(step):
                found = _moments(mixture, x[part].double(), gap, (~pattern).nonzero()[:, 0])
                mean[part[:, None], gap], sd[part[:, None], gap] = found
    return Completed(mean.to(x), sd.to(x))


def _moments(
    mixture: NormalMixture, x: Tensor, gap: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and sd (n, M) of the cells in ``gap`` of rows of one pattern."""
    odds = mixture.component_log_prob(x).softmax(-1).unsqueeze(-1)  # (S, n, K, 1)
    locs, scales, trils = mixture.locs.double(), mixture.scales, mixture.scale_trils
    middle = locs[..., gap].mean((0, 1, 2))
    away = locs[..., gap] - middle  # (S, 1, K, M)
    if trils is not None:
        shift, spread = given_rest(trils, locs, x, gap, there)
        away = away + shift
    elif scales is not None:
        spread = scales.double().expand_as(locs)[..., gap]
    unit = (spread + away.abs()).amax((0, 1, 2)).clamp_min(1e-300)  # no square overflows
    first = (odds * (away / unit)).sum(2).mean(0)
    second = (odds * ((spread / unit).square() + (away / unit).square())).sum(2).mean(0)
    return middle + unit * first, unit * (second - first.square()).clamp_min(0.0).sqrt()
