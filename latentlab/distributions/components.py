r"""Gaussian components that rows share: densities of all rows under S sets of K components.

.. math::
    \log \pi_k \mathcal{N}(x \mid \mu_k, \Sigma_k) = \langle W_k, \phi(y) \rangle, \qquad
    y = U^{-1} (x - c)

The natural parameters :math:`W_k` are taken about the mean c of the components, in units of their
mean standard deviations or, with Cholesky factors :math:`L_k`, of the mean U of these.
The frame (c, U) is a matter of rounding alone, and has no gradient.

Letters: N rows, D features, K components, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentlab.distributions.quadratic import expected_statistics

__all__ = ["Diagonal", "Kernel", "Moments", "Tilted", "missing_patterns"]

_LOG_2PI = math.log(2 * math.pi)

Kernel = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Moments:
    r"""What an E-step takes from rows: sums over n of :math:`r_{nk} (1, x_n, x_n x_n^\top)`.

    Arguments:
        log_likelihood: of the rows, in nats.
        number: shape (K,).
        total: shape (K, D).
        squares: shape (K, D, D), or its diagonal (K, D) where cells are independent.
    """

    log_likelihood: Tensor
    number: Tensor
    total: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Diagonal:
    """Components with independent cells.

    Arguments:
        log_weights: shape (S, K).
        locs: shape (S, K, D).
        scales: standard deviations, shape (S, K, D).
    """

    log_weights: Tensor
    locs: Tensor
    scales: Tensor

    def through(self, kernel: Kernel, x: Tensor) -> Tensor:
        """What a kernel makes of rows (N, D), whose cells may be NaN; shape (S, ..., N)."""
        centre, unit = (v.detach().flatten(0, -2).mean(0) for v in (self.locs, self.scales))
        locs, scales = (self.locs - centre) / unit, self.scales / unit
        precision = scales**-2
        linear = precision * locs
        of_cell = -0.5 * linear * locs - scales.log() - unit.log() - 0.5 * _LOG_2PI
        parts = [-0.5 * precision, linear, of_cell, self.log_weights.unsqueeze(-1)]
        return kernel(torch.cat(parts, -1), ((x - centre) / unit).T.contiguous(), False)

    def expected(self, x: Tensor, counts: Tensor | None = None) -> Moments:
        """The moments of rows (N, D) that count as often as they say; S is one."""
        value, found = _gathered(self, x, counts)
        centre, unit = (v.flatten(0, -2).mean(0) for v in (self.locs, self.scales))
        D, locs, scales = x.shape[1], self.locs[0], self.scales[0]
        squares, total, present, number = found.split([D, D, D, 1], -1)
        missing = number - present
        whole = unit * total + centre * present
        squares = unit**2 * squares + centre * (2 * whole - centre * present)
        # A missing cell has the moments of its component.
        return Moments(
            value,
            number[:, 0],
            whole + missing * locs,
            squares + missing * (locs**2 + scales**2),
        )


@dataclass(frozen=True)
class Tilted:
    """Components with covariances.

    Arguments:
        log_weights: shape (S, K).
        locs: shape (S, K, D).
        trils: Cholesky factors of the covariances, shape (S, K, D, D).
    """

    log_weights: Tensor
    locs: Tensor
    trils: Tensor

    def through(self, kernel: Kernel, x: Tensor) -> Tensor:
        """What a kernel makes of rows (N, D) without a missing cell; shape (S, ..., N)."""
        centre, unit, frame = self._frame()
        y = torch.linalg.solve_triangular(frame, ((x - centre) / unit).T, upper=False)
        y = y.contiguous()  # columns of rows, which the products run along
        locs = self._into_frame(frame, ((self.locs - centre) / unit).unsqueeze(-1))  # (S, K, D, 1)
        trils = self._into_frame(frame, self.trils / unit.unsqueeze(-1))
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        inverse = torch.linalg.solve_triangular(trils, eye, upper=False)
        precision = inverse.mT @ inverse
        linear = (precision @ locs).squeeze(-1)
        log_det = trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = log_det + unit.log().sum() + frame.diagonal().log().sum()
        constant = self.log_weights - log_det - 0.5 * x.shape[1] * _LOG_2PI
        constant = constant - 0.5 * (linear * locs.squeeze(-1)).sum(-1)
        # The products run over i <= j: those off the diagonal stand for two cells.
        i, j = torch.triu_indices(*eye.shape, device=x.device)
        products = precision[..., i, j] * (0.5 * eye[i, j] - 1)
        return kernel(torch.cat([products, linear, constant.unsqueeze(-1)], -1), y, True)

    def expected(self, x: Tensor, counts: Tensor | None = None) -> Moments:
        """The moments of rows (N, D) without a missing cell; S is one."""
        value, found = _gathered(self, x, counts)
        centre, unit, frame = self._frame()
        D, out = x.shape[1], unit.unsqueeze(-1) * frame
        products, total, number = found.split([found.shape[-1] - D - 1, D, 1], -1)
        i, j = torch.triu_indices(D, D, device=x.device)
        squares = products.new_zeros(len(products), D, D)
        squares[:, i, j], squares[:, j, i] = products, products
        away = total @ out.T  # from the centre
        squares = out @ squares @ out.T
        cross = away.unsqueeze(-1) * centre
        squares = squares + cross + cross.mT + number.unsqueeze(-1) * torch.outer(centre, centre)
        return Moments(value, number[:, 0], away + number * centre, squares)

    def marginal(self, there: Tensor) -> Tilted:
        """The components of some of the columns, given by their indices (D',)."""
        rows = self.trils[..., there, :]
        unit = rows.detach().abs().sum(-1, keepdim=True)
        rows = rows / unit
        return Tilted(
            self.log_weights,
            self.locs[..., there],
            unit * torch.linalg.cholesky(rows @ rows.mT),
        )

    def _frame(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centre (D,), units (D,), and a triangle (D, D) for the rest."""
        centre = self.locs.detach().flatten(0, -2).mean(0)
        trils = self.trils.detach().flatten(0, -3)
        unit = trils.abs().sum(-1).mean(0)
        # The mean of Cholesky factors is one, too, and squares no condition number.
        return centre, unit, (trils / unit.unsqueeze(-1)).mean(0)

    @staticmethod
    def _into_frame(frame: Tensor, columns: Tensor) -> Tensor:
        """The solution of a triangular system for columns (S, K, D, C)."""
        return torch.linalg.solve_triangular(frame, columns, upper=False)


def _gathered(
    components: Diagonal | Tilted, x: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The log-likelihood of rows, and their expected statistics (K, F) in the frame."""
    found = []

    def gather(coefficients: Tensor, y: Tensor, products: bool) -> Tensor:
        found.append(expected_statistics(coefficients[0], y, products, counts))
        return found[0][0]

    components.through(gather, x)
    return found[0]


def missing_patterns(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The patterns of missing cells in rows (N, D), where they can be looked at.

    Returns:
        Which cells are present, a row for each pattern (M, D), and the number of the pattern of
        each row of x (N,); ``None`` while a graph is recorded, or in ``vmap``.
    """
    try:
        if not bool(x.isnan().any()):
            present = torch.ones_like(x[:1], dtype=torch.bool)
            return present, torch.zeros(len(x), dtype=torch.long, device=x.device)
        return torch.unique(~x.isnan(), dim=0, return_inverse=True)
    except RuntimeError:  # no value can be read
        return None
