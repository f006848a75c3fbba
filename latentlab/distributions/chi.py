r"""The chi distribution: the length of a vector of independent normal numbers.

.. math:: x = s \, \lVert g \rVert, \quad g \sim \mathcal{N}(0, I_k), \qquad
    p(x) = \frac{2^{1 - k/2}}{s \, \Gamma(k / 2)} \Bigl(\frac{x}{s}\Bigr)^{k - 1}
           e^{-x^2 / 2 s^2}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["Chi"]


class Chi(TorchDistribution):
    """The length of a vector of ``df`` normal numbers with standard deviation ``scale``.

    Arguments:
        df: degrees of freedom k, any shape, positive.
        scale: s, any shape that goes with it, positive.
        validate_args: as in ``torch.distributions``.

    Example:
        >>> Chi(torch.tensor(1.0), torch.tensor(1.0)).log_prob(torch.tensor(0.0)).exp()
        tensor(0.7979)
    """

    arg_constraints = {"df": constraints.positive, "scale": constraints.positive}
    support = constraints.nonnegative
    has_rsample = True
    df: Tensor
    scale: Tensor

    def __init__(self, df: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.df, self.scale = torch.broadcast_tensors(df, scale)
        super().__init__(self.df.shape, validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> Chi:
        """The same distribution with a larger batch shape."""
        shape = Size(batch_shape)
        df, scale = self.df.expand(shape), self.scale.expand(shape)
        return Chi(df, scale, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        ratio, k = value / self.scale, self.df
        constant = (1 - k / 2) * math.log(2) - torch.lgamma(k / 2) - self.scale.log()
        return constant + torch.xlogy(k - 1, ratio) - 0.5 * ratio.square()

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch)``, with a gradient."""
        half = (self.df / 2).expand(self._extended_shape(Size(sample_shape)))
        return self.scale * (2 * torch._standard_gamma(half)).sqrt()

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.scale * math.sqrt(2) * _ratio(self.df)

    @property
    def variance(self) -> Tensor:
        """The variance."""
        return self.scale.square() * self.df - self.mean.square()


def _ratio(df: Tensor) -> Tensor:
    return (torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2)).exp()
