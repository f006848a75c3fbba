r"""Simulation-based calibration: whether posteriors hold the truth as often as they say.

.. math:: \theta_m \sim p(\theta), \quad y_m \sim p(y \mid \theta_m), \quad
          \theta_{m1}, \ldots, \theta_{mS} \sim q(\theta \mid y_m), \qquad
          r_m = \sum_s 1[\theta_{ms} < \theta_m]

If q is the posterior, ranks are uniform on 0, ..., S. With normal posteriors whose standard
deviation is c times right, :math:`\Pr(\text{outer 20 %}) = 2 \Phi(c \, \Phi^{-1}(0.1))`.

Letters: M simulations, S draws in each, F quantities.

References:
    | Validating Bayesian inference algorithms with simulation-based calibration
      (Talts et al., 2018)
    | Simulation-based calibration checking for Bayesian computation: the choice of test quantities
      shapes sensitivity (Modrák et al., 2023)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import labels, to_tensor, unit_of, whole
from latentlab.diagnostics.ecdf import Uniformity, uniformity
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sbc", "Tarp", "holm", "sbc", "sbc_ranks", "tarp"]

_LEVEL = 0.05
_OUTER = 0.1  # share of draws at each end, whose count tells the width
_SHOWN = 4  # quantities by name
_MOST = 1e150  # whose square a double can hold


@dataclass(frozen=True, eq=False, repr=False)
class Sbc:
    """Result of :func:`sbc`.

    Arguments:
        names: of the quantities, F of them.
        quantities: the test of each, F of them.
        p_values: adjusted for their number by Holm's method, shape (F,).
        outer: share of simulations in the outer 20 % of the draws, shape (F,).
        outer_se: its standard error, shape (F,).
        outer_expected: what that share should be, near 0.2.
    """

    names: tuple[str, ...]
    quantities: tuple[Uniformity, ...]
    p_values: Tensor
    outer: Tensor
    outer_se: Tensor
    outer_expected: float

    @property
    def ok(self) -> bool:
        """True where no adjusted p-value is below 0.05."""
        return bool((self.p_values > _LEVEL).all())

    @property
    def num_simulations(self) -> int:
        """Number M of simulations."""
        return self.quantities[0].num_values

    @property
    def sd_ratio(self) -> list[Estimate]:
        """Standard deviation of each over what it should be, as if all were normal and centred."""
        from scipy.special import ndtri  # imported late, as it takes long
        from scipy.stats import norm

        found, M = [], self.num_simulations
        for count in (self.outer * M).tolist():
            share = (count + 0.5) / (M + 1)
            c = float(ndtri(share / 2) / ndtri(self.outer_expected / 2))
            slope = 2 * norm.pdf(ndtri(share / 2)) * abs(ndtri(self.outer_expected / 2))
            found.append(Estimate(c, float(math.sqrt(share * (1 - share) / M) / slope)))
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ECDF difference of each quantity, in the band for one; those at fault are named.

        A wave that is up first and then down is a posterior that is too narrow, the reverse one
        that is too wide; a bump below zero is one that is too low, one above is too high.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax, one = _axes(ax), self.quantities[0]
        ax.fill_between(one.points, one.lower, one.upper, color="0.5", alpha=0.2, linewidth=0)
        ax.axhline(0, color="0.5", linewidth=0.8)
        named = self.p_values <= _LEVEL if len(self.names) > _SHOWN else self.p_values <= 1
        for name, found, bad in zip(self.names, self.quantities, named.tolist(), strict=True):
            style = {"label": name} if bad else {"color": "0.6", "linewidth": 0.8}
            ax.plot(found.points, found.difference, drawstyle="steps-post", **style)
        if named.any():
            ax.legend(fontsize="small")
        count = int((self.p_values <= _LEVEL).sum())
        title = f"{count} of {len(self.names)} not calibrated"
        ax.set(xlabel="rank / number of draws", ylabel="ECDF difference", title=title)
        return ax

    def __str__(self) -> str:
        least, F, M = float(self.p_values.min()), len(self.names), self.num_simulations
        if self.ok:
            return f"calibrated: all {F} uniform over {M} simulations (least p = {least:.2g})"
        order = [f for f in self.p_values.argsort().tolist() if self.p_values[f] <= _LEVEL]
        found = []
        for f in order[:_SHOWN]:
            reading, ratio = self.quantities[f].reading, ""
            if "too" in reading:
                ratio = f", sd about {self.sd_ratio[f]} of what it should be"
            found.append(f"{self.names[f]} {reading}{ratio} (p = {self.p_values[f]:.1g})")
        more = f"; and {len(order) - _SHOWN} more" if len(order) > _SHOWN else ""
        return f"not calibrated: {'; '.join(found)}{more} ({M} simulations)"

    __repr__ = __str__


def sbc(ranks: ArrayLike | Tensor, num_draws: int, names: Sequence[str] | None = None) -> Sbc:
    r"""Test the ranks of true values among posterior draws for uniformity.

    How to read it: p-values are exact for each quantity and adjusted for their number, so that a
    calibrated method is called "not calibrated" in one run of twenty. "Too narrow" overstates what
    is known, and is the usual fault of mean-field guides: try correlations, or a flow. "Too wide"
    is seldom a guide's fault: look at the model's simulator. "Biased low" is a posterior below the
    truth: an optimum that was not reached, a wrong transform, a prior that differs between the
    simulator and the model. M = 100 finds standard deviations 0.6 times right, M = 1000 those 0.85
    times right.

    A posterior that ignores the data and returns the prior passes: add a quantity that
    depends on the data, such as the log-likelihood :math:`\log p(y_m \mid \theta)`. Draws of a
    chain must be thinned until they are nearly independent, or ranks pile up at the ends.

    Arguments:
        ranks: of :func:`sbc_ranks`, shape (M, F), M at least 10.
        num_draws: draws S behind each rank.
        names: of the quantities, F of them; ``quantity[0]``, ... by default.

    Returns:
        A test and a reading of each quantity.

    Raises:
        ValueError: for other shapes, fewer simulations, or ranks out of range.

    References:
        | Graphical test for discrete uniformity (Säilynoja, Bürkner and Vehtari, 2022)
        | A simple sequentially rejective multiple test procedure (Holm, 1979)

    Example:
        Posteriors N(y / 2, 1/2) of a normal mean, right and 0.6 times as wide as they should be:

        >>> truth = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> noise = torch.randn(500, 100, 2, generator=torch.Generator().manual_seed(1)).double()
        >>> y = truth + torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
        >>> draws = y[:, None] / 2 + torch.tensor([1.0, 0.6]) * 0.5**0.5 * noise
        >>> print(sbc(sbc_ranks(truth, draws), 100, ["right", "narrow"]))
        not calibrated: narrow too narrow (U-shape), sd about 0.6... of what it should be ...
    """
    r = to_tensor(ranks, "ranks")
    if r.dim() != 2 or 0 in r.shape:
        raise ValueError(
            f"ranks: expected shape (M, F), got {tuple(r.shape)}; for one quantity use "
            "ranks[:, None]"
        )
    num_draws = whole(num_draws, "num_draws", 1)
    called = labels(names, r.shape[1], "quantity", "quantity")
    found = []
    for f, label in enumerate(called):
        try:
            found.append(uniformity(r[:, f], num_draws))
        except ValueError as error:
            raise ValueError(f"ranks of {label}: {error}") from None
    edge = max(round(_OUTER * (num_draws + 1)), 1)
    outer = ((r < edge) | (r > num_draws - edge)).double().mean(0)
    return Sbc(
        called,
        tuple(found),
        holm([one.p_value for one in found]),
        outer,
        (outer * (1 - outer) / len(r)).sqrt(),
        min(2 * edge / (num_draws + 1), 1.0),
    )


def sbc_ranks(truth: ArrayLike | Tensor, draws: ArrayLike | Tensor, seed: int = 0) -> Tensor:
    """Ranks of true values among draws, ties broken at random.

    Without the breaking of ties, ranks of counts and labels would not be uniform for an exact
    posterior either.

    Arguments:
        truth: shape (M, F).
        draws: shape (M, S, F).
        seed: of the breaking of ties.

    Returns:
        Numbers of draws below the truth, 0 to S, shape (M, F).

    Raises:
        ValueError: for shapes that do not fit, or NaN.

    Example:
        >>> sbc_ranks([[0.5], [2.0]], [[[0.0], [1.0]], [[0.0], [1.0]]])
        tensor([[1],
                [2]])
    """
    t, d = to_tensor(truth, "truth"), to_tensor(draws, "draws")
    if t.dim() != 2 or d.dim() != 3 or t.shape != (d.shape[0], d.shape[2]) or 0 in d.shape:
        raise ValueError(
            "truth, draws: expected shapes (M, F) and (M, S, F), got "
            f"{tuple(t.shape)} and {tuple(d.shape)}"
        )
    for value, argument in ((t, "truth"), (d, "draws")):
        if value.isnan().any():
            where = value.isnan().nonzero()[0].tolist()
            raise ValueError(f"{argument}: expected numbers, got NaN (first at {where})")
    below, ties = (d < t[:, None]).sum(1), (d == t[:, None]).sum(1)
    generator = torch.Generator().manual_seed(whole(seed, "seed", 0))
    u = torch.rand(t.shape, generator=generator, dtype=torch.float64)
    return below + (u * (ties + 1)).long()


@dataclass(frozen=True, eq=False, repr=False)
class Tarp:
    """Result of :func:`tarp`.

    Arguments:
        levels: credibility of the regions, shape (K,).
        coverage: share of truths inside, shape (K,).
        se: its standard error, shape (K,).
        uniformity: the test of the levels at which truths are just covered.
    """

    levels: Tensor
    coverage: Tensor
    se: Tensor
    uniformity: Uniformity

    @property
    def ok(self) -> bool:
        """True where the p-value is above 0.05."""
        return self.uniformity.ok

    def plot(self, ax: Axes | None = None) -> Axes:
        """Coverage against credibility, with the band that it should stay in.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax, test = _axes(ax), self.uniformity
        band = (test.points + test.lower, test.points + test.upper)
        ax.fill_between(test.points, *band, color="0.5", alpha=0.2, linewidth=0)
        ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        ax.plot(self.levels, self.coverage)
        ax.set(xlabel="credibility", ylabel="coverage", title=f"p = {test.p_value:.2g}")
        return ax

    def __str__(self) -> str:
        k = int((self.coverage - self.levels).abs().argmax())
        share = Estimate(float(self.coverage[k]), float(self.se[k]))
        fit = "covers as it should" if self.ok else "does not cover as it should"
        where = f"regions of credibility {float(self.levels[k]):.2g} hold {share}"
        return f"{fit}: {where} (p = {self.uniformity.p_value:.2g})"

    __repr__ = __str__


def tarp(
    truth: ArrayLike | Tensor,
    draws: ArrayLike | Tensor,
    references: ArrayLike | Tensor,
    seed: int = 0,
) -> Tarp:
    r"""Coverage of the whole posterior at once, by distances to reference points.

    .. math:: f_m = \frac{1}{S} \sum_s 1[d(\theta_{ms}, \rho_m) < d(\theta_m, \rho_m)]

    is uniform under the posterior, whatever the reference :math:`\rho_m`; its distribution
    function is the expected coverage. Coordinates are in standard deviations of the truths.

    How to read it: below the diagonal at high levels are posteriors that are too narrow, above it
    too wide; with references far away, it is bias that shows. Unlike single latents' ranks it sees
    missing correlations. References that do not depend on the data cannot tell the prior from the
    posterior: draw them around the data, such as a noisy estimate of each truth from its data.

    Arguments:
        truth: shape (M, F), M at least 10.
        draws: shape (M, S, F).
        references: one for each simulation, chosen without knowledge of the truth beyond the data,
            shape (M, F).
        seed: of the breaking of ties.

    Returns:
        Coverage with errors, and an exact test.

    Raises:
        ValueError: for shapes that do not fit, fewer simulations, or numbers that are not finite.

    References:
        | Sampling-based accuracy testing of posterior estimators for general inference
          (Lemos, Coogan, Hezaveh and Perreault-Levasseur, 2023)

    Example:
        >>> def normal(*shape, seed):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     return torch.randn(*shape, generator=generator).double()
        >>> truth = normal(500, 2, seed=0)
        >>> y = truth + normal(500, 2, seed=1)
        >>> draws = y[:, None] / 2 + 0.5**0.5 * normal(500, 200, 2, seed=2)
        >>> tarp(truth, draws, normal(500, 2, seed=3)).ok
        True
        >>> print(tarp(truth, draws * 0.5 + y[:, None] / 4, y / 2))
        does not cover as it should: ...
    """
    handed_in = {"truth": truth, "draws": draws, "references": references}
    t, d, r = (to_tensor(v, argument).double() for argument, v in handed_in.items())
    if t.dim() != 2 or d.dim() != 3 or t.shape != (d.shape[0], d.shape[2]) or r.shape != t.shape:
        raise ValueError(
            "truth, draws, references: expected shapes (M, F), (M, S, F) and (M, F), got "
            f"{tuple(t.shape)}, {tuple(d.shape)} and {tuple(r.shape)}"
        )
    for value, argument in ((t, "truth"), (d, "draws"), (r, "references")):
        if not value.isfinite().all():
            where = (~value.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{argument}: expected finite numbers, not so first at {where}")
    unit = unit_of(t, dim=0)
    t, d, r = (v / unit for v in (t, d, r))
    sd = t.std(0)
    sd = torch.where(sd > 0, sd, 1.0)
    far, near = ((t - r) / sd)[:, None], (d - r[:, None]) / sd  # (M, 1, F), (M, S, F)
    for value, argument in ((far, "references"), (near, "draws")):
        if not (value.abs() < _MOST).all():
            raise ValueError(
                f"{argument}: expected numbers within {_MOST:g} standard deviations of truth, got "
                f"{float(value.abs().max()):g}; are they in the same units?"
            )
    truths, others = far.square().sum(2), near.square().sum(2)[:, :, None]
    ranks = sbc_ranks(truths, others, seed)
    test = uniformity(ranks[:, 0], d.shape[1])
    coverage = (test.points + test.difference).clamp(0, 1)
    return Tarp(test.points, coverage, (coverage * (1 - coverage) / len(t)).sqrt(), test)


def holm(p_values: Sequence[float] | Tensor) -> Tensor:
    """p-values adjusted for their number, by Holm's method.

    Below 0.05 are then, in 19 of 20 cases, none of those whose hypothesis holds.

    Arguments:
        p_values: F of them.

    Returns:
        Shape (F,), none less than the one that it came from.

    References:
        | A simple sequentially rejective multiple test procedure (Holm, 1979)

    Example:
        >>> holm([0.01, 0.04, 0.03])
        tensor([0.0300, 0.0600, 0.0600], dtype=torch.float64)
    """
    p = to_tensor(p_values, "p_values").double().numpy()
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return torch.from_numpy(adjusted[np.argsort(order)])
