r"""What posteriors of simulated data cover, and how much they have learnt.

.. math:: z_m = \frac{\mu_m - \theta_m}{\sigma_m}, \qquad
          \mathrm{contraction}_m = 1 - \sigma_m^2 / \sigma_\mathrm{prior}^2

:math:`\mu_m` and :math:`\sigma_m` are mean and standard deviation of the posterior of the data
simulated with :math:`\theta_m`.

Letters: M simulations, S draws in each, F quantities, A levels.

References:
    | Toward a principled Bayesian workflow in cognitive science
      (Schad, Betancourt and Vasishth, 2021)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import labels, to_tensor, unit_of, whole
from latentlab.diagnostics.calibration import holm
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Contraction", "Coverage", "contraction", "coverage"]

_LEVELS = (0.5, 0.8, 0.9, 0.95)
_SMALL = 0.05
_FEWEST = 10
_MOST = 1e150  # whose square a double can hold


@dataclass(frozen=True, eq=False, repr=False)
class Coverage:
    """Result of :func:`coverage`.

    Arguments:
        names: of the quantities, F of them.
        levels: what the intervals should hold, shape (A,).
        share: what they hold, shape (A, F).
        se: its binomial standard error, shape (A, F).
        p_values: of the exact binomial tests, adjusted for all A F of them, shape (A, F).
    """

    names: tuple[str, ...]
    levels: Tensor
    share: Tensor
    se: Tensor
    p_values: Tensor

    @property
    def ok(self) -> bool:
        """True where no adjusted p-value is below 0.05."""
        return bool((self.p_values > _SMALL).all())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share against level, with two standard errors; below the diagonal is too narrow.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        F = len(self.names)
        for f, name in enumerate(self.names):
            at = self.levels + 0.01 * (f - (F - 1) / 2) / max(F, 4) * 4
            ax.errorbar(at, self.share[:, f], 2 * self.se[:, f], fmt="o", label=name, markersize=4)
        if F <= 8:
            ax.legend(fontsize="small")
        title = f"least adjusted p = {float(self.p_values.min()):.2g}"
        ax.set(xlabel="level", ylabel="share that holds the truth", title=title)
        return ax

    def __str__(self) -> str:
        a, f = divmod(int(self.p_values.argmin()), len(self.names))
        share = Estimate(float(self.share[a, f]), float(self.se[a, f]))
        level = f"{100 * float(self.levels[a]):.3g} %"
        text = f"{level} intervals of {self.names[f]} hold {share}"
        return f"{'as they should' if self.ok else 'not as they should'}: {text}"

    __repr__ = __str__


def coverage(
    ranks: ArrayLike | Tensor,
    num_draws: int,
    levels: Sequence[float] = _LEVELS,
    names: Sequence[str] | None = None,
) -> Coverage:
    """How often central intervals hold the truth.

    How to read it: a 90 % interval that holds the truth in 0.7 of the simulations is too narrow.
    The same ranks are tested as a whole, with more power, by :func:`sbc`; this table says it in
    terms of the intervals that are reported. Shares are exact for the draws at hand: an interval
    runs from the k-th smallest to the k-th largest of them.

    Arguments:
        ranks: of :func:`sbc_ranks`, shape (M, F).
        num_draws: draws S behind each rank.
        levels: of the intervals, in (0, 1). Each becomes the nearest that S draws can have.
        names: of the quantities, F of them.

    Returns:
        Shares with binomial errors, and p-values.

    Raises:
        ValueError: for other shapes, fewer than ten simulations, ranks that are no whole numbers,
            or levels or ranks out of range.

    Example:
        >>> r = torch.randint(0, 100, (400, 1), generator=torch.Generator().manual_seed(0))
        >>> print(coverage(r, 99, levels=[0.9]))
        as they should: 90 % intervals of quantity[0] hold 0.91 ± 0.02
    """
    from scipy.stats import binomtest  # imported late, as it takes long

    r = to_tensor(ranks, "ranks")
    if r.dim() != 2 or 0 in r.shape:
        raise ValueError(
            f"ranks: expected shape (M, F), got {tuple(r.shape)}; for one quantity use "
            "ranks[:, None]"
        )
    num_draws = whole(num_draws, "num_draws", 1)
    M, F = r.shape
    if M < _FEWEST:
        raise ValueError(f"ranks: expected at least {_FEWEST} simulations, got {M}")
    if ((r < 0) | (r > num_draws)).any():
        raise ValueError(
            f"ranks: expected 0 to num_draws={num_draws}, got {float(r.min()):g} to "
            f"{float(r.max()):g}"
        )
    if (bad := r != r.round()).any():  # NaN too
        raise ValueError(
            f"ranks: expected whole numbers 0 to num_draws={num_draws}, got "
            f"{float(r[bad][0]):g} at {bad.nonzero()[0].tolist()}"
        )
    wanted = to_tensor(levels, "levels").double()
    if wanted.dim() != 1 or len(wanted) == 0 or not ((wanted > 0) & (wanted < 1)).all():
        raise ValueError(f"levels: expected numbers between 0 and 1, as in [0.9], got {levels}")
    called, exact, counts = labels(names, F, "quantity", "quantity"), [], []
    for level in wanted.tolist():
        most = (num_draws + 1) // 2
        edge = min(max(round((1 - level) / 2 * (num_draws + 1)), 1), most)
        exact.append(1 - 2 * edge / (num_draws + 1))
        counts.append(((r >= edge) & (r <= num_draws - edge)).sum(0))
    found = torch.stack(counts)
    p = [
        binomtest(count, M, level).pvalue
        for level, row in zip(exact, found.tolist(), strict=True)
        for count in row
    ]
    share = found.double() / M
    smooth = (found.double() + 1) / (M + 2)  # an error also where all or none are held
    se = (smooth * (1 - smooth) / M).sqrt()
    return Coverage(called, torch.tensor(exact), share, se, holm(p).reshape(share.shape))


@dataclass(frozen=True, eq=False, repr=False)
class Contraction:
    """Result of :func:`contraction`.

    Arguments:
        names: of the quantities, F of them.
        z: posterior mean less truth, in posterior standard deviations, shape (M, F).
        contraction: share of the prior's variance that is gone, shape (M, F).
    """

    names: tuple[str, ...]
    z: Tensor
    contraction: Tensor

    @property
    def bias(self) -> list[Estimate]:
        """Mean z-score of each quantity, to be 0."""
        return [Estimate.from_draws(column) for column in self.z.T]

    @property
    def width(self) -> list[Estimate]:
        """Root mean square z-score of each quantity, to be 1; larger is too narrow."""
        found = [Estimate.from_draws(column**2) for column in self.z.T]
        roots = [(math.sqrt(one.value), one.se) for one in found]
        return [Estimate(root, se / (2 * root) if root else 0.0) for root, se in roots]

    @property
    def learnt(self) -> list[Estimate]:
        """Mean contraction of each quantity: 1 where data tell all, 0 where they tell nothing."""
        return [Estimate.from_draws(column) for column in self.contraction.T]

    def plot(self, ax: Axes | None = None) -> Axes:
        """z-score against contraction, a dot a simulation.

        To the right and near zero is as it should be; right and far from zero is overfitted, left
        and near zero has not learnt, left and far is a prior at odds with the data.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        for f, name in enumerate(self.names):
            ax.plot(self.contraction[:, f], self.z[:, f], ".", label=name, alpha=0.5)
        for line in (-2, 2):
            ax.axhline(line, linestyle="--", color="0.5")
        if len(self.names) <= 8:
            ax.legend(fontsize="small")
        low = min(0.0, float(self.contraction.min()))
        ax.set(xlabel="contraction", ylabel="z-score", xlim=(low - 0.03, 1.03))
        return ax

    def __str__(self) -> str:
        parts = zip(self.names, self.bias, self.width, self.learnt, strict=True)
        return "\n".join(
            f"{name}: z-score {bias} (0), its size {width} (1), contraction {learnt}"
            for name, bias, width, learnt in parts
        )

    __repr__ = __str__


def contraction(
    truth: ArrayLike | Tensor,
    mean: ArrayLike | Tensor,
    sd: ArrayLike | Tensor,
    prior_sd: ArrayLike | Tensor,
    names: Sequence[str] | None = None,
) -> Contraction:
    """How far posteriors are from the truth, and how much narrower than the prior.

    How to read it: a size of z-scores of 2 means posteriors half as wide as they should be. A
    contraction near 0 is a quantity that these data do not tell: more data, another design, or a
    prior that is meant. Below 0 the posterior is wider than the prior.

    Arguments:
        truth: shape (M, F), M at least 2.
        mean: of the posteriors, shape (M, F).
        sd: their standard deviations, positive, shape (M, F).
        prior_sd: standard deviation of the prior, positive, shape (F,).
        names: of the quantities, F of them.

    Returns:
        z-scores and contractions.

    Raises:
        ValueError: for other shapes, numbers that are not finite, or widths that are not positive.

    References:
        | Toward a principled Bayesian workflow in cognitive science (Schad et al., 2021)

    Example:
        >>> truth = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> y = truth + torch.randn(500, 1, generator=torch.Generator().manual_seed(1))
        >>> print(contraction(truth, y / 2, torch.full((500, 1), 0.5**0.5), [1.0]))
        quantity[0]: z-score -0.0... ± 0.05 (0), its size 1.0... ± 0.03 (1), contraction 0.5
    """
    handed_in = {"truth": truth, "mean": mean, "sd": sd, "prior_sd": prior_sd}
    t, m, s, p = (to_tensor(v, argument).double() for argument, v in handed_in.items())
    if t.dim() != 2 or len(t) < 2 or m.shape != t.shape or s.shape != t.shape:
        raise ValueError(
            "truth, mean, sd: expected one shape (M, F) with at least 2 simulations, got "
            f"{tuple(t.shape)}, {tuple(m.shape)} and {tuple(s.shape)}"
        )
    if p.shape != t.shape[1:]:
        raise ValueError(f"prior_sd: expected shape ({t.shape[1]},), got {tuple(p.shape)}")
    for value, argument in ((t, "truth"), (m, "mean"), (s, "sd"), (p, "prior_sd")):
        if not value.isfinite().all():
            where = (~value.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{argument}: expected finite numbers, not so first at {where}")
    for value, argument in ((s, "sd"), (p, "prior_sd")):
        if not (value > 0).all():
            raise ValueError(f"{argument}: expected positive numbers, got {float(value.min()):g}")
    unit = unit_of(t, m, s, dim=0)
    z, ratio = (m / unit - t / unit) / (s / unit), s / p
    for value, argument in ((z, "sd"), (ratio, "prior_sd")):
        if not (value.abs() < _MOST).all():
            raise ValueError(
                f"{argument}: expected widths of the order of the other arguments, got one less "
                f"than {1 / _MOST:g} of them"
            )
    return Contraction(labels(names, t.shape[1], "quantity", "quantity"), z, 1 - ratio**2)
