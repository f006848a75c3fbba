r"""The conjugate updates of Gaussian mixtures.

Where nothing is known beforehand and the guide is a point, a step is one of
expectation-maximisation. With a conjugate prior the guide is Dirichlet times normal-Wishart, and
rows go by what is expected of their log-densities,

.. math::
    \ell_n = \log \sum_k \exp \mathbb{E}_q \log \pi_k \mathcal{N}(x_n \mid \mu_k, \Sigma_k), \qquad
    \mathcal{L} = \sum_n \ell_n - \mathrm{KL}(q \,\|\, p);

with moments :math:`n_k, t_k, S_k` of the rows (:mod:`latentlab.models.gmm_em`) and
:math:`\beta_k m_k = t_k` for rows about the prior mean, the update is

.. math::
    \alpha_k = \alpha + n_k, \quad \beta_k = \beta + n_k, \quad \nu_k = \nu + n_k, \quad
    \Psi_k = \Psi + S_k - \beta_k m_k m_k^\top .

The labels are independent of all else in that bound; the ELBO of the fit, which sums them out, is
above it. Rows are standardised on the way.

Letters: N rows, D features, K components.

References:
    | Maximum likelihood from incomplete data via the EM algorithm (Dempster, Laird and Rubin,
      1977)
    | Pattern recognition and machine learning, section 10.2 (Bishop, 2006)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from latentlab.distributions.components import Moments
from latentlab.distributions.correlations import correlation_tril
from latentlab.distributions.wishart import NormalWishart
from latentlab.guides import Guide
from latentlab.guides import NormalWishart as NormalWishartGuide
from latentlab.guides import Point as PointGuide
from latentlab.models.gmm_em import Point, expected, maximum
from latentlab.models.gmm_priors import Conjugate, conjugate_to
from latentlab.models.gmm_starts import clustered, greedy_rows, random_rows

if TYPE_CHECKING:
    from latentlab.models.gmm import GaussianMixture

__all__ = ["ConjugateUpdates", "PointUpdates", "updates_of"]


def updates_of(model: GaussianMixture, guide: object) -> PointUpdates | ConjugateUpdates | None:
    """The updates of a guide of a mixture, where it has some.

    Arguments:
        model: the mixture.
        guide: the guide.
    """
    if isinstance(guide, PointGuide) and model.prior == "flat":
        return PointUpdates(model, guide)
    if isinstance(guide, NormalWishartGuide) and isinstance(model.prior, Conjugate):
        return ConjugateUpdates(model, guide, conjugate_to(model, model.prior))
    return None


_SEED_ROWS, _SEED_ROWS_EACH = 1_000, 50  # rows that seeds are chosen among, at least


@dataclass(frozen=True)
class _Rows:
    """Rows, standardised, and the log-volume of the cells of each that are there."""

    x: Tensor
    y: Tensor
    log_units: Tensor


@dataclass
class _Updates:
    """What both have in common: rows in, moments out, and where to start."""

    model: GaussianMixture
    guide: Guide

    _held: _Rows | None = field(default=None, init=False, repr=False)

    def point(self) -> Point:
        """The components that rows are compared with."""
        raise NotImplementedError

    def maximise(self, statistics: Mapping[str, Tensor]) -> None:
        """See :class:`latentlab.protocols.Updates`."""
        raise NotImplementedError

    def place(
        self, seed: int, x: Tensor, weights: Tensor | None = None, size: int | None = None
    ) -> None:
        """See :class:`latentlab.protocols.PlacesStarts`: components around seeds far apart."""
        model, generator = self.model, Generator(x.device).manual_seed(seed)
        y = self._look(x).y
        counts = torch.ones_like(y[:, 0]) if weights is None else weights.to(y)
        filled, K = y.nan_to_num(0.0), model.num_components
        few = torch.randperm(len(y), generator=generator, device=y.device)[
            : max(_SEED_ROWS, _SEED_ROWS_EACH * K)
        ]
        choose = random_rows if model.init == "random" else greedy_rows
        seeds = choose(filled[few], counts[few], K, generator)
        shares = clustered(filled, counts, seeds)
        number, total = shares.sum(1), shares @ filled
        if model.covariance in ("full", "tied"):
            squares = torch.stack([(filled * share[:, None]).T @ filled for share in shares])
        else:
            squares = shares @ filled**2
        scale = 1.0 if size is None else size / len(x)
        # A pseudo-row keeps a cluster of a few rows from having no width.
        eye = torch.eye(model.num_features).to(y)
        unit = eye if squares.dim() == 3 else eye.diagonal()
        found = {"number": number + 1, "total": total, "squares": squares + unit / 4}
        self.maximise({name: scale * value for name, value in found.items()})

    def _look(self, x: Tensor) -> _Rows:
        """The rows as they are needed, kept for the next step with them."""
        held = self._held
        if held is None or held.x is not x:
            y = (x.double() - self.model.center) / self.model.unit
            unit = self.model.unit.double().expand(y.shape[1]).log()
            present = (~y.isnan()).double() @ unit if bool(y.isnan().any()) else None
            self._held = held = _Rows(
                x, y, unit.sum().expand(len(y)) if present is None else present
            )
        return held

    def _moments(self, at: Point, x: Tensor, weights: Tensor | None, size: int | None) -> Moments:
        """The moments of all rows, and their log-likelihood in the units of the data."""
        rows = self._look(x)
        y, cells, counts = rows.y, rows.log_units, None
        if weights is not None:  # a blank row of weight 0 counts for nothing
            counts = weights.to(y)
            y, cells = torch.where(counts[:, None] > 0, y, 0.0), cells * counts
        found = expected(at, y, counts)
        scale = 1.0 if size is None else size / len(x)
        log_lik = found.log_likelihood - cells.sum()
        parts = (log_lik, found.number, found.total, found.squares)
        return Moments(*(scale * part for part in parts))


class PointUpdates(_Updates):
    """Expectation-maximisation, for a point and no prior."""

    def statistics(
        self, x: Tensor, weights: Tensor | None = None, size: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See :class:`latentlab.protocols.Updates`; the bound is the log-likelihood."""
        found = self._moments(self.point(), x, weights, size)
        return _statistics(found), found.log_likelihood

    def maximise(self, statistics: Mapping[str, Tensor]) -> None:
        """See :class:`latentlab.protocols.Updates`."""
        model, found = self.model, _moments(statistics)
        at = maximum(found, model.covariance, floor=model.floor)
        scales, correlations = at.without_floor(model.floor)
        values = {
            "weights": at.log_weights.exp(),
            "locs": model.center + model.unit * at.locs,
            "scales": model.unit * scales,
        }
        if model.is_tilted and correlations is not None:
            values["correlations"] = correlations
        if model.covariance == "spherical":
            values["scales"] = values["scales"][:, 0]
        if model.covariance == "tied":
            values |= {k: values[k][0] for k in ("scales", "correlations") if k in values}
        guide = self.guide
        u = guide.pack({k: v.unsqueeze(0) for k, v in values.items()})[0]
        guide.start(u, guide.free_sd().clone())

    def point(self) -> Point:
        """The components where the guide is, their floor included."""
        guide, model = self.guide, self.model
        found = guide.unpack(guide.free_mean().unsqueeze(0))[0]
        values = {z.name: found[z.name].reshape(z.shape).double() for z in guide.latents}
        K, D = model.num_components, model.num_features
        ratio = values["scales"] / model.unit
        if model.covariance == "spherical":
            ratio = ratio.unsqueeze(-1)
        ratio = ratio.expand(K, D)
        spreads = ratio.square() + model.floor**2
        if model.covariance in ("full", "tied"):
            spreads = spreads.diag_embed()
            if "correlations" in values:
                tril = ratio.unsqueeze(-1) * correlation_tril(values["correlations"], D)
                floor = model.floor**2 * torch.eye(D).to(ratio)
                spreads = tril @ tril.mT + floor
        locs = (values["locs"] - model.center) / model.unit
        return Point(values["weights"].log(), locs, spreads)


@dataclass
class ConjugateUpdates(_Updates):
    """Variational Bayes, for a conjugate prior and its guide."""

    guide: NormalWishartGuide
    prior: NormalWishart

    def statistics(
        self, x: Tensor, weights: Tensor | None = None, size: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See :class:`latentlab.protocols.Updates`; the bound is that of variational Bayes."""
        found = self._moments(self.point(), x, weights, size)
        return _statistics(found), found.log_likelihood - self._family().kl(self.prior)

    def maximise(self, statistics: Mapping[str, Tensor]) -> None:
        """See :class:`latentlab.protocols.Updates`."""
        found, prior = _moments(statistics), self.prior
        strength = prior.strength + found.number
        locs = found.total / strength.unsqueeze(-1)
        squares, is_tilted = found.squares, prior.is_tilted
        if is_tilted != (squares.dim() == 3):  # of one column, which has one shape
            squares = squares.unsqueeze(-1) if is_tilted else squares.squeeze(-1)
        if is_tilted:
            gain = squares - strength[:, None, None] * locs[:, :, None] * locs[:, None, :]
        else:
            gain = (squares - strength.unsqueeze(-1) * locs**2)[..., None, None]
        number = found.number
        if not prior.dof.dim():  # one block for all components
            number, gain = number.sum(), gain.sum(0)
        elif gain.dim() == 4 and prior.dof.dim() == 2:  # one for each cell
            number = number.unsqueeze(-1)
        elif gain.dim() == 4:  # one for all cells of a component
            number, gain = number * locs.shape[-1], gain.sum(1)
        family = NormalWishart(
            prior.concentration + found.number,
            strength,
            locs,
            prior.dof + number,
            prior.scale + gain,
        )
        self.guide.put(self._out(family))

    def point(self) -> Point:
        """The components that have the expected log-densities."""
        family = self._family()
        return Point(family.expected_log_weights(), family.locs, family.widths())

    def _family(self) -> NormalWishart:
        """The guide's distribution, for standardised rows."""
        found, unit = self.guide.distribution, 1 / self.model.unit.double()
        locs = (found.locs - self.model.center) * unit
        return NormalWishart(
            found.concentration, found.strength, locs, found.dof, _in_units(found.scale, unit)
        )

    def _out(self, family: NormalWishart) -> NormalWishart:
        """A distribution for standardised rows, in the units of the data."""
        unit = self.model.unit.double()
        return NormalWishart(
            family.concentration,
            family.strength,
            self.model.center + unit * family.locs,
            family.dof,
            _in_units(family.scale, unit),
        )


def _in_units(scale: Tensor, unit: Tensor) -> Tensor:
    """Scale matrices (blocks, d, d) in other units (D,) or ()."""
    if unit.dim() and scale.dim() == 4:  # one for each cell: (K, D, 1, 1)
        return scale * unit.square().reshape(-1, 1, 1)
    return scale * unit.unsqueeze(-1) * unit if unit.dim() else scale * unit.square()


def _statistics(moments: Moments) -> dict[str, Tensor]:
    return {"number": moments.number, "total": moments.total, "squares": moments.squares}


def _moments(statistics: Mapping[str, Tensor]) -> Moments:
    number, total, squares = (statistics[k] for k in ("number", "total", "squares"))
    return Moments(number.new_zeros(()), number, total, squares)
