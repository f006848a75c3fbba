r"""Gaussian guides on the real line, without correlations or with all of them, and a point.

.. math::
    u = c + A\,(m + L \varepsilon), \quad \varepsilon \sim \mathcal{N}(0, I)

``MeanField`` has diagonal A and L, ``FullRank`` lower-triangular ones, ``Point`` no noise at all.

Letters: L latent numbers in all, P particles.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.guides.base import Draws, Guide, along_path, noise
from latentlab.guides.layout import Data, Part, slowed

__all__ = ["FullRank", "MeanField", "Point"]


class MeanField(Guide):
    r"""Independent Gaussians on the real line: A and L diagonal.

    Ignores correlations of the posterior, and is too narrow where there are some: on a Gaussian
    target with correlation :math:`\rho` its k-hat is :math:`|\rho|`.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> guide = MeanField().bind(
        ...     [Latent("scale", (), (3,), constraints.independent(constraints.positive, 1))],
        ...     max_plate_nesting=0,
        ... )
        >>> guide.draw(5).values["scale"].shape
        torch.Size([5, 3])
    """

    follows_rows = True
    log_scale: nn.Parameter

    def _make_parameters(self, zeros: Tensor) -> None:
        self.register_buffer("frame", torch.ones_like(zeros))
        self.log_scale = nn.Parameter(zeros.clone())

    def _scale(self) -> Tensor:
        return self.frame * self.log_scale.exp()

    def push(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Points u (P, L) of given noise (P, L), and ``log |du/deps|``."""
        v = self.loc + self.log_scale.exp() * eps
        return self.offset + self.frame * v, (self.log_scale + self.frame.log()).sum()

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = noise(num_particles, self.loc)
        scale = self.log_scale.exp()
        v = self.loc + scale * eps
        with torch.no_grad():
            log_det = (self.log_scale + self.frame.log()).sum()
            slope = -eps / scale  # d log q / dv
        return self.offset + self.frame * v, along_path(eps, log_det, v, slope)

    def _draw_part(self, num_particles: int, part: Part) -> tuple[Tensor, Tensor]:
        offset, frame = self.offset[part.places], self.frame[part.places]
        loc, log_scale = (slowed(p[part.places], part.weight) for p in (self.loc, self.log_scale))
        eps, scale = noise(num_particles, loc), log_scale.exp()
        v = loc + scale * eps
        with torch.no_grad():
            log_det = (log_scale + frame.log()) @ part.weight
            slope = -part.weight * eps / scale
        return offset + frame * v, along_path(eps, log_det, v, slope, part.weight)

    def draw_local(
        self, num_particles: int, values: Mapping[str, Tensor], data: Data | None = None
    ) -> Draws:
        """See :class:`DrawsRows`."""
        local = self.draw(num_particles).values
        kept = {s.latent.name: values[s.latent.name] for s in self._sites if not s.is_local}
        return Draws(local | kept, self.loc.new_zeros(num_particles))

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u, shape (L,)."""
        return self._scale()

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`."""
        self._move(center, unit)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; only the diagonal of the precision counts."""
        self._move(center, precision.diagonal().rsqrt())

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; correlations are left behind."""
        self.start(guide.free_mean().detach(), guide.free_sd().detach())

    def recentre(self) -> None:
        """Move the frame to the current mean and standard deviations, in place."""
        self._move(self.free_mean(), self._scale())

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame * self.loc

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L), diagonal."""
        return self._scale()[part].square().diag()

    def element_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Log-density of each batch element of each site, shape ``(P, ..., *batch_shape)``."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        density = dist.Normal(self.free_mean(), self._scale()).log_prob(u)
        parts = {}
        for latent, part, *_ in self._sites:
            batch = (1,) * (self.max_plate_nesting - len(latent.batch_shape)) + latent.batch_shape
            element = density[:, part].reshape(len(u), *batch, -1).sum(-1)
            if latent.name in log_det:
                element = element - log_det[latent.name].reshape(len(u), *batch, -1).sum(-1)
            parts[latent.name] = element
        return parts

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        return dist.Normal(self.free_mean()[part], self._scale()[part]).log_prob(u).sum(-1)

    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
        return dist.Normal(self.free_mean(), self._scale()).to_event(1)


class FullRank(Guide):
    r"""One Gaussian with all correlations on the real line: A and L lower-triangular.

    Exact for a Gaussian posterior. Holds :math:`L (L + 1) / 2` numbers; with thousands of latents
    take ``MeanField``.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> guide = FullRank().bind([Latent("z", (), (2,), constraints.real_vector)],
        ...                         max_plate_nesting=0)
        >>> guide.covariance()
        tensor([[1., 0.],
                [0., 1.]], grad_fn=<MmBackward0>)
    """

    log_scale: nn.Parameter
    lower: nn.Parameter

    def _make_parameters(self, zeros: Tensor) -> None:
        self.register_buffer("frame", torch.ones_like(zeros).diag())
        self.log_scale = nn.Parameter(zeros.clone())
        self.lower = nn.Parameter(zeros.new_zeros(len(zeros), len(zeros)))

    def _tril(self) -> Tensor:
        return self.lower.tril(-1) + self.log_scale.exp().diag()

    def _scale_tril(self) -> Tensor:
        return self.frame @ self._tril()

    def push(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Points u (P, L) of given noise (P, L), and ``log |du/deps|``."""
        v = self.loc + eps @ self._tril().T
        return self.offset + v @ self.frame.T, (self.log_scale + self.frame.diagonal().log()).sum()

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = noise(num_particles, self.loc)
        tril = self._tril()
        v = self.loc + eps @ tril.T
        with torch.no_grad():
            log_det = (self.log_scale + self.frame.diagonal().log()).sum()
            slope = -torch.linalg.solve_triangular(tril, eps, upper=False, left=False)
        return self.offset + v @ self.frame.T, along_path(eps, log_det, v, slope)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`."""
        self._move(center, unit.diag())

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`."""
        # Turned around, the Cholesky factor of a precision is the inverse of that of its inverse.
        turned = torch.linalg.cholesky(precision.double().flip(-2, -1)).flip(-2, -1).T
        eye = torch.eye(len(center), dtype=turned.dtype, device=turned.device)
        self._move(center, torch.linalg.solve_triangular(turned, eye, upper=False))

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; the whole covariance is taken over."""
        mean, sd = guide.free_mean().detach(), guide.free_sd().detach()
        correlation = torch.eye(len(sd), dtype=torch.float64, device=sd.device)
        if guide.has_density:
            correlation = guide.covariance().detach().double() / sd / sd[:, None]
        self._move(mean, sd[:, None] * torch.linalg.cholesky(correlation))

    def recentre(self) -> None:
        """Move the frame to the current mean and Cholesky factor, in place."""
        self._move(self.free_mean(), self._scale_tril())

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame @ self.loc

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u, shape (L,)."""
        return self._scale_tril().norm(dim=-1)

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L)."""
        rows = self._scale_tril()[part]
        return rows @ rows.T

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        if not u.shape[-1]:  # a simplex of one component has no freedom
            return u.new_zeros(len(u))
        # A triangle of the rows without their covariance, which would square their condition.
        triangle = torch.linalg.qr(self._scale_tril()[part].T)[1]
        tril = (triangle * triangle.diagonal().sign()[:, None]).T
        return dist.MultivariateNormal(self.free_mean()[part], scale_tril=tril).log_prob(u)

    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self.free_mean(), scale_tril=self._scale_tril())


class Point(Guide):
    """A point estimate: the mode of the joint density (no uncertainty, so no posterior).

    The mode is that of the density on each latent's own support, without the Jacobian of the map
    from the real line: with flat priors it is the maximum of the likelihood.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> guide = Point().bind([Latent("z", (), (), constraints.real)], max_plate_nesting=0)
        >>> guide.draw(2).log_q
        tensor([0., 0.])
    """

    has_density = False
    follows_rows = True

    def _make_parameters(self, zeros: Tensor) -> None:
        self.register_buffer("frame", torch.ones_like(zeros))

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        u = self.free_mean().expand(num_particles, -1)
        return u, u.new_zeros(num_particles)

    def _draw_part(self, num_particles: int, part: Part) -> tuple[Tensor, Tensor]:
        loc = slowed(self.loc[part.places], part.weight)
        u = (self.offset[part.places] + self.frame[part.places] * loc).expand(num_particles, -1)
        return u, u.new_zeros(num_particles)

    def free_sd(self) -> Tensor:
        """The units of each number of u, shape (L,); it has no spread."""
        return self.frame

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`; a point has no scale."""
        self._move(center, unit)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; the precision gives the units."""
        self._move(center, precision.diagonal().rsqrt())

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; the spread becomes the unit."""
        self.start(guide.free_mean().detach(), guide.free_sd().detach())

    def recentre(self) -> None:
        """Move the frame to the current point, in place; its units stay."""
        self._move(self.free_mean(), self.frame)

    def free_mean(self) -> Tensor:
        """The point u, shape (L,)."""
        return self.offset + self.frame * self.loc

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.loc[part]).diag()

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        return u.new_zeros(len(u))  # as Pyro counts a point mass

    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
        return dist.Delta(self.free_mean(), event_dim=1)
