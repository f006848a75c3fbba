r"""What linear latent models are put together from: answers, the triangle of W, remarks.

Letters: N rows, D features, L latent dimensions, P = D L - L (L + 1) / 2 loadings, S draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from latentlab.distributions.low_rank import LowRankNormal
from latentlab.models.ppca_optimum import covariance_of, principal_axes

__all__ = [
    "FLOOR",
    "Encoding",
    "pattern_of",
    "pivoted",
    "remarks_on_latents",
    "triangle_of",
    "turns_of",
]

FLOOR = 1e-3  # of a column's standard deviation: the least that its noise has
_HEYWOOD = 10  # floors, below which a column has no noise of its own


class Encoding(NamedTuple):
    """The latents of rows.

    Arguments:
        mean: shape (N, L).
        covariance: shape (N, L, L).
    """

    mean: Tensor
    covariance: Tensor


def pattern_of(num_features: int, latent_dim: int) -> tuple[Tensor, Tensor]:
    """How pivots and loadings write a lower triangle.

    Arguments:
        num_features: D.
        latent_dim: L.

    Returns:
        For each number of W, shape (D L,), its place in (pivots, loadings, 0); and the row that
        each loading stands in, shape (P,).

    Example:
        >>> pattern_of(3, 2)[0].reshape(3, 2)
        tensor([[0, 5],
                [2, 1],
                [3, 4]])
    """
    row, column = torch.tril_indices(num_features, latent_dim, -1)
    pattern = torch.full((num_features, latent_dim), latent_dim + len(row))
    pattern[row, column] = latent_dim + torch.arange(len(row))
    pattern.diagonal().copy_(torch.arange(latent_dim))
    return pattern.flatten(), row


def triangle_of(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots (L,) and loadings (P,) that write W up to a rotation.

    Arguments:
        ordered: W, pivots first, shape (D, L).
    """
    upper = torch.linalg.qr(ordered.mT, mode="r")[1]
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    lower = (sign.unsqueeze(-1) * upper).mT
    row, column = torch.tril_indices(len(lower), lower.shape[1], -1, device=lower.device)
    return lower.diagonal().clone(), lower[row, column]


def pivoted(y: Tensor, latent_dim: int) -> Tensor:
    """The columns (D,), first those that the principal axes tell most apart.

    Arguments:
        y: standardised rows, shape (N, D), NaN where a cell is missing.
        latent_dim: L.
    """
    from scipy.linalg import qr

    values, axes = principal_axes(covariance_of(y.double())[1], latent_dim)
    factor = axes * values[:latent_dim].clamp_min(0.0).sqrt()
    order = qr(factor.T.numpy(force=True), mode="r", pivoting=True)[1]
    return torch.as_tensor(order, dtype=torch.long, device=y.device)


def turns_of(row: LowRankNormal) -> Tensor:
    """Rotations (S, L, L) that bring the latents of each draw to the principal axes of all.

    Arguments:
        row: distributions of a row, batch shape (S, 1).
    """
    whitened = (row.factor / row.variances.mean(0).sqrt().unsqueeze(-1)).squeeze(1)
    L = whitened.shape[-1]
    values, axes = principal_axes((whitened @ whitened.mT).mean(0), L)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign() * values[:L].clamp_min(0.0).sqrt()
    left, _, right = torch.linalg.svd(whitened.mT @ axes)
    return left @ right


def remarks_on_latents(row: LowRankNormal, num_rows: float, *, own_noise: bool) -> list[str]:
    """Sentences on latents that explain nothing, and on columns without noise.

    Arguments:
        row: distributions of a row, batch shape (S, 1).
        num_rows: rows that were fitted.
        own_noise: whether each column has noise of its own.
    """
    D, L = row.factor.shape[-2:]
    precision = row.factor.mT @ (row.factor / row.variances.unsqueeze(-1))
    signal = torch.linalg.eigvalsh(precision.squeeze(1)).mean(0)  # in units of the noise
    used, said = _num_used((1 + signal.flip(0)).tolist(), D, max(num_rows, 2.0)), []
    if used < L:
        way = f"latent_dim={used} would do" if used else "columns look independent"
        said.append(f"{L - used} of {L} latent dimensions explain no more than noise: {way}")
    ratio = (row.variances.mean((0, 1)) / FLOOR**2).sqrt()
    bare = (ratio < _HEYWOOD).nonzero().flatten().tolist()
    if own_noise and bare:
        said.append(
            f"no noise of its own in column {', '.join(map(str, bare))} (a Heywood case): try "
            "fewer latents, or leave out a column that follows from others"
        )
    return said


def _num_used(values: list[float], num_features: int, num_rows: float) -> int:
    """How many eigenvalues, in units of the noise and in falling order, are more than noise.

    The others are noise, too, and are counted as such. The largest eigenvalue of noise alone has a
    known mean and spread (Johnstone, On the distribution of the largest eigenvalue in principal
    components analysis, 2001); three times the spread is allowed for.
    """
    L = len(values)
    for k, value in enumerate(values):
        num = num_features - k
        noise = (num_features - L + sum(values[k:])) / num
        root, width = math.sqrt(num_rows - 1), math.sqrt(num)
        spread = (root + width) * (1 / root + 1 / width) ** (1 / 3)
        if value <= noise * ((root + width) ** 2 + 3 * spread) / num_rows:
            return k
    return L
