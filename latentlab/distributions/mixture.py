r"""A mixture of diagonal Gaussians with its labels summed out.

.. math::
    p(x) = \sum_k \pi_k \prod_d \mathcal{N}(x_d \mid \mu_{kd}, \sigma_{kd}^2)

Each component's log-density is linear in the features :math:`(x^2, x, 1)` of a row, so that all
rows against all components are one matrix product. Features are taken about the mean of the
components, in units of their mean scale, so that data far from the origin lose no digits and no
unit overflows. What is left is rounding of about :math:`10^{-16} R^2` nats, where R is the
distance of a row from that mean in scales of its component. A cell that is NaN is missing: the
marginal of a diagonal Gaussian leaves the factor out, which is exact.

Letters: N rows, D features, K components, S draws.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Categorical, constraints

__all__ = ["DiagonalGaussianMixture"]


class _RealOrMissing(constraints.Constraint):
    """Finite numbers, and NaN for a missing cell."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value).any(-1)


class DiagonalGaussianMixture(TorchDistribution):
    r"""Distribution of a row x under a mixture of diagonal Gaussians, labels summed out.

    Arguments:
        weights: mixture weights, shape (..., K), on the simplex.
        locs: means, shape (..., K, D), in the units of x.
        scales: standard deviations, shape (..., K, D), in the units of x, positive.
        validate_args: as in ``torch.distributions``.

    Raises:
        ValueError: if the shapes do not agree in K and D.

    Example:
        >>> import torch
        >>> weights, locs = torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]])
        >>> mixture = DiagonalGaussianMixture(weights, locs, torch.ones(2, 1))
        >>> mixture.log_prob(torch.tensor([[0.0]]))       # log N(0 | 1, 1), twice halved
        tensor([-1.4189])
        >>> mixture.responsibilities(torch.tensor([[0.0]]))
        tensor([[0.5000, 0.5000]])
    """

    arg_constraints = {
        "weights": constraints.simplex,
        "locs": constraints.independent(constraints.real, 2),
        "scales": constraints.independent(constraints.positive, 2),
    }
    support = _RealOrMissing()

    def __init__(
        self, weights: Tensor, locs: Tensor, scales: Tensor, validate_args: bool | None = None
    ) -> None:
        if locs.shape[-2:] != scales.shape[-2:] or weights.shape[-1:] != locs.shape[-2:-1]:
            raise ValueError(
                "weights, locs, scales: expected shapes (..., K), (..., K, D), (..., K, D), got "
                f"{tuple(weights.shape)}, {tuple(locs.shape)}, {tuple(scales.shape)}"
            )
        self.weights, self.locs, self.scales = weights, locs, scales
        batch_shape = torch.broadcast_shapes(
            weights.shape[:-1], locs.shape[:-2], scales.shape[:-2]
        )
        super().__init__(batch_shape, locs.shape[-1:], validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> DiagonalGaussianMixture:
        """The same mixture with a larger batch shape; parameters are not copied."""
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != Size(batch_shape):
            raise ValueError(
                f"batch_shape: expected a shape that {tuple(self.batch_shape)} expands to, "
                f"got {tuple(batch_shape)}"
            )
        new = self._get_checked_instance(DiagonalGaussianMixture, _instance)
        new.weights, new.locs, new.scales = self.weights, self.locs, self.scales
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def component_log_prob(self, x: Tensor) -> Tensor:
        r"""Joint log-density :math:`\log \pi_k + \log \mathcal{N}(x \mid \mu_k, \sigma_k)`.

        Arguments:
            x: rows, shape (..., D), NaN where a cell is missing.

        Returns:
            Log-densities in nats, shape (..., K).
        """
        # Even so, float32 squares would lose whole nats: float64 inside, whatever came.
        locs, scales = torch.broadcast_tensors(self.locs.double(), self.scales.double())
        centre, unit = (v.detach().flatten(0, -2).mean(0) for v in (locs, scales))  # (D,)
        locs, scales, y = (locs - centre) / unit, scales / unit, (x.double() - centre) / unit
        precision = scales**-2
        linear = precision * locs
        constant = -0.5 * linear * locs - scales.log() - unit.log() - 0.5 * math.log(2 * math.pi)
        missing = torch.isnan(y)
        y = torch.where(missing, 0.0, y)
        features = torch.cat([y * y, y, (~missing).to(y.dtype)], -1)  # (..., 3 D)
        coefficients = torch.cat([-0.5 * precision, linear, constant], -1)  # (..., K, 3 D)
        log_prob = _rows_by_components(features, coefficients) + self.weights.double().log()
        return log_prob.to(torch.promote_types(self.locs.dtype, x.dtype))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of rows in nats, shape of the batch; missing cells integrated out."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.component_log_prob(value).logsumexp(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities of the labels by Bayes' rule, shape (..., K)."""
        return self.component_log_prob(x).softmax(-1)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch_shape, D)``."""
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad():
            K, D = self.locs.shape[-2:]
            weights = self.weights.expand(*shape[:-1], K)
            labels = Categorical(weights).sample()[..., None, None].expand(*shape[:-1], 1, D)
            locs = self.locs.expand(*shape[:-1], K, D).gather(-2, labels).squeeze(-2)
            scales = self.scales.expand(*shape[:-1], K, D).gather(-2, labels).squeeze(-2)
            return torch.normal(locs, scales)

    @property
    def mean(self) -> Tensor:
        """Mean of a row, shape ``(*batch_shape, D)``."""
        mean = (self.weights[..., None] * self.locs).sum(-2)
        return mean.expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        """Variance of each column, shape ``(*batch_shape, D)``."""
        mean = (self.weights[..., None] * self.locs).sum(-2, keepdim=True)
        spread = self.scales**2 + (self.locs - mean) ** 2
        return (self.weights[..., None] * spread).sum(-2).expand(*self.batch_shape, -1)


def _rows_by_components(features: Tensor, coefficients: Tensor) -> Tensor:
    """Features (..., N, F) by coefficients (..., 1, K, F), in one product if rows share them."""
    coefficients = coefficients.transpose(-1, -2)  # (..., F, K)
    if coefficients.dim() == 2:
        return features @ coefficients
    if coefficients.shape[-3] == 1 and features.dim() > 1:
        return features @ coefficients.squeeze(-3)
    return (features.unsqueeze(-2) @ coefficients).squeeze(-2)
