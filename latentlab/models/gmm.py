r"""Gaussian mixtures.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad
    \mu_{kd} \sim \mathcal{N}(m_d, (3 s_d)^2), \quad
    \sigma_{kd} \sim \mathrm{LogNormal}(\log \tfrac{s_d}{2}, 1), \quad
    R_k \sim \mathrm{LKJ}(1 + \tfrac{D}{2}), \\
    x_n \sim \textstyle\sum_k \pi_k \, \mathcal{N}(\mu_k, \Sigma_k), \qquad
    \Sigma_k = \mathrm{diag}(\sigma_k) \, R_k \, \mathrm{diag}(\sigma_k) + f^2 \mathrm{diag}(s^2)

:math:`m_d` and :math:`s_d` are the mean and standard deviation of column d, so that the prior says
the same whatever the units, and means, scales and the ELBO come out in the units of the data.
``covariance`` says what components are free in: ``"full"`` (all of it), ``"tied"`` (one
:math:`\sigma` and R for all of them), ``"diag"`` (:math:`R = I`) or ``"spherical"`` (one
:math:`\sigma_k` for all columns as well, about their mean :math:`s`).

The log-normal prior and the floor :math:`f = 10^{-3}` keep a component from collapsing onto one
row, where the likelihood has no maximum. The prior on R keeps one of D rows, which always lie in a
plane, from collapsing onto that. R is written by its partial correlations, see
:mod:`latentlab.distributions.correlations`. The labels :math:`z_n` are summed out, so that every
latent left is continuous and every guide applies.

Letters: N rows, D features, K components, P = D (D - 1) / 2 pairs of features, S draws.

References:
    | Bayesian regularization for normal mixture estimation (Fraley and Raftery, 2007)
    | Generating random correlation matrices based on vines and extended onion method
      (Lewandowski, Kurowicka and Joe, 2009)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import pyro
import torch
from torch import Generator, Tensor

from latentlab.data.checks import as_count, as_rows, warn_constant
from latentlab.data.table import Table
from latentlab.distributions import NormalMixture
from latentlab.distributions.completion import Completed, completed
from latentlab.distributions.correlations import correlation_tril
from latentlab.guides import FullRank, Guide, MeanField, NormalWishart, Point
from latentlab.models.gmm_em import Covariance
from latentlab.models.gmm_priors import Conjugate, Prior, as_prior, draw_latents
from latentlab.models.gmm_remarks import remarks_on_components
from latentlab.models.gmm_rows import counted
from latentlab.models.gmm_starts import find_start
from latentlab.models.gmm_units import as_counts, check_one_a_row, mean_and_sd, warn_far
from latentlab.models.gmm_updates import ConjugateUpdates, PointUpdates, updates_of
from latentlab.models.over_rows import OverRows
from latentlab.plates import rows

__all__ = ["GaussianMixture"]

_FLOOR = 1e-3  # of a column's standard deviation
_ROUNDING = 1e-13  # of a variance: a correlation matrix keeps its Cholesky factor
_START_ROWS = 20_000  # rows that starting values look at
_CHUNK = 2**24  # elements of (S, N, K) held at a time
_CHOICES = {
    "covariance": ("full", "tied", "diag", "spherical"),
    "init": ("k-means++", "random"),
}


class GaussianMixture(OverRows):
    r"""Mixture of K Gaussians over rows of D numbers.

    Sites: ``weights`` (K,), ``locs`` (K, D), ``scales`` and, with correlations, ``correlations``,
    and the observed ``x`` (N, D). NaN cells of ``x`` count as missing and are integrated out
    exactly, whatever the covariance.

    ==============  ================  ===================
    ``covariance``  ``scales``        ``correlations``
    ==============  ================  ===================
    "full"          (K, D)            (K, P) if D > 1
    "tied"          (D,)              (P,) if D > 1
    "diag"          (K, D)
    "spherical"     (K,)
    ==============  ================  ===================

    Arguments:
        num_features: number of columns D.
        num_components: number of components K.
        covariance: the shape of the covariances; ``"diag"`` takes columns as independent within a
            component, and needs the fewest rows but for ``"spherical"``.
        prior: ``"weak"``; ``"flat"`` for none at all: the mode, ``guide="point"``, is then the
            maximum of the likelihood, by expectation-maximisation; ``"conjugate"``, or a
            :class:`Conjugate`: Dirichlet times normal-Wishart, fitted by variational Bayes.
        concentration: :math:`\alpha` of the Dirichlet prior; below 1 favours few components.
        init: how starting means are chosen, ``"k-means++"`` (far apart) or ``"random"`` rows.

    Raises:
        ValueError: if a count is not an int of at least 1, or another argument is out of range.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100)
        >>> model = ll.GaussianMixture(num_features=2, num_components=2, covariance="full")
        >>> model(size=5).shape                                  # a prior draw
        torch.Size([5, 2])
        >>> model.scale_to(x.x)(x.x[:10], size=100).shape        # 10 rows stand for 100
        torch.Size([10, 2])
    """

    center: Tensor
    spread: Tensor
    num_rows: Tensor

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        covariance: Covariance = "diag",
        prior: Literal["conjugate"] | Prior = "weak",
        concentration: float = 1.0,
        init: Literal["k-means++", "random"] = "k-means++",
    ) -> None:
        super().__init__()
        self.num_features = as_count(num_features, "num_features")
        self.event_shape = (self.num_features,)
        self.num_components = as_count(num_components, "num_components")
        if not isinstance(concentration, int | float) or not 0 < concentration < math.inf:
            raise ValueError(f"concentration: expected a number > 0, got {concentration!r}")
        for name, value in (("covariance", covariance), ("init", init)):
            if value not in _CHOICES[name]:
                known = " or ".join(f'"{choice}"' for choice in _CHOICES[name])
                raise ValueError(f"{name}: expected {known}, got {value!r}")
        self.concentration = float(concentration)
        self.covariance, self.init = covariance, init
        self.prior = as_prior(prior, self.num_features, self.is_tilted)
        self.assume_missing = True  # until rows without a missing cell were seen
        self.register_buffer("center", torch.zeros(self.num_features))
        self.register_buffer("spread", torch.ones(self.num_features))
        self.register_buffer("num_rows", torch.tensor(0.0, dtype=torch.float64))

    @property
    def exchangeable(self) -> Mapping[str, int]:
        """Site -> the axis, from the right, that runs over the components."""
        axes = {site: (dims, len(dims)) for site, dims in self.dims.items() if "component" in dims}
        return {site: dims.index("component") - num for site, (dims, num) in axes.items()}

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Site -> names of its axes."""
        own = () if self.covariance == "tied" else ("component",)
        columns = () if self.covariance == "spherical" else ("feature",)
        named: dict[str, Sequence[str]] = {
            "weights": ("component",),
            "locs": ("component", "feature"),
            "scales": (*own, *columns),
            "x": ("row", "feature"),
        }
        return named | {"correlations": (*own, "pair")} if self.is_tilted else named

    @property
    def is_tilted(self) -> bool:
        """Whether the columns of a component are correlated."""
        return self.covariance in ("full", "tied") and self.num_features > 1

    @property
    def unit(self) -> Tensor:
        """What scales are measured in: each column's spread (D,), or their mean ()."""
        return self.spread.mean() if self.covariance == "spherical" else self.spread

    @property
    def floor(self) -> float:
        """The floor f under the scales; none with a prior that keeps them from zero itself."""
        return 0.0 if isinstance(self.prior, Conjugate) else _FLOOR

    def forward(
        self, x: Tensor | None = None, weights: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """The model: all rows (``x``), a mini-batch (``x``, ``size``) or a draw (``size``).

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            weights: how often each row counts, shape (N,); a weight of 2 is the row twice.
            size: the number of rows that x stands for.
        """
        if x is not None:
            self._expect_shape(x)
        if x is not None and weights is not None:
            check_one_a_row(weights, len(x))
        latents = draw_latents(self)
        with rows(x, size), counted(weights):
            return pyro.sample("x", self.likelihood(**latents), obs=x)

    def likelihood(
        self, weights: Tensor, locs: Tensor, scales: Tensor, correlations: Tensor | None = None
    ) -> NormalMixture:
        """The distribution of a row given the latents, labels summed out.

        Arguments:
            weights: shape (K,), or (S, 1, K) for S draws, the 1 for the plate of rows.
            locs: shape (K, D), or (S, K, D).
            scales: as the site, or (S, ...); with one for all components, (S, 1, D).
            correlations: as the site, or (S, ...); with one for all components, (S, 1, P).

        Returns:
            The mixture, batch shape () or (S, 1).
        """
        if self.covariance == "spherical":
            scales = scales.unsqueeze(-1)
        several = locs.dim() > 2  # K left its plate and became an event: make room for the rows
        if several:
            locs = locs.unsqueeze(-3)
        if several or self.covariance == "tied":
            place = -3 if several else 0
            scales = scales.unsqueeze(place)
            correlations = None if correlations is None else correlations.unsqueeze(place)
        ratio = scales / self.unit
        floored = (ratio**2 + self.floor**2).sqrt()
        if correlations is None:
            return NormalMixture(weights, locs, self.unit * floored)
        # The floor widens scales, and shrinks correlations by what it adds.
        share = (ratio / floored).double()
        tril = share.unsqueeze(-1) * correlation_tril(correlations.double(), self.num_features)
        rest = (1 - share) * (1 + share) + _ROUNDING
        tril = torch.linalg.cholesky_ex(tril @ tril.mT + rest.diag_embed())[0]
        tril = (self.unit * floored).unsqueeze(-1) * tril
        missing = self.assume_missing
        return NormalMixture(weights, locs, scale_trils=tril, assume_missing=missing)

    def default_guide(self) -> Guide:
        """A full-rank Gaussian, or a mean-field one where that would take over 80,000 numbers.

        With a flat prior a point: what has no prior may have no posterior either; with a
        conjugate one, Dirichlet times normal-Wishart.
        """
        if self.prior != "weak":
            return Point() if self.prior == "flat" else NormalWishart()
        K, D = self.num_components, self.num_features
        of_one = {"spherical": 1, "diag": D, "tied": 0, "full": D * (D + 1) // 2}[self.covariance]
        shared = D * (D + 1) // 2 if self.covariance == "tied" else 0
        return FullRank() if K * (1 + D + of_one) - 1 + shared <= 400 else MeanField()

    def updates(self, guide: object) -> PointUpdates | ConjugateUpdates | None:
        """Updates in closed form: of a point with a flat prior, and of a conjugate guide."""
        return updates_of(self, guide)

    def scale_to(
        self, x: Tensor | Table, weights: Tensor | None = None, size: int | None = None
    ) -> GaussianMixture:
        """Set the priors in the units of the data, in place.

        Warns of constant columns, and of a value so far away that the rest look alike.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            weights: how often each row counts, shape (N,); once by default.
            size: the number of rows that x stands for; by default its own, or the sum of weights.

        Returns:
            The model itself.

        Raises:
            ValueError: if x is not N rows of ``num_features`` numbers, or weights are negative,
                not finite, all zero or not N.
        """
        table, counts = self._counted_table(x, weights)
        num_rows = len(table) if counts is None else int((counts > 0).sum())
        if num_rows < self.num_components:
            of_weight = "" if counts is None else " with a weight above 0"
            raise ValueError(
                f"num_components: expected at most the number of rows, got "
                f"{self.num_components} components for {num_rows} rows{of_weight}"
            )
        center, spread = mean_and_sd(table.x, counts)
        warn_constant(table)
        warn_far(table, spread)
        # Where rounding alone tells rows apart, a column's size is its scale, one if it is zero.
        rounding = 8 * torch.finfo(table.x.dtype).eps * center.abs()
        size_of = torch.where(center == 0, 1.0, center.abs())
        varies = spread > rounding
        if self.covariance == "spherical" and bool(varies.any()):  # one scale: that of the others
            size_of = spread[varies].mean().expand_as(spread)
        self.center = center
        self.spread = torch.where(varies, spread, size_of)
        total = float(len(table) if counts is None else counts.sum())
        self.num_rows = torch.tensor(total if size is None else float(size), dtype=torch.float64)
        self.assume_missing = bool(table.missing.any())  # a blank row is one, too
        return self

    def check_data(  # type: ignore[override]
        self, x: Tensor | Table, weights: Tensor | None = None, size: int | None = None
    ) -> None:
        """Refuse rows and weights that the model has no density of; as for ``scale_to``."""
        self._counted_table(x, weights, min_rows=1)

    def starting_values(
        self,
        x: Tensor | Table,
        weights: Tensor | None = None,
        size: int | None = None,
        *,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """A start: seeds by ``init``, then expectation-maximisation until it slows down.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing; 20,000 of them are looked at.
            weights: as for :meth:`scale_to`.
            size: unused; as for :meth:`scale_to`.
            seed: another seed, another start.

        Returns:
            A value for each latent, in the units of x.
        """
        x = self._table(x, min_rows=1).x
        counts = torch.ones(len(x)) if weights is None else as_counts(weights, len(x))
        counts = counts.to(x)
        generator = Generator(x.device).manual_seed(seed)
        some = torch.arange(len(x), device=x.device)
        if len(x) > _START_ROWS:
            some = torch.randperm(len(x), generator=generator, device=x.device)
        some = some[counts[some] > 0][:_START_ROWS]
        y, K = (x[some] - self.center) / self.unit, self.num_components
        start = find_start(y, counts[some], K, self.covariance, self.init, generator)
        scales, correlations = start.without_floor(self.floor)
        values = {
            "weights": start.log_weights.exp(),
            "locs": self.center + self.unit * start.locs.to(x),
            "scales": self.unit * scales.to(x),
        }
        if self.is_tilted and correlations is not None:
            values["correlations"] = correlations
        if self.covariance == "spherical":
            values["scales"] = values["scales"][:, 0]
        if self.covariance == "tied":
            values |= {site: values[site][0] for site in self._sites[2:]}
        return {site: value.to(x) for site, value in values.items()}

    def responsibilities(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Tensor:
        r"""Probability of each label for each row, averaged over posterior draws.

        .. math:: r_{nk} = \mathbb{E}_{q}\, p(z_n = k \mid x_n, \pi, \mu, \Sigma)

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: site -> draws (S, ...), as ``Posterior.sample`` returns them; component k is
                the same one in each draw.

        Returns:
            Probabilities, shape (N, K), rows sum to one.
        """
        return self._average(x, draws, lambda joint: joint.softmax(-1).mean(0))

    def log_prob(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Tensor:
        """Log posterior predictive density of each row in nats, shape (N,).

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`responsibilities`.
        """
        log_sum = self._average(x, draws, lambda joint: joint.logsumexp(-1).logsumexp(0))
        return log_sum - math.log(len(draws["weights"]))

    def impute(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Completed:
        """Mean and sd of missing cells given those that are there, exact for each draw.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`responsibilities`.
        """
        return completed(self.mixture(draws), self._table(x, min_rows=0).x)

    def mixture(self, draws: Mapping[str, Tensor]) -> NormalMixture:
        """The distributions of a row at draws of the latents, batch shape (S, 1).

        Arguments:
            draws: as for :meth:`responsibilities`.
        """
        shared = (
            ("weights", "scales", "correlations") if self.covariance == "tied" else ("weights",)
        )
        return self.likelihood(
            **{k: draws[k].unsqueeze(1) if k in shared else draws[k] for k in self._sites}
        )

    def label_rows(
        self, draws: Mapping[str, Tensor], x: Tensor | Table, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Columns for a table of rows: the most probable component, its odds, the log-density."""
        probs = self.responsibilities(x, draws)
        columns = {"component": probs.argmax(-1)}
        columns |= {f"probability_{k}": probs[:, k] for k in range(self.num_components)}
        return columns | {"log_prob": self.log_prob(x, draws)}

    def remarks(self, draws: Mapping[str, Tensor], *data: Any) -> list[str]:  # noqa: ANN401
        """What the draws say about the number of components.

        Components are taken at their posterior mean; see
        :func:`latentlab.models.gmm_remarks.remarks_on_components`.
        """
        mean = {site: draws[site].double().mean(0, keepdim=True) for site in self._sites}
        mixture = self.mixture(mean)
        weights, locs = mixture.weights[0, 0], mixture.locs[0, 0]
        trils = mixture.scale_trils
        if trils is None:
            trils = cast(Tensor, mixture.scales).expand_as(mixture.locs).diag_embed()
        unit = self.unit.double().expand(self.num_features)
        trils = (trils[0, 0] / unit.unsqueeze(-1)).expand(self.num_components, -1, -1)
        return remarks_on_components(weights, locs / unit, trils, float(self.num_rows))

    def plot_fit(
        self,
        draws: Mapping[str, Tensor],
        names: Sequence[str],
        x: Tensor,
        weights: Tensor | None = None,
    ) -> Any:  # noqa: ANN401
        """The data with the fitted components drawn on them; returns matplotlib axes."""
        from latentlab.report.plots import plot_mixture

        scales = draws["scales"]
        if self.covariance == "spherical":
            scales = scales.unsqueeze(-1)
        if self.covariance == "tied":
            scales = scales.unsqueeze(1)
        correlations = None
        if self.is_tilted:
            tril = correlation_tril(draws["correlations"].mean(0), self.num_features)
            shape = (self.num_components, self.num_features, self.num_features)
            correlations = (tril @ tril.mT).expand(shape).numpy(force=True)
        locs = draws["locs"]
        return plot_mixture(
            x.numpy(force=True),
            draws["weights"].numpy(force=True),
            locs.numpy(force=True),
            scales.expand_as(locs).numpy(force=True),
            names,
            correlations,
        )

    def spec(self) -> dict[str, Any]:
        """What builds this model again."""
        return {
            "class": "GaussianMixture",
            "arguments": {
                "num_features": self.num_features,
                "num_components": self.num_components,
                "covariance": self.covariance,
                "prior": self.prior if isinstance(self.prior, str) else self.prior.spec(),
                "concentration": self.concentration,
                "init": self.init,
            },
        }

    # ------------------------------------------------------------------------------------------

    @property
    def _sites(self) -> tuple[str, ...]:
        return tuple(site for site in self.dims if site != "x")

    def _counted_table(
        self, x: Tensor | Table, weights: Tensor | None, min_rows: int = 2
    ) -> tuple[Table, Tensor | None]:
        """The rows, those of weight zero blank, and how often each counts."""
        table = self._table(x, min_rows)
        if weights is None:
            return table, None
        counts = as_counts(weights, len(table)).to(table.x.device)
        if (counts > 0).all():
            return table, counts
        blank = torch.where(counts[:, None] > 0, table.x, torch.nan)
        return as_rows(Table(blank, table.names), min_rows=min_rows, allow_missing=True), counts

    def _average(
        self,
        x: Tensor | Table,
        draws: Mapping[str, Tensor],
        reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Reduce log-joints (S, n, K) of n rows at a time to n results."""
        x, mixture = self._table(x, min_rows=0).x, self.mixture(draws)
        step = max(1, _CHUNK // draws["weights"].numel())
        with torch.no_grad():
            return torch.cat([reduce(mixture.component_log_prob(part)) for part in x.split(step)])
