r"""The conjugate guide of a Gaussian mixture.

.. math::
    q = \mathrm{Dirichlet}(\pi \mid \alpha) \prod_k
        \mathcal{N}(\mu_k \mid m_k, \Sigma_k / \beta_k) \,
        \mathrm{Wishart}(\Sigma_k^{-1} \mid \nu_k, \Psi_k^{-1})

Its numbers are set by updates in closed form, see :mod:`latentlab.inference.natural`, and by no
gradient.

Letters: L latent numbers in all, P particles, K components, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from latentlab.distributions.wishart import NormalWishart as Family
from latentlab.guides.base import Guide
from latentlab.guides.layout import Data

__all__ = ["NormalWishart"]

_DRAWS = 1000  # behind a mean and a covariance on the real line
_SITES = {"weights", "locs", "scales"}
_PARTS = ("concentration", "strength", "locs", "dof", "scale")


class NormalWishart(Guide):
    """Dirichlet weights and normal-Wishart components, over the sites of a Gaussian mixture.

    The guide of ``GaussianMixture(prior="conjugate")``. Exact for a single component.

    Raises:
        ValueError: if the latents are not those of a mixture.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100)
        >>> model = ll.GaussianMixture(2, 2, covariance="full", prior="conjugate")
        >>> posterior = ll.fit(model, x, progress=False)
        >>> posterior.guide.distribution.strength.shape
        torch.Size([2])
    """

    set_by_updates = True
    concentration: Tensor
    dof: Tensor
    scale: Tensor

    def _make_parameters(self, zeros: Tensor) -> None:
        found = {latent.name: latent for latent in self.latents}
        if not _SITES <= set(found) <= _SITES | {"correlations"}:
            raise ValueError(
                "NormalWishart: expected the sites weights, locs and scales of a Gaussian "
                f"mixture, got {sorted(found)}"
            )
        self.loc.requires_grad_(False)
        K, D = found["locs"].shape
        blocks, d = found["scales"].shape, 1
        if "correlations" in found:
            blocks, d = blocks[:-1], D
        elif not found["scales"].plates:  # one for all components
            blocks = ()
        one = zeros.new_ones((), dtype=torch.float64)
        self.register_buffer("frame", torch.ones_like(zeros))
        self.register_buffer("concentration", one.repeat(K))
        self.register_buffer("strength", one.repeat(K))
        self.register_buffer("locs", 0 * one.repeat(K, D))
        self.register_buffer("dof", (d + 2) * one.repeat(blocks) if blocks else (d + 2) * one)
        self.register_buffer("scale", torch.eye(d).to(one).repeat(*blocks, 1, 1))

    @property
    def distribution(self) -> Family:
        """The distribution of the latents, float64."""
        return Family(*(getattr(self, part) for part in _PARTS))

    def put(self, distribution: Family) -> None:
        """Put another distribution in its place.

        Arguments:
            distribution: of the same shapes.
        """
        for part in _PARTS:
            getattr(self, part).copy_(getattr(distribution, part))

    def _draw_free(self, num_particles: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            values = self.distribution.sample(num_particles)
            u = self.pack(self._shaped(values)).to(self.loc)
            return u, self._free_log_prob(u, slice(None))

    def _shaped(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {z.name: values[z.name].reshape(-1, *z.shape) for z in self.latents}

    def _free_log_prob(self, u: Tensor, part: slice) -> Tensor:
        if u.shape[-1] != self.num_latents:
            raise NotImplementedError("of a part of the latents no density is known")
        values, log_det = self.unpack(u)
        plain = {k: v.double() for k, v in self._shaped(values).items()}
        family = self.distribution
        columns = family.scale.shape[-1:] if family.is_tilted else ()
        plain["scales"] = plain["scales"].reshape(len(u), *self.dof.shape, *columns)
        volume = sum((v.reshape(len(u), -1).sum(-1) for v in log_det.values()), u.new_zeros(()))
        return family.log_prob(plain).to(u) + volume

    def site_log_prob(
        self, values: Mapping[str, Tensor], data: Data | None = None
    ) -> dict[str, Tensor]:
        """Marginal log-density (P,) of the sites that have one in closed form: the weights."""
        weights = values["weights"].reshape(-1, len(self.concentration)).double()
        density = dist.Dirichlet(self.concentration, validate_args=False).log_prob(weights)
        return {"weights": density.to(self.loc)}

    def _free_distribution(self, data: Data | None = None) -> TorchDistribution:
        return _Free(self)

    def start(self, center: Tensor, unit: Tensor) -> None:
        """Nothing: updates set its numbers, and their own starts."""

    def lay(self, center: Tensor, precision: Tensor) -> None:
        """Nothing, as :meth:`start`."""

    def start_from(self, guide: Guide) -> None:
        """Nothing, as :meth:`start`."""

    def recentre(self) -> None:
        """Nothing: it has no frame."""

    def _some(self) -> Tensor:
        """Draws of u, always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self._draw_free(_DRAWS)[0]

    def free_mean(self) -> Tensor:
        """Mean of u, shape (L,), by draws."""
        return self._some().mean(0)

    def free_sd(self) -> Tensor:
        """Standard deviation of each number of u, shape (L,), by draws."""
        return self._some().std(0)

    def covariance(self, part: slice = slice(None)) -> Tensor:
        """Covariance of (a part of) u, shape (L, L), by draws."""
        return torch.cov(self._some()[:, part].T).reshape(*[self.loc[part].numel()] * 2)


class _Free(TorchDistribution):
    """The distribution of u as Pyro knows it."""

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, guide: NormalWishart, batch_shape: Size = Size()) -> None:  # noqa: B008
        self.guide = guide
        super().__init__(batch_shape, Size((guide.num_latents,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Free:  # noqa: ANN401
        return _Free(self.guide, Size(batch_shape))

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: ANN401, B008
        shape = self._extended_shape(Size(sample_shape))
        return self.guide._draw_free(shape[:-1].numel())[0].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = self.guide._free_log_prob(value.reshape(-1, value.shape[-1]), slice(None))
        return flat.reshape(value.shape[:-1])
