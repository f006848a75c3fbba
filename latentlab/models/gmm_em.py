r"""The two steps of expectation-maximisation for Gaussian mixtures.

.. math::
    n_k = \sum_n r_{nk}, \quad t_k = \sum_n r_{nk} \, \mathbb{E} x_n, \quad
    S_k = \sum_n r_{nk} \, \mathbb{E} x_n x_n^\top
    \qquad \longrightarrow \qquad
    \pi_k = \frac{n_k}{N}, \quad \mu_k = \frac{t_k}{n_k}, \quad
    \Sigma_k = \frac{S_k}{n_k} - \mu_k \mu_k^\top

Rows are standardised, so that sums of squares lose no digits. Complete rows, and rows of
independent cells, are one matrix product; where cells of a row depend on each other and some are
missing, the statistics come from the slopes of the log-likelihood :math:`\ell`, which hold them by
Fisher's identity,

.. math::
    n_k = \pi_k \frac{\partial \ell}{\partial \pi_k}, \quad
    \mathbb{E} \sum_n r_{nk} (x_n - \mu_k) = \Sigma_k \frac{\partial \ell}{\partial \mu_k}, \quad
    \mathbb{E} \sum_n r_{nk} (x_n - \mu_k)(x_n - \mu_k)^\top
        = n_k \Sigma_k + 2 \, \Sigma_k \frac{\partial \ell}{\partial \Sigma_k} \Sigma_k

Letters: N rows, D features, K components.

References:
    | Optimization with EM and expectation-conjugate-gradient (Salakhutdinov, Roweis and
      Ghahramani, 2003)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentlab.distributions import NormalMixture
from latentlab.distributions.components import Diagonal, Moments, Tilted
from latentlab.distributions.correlations import partial_correlations

__all__ = ["Covariance", "Point", "expected", "maximum"]

Covariance = Literal["full", "tied", "diag", "spherical"]

_EMPTY = 1e-12  # rows, below which a component has none
_ABOVE = 1e-6  # of the floor's variance, by which a variance stays above it


@dataclass(frozen=True)
class Point:
    """Parameters of a mixture of standardised rows, float64.

    Arguments:
        log_weights: shape (K,); their exponentials need not sum to one.
        locs: shape (K, D).
        spreads: covariances (K, D, D) of "full" and "tied", else variances (K, D).
    """

    log_weights: Tensor
    locs: Tensor
    spreads: Tensor

    @property
    def is_tilted(self) -> bool:
        """Whether the cells of a row depend on each other."""
        return self.spreads.dim() == 3

    def components(self) -> Diagonal | Tilted:
        """The components, as one set of them."""
        kind = Tilted if self.is_tilted else Diagonal
        scales = torch.linalg.cholesky(self.spreads) if self.is_tilted else self.spreads.sqrt()
        return kind(self.log_weights[None], self.locs[None], scales[None])

    def without_floor(self, floor: float) -> tuple[Tensor, Tensor | None]:
        """Standard deviations (K, D) and partial correlations (K, P) that a floor widens to these.

        Arguments:
            floor: standard deviation that is added to each column.
        """
        if not self.is_tilted:
            above = self.spreads - floor**2
            least = _ABOVE / 2 * floor**2
            return torch.where(above > least, above, self.spreads).sqrt(), None
        eye = torch.eye(self.spreads.shape[-1]).to(self.spreads)
        tril, fault = torch.linalg.cholesky_ex(self.spreads - floor**2 * eye)
        whole = torch.linalg.cholesky(self.spreads)
        tril = torch.where((fault == 0)[:, None, None], tril, whole)
        scales = tril.square().sum(-1).sqrt()
        return scales, partial_correlations(tril / scales.unsqueeze(-1))


def expected(at: Point, y: Tensor, counts: Tensor | None = None) -> Moments:
    """The E-step.

    Arguments:
        at: the parameters.
        y: standardised rows, shape (N, D), float64, NaN where a cell is missing.
        counts: how often each row counts, shape (N,); once by default.
    """
    with torch.no_grad():
        components = at.components()
        if not (at.is_tilted and bool(y.isnan().any())):
            return components.expected(y, counts)
    return _by_slopes(at, y, counts)


def maximum(
    moments: Moments, covariance: Covariance, *, floor: float = 0.0, pseudo: float = 0.0
) -> Point:
    """The M-step.

    Arguments:
        moments: what the E-step found.
        covariance: the shape of the covariances.
        floor: least standard deviation in any direction.
        pseudo: rows of mean 0 and scale 1/2 that each component has besides, so that none is
            empty.
    """
    number, squares = moments.number + pseudo, moments.squares
    is_tilted = squares.dim() == 3
    if pseudo:
        whole = pseudo / 4 * torch.eye(squares.shape[-1]).to(squares)
        squares = squares + (whole if is_tilted else whole.diagonal())
    empty = number < _EMPTY
    held = torch.where(empty, 1.0, number)
    locs = torch.where(empty[:, None], 0.0, moments.total / held[:, None])
    share = held.reshape(-1, *[1] * (squares.dim() - 1))
    spreads = squares / share - (_outer(locs) if is_tilted else locs**2)
    if covariance == "tied":
        spreads = ((spreads * share * ~empty[:, None, None]).sum(0) / number.sum()).expand_as(
            spreads
        )
    if covariance == "spherical":
        spreads = spreads.mean(-1, keepdim=True).expand_as(spreads)
    least = (1 + _ABOVE) * floor**2
    if is_tilted:
        spreads = _no_narrower(spreads, least)
        spreads = torch.where(empty[:, None, None], _eye(spreads), spreads)
    else:
        spreads = torch.where(empty[:, None], 1.0, spreads.clamp_min(least))
    return Point((number / number.sum()).log(), locs, spreads)


def _no_narrower(spreads: Tensor, least: float) -> Tensor:
    """Covariances with no direction of less variance: the maximum under that condition."""
    if not least or bool(
        (torch.linalg.cholesky_ex(spreads - least * _eye(spreads))[1] == 0).all()
    ):
        return spreads
    size, axes = torch.linalg.eigh(spreads)
    return (axes * size.clamp_min(least).unsqueeze(-2)) @ axes.mT


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _outer(locs: Tensor) -> Tensor:
    return locs[:, :, None] * locs[:, None, :]


def _by_slopes(at: Point, y: Tensor, counts: Tensor | None) -> Moments:
    """The E-step where cells are missing and depend on those that are there."""
    top = at.log_weights.max()
    with torch.enable_grad():
        given = ((at.log_weights - top).exp(), at.locs, at.spreads)
        weights, locs, spreads = (v.detach().clone().requires_grad_() for v in given)
        trils = torch.linalg.cholesky(spreads)
        mixture = NormalMixture(weights, locs, scale_trils=trils, validate_args=False)
        log_prob = mixture.log_prob(y) + top
        value = log_prob.sum() if counts is None else (log_prob * counts).sum()
        of_weights, of_locs, of_spreads = torch.autograd.grad(value, (weights, locs, spreads))
    number, slope = given[0] * of_weights, (of_spreads + of_spreads.mT) / 2
    away = (at.spreads @ of_locs.unsqueeze(-1)).squeeze(-1)
    squares = number[:, None, None] * at.spreads + 2 * at.spreads @ slope @ at.spreads
    cross = at.locs[:, :, None] * away[:, None, :]
    squares = squares + cross + cross.mT + number[:, None, None] * _outer(at.locs)
    return Moments(value.detach(), number, number[:, None] * at.locs + away, squares)
