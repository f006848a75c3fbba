r"""What can be said of the number of components that a mixture really has.

A component may hold no rows, or be another one twice. The effective number counts neither: with
the affinity :math:`Z_{jk} = \int \sqrt{p_j p_k}` of components it is

.. math:: \exp\Bigl(-\sum_k \pi_k \log (Z \pi)_k\Bigr),

the K of K equal and separate components.

Letters: K components, D features.

References:
    | Measuring diversity: the importance of species similarity (Leinster and Cobbold, 2012)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affinity", "remarks_on_components"]

_SAME = 0.95  # affinity of two components a third of a scale to either side of their mean
_FEWEST = 2  # rows that a component has to hold


def remarks_on_components(
    weights: Tensor, locs: Tensor, trils: Tensor, num_rows: float
) -> list[str]:
    """A sentence on components that are none, or nothing.

    Arguments:
        weights: shape (K,).
        locs: shape (K, D), in any units.
        trils: Cholesky factors of the covariances, shape (K, D, D), in these units.
        num_rows: number of rows that were fitted.

    Returns:
        At most one sentence.
    """
    K = len(weights)
    alike = affinity(locs, trils)
    held = weights * max(num_rows, 1.0)
    few = [k for k in range(K) if held[k] < _FEWEST]
    same = [(j, k) for j, k in (alike > _SAME).nonzero().tolist() if j < k]
    faults = [f"component {k} holds fewer than {_FEWEST} rows" for k in few]
    faults += [f"components {j} and {k} are the same" for j, k in same if not {j, k} & {*few}]
    if not faults:
        return []
    effective = float((-weights @ (alike @ weights).log()).exp())
    return [
        f"{', '.join(faults)} (effective number of components {effective:.1f} of {K}): "
        "try fewer components"
    ]


def affinity(locs: Tensor, trils: Tensor) -> Tensor:
    """Bhattacharyya's coefficient of each two Gaussians, shape (K, K), one if equal.

    Arguments:
        locs: shape (K, D).
        trils: Cholesky factors of the covariances, shape (K, D, D).
    """
    covariances = trils @ trils.mT
    middle = torch.linalg.cholesky((covariances[:, None] + covariances) / 2)
    away = (locs[:, None] - locs).unsqueeze(-1)  # (K, K, D, 1)
    standard = torch.linalg.solve_triangular(middle, away, upper=False)
    log_det = trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = (log_det[:, None] + log_det) / 2 - middle.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (log_det - standard.square().sum((-2, -1)) / 8).exp()
