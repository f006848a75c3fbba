r"""Normal rows with the prior that is conjugate to them.

.. math:: \sigma_{kd}^{-2} \sim \mathrm{Gamma}(a, b_d), \quad
          \mu_{kd} \mid \sigma_{kd} \sim \mathcal{N}(m_d, \sigma_{kd}^2 / \kappa)

Letters: N rows, D features, K states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import PowerTransform

from latentlab.distributions.cells import Cells
from latentlab.distributions.emission_kinds import GaussianEmission
from latentlab.distributions.factors import Factor, NormalGamma, Sites

__all__ = ["NormalGammaEmission"]

_SHAPE = 2.0  # a: the least whole number for which a variance has a mean
_COUNT = 1 / 36  # of rows at half a standard deviation: a mean is three of them away
_SITES = ("scales", "locs")
_LOG_2PI = math.log(2 * math.pi)


class NormalGammaEmission(nn.Module):
    r"""Rows that are normal in each state, cells independent: sites ``scales`` and ``locs``.

    :math:`m_d` is the mean of a column, :math:`a = 2`, and :math:`b_d, \kappa` are such that a
    variance is :math:`s_d^2 / 4` in the mean, and a location :math:`3 s_d` away, with
    :math:`s_d` the standard deviation of the column. No scale has a floor: the prior keeps it
    from zero.

    Arguments:
        num_features: number of columns D.

    Example:
        >>> emission = NormalGammaEmission(num_features=2)
        >>> [*emission.sites()]
        ['scales', 'locs']
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.units = GaussianEmission(num_features)  # and what else does not depend on the prior

    @property
    def center(self) -> Tensor:
        """Mean of each column, shape (D,)."""
        return self.units.center

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each column, shape (D,)."""
        return self.units.spread

    def sites(self) -> Mapping[str, Any]:
        """Priors in the units of the data, each by itself."""
        prior = self._prior()
        df = 2 * prior.concentration
        precision = dist.Gamma(prior.concentration, prior.rate)
        scale = (prior.rate / (prior.concentration * prior.count)).sqrt()
        root = PowerTransform(-0.5)  # type: ignore[arg-type]
        return {
            "scales": dist.TransformedDistribution(precision, [root]).to_event(1),
            "locs": dist.StudentT(df, prior.loc, scale).to_event(1),
        }

    def given(self, site: str, values: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
        """The prior of ``locs`` given ``scales``.

        Arguments:
            site: which prior.
            values: of the sites before it, shape (..., K, D).
        """
        if site == "scales":
            return self.sites()[site]
        return dist.Normal(self.center, values["scales"] / math.sqrt(_COUNT)).to_event(1)

    def distribution(self, scales: Tensor, locs: Tensor) -> Any:  # noqa: ANN401
        """Rows in each state.

        Arguments:
            scales: standard deviations, shape (..., K, D).
            locs: means, shape (..., K, D).
        """
        standard = dist.Normal((locs - self.center) / self.spread, scales / self.spread)
        return Cells(standard, event_dim=1, origin=self.center, unit=self.spread)

    def measure(self, x: Tensor) -> None:
        """Take mean and standard deviation of the columns as units, in place."""
        self.units.measure(x)

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Means and scales of weighted rows."""
        return self.units.estimate(x, weights)

    is_conjugate = True

    def priors(self) -> dict[Sites, Factor]:
        """The prior of both sites."""
        return {_SITES: self._prior()}

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Weights (K, D), sums and sums of squares (K, D) of cells, in units."""
        return self.units.statistics(x, weights)

    def posteriors(self, statistics: Mapping[str, Tensor]) -> dict[Sites, Factor]:
        """That of both sites."""
        held, first, second = (statistics[name] for name in ("held", "first", "second"))
        count = _COUNT + held
        mean = first / count  # of the centre, which is zero here, and the rows
        rest = (second - count * mean.square()).clamp_min(0.0)
        rate = self.spread.square() * (_SHAPE - 1) / 4 + self.spread.square() * rest / 2
        loc = self.center + self.spread * mean
        return {_SITES: NormalGamma(loc, count, _SHAPE + held / 2, rate)}

    def expected_log_prob(self, x: Tensor, found: Mapping[Sites, Factor]) -> Tensor:
        """Expected log-density of rows in each state."""
        cells: NormalGamma = found[_SITES]  # type: ignore[assignment]
        missing, precision = x.isnan().unsqueeze(-2), cells.precision
        away = (x.unsqueeze(-2) - cells.loc).square()  # (..., K, D)
        square = 1 / cells.count + precision.expected() * away
        log_prob = 0.5 * (precision.expected_log() - _LOG_2PI - square)
        return torch.where(missing, 0.0, log_prob).sum(-1)

    def _prior(self) -> NormalGamma:
        one = torch.ones_like(self.spread)
        rate = self.spread.square() * (_SHAPE - 1) / 4
        return NormalGamma(self.center, _COUNT * one, _SHAPE * one, rate)
