r"""A guide that bends: noise through a flow, then through the frame of a Gaussian guide.

.. math::
    u = c + A\,(m + L f_\theta(\varepsilon)), \quad \varepsilon \sim \mathcal{N}(0, I), \quad
    z = T(u)

f is a flow that starts at the identity, so that the guide starts as the Gaussian it was laid over
(:meth:`Flow.start_from`) and its ELBO can only rise. A flow that draws in one pass is taken,
whatever its kind: drawing is what a guide does at every step.

The gradient leaves out the score of q, which is zero on average, but noise: with
:math:`w = f(\varepsilon)` and J its Jacobian,

.. math::
    \nabla_w \log q = J^{-\top} \nabla_\varepsilon
        \left[ \log \mathcal{N}(\varepsilon) - \log |\det J| \right],

one triangular solve a draw. Under an exact posterior the gradient is then zero draw by draw, so
that a Gaussian posterior stays one. Where draws are so many that their Jacobians would be dear,
the score averages out, and is left in.

Letters: L latent numbers, P particles.

References:
    | Variational inference with normalizing flows (Rezende and Mohamed, 2015)
    | Improved variational inference with inverse autoregressive flow (Kingma et al., 2016)
    | Path-gradient estimators for continuous normalizing flows (Vaitl et al., 2022)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from latentlab import flows
from latentlab.data.checks import as_count
from latentlab.flows.density import standard_normal_log_prob
from latentlab.flows.kinds import Kind
from latentlab.flows.masked import MaskedFlow
from latentlab.flows.planar import Planar
from latentlab.guides.base import Guide, along_path, noise
from latentlab.guides.layout import Data
from latentlab.nn import as_widths

__all__ = ["Flow"]

_JACOBIAN_ROWS = 4096  # particles times latents up to which the score is left out
_MOMENT_DRAWS = 4000


class Flow(Guide):
    r"""Noise bent by a flow: reaches skewed, curved and funnel-shaped posteriors, at a price.

    Each step costs some times that of ``FullRank``, and a fit needs more of them; ``fit`` starts
    it from a fitted Gaussian guide.

    Arguments:
        kind: of the flow, as for :func:`latentlab.flows.make`.
        hidden_dims: widths of the hidden layers of its networks; by default two of 64, or of
            twice the number of latents where that is more.
        num_transforms: maps in the chain.
        num_bins: of its splines.

    Raises:
        ValueError: for an unknown kind or a setting that is out of range.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> guide = Flow("nsf").bind(
        ...     [Latent("z", (), (3,), constraints.independent(constraints.real, 1))],
        ...     max_plate_nesting=0,
        ... )
        >>> guide.draw(5).values["z"].shape
        torch.Size([5, 3])
    """

    log_scale: nn.Parameter
    lower: nn.Parameter
    flow: MaskedFlow | Planar

    def __init__(
        self,
        kind: Kind = "iaf",
        *,
        hidden_dims: Sequence[int] | None = None,
        num_transforms: int = 3,
        num_bins: int = 8,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "kind": kind,
            "hidden_dims": None if hidden_dims is None else [*as_widths(hidden_dims)],
            "num_transforms": as_count(num_transforms, "num_transforms"),
            "num_bins": as_count(num_bins, "num_bins"),
        }
        self._make_flow(1)  # names what is out of range before there are data

    def _make_flow(self, num_latents: int) -> MaskedFlow | Planar:
        settings = self.settings | {"affine": "none"}
        with torch.random.fork_rng(devices=[]):  # to be built takes no random numbers from others
            flow = flows.make(num_features=num_latents, **settings)
        # What is pushed goes on through the frame: it is never pulled as the tensor that it was.
        flow.remembers = False
        return flow

    def _make_parameters(self, zeros: Tensor) -> None:
        self.register_buffer("frame", torch.eye(len(zeros)).to(zeros))
        self.log_scale = nn.Parameter(zeros.clone())
        self.lower = nn.Parameter(torch.zeros(len(zeros), len(zeros)).to(zeros))
        self.flow = self._make_flow(max(len(zeros), 1)).to(zeros)
        if not len(zeros):
            self.flow.requires_grad_(False)

    def _tril(self) -> Tensor:
        return self.lower.tril(-1) + self.log_scale.exp().diag()

    def _scale_tril(self) -> Tensor:
        return self.frame @ self._tril()

    def _some(self) -> Tensor:
        """Draws of u (S, L), always the same ones."""
        shape = (_MOMENT_DRAWS, self.num_latents)
        generator = torch.Generator().manual_seed(0)
        dtype = self.loc.dtype
        eps = torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(self.loc)
        return _Whole(self).push(eps)[0]

    def _log_stretch(self) -> Tensor:
        return self.log_scale.sum() + self.frame.diagonal().log().sum()

    def leaves_out_score(self, num_particles: int) -> bool:
        """See :meth:`Guide.leaves_out_score`; of many draws the Jacobians would be dear."""
        return num_particles * self.num_latents <= _JACOBIAN_ROWS

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        eps = noise(num_particles, self.loc)
        if not self.num_latents:
            return eps, eps.new_zeros(num_particles)
        if not torch.is_grad_enabled() or not self.leaves_out_score(num_particles):
            u, log_det = _Whole(self).push(eps)
            return u, standard_normal_log_prob(eps) - log_det
        w, log_det, slope = _push_with_score(self.flow, eps)
        tril = self._tril()
        v = self.loc + w @ tril.T
        with torch.no_grad():
            slope = torch.linalg.solve_triangular(tril, slope.detach(), upper=False, left=False)
            log_det = log_det + self._log_stretch()
        return self.offset + v @ self.frame.T, along_path(eps, log_det, v, slope)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`; the flow becomes the identity."""
        self._place(center, unit.diag())
        self.flow.to_identity()

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; the flow becomes the identity."""
        turned = torch.linalg.cholesky(precision.double().flip(-2, -1)).flip(-2, -1).T
        eye = torch.eye(len(center), dtype=turned.dtype, device=turned.device)
        self._place(center, torch.linalg.solve_triangular(turned, eye, upper=False))
        self.flow.to_identity()

    def network_parameters(self) -> Iterator[Tensor]:
        """Parameters of the flow, which a fit moves by shorter steps than mean and scale."""
        return self.flow.parameters()

    def recentre(self) -> None:
        """Move the frame to the affine part of the map, in place; the flow stays as it is."""
        with torch.no_grad():
            center, tril = self.offset + self.frame @ self.loc, self._scale_tril()
        self._place(center, tril)

    def start_from(self, guide: Guide) -> None:
        """Begin where another guide of the same latents ended, in place.

        Arguments:
            guide: a fitted guide; mean and covariance are taken over, so that both are the same
                where that one is Gaussian.
        """
        sd = guide.free_sd().detach().double()
        correlation = torch.eye(len(sd)).to(sd)
        if guide.has_density:
            correlation = guide.covariance().detach().double() / sd / sd[:, None]
        tril = sd[:, None] * torch.linalg.cholesky(correlation)
        self._place(guide.free_mean().detach(), tril)
        self.flow.to_identity()

    def _place(self, center: Tensor, frame: Tensor) -> None:
        with torch.no_grad():
            self.offset.copy_(center)
            self.frame.copy_(frame)
            for parameter in (self.loc, self.log_scale, self.lower):
                parameter.zero_()

    def free_mean(self) -> Tensor:
        """Mean of u by draws, shape (L,)."""
        return self._some().mean(0)

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u by draws, shape (L,)."""
        return self._some().std(0)

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u by draws, shape (L, L)."""
        return torch.cov(self._some()[:, part].T)

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        if not self.num_latents:
            return u.new_zeros(len(u))
        eps, log_det = _Whole(self).pull(u)
        return standard_normal_log_prob(eps) + log_det

    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
        return flows.FlowDistribution(_Whole(self), like=self.loc)

    def site_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Log-density (P,) in nats of the only site; of several, the marginals are not known."""
        if len(self.latents) != 1:
            return {}
        return {self.latents[0].name: self.log_prob(values)}

    def spec(self) -> dict[str, Any]:
        """What builds this guide again, apart from its numbers."""
        return super().spec() | {"arguments": self.settings}


class _Whole:
    """The whole map from noise to u, as a flow."""

    def __init__(self, guide: Flow) -> None:
        self.guide, self.num_features = guide, guide.num_latents

    def push(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points u of noise."""
        w, log_det = self.guide.flow.push(noise, context)
        center, tril = self._affine()
        value = torch.addmm(center, w, tril.T) if w.dim() == 2 else center + w @ tril.T
        return value, log_det + self.guide._log_stretch()

    def pull(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise of points u."""
        center, tril = self._affine()
        w = torch.linalg.solve_triangular(tril, (value - center).unsqueeze(-1), upper=False)
        noise, log_det = self.guide.flow.pull(w.squeeze(-1), context)
        return noise, log_det - self.guide._log_stretch()

    def _affine(self) -> tuple[Tensor, Tensor]:
        guide = self.guide
        return guide.offset + guide.frame @ guide.loc, guide._scale_tril()


def _push_with_score(flow: MaskedFlow | Planar, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points w = f(eps) with their log-determinants, and the gradient (P, L) of log q(w) in w."""
    rows = torch.eye(eps.shape[-1], dtype=eps.dtype, device=eps.device)[:, None]
    rows = rows.expand(-1, *eps.shape)
    slopes = _slopes if get_proxy_mode() is None else _recorded_slopes
    w, log_det, slope, jacobian = slopes(flow, eps, rows)
    # jacobian[i, p, j] = d w_i / d eps_j; slope = J^T score.
    score = torch.linalg.solve(jacobian.movedim(0, -1), slope.unsqueeze(-1)).squeeze(-1)
    return w, log_det, score


def _slopes(flow: MaskedFlow | Planar, eps: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Points, log-determinants, and the gradients of log q and of each number of w in eps."""
    w, log_det = flow.push(eps.requires_grad_())
    log_q = standard_normal_log_prob(eps) - log_det
    (slope,) = torch.autograd.grad(log_q.sum(), eps, retain_graph=True)
    (jacobian,) = torch.autograd.grad(w, eps, rows, retain_graph=True, is_grads_batched=True)
    return w, log_det, slope, jacobian


def _recorded_slopes(flow: MaskedFlow | Planar, eps: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """The same; slower than torch's own tape, of which no record can be made."""

    def push(eps: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        w, log_det = flow.push(eps)
        return (w, standard_normal_log_prob(eps) - log_det), log_det

    (w, log_q), pull_back, log_det = torch.func.vjp(push, eps, has_aux=True)  # type: ignore[misc]
    (slope,) = pull_back((torch.zeros_like(w), torch.ones_like(log_q)))
    (jacobian,) = torch.func.vmap(lambda row: pull_back((row, torch.zeros_like(log_q))))(rows)
    return w, log_det, slope, jacobian
