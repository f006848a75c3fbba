r"""A Gaussian guide with a few directions of correlation, for many latents.

.. math::
    u = c + F m + A\,(D \varepsilon_1 + W \varepsilon_2), \quad \varepsilon \sim \mathcal{N}(0, I)

A and D are diagonal, W has R columns. F is the square root of the covariance where the frame was
last moved, so that a step of length one in m is one standard deviation in every direction. The
density comes from matrices of R by R (Woodbury): with :math:`C = I + W^\top D^{-2} W`,

.. math::
    (D^2 + W W^\top)^{-1} = D^{-2} - D^{-2} W C^{-1} W^\top D^{-2}, \qquad
    \log |D^2 + W W^\top| = 2 \log |D| + \log |C| .

Letters: L latent numbers in all, R directions, P particles.

Reference:
    | Gaussian variational approximation with a factor covariance structure (Ong et al., 2018)
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.guides.base import Guide, along_path, noise
from latentlab.guides.layout import Data

__all__ = ["LowRank"]

_MOST = 32  # directions by default
_NUDGE = 0.05  # directions of length zero would stay so: no gradient points out of there
_ROUNDS = 50


class LowRank(Guide):
    r"""One Gaussian with correlations in a few directions: covariance diagonal plus rank R.

    Exact where a few common factors are behind all correlations. Holds :math:`L (R + 2)` numbers,
    where ``FullRank`` has :math:`L (L + 3) / 2`.

    Arguments:
        rank: number of directions R; by default the root of the number of latents, at most 32.

    Raises:
        ValueError: if ``rank`` is not an int of at least 1.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> guide = LowRank(rank=1).bind([Latent("z", (), (3,), constraints.real_vector)],
        ...                              max_plate_nesting=0)
        >>> guide.draw(5).values["z"].shape
        torch.Size([5, 3])
    """

    log_scale: nn.Parameter
    factor: nn.Parameter
    base_factor: Tensor
    turn: Tensor

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"rank: expected an int of at least 1, got {rank!r}")
        self.rank = rank

    def _make_parameters(self, zeros: Tensor) -> None:
        size = len(zeros)
        rank = min(self.rank or min(math.ceil(math.sqrt(size)), _MOST), size)
        self.register_buffer("frame", torch.ones_like(zeros))
        self.register_buffer("base_factor", zeros.new_zeros(size, rank))  # where the frame is
        self.register_buffer("turn", zeros.new_zeros(size, rank))  # F = A (I + turn turn')
        self.log_scale = nn.Parameter(zeros.clone())
        self.factor = nn.Parameter(zeros.new_zeros(size, rank))

    def _whole_factor(self) -> Tensor:
        return self.base_factor + self.factor

    def _shift(self) -> Tensor:
        """How far the mean is from c, in units of A."""
        return self.loc + self.turn @ (self.turn.T @ self.loc)

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = noise(num_particles, self.loc)
        common = noise(num_particles, self.loc[: self.factor.shape[1]])
        factor, scale = self._whole_factor(), self.log_scale.exp()
        y = eps * scale + common @ factor.T
        v = self._shift() + y
        with torch.no_grad():
            scaled = factor / scale[:, None]  # D^-1 W
            inner = torch.eye(len(scaled.T)).to(scaled) + scaled.T @ scaled
            root = torch.linalg.cholesky(inner)
            white = y / scale
            told = torch.cholesky_solve((white @ scaled).T, root).T
            solved = white - told @ scaled.T  # D times the inverse covariance times y
            slope = -solved / scale
            # y' S^-1 y as a square, so that no difference of large numbers is taken.
            length = ((solved * solved).sum(-1) + (told * told).sum(-1)).sqrt()
            log_det = (self.log_scale + self.frame.log()).sum() + root.diagonal().log().sum()
            num = len(self.loc)
            flat = torch.cat([length[:, None], length.new_zeros(len(length), max(num - 1, 0))], 1)
        return self.offset + self.frame * v, along_path(flat[:, :num], log_det, v, slope)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`; the directions begin short, not zero."""
        generator = torch.Generator().manual_seed(0)
        shape = tuple(self.factor.shape)
        eps = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        nudge = _NUDGE * eps.to(self.loc) / max(math.sqrt(shape[1]), 1.0)
        # Standard deviations as they are told, the directions among them.
        self._place(center, unit / (1 + nudge.square().sum(-1)).sqrt(), nudge)

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; of the correlations, what the directions can hold."""
        unit = precision.diagonal().rsqrt()
        scaled = (precision * unit * unit[:, None]).double()
        eye = torch.eye(len(unit), dtype=scaled.dtype, device=scaled.device)
        covariance = torch.cholesky_solve(eye, torch.linalg.cholesky(scaled))
        self._take(center, unit.double(), covariance)

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; of the correlations, what the directions can hold."""
        mean, sd = guide.free_mean().detach(), guide.free_sd().detach()
        if isinstance(guide, LowRank) and guide.factor.shape == self.factor.shape:
            self.load_state_dict(guide.state_dict())
            self.recentre()
        elif guide.has_density and len(sd) <= 2000:
            covariance = guide.covariance().detach().double()
            self._take(mean, sd.double(), covariance / sd / sd[:, None])
        else:
            self.start(mean, sd)

    def _take(self, center: Tensor, unit: Tensor, covariance: Tensor) -> None:
        """Take over a mean, and a covariance in some units by principal factors."""
        if not len(unit):
            return
        variance = covariance.diagonal()
        own = 0.5 * variance
        rank = self.factor.shape[1]
        for _ in range(_ROUNDS):
            root = own.sqrt()
            size, axes = torch.linalg.eigh(covariance / root / root[:, None])
            size, axes = size[-rank:], axes[:, -rank:]
            factor = root[:, None] * axes * (size - 1).clamp_min(0).sqrt()
            own = (variance - factor.square().sum(-1)).clamp_min(1e-6 * variance)
        self._place(center, unit * own.sqrt(), factor / own.sqrt()[:, None])

    def recentre(self) -> None:
        """Move the frame to the current mean and covariance, in place."""
        with torch.no_grad():
            scale = self.log_scale.exp()
            factor = self._whole_factor() / scale[:, None]
            center = self.free_mean()
            self._place(center, self.frame * scale, factor)

    def _place(self, center: Tensor, frame: Tensor, factor: Tensor) -> None:
        """Put c, A and W somewhere, and the root of their covariance beside them."""
        with torch.no_grad():
            self._move(center, frame)
            self.base_factor.copy_(factor)
            axes, size, _ = torch.linalg.svd(factor, full_matrices=False)
            self.turn.copy_(axes * ((1 + size * size).sqrt() - 1).sqrt())

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,)."""
        return self.offset + self.frame * self._shift()

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u, shape (L,)."""
        factor, scale = self._whole_factor(), self.log_scale.exp()
        return self.frame * (scale.square() + factor.square().sum(-1)).sqrt()

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L)."""
        factor = (self.frame[:, None] * self._whole_factor())[part]
        return factor @ factor.T + (self.frame * self.log_scale.exp())[part].square().diag()

    def _distribution(self, part: slice) -> dist.LowRankMultivariateNormal:
        return dist.LowRankMultivariateNormal(
            self.free_mean()[part],
            (self.frame[:, None] * self._whole_factor())[part],
            (self.frame * self.log_scale.exp())[part].square(),
        )

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        if not u.shape[-1]:  # a simplex of one component has no freedom
            return u.new_zeros(len(u))
        return self._distribution(part).log_prob(u)

    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
        return self._distribution(slice(None))

    def spec(self) -> dict[str, Any]:
        """What builds this guide again, apart from its numbers."""
        return super().spec() | {"arguments": {"rank": self.rank}}
