r"""A Gaussian guide with all correlations of a hierarchy.

The numbers of each row have a mean that is linear in the global ones,

.. math:: w_n \mid g \sim \mathcal{N}(a_n + S_n g, \Sigma_n), \quad g \sim \mathcal{N}(m, \Sigma),

so that given g the rows are independent: the precision matrix is an arrow. It is ``FullRank``
without the numbers that are zero where rows are independent in the model: exact for a Gaussian
hierarchy, and as many numbers as there are rows, not their square.

Letters: L numbers in all, G of them global, N rows, l numbers a row.

Reference:
    | Gaussian variational approximation with sparse precision matrices (Tan and Nott, 2018)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentlab.guides.base import Guide
from latentlab.guides.hierarchy import Factors, Hierarchy
from latentlab.guides.layout import Data, Layout, Part, slowed

__all__ = ["Arrow", "Structured"]


@dataclass(frozen=True)
class Arrow:
    """A precision matrix of independent rows given global numbers.

    Arguments:
        outer: of the global numbers, shape (G, G).
        cross: of each row with the global ones, shape (N, l, G).
        inner: of each row, shape (N, l, l).
    """

    outer: Tensor
    cross: Tensor
    inner: Tensor

    @classmethod
    def of(cls, precision: Tensor, layout: Layout) -> Arrow:
        """The part of a whole precision matrix (L, L) that is an arrow."""
        outer, inner = layout.outer, layout.inner
        return cls(
            precision[outer[:, None], outer],
            precision[inner[:, :, None], outer],
            precision[inner[:, :, None], inner[:, None, :]],
        )

    def made_positive(self, least: float = 1.0) -> Arrow:
        """With the eigenvalues of its blocks made positive, and at least so large.

        Arguments:
            least: the smallest eigenvalue of a row, and of the global numbers without the rows.
        """
        inner = _positive(self.inner, least)
        # What the rows tell of the global numbers is taken out, and put back.
        told = (self.cross.mT @ torch.linalg.solve(inner, self.cross)).sum(0)
        return Arrow(_positive(self.outer - told, least) + told, self.cross, inner)

    def diagonal(self, layout: Layout) -> Tensor:
        """Its diagonal, shape (L,), in the order of u."""
        return layout.join(self.outer.diagonal(), self.inner.diagonal(dim1=-2, dim2=-1))


class Structured(Hierarchy):
    r"""A Gaussian with all correlations of a hierarchy: global latents, and each row given them.

    Exact for a Gaussian hierarchy. Holds about :math:`G^2 / 2 + N l (G + l)` numbers, and follows
    mini-batches. Latents that are local to a plate over the rows of the data are a row's own; all
    others are global, and where no latent is local this is ``FullRank``.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> loc = Latent("loc", (), (), constraints.real)
        >>> z = Latent("z", (5,), (), constraints.real, (("rows", 5, -1),))
        >>> guide = Structured().bind([loc, z], max_plate_nesting=1, local_plate="rows")
        >>> guide.draw(3).values["z"].shape
        torch.Size([3, 5])
    """

    log_scale: nn.Parameter
    lower: nn.Parameter
    local_lower: nn.Parameter
    local_slope: nn.Parameter
    local_frame: Tensor
    frame_slope: Tensor

    def _make_parameters(self, zeros: Tensor) -> None:
        num, own = self._whole.inner.shape
        size = len(self._whole.outer)
        eye = torch.eye(own).to(zeros)
        self.register_buffer("frame", torch.eye(size).to(zeros))
        self.register_buffer("local_frame", eye.expand(num, own, own).clone())
        self.register_buffer("frame_slope", zeros.new_zeros(num, own, size))
        self.log_scale = nn.Parameter(zeros.clone())
        self.lower = nn.Parameter(zeros.new_zeros(size, size))
        self.local_lower = nn.Parameter(zeros.new_zeros(num, own, own))
        self.local_slope = nn.Parameter(zeros.new_zeros(num, own, size))

    def _factors(self, part: Part | None = None, data: Data | None = None) -> Factors:
        """All that the draws of some rows are made of."""
        outer, inner = self._whole.outer, self._whole.inner
        if part is None:
            own = [self.local_lower, self.local_slope, self.loc[inner], self.log_scale[inner]]
            frames = [self.local_frame, self.frame_slope, self.offset[inner]]
        else:
            inner, rows, scale = inner[part.rows], part.rows, part.scale
            own = [self.local_lower[rows], self.local_slope[rows]]
            own = [slowed(p, scale) for p in (*own, self.loc[inner], self.log_scale[inner])]
            frames = [self.local_frame[rows], self.frame_slope[rows], self.offset[inner]]
        lower, slope, loc, log_scale = own
        return Factors(
            offset_g=self.offset[outer],
            frame_g=self.frame,
            loc_g=self.loc[outer],
            tril_g=self.lower.tril(-1) + self.log_scale[outer].exp().diag(),
            offset_n=frames[2],
            frame_n=frames[0],
            frame_slope=frames[1],
            loc_n=loc,
            tril_n=lower.tril(-1) + log_scale.exp().diag_embed(),
            slope_n=slope,
        )

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`."""
        outer, inner = self._whole.outer, self._whole.inner
        slope = torch.zeros_like(self.frame_slope)
        self._place(center, unit[outer].diag(), unit[inner].diag_embed(), slope)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; links from row to row are left out."""
        unit = precision.diagonal().rsqrt()
        scaled = (precision * unit * unit[:, None]).double()
        self.lay_arrow(center, Arrow.of(scaled, self._whole), unit.double())

    def lay_arrow(self, center: Tensor, arrow: Arrow, unit: Tensor) -> None:
        """Lay the frame and q over a mode that has such a precision, in place.

        Arguments:
            center: the mode, shape (L,).
            arrow: the precision, in some units.
            unit: these, shape (L,).
        """
        local = _inverse_root(arrow.inner)  # (N, l, l), lower
        given = -local @ (local.mT @ arrow.cross)  # mean of a row by the global numbers
        outer = arrow.outer + (arrow.cross.mT @ given).sum(0)
        frame = _inverse_root(outer)
        u_g, u_n = unit[self._whole.outer], unit[self._whole.inner]
        slope = u_n[..., None] * (given @ frame)
        self._place(center, u_g[:, None] * frame, u_n[..., None] * local, slope)

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; the part of the covariance that is of this shape."""
        mean, sd = guide.free_mean().detach(), guide.free_sd().detach()
        outer, inner = self._whole.outer, self._whole.inner
        if isinstance(guide, Structured):
            self.load_state_dict(guide.state_dict())
            self.recentre()
        elif guide.has_density and len(sd) <= 2000:
            covariance = guide.covariance().detach().double() / sd / sd[:, None]
            part = Arrow.of(covariance, self._whole)
            frame = torch.linalg.cholesky(part.outer)
            slope = torch.linalg.solve_triangular(frame, part.cross.mT, upper=False).mT
            local = torch.linalg.cholesky(part.inner - slope @ slope.mT)
            scale = sd[inner][..., None]
            self._place(mean, sd[outer][:, None] * frame, scale * local, scale * slope)
        else:
            self.start(mean, sd)

    def recentre(self) -> None:
        """Move the frame to the current mean and factors, in place."""
        with torch.no_grad():
            at = self._factors()
            slope = at.frame_slope @ at.tril_g + at.frame_n @ at.slope_n
            self._place(self.free_mean(), at.frame_g @ at.tril_g, at.frame_n @ at.tril_n, slope)

    def _place(self, center: Tensor, frame: Tensor, local: Tensor, slope: Tensor) -> None:
        with torch.no_grad():
            self._move(center, frame)
            self.local_frame.copy_(local)
            self.frame_slope.copy_(slope)


def _positive(matrix: Tensor, least: float) -> Tensor:
    size, axes = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (axes * size.abs().clamp_min(least).unsqueeze(-2)) @ axes.mT


def _inverse_root(precision: Tensor) -> Tensor:
    """Lower-triangular A with A A' the inverse of a precision (..., l, l)."""
    # Turned around, the Cholesky factor of a precision is the inverse of that of its inverse.
    turned = torch.linalg.cholesky(precision.flip(-2, -1)).flip(-2, -1).mT
    eye = torch.eye(precision.shape[-1], dtype=turned.dtype, device=turned.device)
    return torch.linalg.solve_triangular(turned, eye.expand_as(turned), upper=False)
