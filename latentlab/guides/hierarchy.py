r"""Gaussian guides in the shape of a hierarchy: global numbers, and those of rows given them.

.. math::
    g &= c_g + A_g v_g, & v_g &= m_g + L_g \varepsilon_g, \\
    w_n &= c_n + C_n v_g + A_n v_n, & v_n &= m_n + B_n \varepsilon_g + L_n \varepsilon_n

g are the global numbers, :math:`w_n` those of row n; A and L are lower-triangular. A mini-batch
has the numbers of its rows only, each of them standing for N / B.

Letters: L numbers in all, G of them global, N rows, B of them, l numbers a row, P particles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from latentlab import flows
from latentlab.flows.density import standard_normal_log_prob
from latentlab.guides.base import Draws, Guide, _total, along_path
from latentlab.guides.layout import Data, Layout, Part, Site

__all__ = ["Factors", "Hierarchy"]


class Hierarchy(Guide):
    """Abstract: a subclass says where c, A, C, m, L and B of some rows come from."""

    follows_rows = True

    @abstractmethod
    def _factors(self, part: Part | None = None, data: Data | None = None) -> Factors:
        """All that the draws of some rows are made of."""

    def draw(self, num_particles: int, data: Data | None = None) -> Draws:
        """See :meth:`Guide.draw`."""
        part = self._part(data)
        u, log_q = self._draw_rows(num_particles, part, self._factors(part, data))
        if part is None:
            values, log_det = self.unpack(u)
        else:
            values, log_det = self.unpack(u, part.layout)
            log_det = part.volume(log_det)
        return Draws(values, log_q - _total(log_det, u))

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        return self._draw_rows(num_particles, None, self._factors())

    def _draw_rows(
        self, num_particles: int, part: Part | None, at: Factors
    ) -> tuple[Tensor, Tensor]:
        eps = _noise(num_particles, at)
        v_g, v_n = at.bend(*eps)
        u_g, u_n = at.place(v_g, v_n)
        scale = 1.0 if part is None else part.scale
        with torch.no_grad():
            slopes = at.slopes(*eps, scale)
            log_det = at.log_det_g() + scale * at.log_det_n().sum()
            weight = torch.cat(
                [torch.ones_like(at.loc_g), torch.full_like(at.loc_n, scale).flatten()]
            )
        flat = (torch.cat([g, n.flatten(-2)], -1) for g, n in (eps, (v_g, v_n), slopes))
        noise, v, slope = flat
        log_q = along_path(noise, log_det, v, slope, weight)
        layout = self._whole if part is None else part.layout
        return layout.join(u_g, u_n), log_q

    def log_prob(self, values: Mapping[str, Tensor], data: Data | None = None) -> Tensor:
        """See :meth:`Guide.log_prob`."""
        parts = self.element_log_prob(values, data).values()
        num = len(next(iter(values.values())))
        return sum((p.reshape(num, -1).sum(-1) for p in parts), self.loc.new_zeros(num))

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self._mean(self._factors())

    def _mean(self, at: Factors) -> Tensor:
        return self._whole.join(*(part[0] for part in at.place(at.loc_g[None], at.loc_n[None])))

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u, shape (L,)."""
        outer, slope, local = self._factors().roots()
        own = (slope.square().sum(-1) + local.square().sum(-1)).sqrt()
        return self._whole.join(outer.norm(dim=-1), own)

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L)."""
        outer, slope, local = self._factors().roots()
        common = torch.cat([outer, slope.flatten(0, 1)])
        blocks = torch.block_diag(torch.zeros_like(outer), *(local @ local.mT))
        order = self._whole.order[part]
        return common[order] @ common[order].T + blocks[order[:, None], order]

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        noise, log_det = _Map(self._factors(), self._whole).pull(u)
        return standard_normal_log_prob(noise) + log_det

    def _free_distribution(self, data: Data | None = None) -> TorchDistribution:
        return flows.FlowDistribution(_Map(self._factors(None, data), self._whole), like=self.loc)

    def site_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Log-density (P,) of each site, in nats: marginal, of a local one given the global ones.

        Arguments:
            values: of all sites, each (P, ...).
            data: not used.
        """
        u, at = self.pack(values), self._factors(None, data)
        log_det = self.unpack(u)[1]
        (u_g, u_n), mean = self._whole.split(u), self._mean(at)
        (root, _, local), given = at.roots(), at.given(u_g)
        found, start = {}, 0
        for site in self._sites:
            name, part = site.latent.name, site.part
            size = part.stop - part.start
            if site.is_local:
                own = slice(start, start + size // len(self._whole.inner))
                start = own.stop
                density = _normal(u_n[..., own], given[..., own], local[:, own]).sum(-1)
            else:
                density = _normal(u[:, part], mean[part], root[self._whole.order[part]])
            if name in log_det:
                density = density - log_det[name].reshape(len(u), -1).sum(-1)
            found[name] = density
        return found

    def element_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Log-density of the global latents (P, 1, ...), and of each row's (P, ..., N, ...).

        That of all global latents stands under the first of them, that of all latents of a row,
        given the global ones, under the first local one.

        Arguments:
            values: of all sites, each (P, ...).
            data: not used.
        """
        u, at = self.pack(values), self._factors(None, data)
        eps_g, eps_n = at.pull(*self._whole.split(u))
        outer = standard_normal_log_prob(eps_g) - at.log_det_g()
        inner = standard_normal_log_prob(eps_n) - at.log_det_n()
        return _by_site(self._sites, self.max_plate_nesting, (outer, inner), self.unpack(u)[1])

    def draw_local(
        self, num_particles: int, values: Mapping[str, Tensor], data: Data | None = None
    ) -> Draws:
        """See :class:`latentlab.guides.base.DrawsRows`."""
        at = self._factors(None, data)
        eps_g, eps_n = _noise(num_particles, at)
        free = [self._free(s, values[s.latent.name]) for s in self._sites if not s.is_local]
        u_g = torch.cat(free, -1) if free else eps_g
        u_n = at.given(u_g) + _each(at.roots()[2], eps_n)
        return Draws(self.unpack(self._whole.join(u_g, u_n))[0], u_g.new_zeros(num_particles))


class Factors(NamedTuple):
    """The numbers that draws are made of, in the letters of the module."""

    offset_g: Tensor
    frame_g: Tensor
    loc_g: Tensor
    tril_g: Tensor
    offset_n: Tensor
    frame_n: Tensor
    frame_slope: Tensor
    loc_n: Tensor
    tril_n: Tensor
    slope_n: Tensor

    def bend(self, eps_g: Tensor, eps_n: Tensor) -> tuple[Tensor, Tensor]:
        """The v of noise."""
        v_g = self.loc_g + eps_g @ self.tril_g.T
        return v_g, self.loc_n + _rows(self.slope_n, eps_g) + _each(self.tril_n, eps_n)

    def place(self, v_g: Tensor, v_n: Tensor) -> tuple[Tensor, Tensor]:
        """The g and w of v."""
        w = self.offset_n + _rows(self.frame_slope, v_g) + _each(self.frame_n, v_n)
        return self.offset_g + v_g @ self.frame_g.T, w

    def slopes(self, eps_g: Tensor, eps_n: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The gradient of log q with respect to v, each row counted ``scale`` times."""
        x_n = _solve(self.tril_n.mT, eps_n, upper=True)
        told = x_n.flatten(1) @ self.slope_n.flatten(0, 1)
        x_g = _solve(self.tril_g.T, eps_g - scale * told, upper=True)
        return -x_g, -scale * x_n

    def log_det_g(self) -> Tensor:
        """The log |A_g L_g|."""
        return (self.tril_g.diagonal().log() + self.frame_g.diagonal().log()).sum()

    def log_det_n(self) -> Tensor:
        """The log |A_n L_n| of each row, shape (N,)."""
        own, frame = (t.diagonal(dim1=-2, dim2=-1).log() for t in (self.tril_n, self.frame_n))
        return (own + frame).sum(-1)

    def roots(self) -> tuple[Tensor, Tensor, Tensor]:
        """What multiplies the noise: A_g L_g, C_n L_g + A_n B_n, A_n L_n."""
        slope = self.frame_slope @ self.tril_g + self.frame_n @ self.slope_n
        return self.frame_g @ self.tril_g, slope, self.frame_n @ self.tril_n

    def given(self, u_g: Tensor) -> Tensor:
        """Means (P, N, l) of the rows' numbers, given the global ones."""
        outer, slope, _ = self.roots()
        mean_g, mean_n = self.place(self.loc_g[None], self.loc_n[None])
        return mean_n + _rows(slope, _solve(outer, u_g - mean_g, upper=False))

    def pull(self, u_g: Tensor, u_n: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of g and w."""
        outer, slope, local = self.roots()
        mean_g, mean_n = self.place(self.loc_g[None], self.loc_n[None])
        eps_g = _solve(outer, u_g - mean_g, upper=False)
        return eps_g, _solve(local, u_n - mean_n - _rows(slope, eps_g), upper=False)


class _Map:
    """The whole map from noise (g, w_1, ..., w_N) to u, as a flow."""

    def __init__(self, at: Factors, whole: Layout) -> None:
        self.at, self.whole, self.num_features = at, whole, whole.size

    def push(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points u of noise."""
        at, whole = self.at, self.whole
        flat = noise.reshape(-1, self.num_features)
        eps_n = flat[:, len(whole.outer) :].reshape(len(flat), *whole.inner.shape)
        u = whole.join(*at.place(*at.bend(flat[:, : len(whole.outer)], eps_n)))
        log_det = at.log_det_g() + at.log_det_n().sum()
        return u.reshape(noise.shape), log_det.expand(noise.shape[:-1])

    def pull(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise of points u."""
        flat = value.reshape(-1, self.num_features)
        eps_g, eps_n = self.at.pull(*self.whole.split(flat))
        noise = torch.cat([eps_g, eps_n.flatten(1)], -1)
        log_det = -(self.at.log_det_g() + self.at.log_det_n().sum())
        return noise.reshape(value.shape), log_det.expand(value.shape[:-1])


def _noise(num_particles: int, at: Factors) -> tuple[Tensor, Tensor]:
    """Standard normal draws (P, G) and (P, N, l)."""
    shapes = (at.loc_g.shape, at.loc_n.shape)
    like = at.loc_g
    global_, local = (
        torch.randn(num_particles, *shape, dtype=like.dtype, device=like.device)
        for shape in shapes
    )
    return global_, local


def _rows(matrices: Tensor, x: Tensor) -> Tensor:
    """A matrix of each row (N, l, G) times vectors (P, G): shape (P, N, l)."""
    return (x @ matrices.flatten(0, 1).T).reshape(len(x), *matrices.shape[:2])


def _each(matrices: Tensor, x: Tensor) -> Tensor:
    """A matrix of each row (N, l, l) times a vector of each row (P, N, l)."""
    return (matrices * x.unsqueeze(-2)).sum(-1)


def _solve(triangle: Tensor, x: Tensor, upper: bool) -> Tensor:
    """Triangles (l, l) or (N, l, l), solved for vectors (P, l) or (P, N, l)."""
    if triangle.shape[-1] == 1:  # for a number a row, a loop over rows would be dear
        return x / triangle[..., 0]
    columns = x.movedim(0, -1)
    return torch.linalg.solve_triangular(triangle, columns, upper=upper).movedim(-1, 0)


def _normal(x: Tensor, mean: Tensor, rows: Tensor) -> Tensor:
    """Log-density of x under a Gaussian that is ``rows`` (..., k, l) times standard noise."""
    if not x.shape[-1]:  # a simplex of one component has no freedom
        return x.sum(-1)
    triangle = torch.linalg.qr(rows.mT)[1]
    tril = (triangle * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT
    return dist.MultivariateNormal(mean, scale_tril=tril).log_prob(x)


def _by_site(
    sites: Sequence[Site],
    nesting: int,
    log_q: tuple[Tensor, Tensor],
    log_det: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Log-density of the global numbers and of each row's, as that of values of sites.

    Arguments:
        sites: of the guide.
        nesting: number of batch dimensions of the model.
        log_q: of the numbers on the real line, (P,) and (P, N).
        log_det: log |dz/du| of each site.

    Returns:
        Each part under the first site of its kind, with the dimensions of the model.
    """
    outer, inner = log_q
    num = len(outer)
    for site in sites:
        stretch = log_det.get(site.latent.name)
        if stretch is None:
            continue
        if site.dim is None:
            outer = outer - stretch.reshape(num, -1).sum(-1)
        else:
            inner = inner - stretch.movedim(site.dim, 1).reshape(*inner.shape, -1).sum(-1)
    names = {site.is_local: site for site in reversed(sites)}
    found: dict[str, Tensor] = {}
    if False in names:
        found[names[False].latent.name] = outer.reshape(num, *(1,) * nesting)
    if True in names:
        shape = [1] * nesting
        shape[names[True].dim or 0] = inner.shape[1]
        found[names[True].latent.name] = inner.reshape(num, *shape)
    return found
