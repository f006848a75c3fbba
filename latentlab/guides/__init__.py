r"""Guides over all latents of a model, each written from its noise.

.. math::
    u = c + A\,(m + L \varepsilon), \quad \varepsilon \sim \mathcal{N}(0, I), \quad
    z = T(u)

T maps the real line to each latent's support. ``MeanField`` has diagonal A and L, ``FullRank``
lower-triangular ones, ``Point`` no noise at all. Only m and L are optimised. The *frame* (c, A)
is fixed while an optimiser runs and moved to the current answer between stages
(:meth:`Guide.recentre`): a step of length one is then one posterior standard deviation
along every axis, whatever the units and, for ``FullRank``, whatever the correlations.

Because u is written from its noise, its density needs no solve, and the gradient leaves out the
term with expectation zero: under an exact posterior the gradient is then exactly zero, not only
on average, so that a fit can reach it (Roeder et al.).

A guide is a Pyro guide, bound to the latents of a model by :meth:`Guide.bind` (``fit``
does it). Letters: L latent numbers in all, P particles.

References:
    | Automatic differentiation variational inference (Kucukelbir et al., 2017)
    | Sticking the landing (Roeder, Wu and Duvenaud, 2017)
"""

from latentlab.guides.amortised import Amortised
from latentlab.guides.base import Draws, DrawsRows, Guide
from latentlab.guides.families import Families
from latentlab.guides.flow import Flow
from latentlab.guides.gaussian import FullRank, MeanField, Point
from latentlab.guides.low_rank import LowRank
from latentlab.guides.normal_wishart import NormalWishart
from latentlab.guides.rebuild import guide_from_spec
from latentlab.guides.structured import Arrow, Structured
from latentlab.supports import Latent

__all__ = [
    "Amortised",
    "Arrow",
    "Draws",
    "DrawsRows",
    "Families",
    "Flow",
    "FullRank",
    "Guide",
    "Latent",
    "LowRank",
    "MeanField",
    "NormalWishart",
    "Point",
    "Structured",
    "guide_from_spec",
]
