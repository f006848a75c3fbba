r"""Normal-Wishart distributions of the components of a Gaussian mixture.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad
    \Sigma_b^{-1} \sim \mathrm{Wishart}(\nu_b, \Psi_b^{-1}), \quad
    \mu_k \mid \Sigma \sim \mathcal{N}(m_k, \Sigma_k / \beta_k)

A block b is what a Wishart distribution is of: the covariance of a component (K blocks), that of
all of them (one), or single variances (K or K D blocks of one by one). Densities are those of
standard deviations and partial correlations, which is what a mixture is written in: with
:math:`\Sigma = \mathrm{diag}(\sigma) R(\rho) \, \mathrm{diag}(\sigma)`

.. math::
    \log \left| \frac{\partial \Sigma}{\partial (\sigma, \rho)} \right|
    = d \log 2 + d \sum_i \log \sigma_i + \sum_{j < i} \frac{d - 1 - j}{2} \log(1 - \rho_{ij}^2)

for columns counted from one. Where :math:`\Psi` is diagonal, standard deviations are independent
given the correlations,

.. math::
    p(R) \propto |R|^{-(\nu + d + 1) / 2} \prod_i (R^{-1})_{ii}^{-\nu / 2}, \qquad
    \sigma_i^2 \mid R \sim \mathrm{InverseGamma}\left(\tfrac{\nu}{2},
        \tfrac{\psi_i}{2} (R^{-1})_{ii}\right),

so that such a prior is two ``pyro.sample`` statements.

Letters: K components, D features, d rows of a block, S draws.

References:
    | Modeling covariance matrices in terms of standard deviations and correlations
      (Barnard, McCulloch and Meng, 2000)
    | Pattern recognition and machine learning, section 10.2 (Bishop, 2006)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Dirichlet, MultivariateNormal, constraints, kl_divergence

from latentlab.distributions.correlations import correlation_tril, partial_correlations

__all__ = ["NormalWishart", "WishartCorrelations", "inverse_diagonal"]

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class NormalWishart:
    r"""Dirichlet weights and normal-Wishart components.

    Arguments:
        concentration: :math:`\alpha`, shape (K,).
        strength: :math:`\beta`, rows that a mean is known by, shape (K,).
        locs: :math:`m`, shape (K, D).
        dof: :math:`\nu`, more than d - 1, shape of the blocks: (K,), (), or (K, D).
        scale: :math:`\Psi`, shape (blocks, d, d).
    """

    concentration: Tensor
    strength: Tensor
    locs: Tensor
    dof: Tensor
    scale: Tensor

    @property
    def is_tilted(self) -> bool:
        """Whether blocks are covariances of all columns; of one column all shapes are one."""
        return self.scale.shape[-1] == self.locs.shape[-1] and self.dof.shape != self.locs.shape

    def widths(self) -> Tensor:
        r"""Inverse of :math:`\mathbb{E} \, \Sigma_k^{-1}`, (K, D, D), or of variances (K, D)."""
        return self._of_components(self.scale / self.dof[..., None, None])

    def expected_log_weights(self) -> Tensor:
        r"""What :math:`\log \pi_k` becomes, with ``locs`` and ``widths`` in the place of the rest.

        .. math::
            \mathbb{E} \log \pi_k \mathcal{N}(x \mid \mu_k, \Sigma_k)
            = w_k + \log \mathcal{N}(x \mid m_k, \Psi_k / \nu_k)
        """
        d, D = self.scale.shape[-1], self.locs.shape[-1]
        gap = _sum_of_digammas(self.dof, d) + d * (_LOG_2 - self.dof.log())
        per_component = gap.sum(-1) if self.dof.shape == self.locs.shape else gap * (D / d)
        log_weights = self.concentration.digamma() - self.concentration.sum().digamma()
        return log_weights + per_component / 2 - D / (2 * self.strength)

    def kl(self, prior: NormalWishart) -> Tensor:
        """KL divergence from a prior, in nats."""
        D, d = self.locs.shape[-1], self.scale.shape[-1]
        weights = kl_divergence(Dirichlet(self.concentration), Dirichlet(prior.concentration))
        ratio, away = prior.strength / self.strength, self.locs - prior.locs
        widths = self.widths()
        if widths.dim() == 3:
            tril = torch.linalg.cholesky(widths)
            away = torch.linalg.solve_triangular(tril, away.unsqueeze(-1), upper=False).squeeze(-1)
        else:
            away = away / widths.sqrt()
        locs = D * (ratio - 1 - ratio.log()) + prior.strength * away.square().sum(-1)
        tril, before = torch.linalg.cholesky(self.scale), torch.linalg.cholesky(prior.scale)
        log_det, log_det_before = _log_det(tril), _log_det(before)
        between = torch.linalg.solve_triangular(tril, before.expand_as(tril), upper=False)
        blocks = (
            _log_normaliser(self.dof, log_det, d)
            - _log_normaliser(prior.dof, log_det_before, d)
            + (self.dof - prior.dof) / 2 * (_sum_of_digammas(self.dof, d) + d * _LOG_2 - log_det)
            + self.dof / 2 * (between.square().sum((-2, -1)) - d)
        )
        return weights + locs.sum() / 2 + blocks.sum()

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws (S, ...) of ``weights``, ``locs``, ``scales`` and, if d > 1, ``correlations``."""
        shape, d = (num_samples, *self.scale.shape), self.scale.shape[-1]
        weights = Dirichlet(self.concentration).sample((num_samples,))
        tail = torch.arange(1 - d, 1, dtype=self.dof.dtype, device=self.dof.device)
        chi = torch._standard_gamma((self.dof.unsqueeze(-1) + tail).expand(shape[:-1]) / 2)
        bartlett = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device).tril(-1)
        bartlett = bartlett + (2 * chi).sqrt().diag_embed()
        whole = torch.linalg.cholesky(self.scale).expand(shape)
        tril = torch.linalg.solve_triangular(bartlett, whole, upper=False, left=False)
        scales = tril.square().sum(-1).sqrt()  # (S, blocks, d)
        noise = torch.randn((num_samples, *self.locs.shape)).to(self.locs)
        noise = noise / self.strength.sqrt().unsqueeze(-1)
        if self.is_tilted:
            away = (self._per_component(tril) @ noise.unsqueeze(-1)).squeeze(-1)
        else:
            away = self._columns(scales) * noise
        found = {"weights": weights, "locs": self.locs + away}
        if d > 1:
            found["correlations"] = partial_correlations(tril / scales.unsqueeze(-1))
        return found | {"scales": scales if self.is_tilted else scales.squeeze(-1)}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density (S,) of values, as :meth:`sample` returns them."""
        weights = Dirichlet(self.concentration, validate_args=False).log_prob(values["weights"])
        scales = values["scales"] if self.is_tilted else values["scales"].unsqueeze(-1)
        tril, volume = self._tril(scales, values.get("correlations"))
        d, dims = self.scale.shape[-1], tuple(range(1, scales.dim() - 1))
        whole = torch.linalg.cholesky(self.scale)
        between = torch.linalg.solve_triangular(tril, whole.expand_as(tril), upper=False)
        blocks = _log_normaliser(self.dof, _log_det(whole), d) - (self.dof + d + 1) / 2 * _log_det(
            tril
        )
        blocks = blocks - between.square().sum((-2, -1)) / 2 + volume
        away = values["locs"] - self.locs
        root = self.strength.sqrt()
        if self.is_tilted:
            spread = self._per_component(tril) / root[:, None, None]
            locs = MultivariateNormal(torch.zeros_like(away), scale_tril=spread).log_prob(away)
        else:
            spread = self._columns(scales) / root[:, None]
            locs = torch.distributions.Normal(0.0, spread).log_prob(away).sum(-1)
        return weights + locs.sum(-1) + (blocks.sum(dims) if dims else blocks)

    # ------------------------------------------------------------------------------------------

    def _tril(self, scales: Tensor, correlations: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cholesky factors of the blocks, and the log-volume of the way there."""
        d = self.scale.shape[-1]
        volume = d * _LOG_2 + d * scales.log().sum(-1)
        if correlations is None:
            return scales.unsqueeze(-1), volume
        tril = scales.unsqueeze(-1) * correlation_tril(correlations, d)
        return tril, volume + correlation_volume(correlations, d)

    def _of_components(self, scale: Tensor) -> Tensor:
        """Blocks (..., d, d) as covariances (K, D, D), or variances (K, D)."""
        if self.is_tilted:
            return self._per_component(scale)
        return self._columns(scale.squeeze(-1))

    def _per_component(self, blocks: Tensor) -> Tensor:
        """One block for each component: (..., K, d, d)."""
        blocks = blocks if self.dof.dim() else blocks.unsqueeze(-3)
        return blocks.expand(*blocks.shape[:-3], len(self.locs), *blocks.shape[-2:])

    def _columns(self, blocks: Tensor) -> Tensor:
        """Numbers (..., K, D, 1) or (..., K, 1) of single variances as (..., K, D)."""
        blocks = blocks.squeeze(-1)
        if self.dof.shape != self.locs.shape:
            blocks = blocks.unsqueeze(-1)
        return blocks.expand(*blocks.shape[:-2], *self.locs.shape)


class WishartCorrelations(TorchDistribution):
    r"""Partial correlations of covariances that are inverse-Wishart, :math:`\Psi` diagonal.

    Arguments:
        num_columns: number of columns d, at least 2.
        dof: :math:`\nu`, more than d - 1; shape () or that of a batch.
        validate_args: as in ``torch.distributions``.

    Example:
        >>> WishartCorrelations(3, torch.tensor(4.0)).sample((5,)).shape
        torch.Size([5, 3])
        >>> WishartCorrelations(2, torch.tensor(3.0)).log_prob(torch.tensor([0.3])).exp()
        tensor(0.5000)
    """

    arg_constraints = {"dof": constraints.positive}
    support = constraints.independent(constraints.interval(-1.0, 1.0), 1)

    def __init__(self, num_columns: int, dof: Tensor, validate_args: bool | None = None) -> None:
        self.num_columns, self.dof = num_columns, dof
        num_pairs = num_columns * (num_columns - 1) // 2
        super().__init__(dof.shape, Size((num_pairs,)), validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> WishartCorrelations:
        """The same distribution with a larger batch shape."""
        return WishartCorrelations(self.num_columns, self.dof.expand(Size(batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of partial correlations (..., P), shape of the batch."""
        d, half = self.num_columns, self.dof / 2
        tril = correlation_tril(value, d)
        norm = d * half.lgamma() - torch.mvlgamma(half, d)
        on_diagonal = inverse_diagonal(tril).log().sum(-1)
        density = norm - (half + (d + 1) / 2) * _log_det(tril) - half * on_diagonal
        return density + correlation_volume(value, d)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch_shape, P)``."""
        shape, d = Size((*sample_shape, *self.dof.shape)), self.num_columns
        with torch.no_grad():
            tail = torch.arange(1 - d, 1).to(self.dof)
            chi = torch._standard_gamma((self.dof.unsqueeze(-1) + tail).expand(*shape, d) / 2)
            noise = torch.randn(*shape, d, d).to(self.dof).tril(-1)
            bartlett = noise + (2 * chi).sqrt().diag_embed()
            eye = torch.eye(d).to(self.dof)
            tril = torch.linalg.solve_triangular(bartlett, eye, upper=False)
            return partial_correlations(tril / tril.square().sum(-1, keepdim=True).sqrt())


def inverse_diagonal(tril: Tensor) -> Tensor:
    """The diagonal (..., d) of the inverse of a matrix by its Cholesky factor (..., d, d)."""
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
    return torch.linalg.solve_triangular(tril, eye, upper=False).square().sum(-2)


def correlation_volume(values: Tensor, num_columns: int) -> Tensor:
    """Log-volume of a correlation matrix in its partial correlations (..., P)."""
    _, j = torch.tril_indices(num_columns, num_columns, -1, device=values.device)
    return ((num_columns - 2 - j) / 2 * ((1 - values) * (1 + values)).log()).sum(-1)


def _sum_of_digammas(dof: Tensor, d: int) -> Tensor:
    tail = torch.arange(d, dtype=dof.dtype, device=dof.device)
    return ((dof.unsqueeze(-1) - tail) / 2).digamma().sum(-1)


def _log_det(tril: Tensor) -> Tensor:
    return 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _log_normaliser(dof: Tensor, log_det: Tensor, d: int) -> Tensor:
    return dof / 2 * (log_det - d * _LOG_2) - torch.mvlgamma(dof / 2, d)
