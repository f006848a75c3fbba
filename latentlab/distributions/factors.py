r"""Exponential families whose expectations have closed forms: priors, and factors of a guide.

====================  =================================================================
:class:`Dirichlet`    shares :math:`\pi \sim \mathrm{Dirichlet}(\alpha)`
:class:`Gamma`        rates :math:`\lambda \sim \mathrm{Gamma}(a, b)`
:class:`Beta`         probabilities :math:`p \sim \mathrm{Beta}(a, b)`
:class:`NormalGamma`  :math:`\sigma^{-2} \sim \mathrm{Gamma}(a, b), \;
                      \mu \mid \sigma \sim \mathcal{N}(m, \sigma^2 / \kappa)`
====================  =================================================================

Each is over one site or several, in the order that it draws them, and independent over all of its
batch. A prior that is conjugate to a likelihood is followed by a posterior of the same family.

Letters: C shares, S draws.

References:
    | Pattern recognition and machine learning (Bishop, 2006), chapter 10 and appendix B
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from pyro.distributions import Beta as BetaDistribution
from pyro.distributions import Dirichlet as DirichletDistribution
from pyro.distributions import Gamma as GammaDistribution
from pyro.distributions import Normal, StudentT
from torch import Tensor

__all__ = ["Beta", "Dirichlet", "Factor", "Gamma", "NormalGamma", "Sites"]

Sites = tuple[str, ...]
"""The sites of a factor, in the order that it draws them."""

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Factor(ABC):
    """What they share; each field is a number of the family, of the shape of its first site.

    ``free`` names the numbers that may be negative; all others are positive.
    """

    free: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The numbers of the family."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    @abstractmethod
    def around(cls, values: Sequence[Tensor], spread: Sequence[Tensor]) -> Factor:
        """A member that stands about some values.

        Arguments:
            values: of its sites.
            spread: about the standard deviation of each number of theirs on the real line.
        """

    @abstractmethod
    def draw(self, num_draws: int) -> tuple[Tensor, ...]:
        """Draws (S, ...) of its sites, with a gradient."""

    @abstractmethod
    def log_probs(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Log-density of each site given those before it, one for each draw, (S,)."""

    def marginals(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Log-density of each site by itself, one for each draw, (S,)."""
        return self.log_probs(*values)

    @abstractmethod
    def kl(self, other: Factor) -> Tensor:
        """The divergence from this one to another of the family, in nats, summed over all."""


@dataclass(frozen=True)
class Dirichlet(Factor):
    r"""Shares, ``concentration`` (..., C).

    Example:
        >>> found = Dirichlet(torch.tensor([2.0, 1.0])).expected_log()
        >>> found.exp()  # less than one in all
        tensor([0.6065, 0.2231])
    """

    concentration: Tensor

    @classmethod
    def around(cls, values: Sequence[Tensor], spread: Sequence[Tensor]) -> Dirichlet:
        """See :meth:`Factor.around`."""
        (shares,), (sd,) = values, spread
        width = sd.square().mean(-1, keepdim=True) if sd.shape[-1] else torch.ones_like(shares)
        return cls(shares * shares.shape[-1] / width + 1e-3)

    def expected_log(self) -> Tensor:
        """Expected log of each share, (..., C)."""
        total = self.concentration.sum(-1, keepdim=True)
        return self.concentration.digamma() - total.digamma()

    def draw(self, num_draws: int) -> tuple[Tensor, ...]:
        """See :meth:`Factor.draw`."""
        drawn = self._distribution().rsample(torch.Size((num_draws,)))
        return (drawn.clamp_min(torch.finfo(drawn.dtype).tiny),)

    def log_probs(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Factor.log_probs`."""
        return (_of_draws(self._distribution().log_prob(values[0])),)

    def kl(self, other: Factor) -> Tensor:
        """See :meth:`Factor.kl`."""
        q, p = self.concentration, other.concentration  # type: ignore[attr-defined]
        norm = q.sum(-1).lgamma() - p.sum(-1).lgamma() + (p.lgamma() - q.lgamma()).sum(-1)
        return (norm + ((q - p) * self.expected_log()).sum(-1)).sum()

    def _distribution(self) -> DirichletDistribution:
        return DirichletDistribution(self.concentration, validate_args=False)


@dataclass(frozen=True)
class Gamma(Factor):
    r"""Positive numbers, ``concentration`` and ``rate`` of one shape.

    Example:
        >>> prior = Gamma(torch.ones(1), torch.ones(1))
        >>> prior.expected(), prior.kl(prior)
        (tensor([1.]), tensor(0.))
    """

    concentration: Tensor
    rate: Tensor

    @classmethod
    def around(cls, values: Sequence[Tensor], spread: Sequence[Tensor]) -> Gamma:
        """See :meth:`Factor.around`."""
        concentration = spread[0].square().reciprocal()
        return cls(concentration, concentration / values[0])

    def expected(self) -> Tensor:
        """Mean of each number."""
        return self.concentration / self.rate

    def expected_log(self) -> Tensor:
        """Expected log of each number."""
        return self.concentration.digamma() - self.rate.log()

    def draw(self, num_draws: int) -> tuple[Tensor, ...]:
        """See :meth:`Factor.draw`."""
        drawn = self._distribution().rsample(torch.Size((num_draws,)))
        return (drawn.clamp_min(torch.finfo(drawn.dtype).tiny),)

    def log_probs(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Factor.log_probs`."""
        return (_of_draws(self._distribution().log_prob(values[0])),)

    def kl(self, other: Factor) -> Tensor:
        """See :meth:`Factor.kl`."""
        a, b, c, d = self.concentration, self.rate, other.concentration, other.rate  # type: ignore[attr-defined]
        shape = (a - c) * a.digamma() - a.lgamma() + c.lgamma()
        return (shape + c * (b.log() - d.log()) + a * (d - b) / b).sum()

    def _distribution(self) -> GammaDistribution:
        return GammaDistribution(self.concentration, self.rate, validate_args=False)


@dataclass(frozen=True)
class Beta(Factor):
    r"""Probabilities, ``ones`` (a) and ``zeros`` (b) of one shape.

    Example:
        >>> Beta(torch.ones(1), torch.ones(1)).expected_logs()[0]
        tensor([-1.])
    """

    ones: Tensor
    zeros: Tensor

    @classmethod
    def around(cls, values: Sequence[Tensor], spread: Sequence[Tensor]) -> Beta:
        """See :meth:`Factor.around`."""
        count = 2 / spread[0].square()
        return cls(count * values[0] + 1e-3, count * (1 - values[0]) + 1e-3)

    def expected_logs(self) -> tuple[Tensor, Tensor]:
        """Expected log of each probability, and of one minus it."""
        total = (self.ones + self.zeros).digamma()
        return self.ones.digamma() - total, self.zeros.digamma() - total

    def draw(self, num_draws: int) -> tuple[Tensor, ...]:
        """See :meth:`Factor.draw`."""
        drawn = self._distribution().rsample(torch.Size((num_draws,)))
        finfo = torch.finfo(drawn.dtype)
        return (drawn.clamp(finfo.tiny, 1 - finfo.eps),)

    def log_probs(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Factor.log_probs`."""
        return (_of_draws(self._distribution().log_prob(values[0])),)

    def kl(self, other: Factor) -> Tensor:
        """See :meth:`Factor.kl`."""
        p = torch.stack([other.ones, other.zeros], -1)  # type: ignore[attr-defined]
        return Dirichlet(torch.stack([self.ones, self.zeros], -1)).kl(Dirichlet(p))

    def _distribution(self) -> BetaDistribution:
        return BetaDistribution(self.ones, self.zeros, validate_args=False)


@dataclass(frozen=True)
class NormalGamma(Factor):
    r"""Scales :math:`\sigma` and locations :math:`\mu`, drawn in this order.

    Arguments:
        loc: m.
        count: :math:`\kappa`, so many rows is what is known of the location worth.
        concentration: a.
        rate: b.

    Example:
        >>> one = torch.ones(2)
        >>> scales, locs = NormalGamma(0 * one, one, one, one).draw(5)
        >>> scales.shape, locs.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    free = ("loc",)
    loc: Tensor
    count: Tensor
    concentration: Tensor
    rate: Tensor

    @classmethod
    def around(cls, values: Sequence[Tensor], spread: Sequence[Tensor]) -> NormalGamma:
        """See :meth:`Factor.around`."""
        (scales, locs), (of_log, of_loc) = values, spread
        concentration = 0.25 / of_log.square()
        count = (scales / of_loc).square()
        return cls(locs, count, concentration, concentration * scales.square())

    @property
    def precision(self) -> Gamma:
        r"""The factor of :math:`\sigma^{-2}`."""
        return Gamma(self.concentration, self.rate)

    def draw(self, num_draws: int) -> tuple[Tensor, ...]:
        """See :meth:`Factor.draw`."""
        scales = self.precision.draw(num_draws)[0].rsqrt()
        return scales, self._given(scales).rsample()

    def log_probs(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Factor.log_probs`."""
        scales, locs = values
        return self._of_scales(scales), _of_draws(self._given(scales).log_prob(locs))

    def marginals(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Factor.marginals`: that of a location is a Student's t."""
        scale = (self.rate / (self.concentration * self.count)).sqrt()
        locs = StudentT(2 * self.concentration, self.loc, scale, validate_args=False)
        return self._of_scales(values[0]), _of_draws(locs.log_prob(values[1]))

    def kl(self, other: Factor) -> Tensor:
        """See :meth:`Factor.kl`."""
        p: NormalGamma = other  # type: ignore[assignment]
        ratio = p.count / self.count
        away = p.count * self.precision.expected() * (self.loc - p.loc).square()
        return self.precision.kl(p.precision) + 0.5 * (ratio - 1 - ratio.log() + away).sum()

    def _given(self, scales: Tensor) -> Normal:
        return Normal(self.loc, scales / self.count.sqrt(), validate_args=False)

    def _of_scales(self, scales: Tensor) -> Tensor:
        stretch = _LOG_2 - 3 * scales.log()  # log of |d sigma^-2 / d sigma|
        precision = scales.square().reciprocal()
        given = GammaDistribution(self.concentration, self.rate, validate_args=False)
        return _of_draws(given.log_prob(precision) + stretch)


def _of_draws(log_prob: Tensor) -> Tensor:
    """Sums (S,) of what is independent."""
    return log_prob.reshape(len(log_prob), -1).sum(-1)
