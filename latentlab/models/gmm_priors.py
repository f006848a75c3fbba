r"""The priors of a Gaussian mixture.

``"weak"`` is log-normal in the standard deviations and says little, in the units of the data;
``"flat"`` says nothing at all. :class:`Conjugate` is Dirichlet times normal-Wishart,

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad
    \Sigma_k^{-1} \sim \mathrm{Wishart}(\nu, (\psi \, \mathrm{diag} \, s^2)^{-1}), \quad
    \mu_k \mid \Sigma_k \sim \mathcal{N}(m, \Sigma_k / \beta),

which has a posterior in closed form given the labels: each step of a fit is then exact. Single
variances (``"diag"``, ``"spherical"``) are inverse-gamma,
:math:`\sigma^2 \sim \mathrm{InverseGamma}(\nu / 2, \psi s^2 / 2)`.

:math:`m_d` and :math:`s_d` are the mean and standard deviation of column d.

Letters: D features, K components, P pairs of features.

References:
    | Bayesian regularization for normal mixture estimation (Fraley and Raftery, 2007)
    | Pattern recognition and machine learning, section 10.2 (Bishop, 2006)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.transforms import PowerTransform

from latentlab.distributions.correlations import PartialCorrelations, correlation_tril
from latentlab.distributions.normal_row import normal_cells
from latentlab.distributions.wishart import NormalWishart, WishartCorrelations, inverse_diagonal

if TYPE_CHECKING:
    from latentlab.models.gmm import GaussianMixture

__all__ = ["Conjugate", "Prior", "as_prior", "conjugate_to", "draw_latents"]


@dataclass(frozen=True)
class Conjugate:
    r"""Dirichlet times normal-Wishart, in the units of the data.

    Arguments:
        strength: :math:`\beta`, how many rows the prior mean of a component is worth.
        dof: :math:`\nu`, more than D - 1; by default D + 2, or 3 for single variances.
        variance: :math:`\psi`, as a share of the columns' variances; by default
            :math:`K^{-2/D}`, so that K components fill the space.

    Raises:
        ValueError: if a number is not above 0.

    Example:
        >>> Conjugate(strength=1.0).strength
        1.0
    """

    strength: float = 0.01
    dof: float | None = None
    variance: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None and name != "strength":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"prior: {name}: expected a number > 0, got {value!r}")

    def spec(self) -> dict[str, float | None]:
        """The prior as JSON values."""
        return asdict(self)


Prior = Literal["weak", "flat"] | Conjugate


def as_prior(prior: Any, num_features: int, is_tilted: bool) -> Prior:  # noqa: ANN401
    """A prior as it was given, by name, or by what ``spec()`` returned.

    Arguments:
        prior: the argument of that name.
        num_features: D.
        is_tilted: whether columns of a component are correlated.

    Raises:
        ValueError: if it is none, or its degrees of freedom are too few.
    """
    if isinstance(prior, str) and prior in ("weak", "flat"):
        return prior  # type: ignore[return-value]
    if isinstance(prior, str) and prior == "conjugate":
        return Conjugate()
    found = Conjugate(**prior) if isinstance(prior, Mapping) else prior
    if not isinstance(found, Conjugate):
        raise ValueError(
            f'prior: expected "weak", "flat" or "conjugate", got {prior!r}; numbers of a '
            "conjugate one go into latentlab.models.Conjugate(...)"
        )
    if is_tilted and found.dof is not None and found.dof <= num_features - 1:
        raise ValueError(
            f"prior: dof: expected more than num_features - 1 = {num_features - 1}, "
            f"got {found.dof:g}"
        )
    return found


def conjugate_to(model: GaussianMixture, prior: Conjugate) -> NormalWishart:
    """The distribution of a conjugate prior for a mixture of standardised rows, float64.

    Arguments:
        model: the mixture.
        prior: its prior.
    """
    K, D = model.num_components, model.num_features
    d = D if model.is_tilted else 1
    blocks: tuple[int, ...] = {"full": (K,), "tied": (), "diag": (K, D), "spherical": (K,)}[
        model.covariance
    ]
    if D == 1 and model.covariance == "full":
        blocks = (K, 1)
    dof = d + 2.0 if prior.dof is None else float(prior.dof)
    variance = K ** (-2 / D) if prior.variance is None else float(prior.variance)
    one = model.spread.new_ones((), dtype=torch.float64)
    return NormalWishart(
        model.concentration * one.expand(K),
        prior.strength * one.expand(K),
        one.new_zeros(K, D),
        dof * one.expand(blocks),
        (variance * torch.eye(d).to(one)).expand(*blocks, d, d),
    )


def draw_latents(model: GaussianMixture) -> dict[str, Tensor]:
    """The latents of a mixture from its prior, by ``pyro.sample``.

    Arguments:
        model: the mixture, its units set.
    """
    alpha = model.spread.new_full((model.num_components,), model.concentration)
    free = poutine.mask(mask=False) if model.prior == "flat" else nullcontext()
    with free:
        latents = {"weights": pyro.sample("weights", dist.Dirichlet(alpha))}
        if isinstance(model.prior, Conjugate):
            return latents | _conjugate(model, model.prior)
        return latents | _weak(model)


def _weak(model: GaussianMixture) -> dict[str, Tensor]:
    center, spread, latents = model.center, model.spread, dict[str, Tensor]()
    scale = dist.LogNormal((model.unit / 2).log(), 1.0)
    scale = scale if model.covariance == "spherical" else scale.to_event(1)
    components = pyro.plate("components", model.num_components)
    with components:
        latents["locs"] = pyro.sample("locs", normal_cells(center, 3 * spread).to_event(1))
    with components if model.covariance != "tied" else nullcontext():
        latents["scales"] = pyro.sample("scales", scale)
        if model.is_tilted:
            concentration = spread.new_full((), 1 + model.num_features / 2)
            prior = PartialCorrelations(model.num_features, concentration)
            latents["correlations"] = pyro.sample("correlations", prior)
    return latents


def _conjugate(model: GaussianMixture, prior: Conjugate) -> dict[str, Tensor]:
    found, latents = conjugate_to(model, prior), dict[str, Tensor]()
    like = model.spread
    dof, beta = found.dof.flatten()[0].to(like), found.strength[0].to(like)
    psi = (found.scale.flatten()[0].to(like) * model.unit.square()).expand(
        () if model.covariance == "spherical" else (model.num_features,)
    )
    components = pyro.plate("components", model.num_components)
    with components if model.covariance != "tied" else nullcontext():
        if model.is_tilted:
            of_rows = WishartCorrelations(model.num_features, dof)
            latents["correlations"] = pyro.sample("correlations", of_rows)
            tril = correlation_tril(latents["correlations"], model.num_features)
            psi = psi * inverse_diagonal(tril)
        variance = dist.InverseGamma(dof / 2, psi / 2)
        scale = dist.TransformedDistribution(variance, [PowerTransform(torch.tensor(0.5))])
        scale = scale if model.covariance == "spherical" else scale.to_event(1)
        latents["scales"] = scales = pyro.sample("scales", scale)
    with components:
        if model.is_tilted:
            tril = scales.unsqueeze(-1) * tril / beta.sqrt()
            locs = dist.MultivariateNormal(model.center, scale_tril=tril, validate_args=False)
        else:
            width = scales.unsqueeze(-1) if model.covariance == "spherical" else scales
            locs = dist.Normal(model.center, width / beta.sqrt()).to_event(1)
        latents["locs"] = pyro.sample("locs", locs)
    return latents
