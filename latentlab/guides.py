r"""Guides over all latents of a model, each written from its noise.

.. math::
    u = c + A\,(m + L \varepsilon), \quad \varepsilon \sim \mathcal{N}(0, I), \quad
    z = T(u)

T maps the real line to each latent's support. ``MeanField`` has diagonal A and L, ``FullRank``
lower-triangular ones, ``Point`` no noise at all. Only m and L are optimised. The *frame* (c, A)
is fixed while an optimiser runs and moved to the current answer between stages
(:meth:`GaussianGuide.recentre`): a step of length one is then one posterior standard deviation
along every axis, whatever the units and, for ``FullRank``, whatever the correlations.

Because u is written from its noise, its density needs no solve, and the gradient leaves out the
term with expectation zero: under an exact posterior the gradient is then exactly zero, not only
on average, so that a fit can reach it (Roeder et al.).

A guide is a Pyro guide, bound to the latents of a model by :meth:`GaussianGuide.bind` (``fit``
does it). Letters: L latent numbers in all, P particles.

References:
    | Automatic differentiation variational inference (Kucukelbir et al., 2017)
    | Sticking the landing (Roeder, Wu and Duvenaud, 2017)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.supports import Latent, is_identity

__all__ = ["Draws", "FullRank", "GaussianGuide", "Latent", "MeanField", "Point", "guide_from_spec"]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Draws:
    """Draws of a guide: ``values`` site -> (P, ...), ``log_q`` (P,) in nats.

    ``indices`` holds the rows of a mini-batch that a guide of your own chose for its plates.
    """

    values: dict[str, Tensor]
    log_q: Tensor
    indices: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, part: slice) -> Draws:
        """Some of the draws."""
        values = {name: value[part] for name, value in self.values.items()}
        return Draws(values, self.log_q[part], self.indices)

    def __len__(self) -> int:
        return len(self.log_q)

    def detached(self) -> Draws:
        """The same draws without a gradient."""
        values = {name: value.detach() for name, value in self.values.items()}
        return Draws(values, self.log_q.detach(), self.indices)


class GaussianGuide(nn.Module, ABC):
    r"""What Gaussian guides share: the layout of u, the frame, and being a Pyro guide.

    Abstract: a subclass says how m and L make :math:`v = m + L \varepsilon` and what A is.
    """

    has_density: ClassVar[bool] = True  # a point mass has none: no Jacobian counts
    latents: tuple[Latent, ...] = ()
    max_plate_nesting: int = 0
    offset: Tensor  # c, shape (L,)
    frame: Tensor  # A, or its diagonal
    loc: nn.Parameter  # m, shape (L,)

    def bind(
        self,
        latents: Sequence[Latent],
        *,
        max_plate_nesting: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> GaussianGuide:
        """Lay out the latents of a model, in place.

        Arguments:
            latents: the sites to cover; discrete ones are not among them.
            max_plate_nesting: the number of batch dimensions of the model.
            dtype: of the parameters; torch's default dtype by default.
            device: of the parameters.

        Returns:
            The guide itself, at the standard normal on the real line.

        Raises:
            ValueError: if there is no bijection to the support of a site.
        """
        self.latents, self.max_plate_nesting = tuple(latents), max_plate_nesting
        numels = [math.prod(latent.free_shape) for latent in self.latents]
        ends = torch.tensor([0, *numels]).cumsum(0).tolist()
        self._slices = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        # Transforms are looked up once: the registry is slow, and a plain real line needs none.
        transforms = [latent.transform for latent in self.latents]
        self._transforms = [None if is_identity(t) else t for t in transforms]
        zeros = torch.zeros(ends[-1], dtype=dtype or torch.get_default_dtype(), device=device)
        self.register_buffer("offset", zeros.clone())
        self.loc = nn.Parameter(zeros.clone())
        self._make_parameters(zeros)
        return self

    @property
    def num_latents(self) -> int:
        """Numbers in all, on the real line."""
        return self.loc.numel()

    @abstractmethod
    def _make_parameters(self, zeros: Tensor) -> None:
        """Register the frame and the parameters besides ``loc``, like ``zeros`` (L,)."""

    @abstractmethod
    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws u (P, L) and their log-density (P,), with the path gradient only."""

    @abstractmethod
    def _free_distribution(self) -> dist.TorchDistribution:
        """The distribution of u as Pyro knows it."""

    @abstractmethod
    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        """Marginal log-density (P,) of a part of u, shape (P, part)."""

    @abstractmethod
    def start(self, center: Tensor, unit: Tensor) -> None:
        """Put the frame and q at a centre (L,), standard deviations ``unit`` (L,), in place."""

    @abstractmethod
    def lay(self, center: Tensor, precision: Tensor) -> None:
        """Lay the frame and q over a mode (L,) that has a precision (L, L), in place."""

    @abstractmethod
    def recentre(self) -> None:
        """Move the frame to the current answer, in place; the distribution stays the same."""

    @abstractmethod
    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L)."""

    @abstractmethod
    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""

    def draw(self, num_particles: int) -> Draws:
        """Draw from the guide without going through Pyro.

        Arguments:
            num_particles: number of draws P.

        Returns:
            Values of shape (P, 1, ..., batch, event), ready for a model with
            ``max_plate_nesting`` plates, and their log-densities (P,).
        """
        u, log_q = self._draw_free(num_particles)
        values, log_det = self.unpack(u)
        return Draws(values, log_q - _total(log_det, u))

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the sites at u (P, L), and log |dz/du| of those where it counts."""
        values, log_det = {}, {}
        ones = (1,) * self.max_plate_nesting
        for latent, part, transform in self._layout():
            batch = ones[len(latent.batch_shape) :] + latent.batch_shape
            event = latent.free_shape[len(latent.batch_shape) :]
            free = u[:, part].reshape(len(u), *batch, *event)
            values[latent.name] = value = free if transform is None else transform(free)
            if transform is not None and self.has_density:
                log_det[latent.name] = transform.log_abs_det_jacobian(free, value)
        return values, log_det

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The point u (P, L) of values (P, ...) of all sites."""
        free = []
        for latent, _, transform in self._layout():
            value = values[latent.name].to(self.loc)
            free_value = value if transform is None else transform.inv(value)
            free.append(free_value.reshape(len(value), -1))
        return torch.cat(free, -1)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density (P,) in nats of values (P, ...) of all sites."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        return self._free_log_prob(u, slice(None)) - _total(log_det, u)

    def site_log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Marginal log-density (P,) in nats of each site."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        return {
            latent.name: self._free_log_prob(u[:, part], part)
            - _total({k: v for k, v in log_det.items() if k == latent.name}, u)
            for latent, part, _ in self._layout()
        }

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """The guide as a Pyro program; arguments are those of the model and are not used."""
        u: Tensor = self.loc
        if self.num_latents:  # a simplex of one component has no freedom
            u = pyro.sample("_free", self._free_distribution(), infer={"is_auxiliary": True})
        prefix = u.shape[:-1]
        flat, log_det = self.unpack(u.reshape(math.prod(prefix), self.num_latents))
        # A plate may be entered many times, but made only once.
        frames = dict.fromkeys(frame for latent in self.latents for frame in latent.plates)
        plates = {(name, n, dim): pyro.plate(name, n, dim=dim) for name, n, dim in frames}
        values = {}
        for latent in self.latents:
            outer = prefix[: max(len(prefix) - len(latent.batch_shape), 0)]
            batch = (*outer, *latent.batch_shape)
            volume = log_det[latent.name] if latent.name in log_det else u.new_zeros(batch)
            value = flat[latent.name].reshape(batch + latent.event_shape)
            delta = dist.Delta(value, -volume.reshape(batch), len(latent.event_shape))
            with ExitStack() as stack:
                for frame in latent.plates:
                    stack.enter_context(plates[frame])
                values[latent.name] = pyro.sample(latent.name, delta)
        return values

    def spec(self) -> dict[str, Any]:
        """What builds this guide again, apart from its numbers."""
        return {
            "class": type(self).__name__,
            "latents": [latent.spec() for latent in self.latents],
            "max_plate_nesting": self.max_plate_nesting,
        }

    def _layout(self) -> zip:
        """Each site, its part of u, and its transform (``None`` for a plain real line)."""
        return zip(self.latents, self._slices, self._transforms, strict=True)

    def _move(self, center: Tensor, frame: Tensor) -> None:
        """Put the frame somewhere and q at the standard normal in it, in place."""
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(frame)
            for parameter in self.parameters():
                parameter.zero_()


class MeanField(GaussianGuide):
    r"""Independent Gaussians on the real line: A and L diagonal.

    Ignores correlations of the posterior, and is too narrow where there are some: on a Gaussian
    target with correlation :math:`\rho` its k-hat is :math:`|\rho|`.

    Example:
        >>> from pyro.distributions import constraints
        >>> guide = MeanField().bind(
        ...     [Latent("scale", (), (3,), constraints.independent(constraints.positive, 1))],
        ...     max_plate_nesting=0,
        ... )
        >>> guide.draw(5).values["scale"].shape
        torch.Size([5, 3])
    """

    log_scale: nn.Parameter

    def _make_parameters(self, zeros: Tensor) -> None:
        self.register_buffer("frame", torch.ones_like(zeros))
        self.log_scale = nn.Parameter(zeros.clone())

    def _scale(self) -> Tensor:
        return self.frame * self.log_scale.exp()

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = _noise(num_particles, self.loc)
        scale = self.log_scale.exp()
        v = self.loc + scale * eps
        with torch.no_grad():
            log_det = (self.log_scale + self.frame.log()).sum()
            slope = -eps / scale  # d log q / dv
        return self.offset + self.frame * v, _along_path(eps, log_det, v, slope)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`GaussianGuide.start`."""
        self._move(center, unit)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`GaussianGuide.lay`; only the diagonal of the precision counts."""
        self._move(center, precision.diagonal().rsqrt())

    def recentre(self) -> None:
        """Move the frame to the current mean and standard deviations, in place."""
        self._move(self.free_mean(), self._scale())

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame * self.loc

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L), diagonal."""
        return self._scale()[part].square().diag()

    def element_log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log-density of each batch element of each site, shape (P, ..., *batch_shape)."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        density = dist.Normal(self.free_mean(), self._scale()).log_prob(u)
        parts = {}
        for latent, part, _ in self._layout():
            batch = (1,) * (self.max_plate_nesting - len(latent.batch_shape)) + latent.batch_shape
            element = density[:, part].reshape(len(u), *batch, -1).sum(-1)
            if latent.name in log_det:
                element = element - log_det[latent.name].reshape(len(u), *batch, -1).sum(-1)
            parts[latent.name] = element
        return parts

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        return dist.Normal(self.free_mean()[part], self._scale()[part]).log_prob(u).sum(-1)

    def _free_distribution(self) -> dist.TorchDistribution:
        return dist.Normal(self.free_mean(), self._scale()).to_event(1)


class FullRank(GaussianGuide):
    r"""One Gaussian with all correlations on the real line: A and L lower-triangular.

    Exact for a Gaussian posterior. Holds :math:`L (L + 1) / 2` numbers; with thousands of latents
    take ``MeanField``.

    Example:
        >>> from pyro.distributions import constraints
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

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = _noise(num_particles, self.loc)
        tril = self._tril()
        v = self.loc + eps @ tril.T
        with torch.no_grad():
            log_det = (self.log_scale + self.frame.diagonal().log()).sum()
            slope = -torch.linalg.solve_triangular(tril, eps, upper=False, left=False)
        return self.offset + v @ self.frame.T, _along_path(eps, log_det, v, slope)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`GaussianGuide.start`."""
        self._move(center, unit.diag())

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`GaussianGuide.lay`."""
        # Turned around, the Cholesky factor of a precision is the inverse of that of its inverse.
        turned = torch.linalg.cholesky(precision.double().flip(-2, -1)).flip(-2, -1).T
        eye = torch.eye(len(center), dtype=turned.dtype, device=turned.device)
        self._move(center, torch.linalg.solve_triangular(turned, eye, upper=False))

    def recentre(self) -> None:
        """Move the frame to the current mean and Cholesky factor, in place."""
        self._move(self.free_mean(), self._scale_tril())

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame @ self.loc

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

    def _free_distribution(self) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self.free_mean(), scale_tril=self._scale_tril())


class Point(GaussianGuide):
    """A point estimate: the mode of the joint density (no uncertainty, so no posterior).

    The mode is that of the density on each latent's own support, without the Jacobian of the map
    from the real line: with flat priors it is the maximum of the likelihood.

    Example:
        >>> from pyro.distributions import constraints
        >>> guide = Point().bind([Latent("z", (), (), constraints.real)], max_plate_nesting=0)
        >>> guide.draw(2).log_q
        tensor([0., 0.])
    """

    has_density = False

    def _make_parameters(self, zeros: Tensor) -> None:
        self.register_buffer("frame", torch.ones_like(zeros))

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        u = self.free_mean().expand(num_particles, -1)
        return u, u.new_zeros(num_particles)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`GaussianGuide.start`; a point has no scale."""
        self._move(center, unit)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`GaussianGuide.lay`; the precision gives the units."""
        self._move(center, precision.diagonal().rsqrt())

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

    def _free_distribution(self) -> dist.TorchDistribution:
        return dist.Delta(self.free_mean(), event_dim=1)


def guide_from_spec(spec: Mapping[str, Any], dtype: torch.dtype) -> GaussianGuide:
    """The guide that ``spec()`` described, with its parameters still to be loaded.

    Arguments:
        spec: what ``spec()`` returned.
        dtype: of the parameters.

    Returns:
        The bound guide.

    Raises:
        ValueError: if the class is not one of this module.
    """
    known = {guide.__name__: guide for guide in (Point, MeanField, FullRank)}
    if spec["class"] not in known:
        raise ValueError(f"guide: expected one of {sorted(known)}, got {spec['class']!r}")
    latents = [Latent.from_spec(latent) for latent in spec["latents"]]
    return known[spec["class"]]().bind(
        latents, max_plate_nesting=spec["max_plate_nesting"], dtype=dtype
    )


def _noise(num_particles: int, like: Tensor) -> Tensor:
    return torch.randn(num_particles, len(like), dtype=like.dtype, device=like.device)


def _along_path(eps: Tensor, log_det: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """The log q (P,) of the noise, with the gradient ``slope`` along v (P, L) and no other."""
    with torch.no_grad():
        value = -0.5 * (eps * eps).sum(-1) - log_det - 0.5 * eps.shape[-1] * _LOG_2PI
    path = (v * slope).sum(-1)
    return value + (path - path.detach())


def _total(log_det: Mapping[str, Tensor], u: Tensor) -> Tensor:
    return sum((part.reshape(len(u), -1).sum(-1) for part in log_det.values()), u.new_zeros(()))
