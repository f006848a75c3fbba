r"""A normal distribution of a row that a few latent numbers explain, these integrated out.

.. math::
    z \sim \mathcal{N}(0, I), \quad x \mid z \sim \mathcal{N}(\mu + W z, \mathrm{diag}\,\psi)
    \quad\Rightarrow\quad x \sim \mathcal{N}(\mu, W W^\top + \mathrm{diag}\,\psi)

With o the cells that are there and :math:`A = I + W_o^\top \psi_o^{-1} W_o`, the latents of a row
are again normal, and give its density without a D by D matrix and without cancellation:

.. math::
    z \mid x_o \sim \mathcal{N}(m, A^{-1}), \qquad m = A^{-1} W_o^\top \psi_o^{-1} (x_o - \mu_o) \\
    -2 \log p(x_o) = |o| \log 2\pi + \log|A| + \textstyle\sum_o \log \psi_d
        + \sum_o (x_d - \mu_d - W_d m)^2 / \psi_d + m^\top m

Letters: N rows, D features, L latent dimensions.

Reference:
    | Probabilistic principal component analysis (Tipping and Bishop, 1999)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from latentlab.distributions.cells import may_miss

__all__ = ["Codes", "LowRankNormal"]

_LOG_2PI = math.log(2 * math.pi)


class Codes(NamedTuple):
    """What a row says of its latents: a normal distribution of them.

    Arguments:
        mean: shape (..., L).
        precision: A, shape (..., L, L); one for all rows where no cell is missing.
    """

    mean: Tensor
    precision: Tensor


class _RealOrMissing(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value).any(-1)


class LowRankNormal(TorchDistribution):
    r"""A normal distribution with covariance :math:`W W^\top + \mathrm{diag}\,\psi`.

    Cells that are NaN are missing and integrated out, which is exact. Rows may have an origin and
    units of their own, :math:`x_d = o_d + u_d y_d` with y from this distribution; the origin is
    taken off first, so that data far from zero lose no digits.

    Arguments:
        loc: mean, shape (..., D).
        factor: W, shape (..., D, L).
        variances: :math:`\psi`, shape (..., D), positive.
        origin: o, shape (D,).
        unit: u, shape (D,), positive.
        validate_args: as in ``torch.distributions``.

    Example:
        >>> row = LowRankNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2))
        >>> row.log_prob(torch.tensor([[0.0, 0.0], [0.0, torch.nan]]))
        tensor([-2.3872, -1.2655])
        >>> row.codes(torch.tensor([1.0, 1.0])).mean
        tensor([0.6667])
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "factor": constraints.independent(constraints.real, 2),
        "variances": constraints.independent(constraints.positive, 1),
    }
    support = _RealOrMissing()
    has_rsample = True
    loc: Tensor
    factor: Tensor
    variances: Tensor

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        variances: Tensor,
        origin: Tensor | None = None,
        unit: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.factor, self.variances = loc, factor, variances
        self.origin = loc.new_zeros(loc.shape[-1]) if origin is None else origin
        self.unit = loc.new_ones(loc.shape[-1]) if unit is None else unit
        shapes = (loc.shape[:-1], factor.shape[:-2], variances.shape[:-1])
        batch = torch.broadcast_shapes(*shapes)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> LowRankNormal:
        """The same rows with a larger batch shape."""
        batch, (D, L) = Size(batch_shape), self.factor.shape[-2:]
        loc, variances = self.loc.expand(*batch, D), self.variances.expand(*batch, D)
        factor = self.factor.expand(*batch, D, L)
        units = (self.origin, self.unit)
        return LowRankNormal(loc, factor, variances, *units, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of the cells that are there, shape of the batch."""
        if self._validate_args:
            self._validate_sample(value)
        there, away = self._read(value)
        codes = self._codes(there, away)
        rest = away - _applied(self.factor, codes.mean)
        square, log_psi = rest.square() / self.variances, self.variances.log()
        log_psi = log_psi + 2 * self.unit.log()
        log_det = 2 * _diagonal(torch.linalg.cholesky_ex(codes.precision)[0]).log().sum(-1)
        if there is None:
            count: Tensor | int = value.shape[-1]
            log_psi, square = log_psi.sum(-1), square.sum(-1)
        else:
            count = there.sum(-1)
            log_psi, square = (there * log_psi).sum(-1), (there * square).sum(-1)
        total = square + codes.mean.square().sum(-1) + log_det + log_psi
        return -0.5 * (total + count * _LOG_2PI)

    def codes(self, value: Tensor) -> Codes:
        """The distribution of the latents given the cells that are there, exact.

        Arguments:
            value: rows, shape (..., D), NaN where a cell is missing.
        """
        return self._codes(*self._read(value))

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, D)``, with a gradient."""
        shape = self._extended_shape(Size(sample_shape))
        dtype, device = self.loc.dtype, self.loc.device
        L = self.factor.shape[-1]
        z = torch.randn((*shape[:-1], L), dtype=dtype, device=device)
        noise = self.variances.sqrt() * torch.randn(shape, dtype=dtype, device=device)
        return self.origin + self.unit * (self.loc + _applied(self.factor, z) + noise)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, D)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """Mean of each cell."""
        mean = self.origin + self.unit * self.loc
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each cell."""
        variance = self.unit.square() * (self.factor.square().sum(-1) + self.variances)
        return variance.expand(self.batch_shape + self.event_shape)

    def _read(self, value: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which cells are there, one or zero (``None``: all), and how far from the mean."""
        away = (value - self.origin) / self.unit - self.loc
        if not may_miss(value):
            return None, away
        missing = value.isnan()
        return (~missing).to(self.loc.dtype), torch.where(missing, 0.0, away)

    def completed(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each cell given those that are there, shape (..., D) each.

        Arguments:
            value: rows, shape (..., D), NaN where a cell is missing.

        Returns:
            A cell that is there is its own mean, and has no variance.
        """
        codes = self.codes(value)
        expected = self.origin + self.unit * (self.loc + _applied(self.factor, codes.mean))
        tril = torch.linalg.cholesky_ex(codes.precision)[0]
        wide = torch.linalg.solve_triangular(tril, self.factor.mT, upper=False)
        variance = self.unit.square() * (self.variances + wide.square().sum(-2))
        missing = value.isnan()
        zero = torch.zeros_like(expected)
        return torch.where(missing, expected, value), torch.where(missing, variance, zero)

    def _codes(self, there: Tensor | None, away: Tensor) -> Codes:
        # The noise is one: W and the rows are measured in units of it.
        scale = self.variances.sqrt()
        unit_factor = self.factor / scale.unsqueeze(-1)  # (..., D, L)
        L = unit_factor.shape[-1]
        eye = torch.eye(L, dtype=unit_factor.dtype, device=unit_factor.device)
        if there is None:
            precision = eye + unit_factor.mT @ unit_factor
        else:
            outer = unit_factor.unsqueeze(-1) * unit_factor.unsqueeze(-2)
            of_rows = _applied(outer.flatten(-2).mT, there)
            precision = eye + of_rows.unflatten(-1, (L, L))
        seen = _applied(unit_factor.mT, away / scale)
        tril = torch.linalg.cholesky_ex(precision)[0]
        inverse = torch.linalg.solve_triangular(tril, eye, upper=False)
        mean = _applied(inverse.mT, _applied(inverse, seen))
        return Codes(mean, precision)


def _applied(matrix: Tensor, rows: Tensor) -> Tensor:
    """Matrix (..., I, J) times each row (..., J), as one product where one matrix is for many."""
    if matrix.dim() == 2:
        return rows @ matrix.mT
    if matrix.shape[-3] == 1 and rows.dim() >= 2 and matrix.dim() <= rows.dim() + 1:
        return rows @ matrix.squeeze(-3).mT  # (..., N, J) by (..., J, I)
    return (matrix @ rows.unsqueeze(-1)).squeeze(-1)


def _diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1)
