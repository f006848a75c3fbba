r"""A normal distribution of a row whose cells depend on each other, and may be missing.

.. math:: \log p(x) = \log \mathcal{N}(x_o \mid \mu_o, \Sigma_{oo})

with o the cells that are there: the others are integrated out, which is exact.

Letters: D features.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import AffineTransform, constraints

from latentlab.distributions.quadratic import is_traced

__all__ = ["NormalRow", "given_rest", "normal_cells"]

_LOG_2PI = math.log(2 * math.pi)


class _RealOrMissing(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value).any(-1)


class NormalRow(TorchDistribution):
    r"""A normal distribution of a row with correlations; missing cells are integrated out.

    Arguments:
        loc: mean, shape (..., D).
        scale_tril: Cholesky factor of the covariance, shape (..., D, D).
        validate_args: as in ``torch.distributions``.

    Example:
        >>> row = NormalRow(torch.zeros(2), torch.eye(2))
        >>> row.log_prob(torch.tensor([[0.0, 0.0], [0.0, torch.nan]]))
        tensor([-1.8379, -0.9189])
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = _RealOrMissing()
    has_rsample = True
    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        batch = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> NormalRow:
        """The same rows with a larger batch shape."""
        batch, D = Size(batch_shape), self.event_shape[0]
        loc, tril = self.loc.expand(*batch, D), self.scale_tril.expand(*batch, D, D)
        return NormalRow(loc, tril, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of the cells that are there, shape of the batch."""
        missing = value.isnan()
        if not is_traced() and not bool(missing.any()):
            return self._density(value - self.loc, self.scale_tril, value.shape[-1])
        # Missing cells become independent standard normal ones at their mean: they add nothing
        # but a constant, and the others keep their marginal.
        away = torch.where(missing, 0.0, value - self.loc)
        apart = missing.unsqueeze(-1) | missing.unsqueeze(-2)
        eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        unit, rows = self._scaled()
        tril = torch.linalg.cholesky(torch.where(apart, eye, rows @ rows.mT))
        unit = torch.where(missing, 1.0, unit)
        there = (~missing).sum(-1).to(value.dtype)
        return self._density(away / unit, tril, there) - unit.log().sum(-1)

    @staticmethod
    def _density(away: Tensor, tril: Tensor, count: int | Tensor) -> Tensor:
        eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
        inverse = torch.linalg.solve_triangular(tril, eye, upper=False)
        standard = (inverse @ away.unsqueeze(-1)).squeeze(-1)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (standard.square().sum(-1) + count * _LOG_2PI) - log_det

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, D)``, with a gradient."""
        shape = self._extended_shape(Size(sample_shape))
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (self.scale_tril @ eps.unsqueeze(-1)).squeeze(-1)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, D)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def given_rest(self, rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of missing cells given those that are there.

        Arguments:
            rows: as for :class:`latentlab.distributions.cells.FillsRows`.
            gap: as for :class:`latentlab.distributions.cells.FillsRows`.
        """
        there = torch.ones(self.event_shape, dtype=torch.bool, device=gap.device)
        there = there.index_fill(0, gap, False).nonzero()[:, 0]
        shift, sd = given_rest(self.scale_tril, self.loc, rows, gap, there)
        mean = self.loc[..., gap] + shift
        return mean, sd.expand(mean.shape)

    @property
    def mean(self) -> Tensor:
        """Mean of each cell."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each cell."""
        return self.stddev.square()

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each cell."""
        unit, rows = self._scaled()
        sd = unit * rows.square().sum(-1).sqrt()
        return sd.expand(self.batch_shape + self.event_shape)

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """Scales of cells (..., D), and the Cholesky factor in them: nothing small is squared."""
        unit = self.scale_tril.abs().sum(-1)
        return unit, self.scale_tril / unit.unsqueeze(-1)


def normal_cells(loc: Tensor, scale: Tensor) -> dist.TransformedDistribution:
    """Independent N(loc, scale), whose density squares no scale: none is too small or too large.

    Arguments:
        loc: means, of any shape.
        scale: standard deviations, of the same shape.
    """
    standard = dist.Normal(torch.zeros_like(loc), 1.0)
    return dist.TransformedDistribution(standard, [AffineTransform(loc, scale)])


def given_rest(
    trils: Tensor, locs: Tensor, rows: Tensor, gap: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    r"""What the observed cells o of rows say of the missing ones m, in each of K components.

    .. math:: \Sigma_{mo} \Sigma_{oo}^{-1} (x_o - \mu_o), \qquad
        \mathrm{diag}(\Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om})^{1/2}

    Letters: n rows, M missing and O observed cells.

    Arguments:
        trils: Cholesky factors of the covariances, shape (..., 1, K, D, D) or less.
        locs: means, shape (..., 1, K, D), the 1 for the rows.
        rows: shape (n, D), that all miss the cells in ``gap``.
        gap: columns of these, shape (M,).
        there: the other columns, shape (O,).

    Returns:
        What is added to the mean, shape (..., n, K, M), and the standard deviation that is left,
        shape (..., 1, K, M).
    """
    factors = trils.double().expand(*locs.shape, locs.shape[-1])
    unit = factors.abs().sum(-1)  # (..., 1, K, D)
    factors = factors / unit.unsqueeze(-1)
    seen, lost = factors[..., there, :], factors[..., gap, :]
    factor = torch.linalg.cholesky(seen @ seen.mT)
    gain = torch.linalg.solve_triangular(factor, seen @ lost.mT, upper=False)  # (..., 1, K, O, M)
    left = (lost.square().sum(-1) - gain.square().sum(-2)).clamp_min(0.0).sqrt()
    away = (rows[:, None, there] - locs[..., there]) / unit[..., there]  # (..., n, K, O)
    # One solve for all rows of a component: (..., 1, K, O, n).
    columns = away.movedim(-3, -1).unsqueeze(-4)
    whitened = torch.linalg.solve_triangular(factor, columns, upper=False)
    shift = (gain.mT @ whitened).squeeze(-4).movedim(-1, -3)  # (..., n, K, M)
    return shift * unit[..., gap], left * unit[..., gap]
