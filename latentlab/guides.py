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
on average (Roeder et al.), so that a fit can reach it.

A guide is a Pyro guide, bound to the latents of a model by :meth:`GaussianGuide.bind` (``fit`` does
it). Letters: L latent numbers in all, P particles.

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
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from latentlab.supports import support_from_spec, support_spec

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


@dataclass(frozen=True)
class Latent:
    """One latent site of a model: where its numbers stand in the flat vector u."""

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    support: constraints.Constraint
    plates: tuple[tuple[str, int, int], ...] = ()  # name, size, dim

    @property
    def transform(self) -> Transform:
        """The bijection from the real line to the support."""
        return biject_to(self.support)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value."""
        return self.batch_shape + self.event_shape

    @property
    def free_shape(self) -> tuple[int, ...]:
        """Shape of one value on the real line; a simplex has one number less."""
        return tuple(self.transform.inverse_shape(Size(self.shape)))

    def spec(self) -> dict[str, Any]:
        """The site as JSON values."""
        return {
            "name": self.name,
            "batch_shape": list(self.batch_shape),
            "event_shape": list(self.event_shape),
            "support": support_spec(self.support),
            "plates": [list(plate) for plate in self.plates],
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Latent:
        """The site that :meth:`spec` described."""
        return cls(
            spec["name"],
            tuple(spec["batch_shape"]),
            tuple(spec["event_shape"]),
            support_from_spec(spec["support"]),
            tuple((name, size, dim) for name, size, dim in spec["plates"]),
        )


class GaussianGuide(nn.Module, ABC):
    """What Gaussian guides share: the layout of u, the frame, and being a Pyro guide.

    Abstract: a subclass says how m and L make :math:`v = m + L \\varepsilon` and what A is.
    """

    latents: tuple[Latent, ...] = ()
    max_plate_nesting: int = 0

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
        """
        self.latents, self.max_plate_nesting = tuple(latents), max_plate_nesting
        numels = [math.prod(latent.free_shape) for latent in self.latents]
        ends = torch.tensor([0, *numels]).cumsum(0).tolist()
        self._slices = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        # Transforms are looked up once: the registry is slow, and a plain real line needs none.
        self._transforms = [
            None if _is_identity(latent.transform) else latent.transform for latent in self.latents
        ]
        self._make_parameters(ends[-1], dtype or torch.get_default_dtype(), device)
        return self

    @property
    def num_latents(self) -> int:
        """Numbers in all, on the real line."""
        return self.loc.numel()

    @abstractmethod
    def _make_parameters(
        self, num_latents: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        """Register the frame and the parameters."""

    @abstractmethod
    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws u (P, L) and their log-density (P,), with the path gradient only."""

    @abstractmethod
    def start(self, center: Tensor, unit: Tensor) -> None:
        """Put the frame and q at a centre (L,) with standard deviations ``unit`` (L,), in place."""

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
        return Draws(values, log_q - self._total(log_det, u))

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the sites at u (P, L), and each one's log |dz/du|."""
        values, log_det = {}, {}
        ones = (1,) * self.max_plate_nesting
        for latent, part, transform in zip(
            self.latents, self._slices, self._transforms, strict=True
        ):
            batch = ones[len(latent.batch_shape) :] + latent.batch_shape
            event = latent.free_shape[len(latent.batch_shape) :]
            free = u[:, part].reshape(len(u), *batch, *event)
            if transform is None:
                values[latent.name] = free
                continue
            values[latent.name] = value = transform(free)
            log_det[latent.name] = transform.log_abs_det_jacobian(free, value)
        return values, log_det

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The point u (P, L) of values (P, ...) of all sites."""
        free = []
        for latent, transform in zip(self.latents, self._transforms, strict=True):
            value = values[latent.name].to(self.loc)
            free.append((value if transform is None else transform.inv(value)).flatten(1))
        return torch.cat(free, -1)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density (P,) in nats of values (P, ...) of all sites."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        return self._free_log_prob(u, slice(None)) - self._total(log_det, u)

    def site_log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Marginal log-density (P,) in nats of each site."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        return {
            latent.name: self._free_log_prob(u[:, part], part)
            - self._total({k: v for k, v in log_det.items() if k == latent.name}, u)
            for latent, part in zip(self.latents, self._slices, strict=True)
        }

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        if not u.shape[-1]:  # a simplex of one component has no freedom
            return u.new_zeros(len(u))
        tril = torch.linalg.cholesky(self.covariance(part))
        return dist.MultivariateNormal(self.free_mean()[part], scale_tril=tril).log_prob(u)

    @staticmethod
    def _total(log_det: Mapping[str, Tensor], u: Tensor) -> Tensor:
        return sum((part.reshape(len(u), -1).sum(-1) for part in log_det.values()), u.new_zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """The guide as a Pyro program; arguments are those of the model and are not used."""
        if not self.latents:
            return {}
        free = self._free_distribution()
        u = pyro.sample("_free", free, infer={"is_auxiliary": True})
        prefix = u.shape[:-1]
        flat_values, log_det = self.unpack(u.reshape(-1, u.shape[-1]))
        values = {}
        for latent in self.latents:
            outer = prefix[: max(len(prefix) - len(latent.batch_shape), 0)]
            value = flat_values[latent.name].reshape(*outer, *latent.shape)
            density = log_det.get(latent.name, u.new_zeros(()))
            if density.dim():
                density = density.reshape(*outer, *latent.batch_shape)
            values[latent.name] = self._emit(latent, value, -self._density_of(density))
        return values

    def _density_of(self, log_det: Tensor) -> Tensor:
        return log_det

    def _free_distribution(self) -> dist.Distribution:
        tril = torch.linalg.cholesky(self.covariance())
        return dist.MultivariateNormal(self.free_mean(), scale_tril=tril)

    def _emit(self, latent: Latent, value: Tensor, log_density: Tensor) -> Tensor:
        delta = dist.Delta(value, log_density=log_density, event_dim=len(latent.event_shape))
        with ExitStack() as stack:
            for name, size, dim in latent.plates:
                stack.enter_context(pyro.plate(name, size, dim=dim))
            return pyro.sample(latent.name, delta)

    def spec(self) -> dict[str, Any]:
        """What builds this guide again, apart from its numbers."""
        return {
            "class": type(self).__name__,
            "latents": [latent.spec() for latent in self.latents],
            "max_plate_nesting": self.max_plate_nesting,
        }


class MeanField(GaussianGuide):
    r"""Independent Gaussians on the real line: A and L diagonal.

    Ignores correlations of the posterior, and is too narrow where there are some: on a Gaussian
    target with correlation :math:`\rho` its k-hat is :math:`|\rho|`.

    Example:
        >>> guide = MeanField().bind(
        ...     [Latent("scale", (), (3,), constraints.independent(constraints.positive, 1))],
        ...     max_plate_nesting=0,
        ... )
        >>> guide.draw(5).values["scale"].shape
        torch.Size([5, 3])
    """

    def _make_parameters(
        self, num_latents: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        zeros = torch.zeros(num_latents, dtype=dtype, device=device)
        self.register_buffer("offset", zeros.clone())
        self.register_buffer("frame", torch.ones_like(zeros))
        self.loc = nn.Parameter(zeros.clone())
        self.log_scale = nn.Parameter(zeros.clone())

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = torch.randn(num_particles, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        scale = self.log_scale.exp()
        v = self.loc + scale * eps
        # log q with its gradient through v only: d log q / dv = -eps / scale.
        with torch.no_grad():
            slope = eps / scale
            constant = (self.log_scale + self.frame.log()).sum() + 0.5 * len(scale) * _LOG_2PI
            value = -0.5 * (eps * eps).sum(-1) - constant + (v * slope).sum(-1)
        return self.offset + self.frame * v, value - (v * slope).sum(-1)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`GaussianGuide.start`."""
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(unit)
            self.loc.zero_()
            self.log_scale.zero_()

    def recentre(self) -> None:
        """Move the frame to the current mean and standard deviations, in place."""
        self.start(self.free_mean(), self.frame * self.log_scale.exp())

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame * self.loc

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L), diagonal."""
        return (self.frame * self.log_scale.exp())[part].square().diag()

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        scale = (self.frame * self.log_scale.exp())[part]
        return dist.Normal(self.free_mean()[part], scale).log_prob(u).sum(-1)

    def element_log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log-density of each batch element of each site, shape (P, ..., *batch_shape)."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        density = dist.Normal(self.free_mean(), self.frame * self.log_scale.exp()).log_prob(u)
        parts = {}
        for latent, part in zip(self.latents, self._slices, strict=True):
            batch = (1,) * (self.max_plate_nesting - len(latent.batch_shape)) + latent.batch_shape
            element = density[:, part].reshape(len(u), *batch, -1).sum(-1)
            if latent.name in log_det:
                element = element - log_det[latent.name].reshape(len(u), *batch, -1).sum(-1)
            parts[latent.name] = element
        return parts

    def _free_distribution(self) -> dist.Distribution:
        return dist.Normal(self.free_mean(), self.frame * self.log_scale.exp()).to_event(1)


class FullRank(GaussianGuide):
    r"""One Gaussian with all correlations on the real line: A and L lower-triangular.

    Exact for a Gaussian posterior. Holds :math:`L (L + 1) / 2` numbers; with thousands of latents
    take ``MeanField``.

    Example:
        >>> guide = FullRank().bind([Latent("z", (), (2,), constraints.real_vector)],
        ...                         max_plate_nesting=0)
        >>> guide.covariance()
        tensor([[1., 0.],
                [0., 1.]], grad_fn=<MmBackward0>)
    """

    def _make_parameters(
        self, num_latents: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        zeros = torch.zeros(num_latents, dtype=dtype, device=device)
        self.register_buffer("offset", zeros.clone())
        self.register_buffer("frame", torch.eye(num_latents, dtype=dtype, device=device))
        self.loc = nn.Parameter(zeros.clone())
        self.log_scale = nn.Parameter(zeros.clone())
        self.lower = nn.Parameter(zeros.new_zeros(num_latents, num_latents))

    def _tril(self) -> Tensor:
        return self.lower.tril(-1) + self.log_scale.exp().diag()

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = torch.randn(num_particles, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        tril = self._tril()
        v = self.loc + eps @ tril.T
        # log q with its gradient through v only: d log q / dv = -L^-T eps.
        with torch.no_grad():
            slope = torch.linalg.solve_triangular(tril.T, eps.T, upper=True).T
            log_det = (self.log_scale + self.frame.diagonal().log()).sum()
            constant = log_det + 0.5 * len(self.loc) * _LOG_2PI
            value = -0.5 * (eps * eps).sum(-1) - constant + (v * slope).sum(-1)
        return self.offset + v @ self.frame.T, value - (v * slope).sum(-1)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`GaussianGuide.start`."""
        self._move(center, unit.diag())

    def recentre(self) -> None:
        """Move the frame to the current mean and Cholesky factor, in place."""
        self._move(self.free_mean(), self.frame @ self._tril())

    def _move(self, center: Tensor, frame: Tensor) -> None:
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(frame)
            for parameter in (self.loc, self.log_scale, self.lower):
                parameter.zero_()

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame @ self.loc

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L)."""
        tril = (self.frame @ self._tril())[part]
        return tril @ tril.T

    def _free_distribution(self) -> dist.Distribution:
        return dist.MultivariateNormal(self.free_mean(), scale_tril=self.frame @ self._tril())


class Point(GaussianGuide):
    """A point estimate: the mode of the joint density (no uncertainty, so no posterior).

    The mode is that of the density on each latent's own support, without the Jacobian of the map
    from the real line: with flat priors it is the maximum of the likelihood.

    Example:
        >>> guide = Point().bind([Latent("z", (), (), constraints.real)], max_plate_nesting=0)
        >>> guide.draw(2).log_q
        tensor([0., 0.])
    """

    def _make_parameters(
        self, num_latents: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        zeros = torch.zeros(num_latents, dtype=dtype, device=device)
        self.register_buffer("offset", zeros.clone())
        self.register_buffer("frame", torch.ones_like(zeros))
        self.loc = nn.Parameter(zeros.clone())

    def draw(self, num_particles: int) -> Draws:
        """The point, repeated: values of shape (P, ...), log-density zero."""
        u, log_q = self._draw_free(num_particles)
        return Draws(self.unpack(u)[0], log_q)

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        u = self.free_mean().expand(num_particles, -1)
        return u, u.new_zeros(num_particles)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`GaussianGuide.start`; a point has no scale."""
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(unit)
            self.loc.zero_()

    def recentre(self) -> None:
        """Move the frame to the current point, in place; its units stay."""
        self.start(self.free_mean(), self.frame)

    def free_mean(self) -> Tensor:
        """The point u, shape (L,)."""
        return self.offset + self.frame * self.loc

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Zero."""
        size = len(self.loc[part])
        return self.loc.new_zeros(size, size)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Zero, as Pyro counts a point mass."""
        return self.loc.new_zeros(len(next(iter(values.values()))))

    def site_log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero for each site."""
        return dict.fromkeys(values, self.log_prob(values))

    def _free_distribution(self) -> dist.Distribution:
        return dist.Delta(self.free_mean(), event_dim=1)

    def _density_of(self, log_det: Tensor) -> Tensor:
        return torch.zeros_like(log_det)


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


def _is_identity(transform: Transform) -> bool:
    if isinstance(transform, IndependentTransform):
        return _is_identity(transform.base_transform)
    return isinstance(transform, ComposeTransform) and not transform.parts
