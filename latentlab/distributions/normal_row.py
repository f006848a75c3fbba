r"""A normal distribution of a row whose cells depend on each other, and may be missing.

.. math:: \log p(x) = \log \mathcal{N}(x_o \mid \mu_o, \Sigma_{oo})

with o the cells that are there: the others are integrated out, which is exact.

Letters: D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from latentlab.distributions.quadratic import is_traced

__all__ = ["NormalRow"]

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
        covariance = self.scale_tril @ self.scale_tril.mT
        apart = missing.unsqueeze(-1) | missing.unsqueeze(-2)
        eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        unit = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        scaled = covariance / (unit.unsqueeze(-1) * unit.unsqueeze(-2))
        tril = torch.linalg.cholesky(torch.where(apart, eye, scaled))
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

    @property
    def mean(self) -> Tensor:
        """Mean of each cell."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each cell."""
        return self.scale_tril.square().sum(-1).expand(self.batch_shape + self.event_shape)
