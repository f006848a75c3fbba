r"""Predictive checks: do data look like data that the model draws?

.. math:: p_T = \Pr(T(y^\mathrm{rep}) \ge T(y)), \qquad
          D^2 = (t - \bar t)^\top C^{-1} (t - \bar t)

T is a statistic of a whole data set; t holds all of them, and :math:`\bar t` and C are mean and
covariance over the data and their replicates. If the data are one more replicate, :math:`D^2` has
any rank among theirs with equal chance.

Letters: N rows, D features, R replicates, T statistics.

References:
    | Posterior predictive assessment of model fitness via realized discrepancies
      (Gelman, Meng and Stern, 1996)
    | Visualization in Bayesian workflow (Gabry, Simpson, Vehtari, Betancourt and Gelman, 2019)
    | Visualizing count data regressions using rootograms (Kleiber and Zeileis, 2016)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of
from latentlab.diagnostics.calibration import sbc_ranks
from latentlab.diagnostics.ecdf import Uniformity, uniformity
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.ppc_statistics import (
    Statistic,
    default_statistics,
    lag,
    named,
    values_of,
)
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Pit", "Ppc", "Rootogram", "pit", "plot_densities", "ppc", "rootogram"]

_LEVEL = 0.05
_FEWEST_REPLICATES = 20
_SHOWN = 4  # statistics by name
_MOST_BARS = 2**25  # times replicates: numbers in memory at once
_MOST_DRAWN = 50  # replicates in one picture


@dataclass(frozen=True, eq=False, repr=False)
class Ppc:
    """Result of :func:`ppc`.

    Arguments:
        names: of the statistics, T of them.
        observed: those of the data, shape (T,).
        replicated: those of the replicates, shape (R, T).
        p_values: share of replicates whose statistic is at least as large, ties half, shape (T,).
        p_se: its Monte Carlo standard error, shape (T,).
        distance: Mahalanobis distance of the data from the replicates in all statistics.
        p_value: share of data and replicates that are at least as far out.
    """

    names: tuple[str, ...]
    observed: Tensor
    replicated: Tensor
    p_values: Tensor
    p_se: Tensor
    distance: float
    p_value: Estimate

    @property
    def ok(self) -> bool:
        """True where the joint p-value is above 0.05."""
        return self.p_value.value > _LEVEL

    @property
    def z(self) -> Tensor:
        """Statistics of the data in standard deviations of the replicates, shape (T,)."""
        unit = unit_of(self.observed[None], self.replicated, dim=0)
        observed, replicated = self.observed / unit, self.replicated / unit
        off, sd = observed - replicated.mean(0), replicated.std(0)
        return torch.where(off == 0, 0.0, off / sd)

    @property
    def two_sided(self) -> Tensor:
        """Twice the smaller tail of each statistic, shape (T,)."""
        return 2 * torch.minimum(self.p_values, 1 - self.p_values)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Each statistic of the data among those of the replicates, in their standard deviations.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        replicated = self.replicated / unit_of(self.replicated, dim=0)
        sd = replicated.std(0)
        units = (replicated - replicated.mean(0)) / sd.where(sd > 0, 1.0)
        at = list(range(len(self.names)))
        low, middle, high = units.quantile(torch.tensor([0.025, 0.5, 0.975]).double(), 0)
        ax.hlines(at, low, high, color="0.6", linewidth=6, alpha=0.5)
        ax.plot(middle, at, "|", color="0.4")
        ax.plot(self.z.clamp(-8, 8), at, "o")
        ax.set_yticks(at, self.names)
        ax.invert_yaxis()
        title = f"all together: p = {self.p_value}"
        ax.set(xlabel="standard deviations of the replicates", title=title)
        return ax

    def __str__(self) -> str:
        if self.ok:
            R = len(self.replicated)
            return (
                f"data look like {R} replicates (p = {self.p_value}, {len(self.names)} statistics)"
            )
        found = []
        for t in self.two_sided.argsort(stable=True).tolist()[:_SHOWN]:
            if self.two_sided[t] <= _LEVEL:
                word = "high" if self.p_values[t] < 0.5 else "low"
                p = Estimate(float(self.p_values[t]), float(self.p_se[t]))
                found.append(f"{self.names[t]} too {word} (p = {p})")
        what = "; ".join(found) or "no single statistic, but how they go together"
        return f"data do not look like replicates (p = {self.p_value}): {what}"

    __repr__ = __str__


def ppc(
    observed: ArrayLike | Tensor,
    replicated: ArrayLike | Tensor,
    statistics: Mapping[str, Statistic] | None = None,
    ordered: bool = False,
) -> Ppc:
    """Compare statistics of the data with those of data that the model draws.

    How to read it: replicates of the *posterior* predictive ask whether the model fits; a joint
    p-value below 0.05 says that it does not, and the statistics in the text say where. Replicates
    of the *prior* predictive ask whether the data are anything that the model expects: if not, no
    posterior of it can be trusted. p-values of the posterior predictive have seen the data: they
    are not uniform but gather about one half, so that a small one is the more telling, and a
    statistic that the model fits directly, such as a normal model's mean, never fails. Take
    statistics that the model has no parameter for: the largest value, the share of zeros. What to
    do next: heavier tails where extremes fail, an overdispersed likelihood for the spread of
    counts, zero inflation for zeros, dependence for lag 1.

    Arguments:
        observed: the data, shape (N,) or (N, D).
        replicated: data sets drawn by the model, shape (R, N) or (R, N, D), R at least 20.
        statistics: name -> function of one data set; by default mean, sd, min and max of each
            feature, and for counts (whole numbers from 0) the share of zeros.
        ordered: whether rows are a sequence; adds the correlation of neighbours.

    Returns:
        p-values with Monte Carlo errors, one by one and joint.

    Raises:
        ValueError: for shapes that do not fit, too few replicates, or values or statistics that
            are not finite.

    References:
        | Posterior predictive assessment of model fitness (Gelman, Meng and Stern, 1996)

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> replicated = torch.poisson(torch.full((400, 200), 3.0), generator=rng)
        >>> print(ppc(torch.poisson(torch.full((200,), 3.0), generator=rng), replicated))
        data look like 400 replicates (p = 0.30 ± 0.02, 5 statistics)
        >>> rate = 3 * torch.rand(200, generator=rng) * 2
        >>> print(ppc(torch.poisson(rate, generator=rng), replicated))
        data do not look like replicates (p = 0.002 ± 0.002): sd too high ...
    """
    y, rep = _checked(observed, replicated, _FEWEST_REPLICATES)
    if statistics is None:
        names, one, many = default_statistics(y, rep, ordered)
    else:
        one = values_of(statistics, y)
        names = tuple(statistics)
        many = torch.stack([values_of(statistics, r) for r in rep])
        if ordered:
            names += named("lag 1", y)
            one = torch.cat([one, lag(y[None])[0]])
            many = torch.cat([many, lag(rep)], 1)
    if not names:
        raise ValueError("statistics: expected at least one, got none")
    for t, name in enumerate(names):
        if not (one[t].isfinite() and many[:, t].isfinite().all()):
            raise ValueError(f"statistics: {name!r} is not finite for all data sets")
    R = len(rep)
    if R < 2 * len(names):
        raise ValueError(
            f"replicated: expected at least {2 * len(names)} data sets for {len(names)} "
            f"statistics, got {R}; draw more, or hand in fewer statistics"
        )
    p = ((many > one).double() + 0.5 * (many == one)).mean(0)
    smooth = (p * R + 0.5) / (R + 1)  # an error also where none or all are larger
    distances = _mahalanobis(torch.cat([one[None], many]))
    # The data count as one of R + 1, so that the test is exact.
    farther = int((distances[1:] >= distances[0] * (1 - 1e-9)).sum())
    joint = (1 + farther) / (R + 1)
    return Ppc(
        names,
        one,
        many,
        p,
        (smooth * (1 - smooth) / R).sqrt(),
        math.sqrt(float(distances[0])),
        Estimate(joint, math.sqrt(joint * (1 - joint) / R)),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Pit:
    """Result of :func:`pit`.

    Arguments:
        values: rank of each datum among its replicates, 0 to R, ties broken at random, shape (N,).
        num_replicates: replicates R of each datum.
        uniformity: their test.
    """

    values: Tensor
    num_replicates: int
    uniformity: Uniformity

    @property
    def ok(self) -> bool:
        """True where the p-value is above 0.05."""
        return self.uniformity.ok

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ECDF difference of the ranks, in the band that it should stay in.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = self.uniformity.plot(ax)
        ax.set(xlabel="probability integral transform")
        return ax

    def __str__(self) -> str:
        if self.ok:
            return f"predictions are calibrated ({self.uniformity})"
        return f"predictions are {self.uniformity}"

    __repr__ = __str__


def pit(observed: ArrayLike | Tensor, replicated: ArrayLike | Tensor, seed: int = 0) -> Pit:
    """Where each datum lies among its replicates: the probability integral transform.

    How to read it: a U-shape is predictions that are too narrow, a hump ones that are too wide,
    a slope ones that are off. For counts and labels ties are broken at random, so that right
    predictions are uniform all the same. Replicates of a posterior that has seen the data make
    predictions look a little too wide: take held-out data, or leave-one-out weights.

    Arguments:
        observed: shape (N,), N at least 10; with features, (N, D), all of them count.
        replicated: shape (R, N) or (R, N, D), R at least 1.
        seed: of the breaking of ties.

    Returns:
        The ranks and their test.

    Raises:
        ValueError: for shapes that do not fit, or values that are not finite.

    References:
        | Predictive model assessment for count data (Czado, Gneiting and Held, 2009)

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> rate = torch.full((100, 300), 3.0)
        >>> print(pit(torch.poisson(rate[0], generator=rng), torch.poisson(rate, generator=rng)))
        predictions are calibrated (uniform (p = 0..., 300 values))
    """
    y, rep = _checked(observed, replicated, 1)
    ranks = sbc_ranks(y.reshape(-1, 1), rep.flatten(1).T[:, :, None], seed)[:, 0]
    return Pit(ranks, len(rep), uniformity(ranks, len(rep)))


@dataclass(frozen=True, eq=False, repr=False)
class Rootogram:
    """Result of :func:`rootogram`.

    Arguments:
        counts: 0, 1, ... to the largest, shape (M,).
        observed: how often each came, shape (M,).
        expected: how often it comes on average over replicates, shape (M,).
        lower: 2.5 % quantile of that over replicates, shape (M,).
        upper: 97.5 % quantile, shape (M,).
    """

    counts: Tensor
    observed: Tensor
    expected: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def outside(self) -> list[int]:
        """The counts that came more or less often than in 95 % of the replicates."""
        out = (self.observed < self.lower) | (self.observed > self.upper)
        return self.counts[out].tolist()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Square roots of observed counts hang from those expected; bars should end at zero.

        A bar that does not reach the line is a count that is too rare in the data. A wave, with
        too many small and large counts, is overdispersion; a bar far below zero at 0 is zero
        inflation.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        top = self.expected.sqrt()
        ax.bar(self.counts, -self.observed.sqrt(), 0.8, top, color="0.7")
        ax.plot(self.counts, top, "o-", markersize=3)
        low, high = top - self.upper.sqrt(), top - self.lower.sqrt()
        ax.fill_between(self.counts, low, high, color="C0", alpha=0.2, linewidth=0, step="mid")
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set_ylim(top=1.08 * float(top.max()))
        ax.set(xlabel="count", ylabel="square root of frequency", title=str(self))
        return ax

    def __str__(self) -> str:
        out = self.outside
        shown = ", ".join(map(str, out[:8])) + (", ..." if len(out) > 8 else "")
        found = f"{len(out)} of {len(self.counts)} counts are outside 95 %"
        return f"{found}: {shown}" if out else found

    __repr__ = __str__


def rootogram(observed: ArrayLike | Tensor, replicated: ArrayLike | Tensor) -> Rootogram:
    """Frequencies of counts, observed and replicated.

    How to read it: one count in twenty is outside by chance; neighbours that are outside to the
    same side are not chance. See :meth:`Rootogram.plot` for what a wave means, and :func:`ppc` for
    a test.

    Arguments:
        observed: whole numbers from 0, shape (N,).
        replicated: shape (R, N), R at least 20.

    Returns:
        Frequencies, with their 95 % range over replicates.

    Raises:
        ValueError: for shapes that do not fit, or numbers that are no counts.

    References:
        | Visualizing count data regressions using rootograms (Kleiber and Zeileis, 2016)

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> rate = torch.full((200, 500), 2.0)
        >>> print(rootogram(torch.zeros(500), torch.poisson(rate, generator=rng)))
        7 of ... counts are outside 95 %: 0, 1, 2, 3, 4, 5, 6
    """
    y, rep = _checked(observed, replicated, _FEWEST_REPLICATES)
    if y.shape[1:] != (1,) or to_tensor(observed, "observed").dim() != 1:
        raise ValueError(f"observed: expected shape (N,), got {tuple(y.shape)}")
    for value, argument in ((y, "observed"), (rep, "replicated")):
        bad = (value < 0) | (value != value.round())
        if bad.any():
            raise ValueError(
                f"{argument}: expected whole numbers from 0, got {float(value[bad][0]):g}"
            )
    largest = float(max(y.max(), rep.max()))
    if largest * len(rep) > _MOST_BARS:
        raise ValueError(
            f"observed, replicated: expected counts up to {_MOST_BARS // len(rep)} with "
            f"{len(rep)} replicates, as each has a bar, got {largest:g}; count in tens or "
            "thousands"
        )
    most = int(largest) + 1
    often = torch.stack([torch.bincount(r[:, 0].long(), minlength=most) for r in (y, *rep)])
    low, high = often[1:].double().quantile(torch.tensor([0.025, 0.975]).double(), 0)
    return Rootogram(torch.arange(most), often[0], often[1:].double().mean(0), low, high)


def plot_densities(
    observed: ArrayLike | Tensor, replicated: ArrayLike | Tensor, ax: Axes | None = None
) -> Axes:
    """The distribution of the data over those of up to 50 replicates.

    Arguments:
        observed: shape (N,).
        replicated: shape (R, N).
        ax: where to draw; by default a new figure.

    Raises:
        ValueError: for shapes that do not fit, or values that are not finite.
    """
    from scipy.stats import gaussian_kde  # imported late, as it takes long

    y, rep = _checked(observed, replicated, 1)
    ax = _axes(ax)
    unit = float(unit_of(y, rep[:_MOST_DRAWN]))
    y, rep = y / unit, rep / unit
    both = torch.cat([y[:, 0], rep[:_MOST_DRAWN, :, 0].flatten()])
    low, high = both.quantile(torch.tensor([0.001, 0.999]).double()).tolist()
    low, high = min(low, float(y.min())), max(high, float(y.max()))
    reach = (high - low) or 1.0
    grid = torch.linspace(low - 0.05 * reach, high + 0.05 * reach, 200, dtype=torch.float64)

    def density(values: Tensor) -> np.ndarray:
        if values.max() == values.min():
            return np.full(len(grid), np.nan)
        first, third = values.quantile(torch.tensor([0.25, 0.75]).double())
        # Silverman's width, which a few values far out do not widen.
        narrower = min(1.0, float((third - first) / (1.349 * values.std()))) or 1.0
        estimate = gaussian_kde(values.numpy(), 0.9 * narrower * len(values) ** -0.2)
        return estimate(grid.numpy())

    for r in rep[:_MOST_DRAWN, :, 0]:
        ax.plot(grid * unit, density(r) / unit, color="C0", alpha=0.2, linewidth=0.8)
    ax.plot(grid * unit, density(y[:, 0]) / unit, color="0.1", linewidth=2, label="data")
    ax.plot([], [], color="C0", alpha=0.5, label="replicates")
    ax.legend(fontsize="small")
    ax.set(xlabel="value", ylabel="density")
    return ax


def _mahalanobis(rows: Tensor) -> Tensor:
    """Squared distances of rows (M, T) from their mean, in their own covariance, (M,)."""
    rows = rows / unit_of(rows, dim=0)
    centred = rows - rows.mean(0)
    sd = centred.square().mean(0).sqrt()
    units = centred / sd.where(sd > 0, 1.0)
    u, size, _ = torch.linalg.svd(units, full_matrices=False)
    kept = size > 1e-8 * size.max().clamp(min=1e-300)
    return len(rows) * u[:, kept].square().sum(1)


def _checked(
    observed: ArrayLike | Tensor, replicated: ArrayLike | Tensor, fewest: int
) -> tuple[Tensor, Tensor]:
    """The data (N, D) and replicates (R, N, D) in double precision."""
    y, rep = to_tensor(observed, "observed").double(), to_tensor(replicated, "replicated").double()
    if y.dim() not in (1, 2) or len(y) < 2 or 0 in y.shape:
        raise ValueError(
            f"observed: expected shape (N,) or (N, D) with at least 2 rows, got {tuple(y.shape)}"
        )
    if rep.dim() != y.dim() + 1 or rep.shape[1:] != y.shape or len(rep) < fewest:
        wanted = ", ".join(str(n) for n in y.shape)
        raise ValueError(
            f"replicated: expected shape (R, {wanted}) with R at least {fewest}, got "
            f"{tuple(rep.shape)}"
        )
    for value, argument in ((y, "observed"), (rep, "replicated")):
        if not value.isfinite().all():
            where = (~value.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{argument}: expected finite numbers, not so first at {where}")
    return (y[:, None], rep[:, :, None]) if y.dim() == 1 else (y, rep)
