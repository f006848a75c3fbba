r"""Probabilistic principal components, and factor analysis.

.. math::
    \mu_d \sim \mathcal{N}(m_d, (3 s_d)^2), \quad
    W_{dl} \sim \mathcal{N}(0, s_d^2), \quad
    \sigma_d \sim \mathrm{LogNormal}(\log \tfrac{s_d}{2}, 1), \\
    z_n \sim \mathcal{N}(0, I_L), \quad
    x_n \mid z_n \sim \mathcal{N}(\mu + W z_n, \mathrm{diag}(\sigma^2 + f^2 s^2))

:math:`m_d` and :math:`s_d` are the mean and standard deviation of column d; the principal
components have one :math:`\sigma` and one s for all columns. The latents :math:`z_n` are summed
out, :math:`x_n \sim \mathcal{N}(\mu, W W^\top + \ldots)`, and are exact once W is known.

W is known up to a rotation of the latents, which changes no density. The rotation is taken where
L of the rows of W, the pivots, form a lower triangle with a positive diagonal. The prior of W has
no favourite rotation, so that the triangle has a prior of its own that leaves :math:`W W^\top` as
it is: chi on the diagonal, normal below. Pivots are columns that the latents tell most apart.
:meth:`~ProbabilisticPCA.loadings` and :meth:`~ProbabilisticPCA.encode` turn the latents to the
principal axes. The floor :math:`f = 10^{-3}` keeps noise from vanishing.

Letters: N rows, D features, L latent dimensions, P = D L - L (L + 1) / 2 loadings, S draws.

References:
    | Probabilistic principal component analysis (Tipping and Bishop, 1999)
    | Bayesian factor analysis and model selection: a note on the order-invariant prior
      (Leung and Drton, 2016)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import AffineTransform

from latentlab.data.checks import as_count, warn_constant
from latentlab.data.table import Table
from latentlab.distributions.chi import Chi
from latentlab.distributions.completion import Completed
from latentlab.distributions.low_rank import LowRankNormal
from latentlab.guides import FullRank, Guide, MeanField, Point
from latentlab.models.gmm_units import mean_and_sd, warn_far
from latentlab.models.over_rows import OverRows, as_latents
from latentlab.models.ppca_optimum import find_optimum
from latentlab.models.ppca_parts import (
    FLOOR,
    Encoding,
    pattern_of,
    pivoted,
    remarks_on_latents,
    triangle_of,
    turns_of,
)
from latentlab.plates import rows

__all__ = ["FactorAnalysis", "ProbabilisticPCA"]

_LEAST = 1e-8  # of a column's standard deviation: the least that values start from
_START_ROWS = 20_000  # rows that starting values look at
_CHUNK = 2**22  # numbers of (S, N, D) held at a time
_FULL = 400  # numbers that a full-rank guide is for


class _Linear(OverRows):
    """What both models share; they differ in their noise."""

    center: Tensor
    spread: Tensor
    order: Tensor
    rank: Tensor
    num_rows: Tensor
    pattern: Tensor
    row_of: Tensor
    shared = True

    def __init__(
        self, num_features: int, latent_dim: int, *, prior: Literal["weak", "flat"] = "weak"
    ) -> None:
        super().__init__()
        D = self.num_features = as_count(num_features, "num_features")
        self.event_shape = (D,)
        L = self.latent_dim = as_count(latent_dim, "latent_dim")
        if L >= D:
            raise ValueError(
                f"latent_dim: expected less than num_features={D}, got {L}; noise needs a "
                "dimension of its own"
            )
        if prior not in ("weak", "flat"):
            raise ValueError(f'prior: expected "weak" or "flat", got {prior!r}')
        self.prior = prior
        self.register_buffer("center", torch.zeros(D))
        self.register_buffer("spread", torch.ones(D))
        self.register_buffer("order", torch.arange(D))  # of the columns, pivots first
        self.register_buffer("rank", torch.arange(D))  # its inverse
        self.register_buffer("num_rows", torch.tensor(0.0, dtype=torch.float64))
        pattern, row_of = pattern_of(D, L)
        self.register_buffer("pattern", pattern, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)

    @property
    def dims(self) -> Mapping[str, Sequence[str]]:
        """Site -> names of its axes."""
        noise = {"scale": ()} if self.shared else {"scales": ("feature",)}
        named = {"loc": ("feature",), "pivots": ("latent",), "loadings": ("loading",)}
        return named | noise | {"x": ("row", "feature")}

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model: all rows (``x``), a mini-batch (``x``, ``size``) or a draw (``size``).

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            size: the number of rows that x stands for.
        """
        if x is not None:
            self._expect_shape(x)
        latents = self._draw_latents()
        with rows(x, size):
            return pyro.sample("x", self.likelihood(*latents), obs=x)

    def likelihood(
        self, loc: Tensor, pivots: Tensor, loadings: Tensor, noise: Tensor
    ) -> LowRankNormal:
        """The distribution of a row given the parameters, its latents summed out.

        Arguments:
            loc: shape (..., D).
            pivots: shape (..., L).
            loadings: shape (..., P).
            noise: ``scale``, shape (...), or ``scales``, shape (..., D).
        """
        ratio = (noise.unsqueeze(-1) if self.shared else noise) / self._unit
        variances = (ratio.square() + FLOOR**2).expand(loc.shape)
        unit = self._unit.expand(self.num_features)
        factor = self.factor(pivots, loadings) / unit.unsqueeze(-1)
        return LowRankNormal((loc - self.center) / unit, factor, variances, self.center, unit)

    def factor(self, pivots: Tensor, loadings: Tensor) -> Tensor:
        """The matrix W that the two sites write, shape (..., D, L).

        Arguments:
            pivots: shape (..., L).
            loadings: shape (..., P).
        """
        numbers = torch.cat([pivots, loadings, torch.zeros_like(pivots[..., :1])], -1)
        ordered = numbers.index_select(-1, self.pattern)
        ordered = ordered.unflatten(-1, (self.num_features, self.latent_dim))
        return ordered.index_select(-2, self.rank)

    def default_guide(self) -> Guide:
        """A full-rank Gaussian, or a mean-field one where that would take over 80,000 numbers.

        With a flat prior a point: what has no prior may have no posterior either.
        """
        if self.prior == "flat":
            return Point()
        D, L = self.num_features, self.latent_dim
        numbers = D + len(self.row_of) + L + (1 if self.shared else D)
        return FullRank() if numbers <= _FULL else MeanField()

    def scale_to(self, x: Tensor | Table, size: int | None = None) -> Any:  # noqa: ANN401
        """Set the priors in the units of the data, and choose the pivots, in place.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            size: the number of rows that x stands for.

        Returns:
            The model itself.

        Raises:
            ValueError: if x is not N rows of ``num_features`` numbers.
        """
        table = self._table(x, min_rows=2)
        center, spread = mean_and_sd(table.x)
        warn_constant(table)
        warn_far(table, spread)
        rounding = 8 * torch.finfo(table.x.dtype).eps * center.abs()
        size_of = torch.where(center == 0, 1.0, center.abs())
        self.center = center
        self.spread = torch.where(spread > rounding, spread, size_of)
        some = table.x[:: -(-len(table) // _START_ROWS)]
        self.order = pivoted((some - self.center) / self.spread, self.latent_dim)
        self.rank = self.order.argsort()
        total = float(len(table) if size is None else size)
        self.num_rows = torch.tensor(total, dtype=torch.float64)
        return self

    def optimum(self, x: Tensor | Table) -> dict[str, Tensor]:
        """Where the likelihood is largest; what ``prior="flat"`` is fitted to.

        In closed form where the noise is equal and no cell is missing.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.

        Returns:
            A value for each site, in the units of x.
        """
        x = self._table(x, min_rows=2).x
        y = (x - self.center) / self._unit
        found = find_optimum(y, self.latent_dim, shared=self.shared, least=FLOOR**2)
        unit = self._unit.double().expand(self.num_features)
        factor = unit.unsqueeze(-1) * found.factor
        pivots, loadings = triangle_of(factor.index_select(0, self.order))
        rest = (found.variances - FLOOR**2).clamp_min(_LEAST).sqrt() * unit
        values = {
            "loc": self.center + unit * found.loc,
            "pivots": torch.maximum(pivots, _LEAST * unit[self.order[: self.latent_dim]]),
            "loadings": loadings,
            self._noise: rest[0] if self.shared else rest,
        }
        return {site: value.to(x) for site, value in values.items()}

    def starting_values(
        self, x: Tensor | Table, size: int | None = None, *, seed: int = 0
    ) -> dict[str, Tensor]:
        """The optimum of the likelihood, by 20,000 of the rows where there are more.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            size: unused; as for :meth:`scale_to`.
            seed: which rows these are.
        """
        x = self._table(x, min_rows=2).x
        if len(x) > _START_ROWS:
            generator = torch.Generator(x.device).manual_seed(seed)
            x = x[torch.randperm(len(x), generator=generator, device=x.device)[:_START_ROWS]]
        return self.optimum(x)

    # ---- what a fitted one answers -------------------------------------------------------------

    def distribution(self, draws: Mapping[str, Tensor]) -> LowRankNormal:
        """The distributions of a row at draws of the parameters, batch shape (S, 1).

        Arguments:
            draws: site -> draws (S, ...), as ``Posterior.sample`` returns them.
        """
        return self.likelihood(*(draws[site].unsqueeze(1) for site in self._sites))

    def loadings(self, draws: Mapping[str, Tensor]) -> Tensor:
        """W with latents turned to the principal axes, in the units of x, shape (S, D, L).

        The axes are those of the mean of the draws, the one that explains most first; each draw
        is turned as close to them as it goes.

        Arguments:
            draws: as for :meth:`distribution`.
        """
        factor = self.factor(draws["pivots"], draws["loadings"])
        return factor @ self._turns(draws)

    def encode(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Encoding:
        r"""Mean and covariance of the latents of each row, in the axes of :meth:`loadings`.

        Given the parameters :math:`z_n` is normal, exactly; over the draws its moments add up.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`distribution`.
        """
        x, turns, count = self._table(x, 0).x, self._turns(draws), len(draws["loc"])
        N, L = len(x), self.latent_dim
        first, second = x.new_zeros(N, L), x.new_zeros(N, L, L)
        with torch.no_grad():
            for s, part in self._parts(draws, N):
                mean, precision = self.distribution(part).codes(x)
                turn = turns[s].unsqueeze(1)
                tril = torch.linalg.cholesky(precision)
                half = torch.linalg.solve_triangular(tril, turn.expand_as(tril), upper=False)
                mean = (mean.unsqueeze(-2) @ turn).squeeze(-2)  # (S, N, L)
                first += mean.sum(0) / count
                outer = mean.unsqueeze(-1) * mean.unsqueeze(-2) + half.mT @ half
                second += outer.sum(0) / count
        return Encoding(first, second - first.unsqueeze(-1) * first.unsqueeze(-2))

    def decode(self, z: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Mean of rows given latents in the axes of :meth:`loadings`, shape (..., D).

        Arguments:
            z: latents, shape (..., L).
            draws: as for :meth:`distribution`.
        """
        z = as_latents(z, self.latent_dim)
        return draws["loc"].mean(0) + z.to(draws["loc"]) @ self.loadings(draws).mean(0).mT

    def reconstruct(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Tensor:
        """Rows as their latents explain them, missing cells included, shape (N, D).

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`distribution`.
        """
        x, count = self._table(x, 0).x, len(draws["loc"])
        mean = torch.zeros_like(x)
        with torch.no_grad():
            for _, part in self._parts(draws, len(x)):
                row = self.distribution(part)
                codes = row.codes(x).mean
                y = row.loc + (row.factor @ codes.unsqueeze(-1)).squeeze(-1)
                mean += (row.unit * y).sum(0) / count
        return self.center + mean

    def impute(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Completed:
        """Mean and standard deviation of missing cells given those that are there, exact.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`distribution`.
        """
        x, count = self._table(x, 0).x, len(draws["loc"])
        missing, unit = x.isnan(), self._unit.expand(self.num_features)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        with torch.no_grad():
            for _, part in self._parts(draws, len(x)):
                mean, variance = self.distribution(part).completed(x)
                away = torch.where(missing, (mean - self.center) / unit, 0.0)
                first += away.sum(0) / count
                second += (variance / unit.square() + away.square()).sum(0) / count
        sd = unit * (second - first.square()).clamp_min(0.0).sqrt()
        mean = torch.where(missing, self.center + unit * first, x)
        return Completed(mean, torch.where(missing, sd, 0.0))

    def log_prob(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Tensor:
        """Log posterior predictive density of each row in nats, shape (N,).

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`distribution`.
        """
        x, count = self._table(x, 0).x, len(draws["loc"])
        with torch.no_grad():
            terms = [
                self.distribution(part).log_prob(x).logsumexp(0)
                for _, part in self._parts(draws, len(x))
            ]
        return torch.stack(terms).logsumexp(0) - math.log(count)

    # ---- what it lends the engine --------------------------------------------------------------

    def label_rows(self, draws: Mapping[str, Tensor], x: Tensor | Table) -> dict[str, Tensor]:
        """Columns for a table of rows: the mean of each latent, and the log-density."""
        mean = self.encode(x, draws).mean
        columns = {f"z_{j}": mean[:, j] for j in range(self.latent_dim)}
        return columns | {"log_prob": self.log_prob(x, draws)}

    def remarks(self, draws: Mapping[str, Tensor], *data: Any) -> list[str]:  # noqa: ANN401
        """What the draws say of the number of latents, and of columns without noise."""
        row = self.distribution({site: draws[site].double() for site in self._sites})
        return remarks_on_latents(row, float(self.num_rows), own_noise=not self.shared)

    def plot_fit(self, draws: Mapping[str, Tensor], names: Sequence[str], x: Tensor) -> Any:  # noqa: ANN401
        """A map of the latents of the rows; returns matplotlib axes."""
        from latentlab.report.images import plot_latents

        mean, covariance = self.encode(x[:: -(-len(x) // 2_000)], draws)
        sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return plot_latents(mean.numpy(force=True), sd.numpy(force=True))

    def spec(self) -> dict[str, Any]:
        """What builds this model again; its buffers hold the units and the pivots."""
        arguments = {
            "num_features": self.num_features,
            "latent_dim": self.latent_dim,
            "prior": self.prior,
        }
        return {"class": type(self).__name__, "arguments": arguments}

    # ---- inside --------------------------------------------------------------------------------

    @property
    def _noise(self) -> str:
        return "scale" if self.shared else "scales"

    @property
    def _sites(self) -> tuple[str, ...]:
        return ("loc", "pivots", "loadings", self._noise)

    @property
    def _unit(self) -> Tensor:
        """What the rows are measured in: each column's spread (D,), or their mean ()."""
        return self.spread.mean() if self.shared else self.spread

    def _draw_latents(self) -> tuple[Tensor, ...]:
        """The parameters from their prior."""
        L, unit = self.latent_dim, self._unit.expand(self.num_features)
        ordered = unit.index_select(0, self.order)
        df = torch.arange(L, 0, -1, dtype=unit.dtype, device=unit.device)
        scale = dist.LogNormal((self._unit / 2).log(), 1.0)
        priors: dict[str, Any] = {
            "loc": _normal(self.center, 3 * self.spread).to_event(1),
            "pivots": Chi(df, ordered[:L]).to_event(1),
            "loadings": _normal(0.0, ordered.index_select(0, self.row_of)).to_event(1),
            self._noise: scale if self.shared else scale.to_event(1),
        }
        with poutine.mask(mask=False) if self.prior == "flat" else nullcontext():
            return tuple(pyro.sample(site, prior) for site, prior in priors.items())

    def _turns(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Rotations of the latents of each draw, (S, L, L)."""
        with torch.no_grad():
            return turns_of(self.distribution(draws))

    def _parts(
        self, draws: Mapping[str, Tensor], num_rows: int
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """A few draws at a time."""
        width = max(self.num_features, self.latent_dim**2)
        step = max(1, _CHUNK // (max(1, num_rows) * width))
        for start in range(0, len(draws["loc"]), step):
            some = slice(start, start + step)
            yield some, {site: draws[site][some] for site in self._sites}


class ProbabilisticPCA(_Linear):
    r"""Probabilistic principal component analysis: rows are L latents plus equal noise.

    Sites: ``loc`` (D,), ``pivots`` (L,) and ``loadings`` (P,), which write W together, ``scale``
    (), and the observed ``x`` (N, D). NaN cells are missing and integrated out exactly.

    Arguments:
        num_features: number of columns D.
        latent_dim: number of latents L, below D.
        prior: ``"weak"``, or ``"flat"`` for none at all; the mode, ``guide="point"``, is then the
            maximum of the likelihood, which :meth:`optimum` has in closed form.

    Raises:
        ValueError: if a count is not an int of at least 1, L is not below D, or the prior is
            neither.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100)
        >>> model = ll.ProbabilisticPCA(num_features=2, latent_dim=1, prior="flat").scale_to(x)
        >>> best = {site: value[None] for site, value in model.optimum(x).items()}
        >>> model.encode(x, best).mean.shape
        torch.Size([100, 1])
    """

    shared = True


class FactorAnalysis(_Linear):
    r"""Factor analysis: rows are L latents plus noise of each column's own.

    Sites: ``loc`` (D,), ``pivots`` (L,) and ``loadings`` (P,), which write W together, ``scales``
    (D,), and the observed ``x`` (N, D). NaN cells are missing and integrated out exactly.

    Arguments:
        num_features: number of columns D.
        latent_dim: number of latents L, below D.
        prior: ``"weak"``, or ``"flat"`` for none at all; the mode, ``guide="point"``, is then the
            maximum of the likelihood.

    Raises:
        ValueError: if a count is not an int of at least 1, L is not below D, or the prior is
            neither.

    Example:
        >>> import latentlab as ll
        >>> ll.FactorAnalysis(num_features=3, latent_dim=1)(size=5).shape     # a prior draw
        torch.Size([5, 3])
    """

    shared = False


def _normal(loc: Tensor | float, scale: Tensor) -> dist.TransformedDistribution:
    """N(loc, scale) whose density squares no scale, so that none is too small or too large."""
    standard = dist.Normal(torch.zeros_like(scale), 1.0)
    return dist.TransformedDistribution(standard, [AffineTransform(loc, scale)])
