r"""Correlation matrices as partial correlations, each free in (-1, 1).

.. math::
    \rho_{ij \mid 1 \ldots j-1} \sim 2 \, \mathrm{Beta}(b_j, b_j) - 1, \quad
    b_j = \eta + \frac{D - 1 - j}{2}, \qquad
    L_{ij} = \rho_{ij \mid 1 \ldots j-1}
             \textstyle\prod_{l < j} (1 - \rho_{il \mid 1 \ldots l-1}^2)^{1/2}

for :math:`1 \le j < i \le D`: the correlation of columns i and j among rows that agree in the
columns before j. :math:`L L^\top` then has the density of Lewandowski, Kurowicka and Joe,
proportional to :math:`|R|^{\eta - 1}`. No number is a constant or fixed by the others, as those of
a matrix are, so that every figure has a spread of its own; of two columns the only one is their
correlation.

Letters: D columns, P = D (D - 1) / 2 pairs of them.

References:
    | Generating random correlation matrices based on vines and extended onion method
      (Lewandowski, Kurowicka and Joe, 2009)
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Beta, TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["PartialCorrelations", "correlation_tril", "partial_correlations"]

_EDGE = 1e-12  # partial correlations keep this distance from -1 and 1


class PartialCorrelations(TorchDistribution):
    r"""Distribution of the P partial correlations of a correlation matrix.

    Arguments:
        num_columns: number of columns D, at least 2.
        concentration: :math:`\eta`; 1 is uniform over correlation matrices, more favours small
            correlations. Shape () or that of a batch.
        validate_args: as in ``torch.distributions``.

    Example:
        >>> PartialCorrelations(3, torch.tensor(1.0)).sample((5,)).shape
        torch.Size([5, 3])
        >>> PartialCorrelations(2, torch.tensor(1.0)).log_prob(torch.tensor([0.3])).exp()
        tensor(0.5000)
    """

    arg_constraints = {"concentration": constraints.positive}
    support = constraints.independent(constraints.interval(-1.0, 1.0), 1)
    has_rsample = True

    def __init__(
        self, num_columns: int, concentration: Tensor, validate_args: bool | None = None
    ) -> None:
        self.num_columns, self.concentration = num_columns, concentration
        num_pairs = num_columns * (num_columns - 1) // 2
        super().__init__(concentration.shape, Size((num_pairs,)), validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> PartialCorrelations:
        """The same distribution with a larger batch shape."""
        concentration = self.concentration.expand(Size(batch_shape))
        return PartialCorrelations(self.num_columns, concentration, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of partial correlations (..., P), shape of the batch."""
        if self._validate_args:
            self._validate_sample(value)
        return (self._beta().log_prob((1 + value) / 2) - torch.tensor(2.0).log()).sum(-1)

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch_shape, P)``, with a gradient."""
        draws = 2 * self._beta().rsample(Size(sample_shape)) - 1
        return draws.clamp(_EDGE - 1, 1 - _EDGE)

    def _beta(self) -> Beta:
        _, j = _pairs(self.num_columns, self.concentration.device)
        shape = self.concentration.unsqueeze(-1) + (self.num_columns - 2 - j) / 2
        return Beta(shape, shape, validate_args=False)


def correlation_tril(values: Tensor, num_columns: int) -> Tensor:
    """The Cholesky factor of the correlation matrix of partial correlations.

    Arguments:
        values: partial correlations, shape (..., P), row by row of the lower triangle.
        num_columns: number of columns D.

    Returns:
        Shape (..., D, D).

    Example:
        >>> correlation_tril(torch.tensor([0.6]), 2)
        tensor([[1.0000, 0.0000],
                [0.6000, 0.8000]])
    """
    i, j = _pairs(num_columns, values.device)
    number = torch.full((num_columns, num_columns), len(i), device=values.device)
    number = number.index_put((i, j), torch.arange(len(i), device=values.device))
    padded = torch.cat([values, torch.zeros_like(values[..., :1])], -1)
    partial = padded[..., number]  # (..., D, D), zero on and above the diagonal
    rest = ((1 - partial) * (1 + partial)).sqrt().cumprod(-1)
    before = torch.cat([torch.ones_like(rest[..., :1]), rest[..., :-1]], -1)
    eye = torch.eye(num_columns, dtype=values.dtype, device=values.device)
    return (partial + eye) * before


def partial_correlations(tril: Tensor) -> Tensor:
    """What :func:`correlation_tril` is the inverse of.

    Arguments:
        tril: Cholesky factors of correlation matrices, shape (..., D, D).

    Returns:
        Partial correlations, shape (..., P), a hair away from -1 and 1.
    """
    i, j = _pairs(tril.shape[-1], tril.device)
    squares = tril.square()
    used = squares.cumsum(-1) - squares
    rest = (1 - used).clamp_min(_EDGE).sqrt()
    return (tril / rest)[..., i, j].clamp(_EDGE - 1, 1 - _EDGE)


def _pairs(num_columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the lower triangle, row by row."""
    i, j = torch.tril_indices(num_columns, num_columns, -1, device=device)
    return i, j
