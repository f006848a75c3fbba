"""What guides of ours share: the layout of all latents on the real line, and the frame."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.guides.layout import Data, Given, Layout, Part, Site, lay_out, part_of
from latentlab.supports import Latent

__all__ = ["Draws", "DrawsRows", "Guide", "along_path", "noise"]

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


@runtime_checkable
class DrawsRows(Protocol):
    """A guide that can draw the latents of the rows anew while the global ones stay."""

    def draw_local(
        self, num_particles: int, values: Mapping[str, Tensor], data: Data | None = None
    ) -> Draws:
        """Draws of the latents of each row, given values (P, ...) of the global ones.

        Arguments:
            num_particles: number of draws P.
            values: of (at least) the global sites.
            data: all rows of the data.

        Returns:
            Values of all sites; their log-densities (P,) are not computed.
        """

    def element_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Log-density of each element of the batch of sites, ``(P, ..., batch)``.

        Several that are not independent may stand together under the name of the first of them.

        Arguments:
            values: of all sites, each (P, ...).
            data: all rows of the data.
        """


class Guide(nn.Module, ABC):
    r"""What guides of ours share: the layout of u, the frame, and being a Pyro guide.

    Abstract: a subclass says how m and L make :math:`v = m + L \varepsilon` and what A is.
    """

    has_density: ClassVar[bool] = True  # a point mass has none: no Jacobian counts
    follows_rows: ClassVar[bool] = False  # whether it can draw the latents of some rows alone
    set_by_updates: ClassVar[bool] = False  # in closed form: no gradient moves it
    local_plate: str | None = None
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
        local_plate: str | None = None,
    ) -> Guide:
        """Lay out the latents of a model, in place.

        Arguments:
            latents: the sites to cover; discrete ones are not among them.
            max_plate_nesting: the number of batch dimensions of the model.
            dtype: of the parameters; torch's default dtype by default.
            device: of the parameters.
            local_plate: the plate of the rows, where latents stand in it.

        Returns:
            The guide itself, at the standard normal on the real line.

        Raises:
            ValueError: if there is no bijection to the support of a site.
        """
        self.latents, self.max_plate_nesting = tuple(latents), max_plate_nesting
        self.local_plate = local_plate
        # Laid out once: transforms come from a registry that is slow.
        self._whole = lay_out(self.latents, local_plate, device=device)
        self._batch: Layout | None = None
        size = self._whole.size
        zeros = torch.zeros(size, dtype=dtype or torch.get_default_dtype(), device=device)
        self.register_buffer("offset", zeros.clone())
        self.loc = nn.Parameter(zeros.clone())
        self._make_parameters(zeros)
        return self

    @property
    def num_latents(self) -> int:
        """Numbers in all, on the real line."""
        return self.loc.numel()

    @property
    def layout(self) -> Layout:
        """Where the numbers of each site stand in u."""
        return self._whole

    @abstractmethod
    def _make_parameters(self, zeros: Tensor) -> None:
        """Register the frame and the parameters besides ``loc``, like ``zeros`` (L,)."""

    @abstractmethod
    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws u (P, L) and their log-density (P,), with the path gradient only."""

    @abstractmethod
    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
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

    def draw(self, num_particles: int, data: Data | None = None) -> Draws:
        """Draw from the guide without going through Pyro.

        Arguments:
            num_particles: number of draws P.
            data: of the step; of a mini-batch, the latents of its rows are drawn, and their
                log-density counts as often as the batch stands for them.

        Returns:
            Values of shape (P, 1, ..., batch, event), ready for a model with
            ``max_plate_nesting`` plates, and their log-densities (P,).

        Raises:
            ValueError: for a mini-batch, if this guide cannot follow its rows.
        """
        part = self._part(data)
        if part is None:
            u, log_q = self._draw_free(num_particles)
            values, log_det = self.unpack(u)
        else:
            u, log_q = self._draw_part(num_particles, part)
            values, log_det = self.unpack(u, part.layout)
            log_det = part.volume(log_det)
        return Draws(values, log_q - _total(log_det, u))

    def leaves_out_score(self, num_particles: int) -> bool:
        """Whether the log q of so many draws has the gradient along their path, and no other."""
        return True

    def _draw_part(self, num_particles: int, part: Part) -> tuple[Tensor, Tensor]:
        """As :meth:`_draw_free`, for the numbers of some rows; for guides that follow rows."""
        raise ValueError(
            f"{type(self).__name__}: its latents cannot be drawn for some rows alone; take "
            "MeanField, Structured or Amortised"
        )

    def _part(self, data: Data | None) -> Part | None:
        """Which rows the data are; ``None`` for all, and where no latent is local to rows."""
        if data is None or data.rows is None or not self._whole.inner.numel():
            return None
        if self._batch is None or len(self._batch.inner) != len(data.rows):
            device = self.loc.device
            self._batch = lay_out(self.latents, self.local_plate, len(data.rows), device)
        rows = data.rows.to(self.loc.device)
        return part_of(self._whole, self._batch, rows, self.loc, data.stands_for)

    def unpack(
        self, u: Tensor, layout: Layout | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the sites at u (P, L), and ``log |dz/du|`` of those where it counts.

        Arguments:
            u: numbers on the real line.
            layout: of them, by default that of all rows.
        """
        values, log_det = {}, {}
        for latent, part, transform, batch, shape, _ in (layout or self._whole).sites:
            ones = (1,) * (self.max_plate_nesting - len(batch))
            free = u[:, part].reshape(len(u), *ones, *shape)
            values[latent.name] = value = free if transform is None else transform(free)
            if transform is not None and self.has_density:
                log_det[latent.name] = transform.log_abs_det_jacobian(free, value)
        return values, log_det

    @abstractmethod
    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u, shape (L,)."""

    @abstractmethod
    def start_from(self, guide: Guide) -> None:
        """Begin where another guide of the same latents ended, in place.

        Arguments:
            guide: a fitted guide; its mean is taken over, and as much of its covariance as this
                one can hold.
        """

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The point u (P, L) of values (P, ...) of all sites."""
        return torch.cat([self._free(site, values[site.latent.name]) for site in self._sites], -1)

    def _free(self, site: Site, value: Tensor) -> Tensor:
        """The numbers (P, part) of the values (P, ...) of a site."""
        value = value.to(self.loc)
        free = value if site.transform is None else site.transform.inv(value)
        return free.reshape(len(value), -1)

    def log_prob(self, values: Mapping[str, Tensor], data: Data | None = None) -> Tensor:
        """Log-density (P,) in nats of values (P, ...) of all sites, at all rows of the data."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        return self._free_log_prob(u, slice(None)) - _total(log_det, u)

    def site_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Marginal log-density (P,) in nats of each site, at all rows of the data."""
        u = self.pack(values)
        _, log_det = self.unpack(u)
        return {
            latent.name: self._free_log_prob(u[:, part], part)
            - _total({k: v for k, v in log_det.items() if k == latent.name}, u)
            for latent, part, *_ in self._sites
        }

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """The guide as a Pyro program, at all rows; arguments are those of the model."""
        u: Tensor = self.loc
        if self.num_latents:  # a simplex of one component has no freedom
            given = self._free_distribution(Given((*args, *kwargs.values())))
            u = pyro.sample("_free", given, infer={"is_auxiliary": True})
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
            "local_plate": self.local_plate,
        }

    @property
    def _sites(self) -> tuple[Site, ...]:
        """The sites at all rows, in the order of u."""
        return self._whole.sites

    def _move(self, center: Tensor, frame: Tensor) -> None:
        """Put the frame somewhere and q at the standard normal in it, in place."""
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(frame)
            for parameter in self.parameters():
                parameter.zero_()


def noise(num_particles: int, like: Tensor) -> Tensor:
    """Standard normal draws (P, L) for a guide whose ``loc`` is like this."""
    return torch.randn(num_particles, len(like), dtype=like.dtype, device=like.device)


def along_path(
    eps: Tensor, log_det: Tensor, v: Tensor, slope: Tensor, weight: Tensor | None = None
) -> Tensor:
    """The log q (P,) of the noise, with the gradient ``slope`` along v (P, L) and no other.

    With a ``weight`` (L,) each number counts as often; ``log_det`` and ``slope`` have it already.
    """
    with torch.no_grad():
        if weight is None:
            value = -0.5 * (eps * eps).sum(-1) - log_det - 0.5 * eps.shape[-1] * _LOG_2PI
        else:
            value = -0.5 * ((eps * eps + _LOG_2PI) @ weight) - log_det
    # A recorded graph knows of no_grad only what is detached.
    path = (v * slope.detach()).sum(-1)
    return value.detach() + (path - path.detach())


def _total(log_det: Mapping[str, Tensor], u: Tensor) -> Tensor:
    return sum((part.reshape(len(u), -1).sum(-1) for part in log_det.values()), u.new_zeros(()))
