r"""A guide of exponential families, for models whose priors are conjugate.

.. math:: q(z) = \prod_f q_f(z_f \mid \eta_f)

Each factor is a family of :mod:`latentlab.distributions.factors` over one site or several. Where
the model offers updates for it, a fit puts each factor where the expected statistics of the data
lead, and needs no gradient; without them it is climbed like any other guide.

Letters: L numbers on the real line, P particles.

References:
    | Ensemble learning for hidden Markov models (MacKay, 1997)
    | Variational algorithms for approximate Bayesian inference (Beal, 2003)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.distributions import factors
from latentlab.distributions.factors import Factor, Sites
from latentlab.guides.base import Draws, Guide
from latentlab.guides.layout import Data
from latentlab.seeds import seeded

__all__ = ["Families"]

_MOMENT_DRAWS = 1000
_FAMILIES: dict[str, type[Factor]] = {
    family.__name__: family
    for family in (factors.Beta, factors.Dirichlet, factors.Gamma, factors.NormalGamma)
}


class Families(Guide):
    r"""Independent factors, each a family over one site or several.

    Arguments:
        families: sites, in the order that the family draws them -> family, or its name; as a
            mapping or in pairs.

    Raises:
        ValueError: for an unknown family, and when bound for a site that none covers.

    Example:
        >>> from pyro.distributions import constraints
        >>> from latentlab.guides import Latent
        >>> guide = Families({("weights",): "Dirichlet"}).bind(
        ...     [Latent("weights", (), (3,), constraints.simplex)], max_plate_nesting=0
        ... )
        >>> guide.put({("weights",): factors.Dirichlet(torch.tensor([1.0, 2.0, 3.0]))})
        >>> guide.draw(5).values["weights"].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        families: Mapping[Sites, type[Factor] | str]
        | Iterable[tuple[Iterable[str], type[Factor] | str]],
    ) -> None:
        super().__init__()
        self.families: dict[Sites, type[Factor]] = {}
        for sites, family in families.items() if isinstance(families, Mapping) else families:
            name = family if isinstance(family, str) else family.__name__
            if name not in _FAMILIES:
                raise ValueError(f"families: expected one of {sorted(_FAMILIES)}, got {name!r}")
            self.families[tuple(sites)] = _FAMILIES[name]

    def _make_parameters(self, zeros: Tensor) -> None:
        shapes = {latent.name: latent.shape for latent in self.latents}
        covered = [site for sites in self.families for site in sites]
        if sorted(covered) != sorted(shapes):
            raise ValueError(
                f"families: expected factors for the sites {sorted(shapes)}, got {sorted(covered)}"
            )
        if self._whole.inner.numel():
            raise ValueError("Families: has no factor for each row; take MeanField or Structured")
        self.loc = nn.Parameter(zeros, requires_grad=False)  # as wide as u, and else unused
        for f, (sites, family) in enumerate(self.families.items()):
            for name in family.names():
                start = zeros.new_zeros(shapes[sites[0]])
                self.register_parameter(f"{name}_{f}", nn.Parameter(start))

    def factors(self) -> dict[Sites, Factor]:
        """The factors as they are."""
        found = {}
        for f, (sites, family) in enumerate(self.families.items()):
            numbers = {name: self.get_parameter(f"{name}_{f}") for name in family.names()}
            found[sites] = family(
                **{k: v if k in family.free else v.exp() for k, v in numbers.items()}
            )
        return found

    @torch.no_grad()
    def put(self, found: Mapping[Sites, Factor]) -> None:
        """Put factors in the place of those that are there, in place.

        Arguments:
            found: sites -> factor, for some or all of them.
        """
        for f, (sites, family) in enumerate(self.families.items()):
            if sites in found:
                for name in family.names():
                    value = getattr(found[sites], name)
                    number = value if name in family.free else value.log()
                    self.get_parameter(f"{name}_{f}").copy_(number)

    def draw(self, num_particles: int, data: Data | None = None) -> Draws:
        """See :meth:`Guide.draw`."""
        drawn: dict[str, Tensor] = {}
        log_q = self.loc.new_zeros(num_particles)
        for sites, factor in self.factors().items():
            values = factor.draw(num_particles)
            log_q = log_q + sum(factor.log_probs(*values))
            drawn |= zip(sites, values, strict=True)
        return Draws(self._placed(drawn), log_q)

    def leaves_out_score(self, num_particles: int) -> bool:
        """It does not: its density has the gradient in its numbers, too."""
        return False

    def log_prob(self, values: Mapping[str, Tensor], data: Data | None = None) -> Tensor:
        """See :meth:`Guide.log_prob`."""
        parts = (factor.log_probs(*given) for _, factor, given in self._given(values))
        return sum((part for each in parts for part in each), self.loc.new_zeros(()))

    def log_prob_in_order(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log-density (P,) of each site given those that its factor draws before it.

        Arguments:
            values: of all sites, each (P, ...).
        """
        found: dict[str, Tensor] = {}
        for sites, factor, given in self._given(values):
            found |= zip(sites, factor.log_probs(*given), strict=True)
        return found

    def site_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`Guide.site_log_prob`."""
        found: dict[str, Tensor] = {}
        for sites, factor, given in self._given(values):
            found |= zip(sites, factor.marginals(*given), strict=True)
        return found

    def start(self, center: Tensor, unit: Tensor) -> None:
        """See :meth:`Guide.start`: factors about the centre, as wide as their families can be."""
        with torch.no_grad():
            values = {k: v[0] for k, v in self.unpack(center[None])[0].items()}
            spread = {s.latent.name: unit[s.part].reshape(s.free_shape) for s in self._sites}
            shapes = {s.latent.name: s.latent.shape for s in self._sites}
            self.put(
                {
                    sites: family.around(
                        [values[site].reshape(shapes[site]) for site in sites],
                        [spread[site] for site in sites],
                    )
                    for sites, family in self.families.items()
                }
            )

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """See :meth:`Guide.lay`; only the diagonal of the precision counts."""
        self.start(center, precision.diagonal().rsqrt())

    def start_from(self, guide: Guide) -> None:
        """See :meth:`Guide.start_from`; correlations are left behind."""
        self.start(guide.free_mean().detach(), guide.free_sd().detach())

    def recentre(self) -> None:
        """It has no frame to move."""

    def free_mean(self) -> Tensor:
        """Mean of u by draws, shape (L,)."""
        return self._some().mean(0)

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u by draws, shape (L,)."""
        return self._some().std(0)

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u by draws, shape (L, L)."""
        return torch.cov(self._some()[:, part].T)

    def spec(self) -> dict[str, Any]:
        """What builds this guide again, apart from its numbers."""
        families = [[[*sites], family.__name__] for sites, family in self.families.items()]
        return super().spec() | {"arguments": {"families": families}}

    def _some(self) -> Tensor:
        """Draws of u (S, L), always the same ones."""
        with seeded(0):
            return self._draw_free(_MOMENT_DRAWS)[0]

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        draws = self.draw(num_particles)
        u = self.pack(draws.values)
        return u, draws.log_q + self._stretch(u)

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        return self.log_prob(self.unpack(u)[0]) + self._stretch(u)

    def _free_distribution(self, data: Data | None = None) -> dist.TorchDistribution:
        return _Free(self)

    def _stretch(self, u: Tensor) -> Tensor:
        """Log |dz/du| (P,)."""
        log_det = self.unpack(u)[1].values()
        return sum((x.reshape(len(u), -1).sum(-1) for x in log_det), u.new_zeros(len(u)))

    def _placed(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values (P, ...) with room for all plates of the model, in the order of the sites."""
        placed = {}
        for latent in self.latents:
            value = drawn[latent.name]
            ones = (1,) * (self.max_plate_nesting - len(latent.batch_shape))
            placed[latent.name] = value.reshape(len(value), *ones, *latent.shape)
        return placed

    def _given(self, values: Mapping[str, Tensor]) -> list[tuple[Sites, Factor, list[Tensor]]]:
        """Each factor, with values (P, ...) of its sites as it draws them."""
        shapes = {latent.name: latent.shape for latent in self.latents}
        return [
            (sites, factor, [values[s].to(self.loc).reshape(-1, *shapes[s]) for s in sites])
            for sites, factor in self.factors().items()
        ]


class _Free(dist.TorchDistribution):
    """The distribution of u as Pyro knows it."""

    arg_constraints = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, guide: Families) -> None:
        self._guide = guide
        shape = torch.Size((guide.num_latents,))
        super().__init__(torch.Size(), shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Free:  # noqa: ANN401
        """The same distribution over a larger batch."""
        wider = _Free(self._guide)
        wider._batch_shape = torch.Size(batch_shape)
        return wider

    def rsample(self, sample_shape: Any = ()) -> Tensor:  # noqa: ANN401
        """Draws, shape ``(*sample_shape, *batch, L)``."""
        shape = torch.Size(sample_shape) + self._batch_shape
        return self._guide._draw_free(math.prod(shape))[0].reshape(*shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, shape of the batch."""
        flat = value.reshape(-1, value.shape[-1])
        return self._guide._free_log_prob(flat, slice(None)).reshape(value.shape[:-1])
