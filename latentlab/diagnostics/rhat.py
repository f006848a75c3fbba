r"""R-hat: whether sequences have forgotten where they began.

.. math:: \hat R = \sqrt{\frac{L - 1}{L} + \frac{B}{W}}

Every chain is cut into halves of length L. W is the mean variance within the halves, B the
variance of their means.

Letters: C chains, S draws in each, P quantities, L = S // 2.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import unit_of
from latentlab.diagnostics.chains import halves, to_chains, z_scores

__all__ = ["rhat"]


def rhat(x: ArrayLike | Tensor, rank: bool = False) -> Tensor:
    """Split R-hat of each column.

    How to read it: 1 if the halves of all chains look alike. Above 1.01 a sampler's chains have
    not mixed: run them longer, or from a better start. Iterates of an optimiser are correlated,
    and below 1.1 count as stationary.

    Arguments:
        x: one chain, shape (S, P), or several of equal length, shape (C, S, P); S at least 4. Of
            an odd S the middle draw is left out.
        rank: whether to take the ranks of the draws, and of their distances from the median, and
            the larger of the two R-hats: also right for draws without a variance, and sees chains
            that differ in spread alone. For draws of a sampler.

    Returns:
        Shape (P,). 1 for a column that is constant, infinite for one that is constant in each half
        but not the same in all, NaN for one with a NaN.

    Raises:
        ValueError: for other shapes, or fewer than four draws.

    References:
        | Bayesian data analysis, 3rd edition, section 11.4 (Gelman et al., 2013)
        | Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021)

    Example:
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> x[:, 1] += torch.linspace(0, 3, 1000)  # a trend
        >>> rhat(x)
        tensor([1.0, 1.4], dtype=torch.float64)
        >>> x[:500, 0] *= 5  # the spread changes
        >>> rhat(x)[0], rhat(x, rank=True)[0]
        (tensor(1.00, dtype=torch.float64), tensor(1.5, dtype=torch.float64))
    """
    chains = to_chains(x)
    split = halves(chains / unit_of(chains, dim=(0, 1)))  # (2 C, L, P)
    if not rank:
        return _ratio(split)
    median = torch.from_numpy(np.median(split.numpy(), (0, 1)))
    folded = (split - median).abs()
    return torch.maximum(_ratio(z_scores(split)), _ratio(z_scores(folded)))


def _ratio(split: Tensor) -> Tensor:
    L = split.shape[1]
    within = split.var(1).mean(0)
    between = split.mean(1).var(0)
    ratio = ((L - 1) / L + between / within).sqrt()
    constant = split.amax((0, 1)) == split.amin((0, 1))
    return torch.where(constant, 1.0, ratio)
