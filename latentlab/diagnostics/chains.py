"""What R-hat and effective sample sizes share: draws as chains, halves of them, and ranks.

Letters: C chains, S draws in each, P quantities, L = S // 2.
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor

__all__ = ["halves", "to_chains", "z_scores"]


def to_chains(x: ArrayLike | Tensor) -> Tensor:
    """Draws in double precision, shape (C, S, P).

    Arguments:
        x: one chain, shape (S, P), or several of equal length, shape (C, S, P); S at least 4.

    Raises:
        ValueError: for other shapes, or fewer than four draws.
    """
    chains = to_tensor(x, "x").double()
    if chains.dim() == 2:
        chains = chains[None]
    if chains.dim() != 3 or chains.shape[0] == 0 or chains.shape[1] < 4:
        raise ValueError(
            "x: expected shape (S, P) or (C, S, P) with at least 4 draws S, "
            f"got {tuple(chains.shape)}; for one quantity use x[:, None]"
        )
    return chains


def halves(chains: Tensor) -> Tensor:
    """Each chain cut in two, shape (2 C, L, P); of an odd S the middle draw is left out."""
    L = chains.shape[1] // 2
    return torch.cat([chains[:, :L], chains[:, -L:]])


def z_scores(chains: Tensor) -> Tensor:
    r"""Normal quantiles of the ranks of each quantity, over all of its draws.

    .. math:: \Phi^{-1} \left( \frac{r - 3/8}{C S + 1/4} \right)

    Ties have their mean rank; a quantity with a NaN is NaN throughout.

    Arguments:
        chains: draws, shape (C, S, P).
    """
    from scipy.special import ndtri  # imported late, as they take long
    from scipy.stats import rankdata

    draws = chains.flatten(0, 1)
    ranks = rankdata(draws.numpy(), axis=0)
    return torch.from_numpy(ndtri((ranks - 0.375) / (len(draws) + 0.25))).reshape(chains.shape)
