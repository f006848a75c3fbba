r"""Pareto-smoothed importance sampling: how far a guide is from its target.

Draws :math:`z_s \sim q` have weights :math:`w_s = p(z_s) / q(z_s)`. Far out, weights follow a
generalised Pareto distribution,

.. math:: \Pr(w > u + y \mid w > u) \approx (1 + k y / \sigma)^{-1/k},

whose shape k counts the moments that they have: fewer than 1/k. A light tail (k below 0.5) means
that the weights have a variance; a k of 1 means that not even their mean exists. The M largest
weights tell k-hat, and are then replaced by the expected order statistics of the fit.

Letters: S draws, M of them in the tail, N columns, G grid points of the fit.

References:
    | Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024)
    | A new and efficient estimation method for the generalized Pareto distribution
      (Zhang and Stephens, 2009)
    | Yes, but did it work?: evaluating variational inference (Yao et al., 2018)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import precision, to_tensor
from latentlab.diagnostics.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KhatTable", "Psis", "khat_per_column", "psis", "psis_per_column"]

_GOOD, _BAD = 0.5, 0.7
_FEWEST_DRAWS = 25
_FEWEST_IN_TAIL = 5
_ZERO = math.log(np.finfo(float).tiny)  # log weights, relative to the largest, that count as 0
_EPS = np.finfo(float).eps
_ROUNDING = 1e-6  # relative spread of weights that is not worth a figure
_BATCH = 2**22  # numbers in memory at once
_SHOWN = 10  # rows by number


@dataclass(frozen=True, eq=False, repr=False)
class Psis:
    """Result of :func:`psis`.

    Arguments:
        khat: shape of the weights' tail; ``-inf`` for constant weights, ``inf`` where fewer than
            five draws carry all the weight.
        se: standard error of ``khat``.
        log_weights: smoothed, logs of weights that sum to one, shape (S,).
        tail_size: number M of weights that ``khat`` rests on; 0 for constant weights.
    """

    khat: float
    se: float
    log_weights: Tensor
    tail_size: int

    @property
    def num_samples(self) -> int:
        """Number S of draws."""
        return len(self.log_weights)

    @property
    def exact(self) -> bool:
        """True where the weights are constant, within the tolerance: the guide is the target."""
        return self.khat == -math.inf

    @property
    def ess(self) -> float:
        """Number of draws from the target itself that would do as well as these."""
        return float(torch.exp(-torch.logsumexp(2 * self.log_weights.double(), 0)))

    @property
    def level(self) -> str:
        """``"exact"``, ``"good"`` (to 0.5), ``"ok"`` (to 0.7) or ``"bad"``."""
        if self.exact:
            return "exact"
        return "good" if self.khat <= _GOOD else "ok" if self.khat <= _BAD else "bad"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The weights by rank, against equal weights; the tail is shaded.

        A good guide gives a line that leaves the dashed one slowly. One that starts far above it
        and falls steeply rests on a few draws.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        weights = self.log_weights.double().cpu().sort(descending=True).values.exp().numpy()
        equal, positive = 1 / len(weights), weights[weights > 0]
        limits = max(positive[-1], 1e-6 * equal) / 2, 2 * positive[0]
        ax.set(ylim=limits, xscale="log", yscale="log")
        ax.plot(np.arange(1, len(positive) + 1), positive)
        ax.axhline(equal, linestyle="--", color="0.5")
        if self.tail_size:
            ax.axvspan(1, self.tail_size, color="0.5", alpha=0.15, linewidth=0)
        ax.set(xlabel="rank", ylabel="weight", title=str(self))
        return ax

    def __str__(self) -> str:
        if self.exact:
            spread = math.expm1(float(self.log_weights.max() - self.log_weights.min()))
            within = f"within {spread:.1g}" if spread > _ROUNDING else "up to rounding"
            return f"k-hat exact: all weights are equal {within}"
        readings = {
            "good": f"below {_GOOD}",
            "ok": f"between {_GOOD} and {_BAD}",
            "bad": f"above {_BAD}",
        }
        value = str(Estimate(self.khat, self.se)) if math.isfinite(self.khat) else str(self.khat)
        return f"k-hat {value} ({self.level}: {readings[self.level]})"

    __repr__ = __str__


@dataclass(frozen=True, eq=False, repr=False)
class KhatTable:
    """Result of :func:`khat_per_column`.

    Arguments:
        khat: one for each column, shape (N,); ``-inf`` and ``inf`` as in :class:`Psis`.
        se: their standard errors, shape (N,).
    """

    khat: Tensor
    se: Tensor

    @property
    def bad(self) -> Tensor:
        """Indices of the columns above 0.7."""
        return (self.khat > _BAD).nonzero()[:, 0]

    def plot(self, ax: Axes | None = None) -> Axes:
        """k-hat by column, with lines at 0.5 and 0.7.

        Infinite ones are drawn at the edges, the ten worst above 0.7 have their number.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        finite = self.khat[self.khat.isfinite()]
        low = min([0.0, *finite.tolist()])
        high = max([1.0, *finite.tolist()])
        khat = self.khat.clamp(low - 0.1, high + 0.1).numpy()
        ax.plot(np.arange(len(khat)), khat, ".")
        for threshold in (_GOOD, _BAD):
            ax.axhline(threshold, linestyle="--", color="0.5")
        for row in self.khat.argsort(descending=True)[: min(len(self.bad), _SHOWN)].tolist():
            ax.annotate(str(row), (row, khat[row]), (4, 0), textcoords="offset points")
        title = f"{len(self.bad)} of {len(khat)} above {_BAD}"
        ax.set(xlabel="row", ylabel="k-hat", title=title)
        return ax

    def __str__(self) -> str:
        N, row = len(self.khat), int(self.khat.argmax())
        worst = Estimate(float(self.khat[row]), float(self.se[row]))
        if worst.value == -math.inf:
            return f"all {N} exact"
        shown = str(worst) if math.isfinite(worst.value) else str(worst.value)
        bad = self.bad.tolist()
        if not bad:
            return f"all {N} below {_BAD} (worst {shown} at row {row})"
        if len(bad) == 1:
            return f"row {row} of {N} is > {_BAD} ({shown})"
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        rows = ", ".join(map(str, bad[:_SHOWN])) + more
        return f"rows {rows} of {N} are > {_BAD} (worst {shown} at row {row})"

    __repr__ = __str__


def psis(
    log_weights: ArrayLike | Tensor, tail_size: int | None = None, tolerance: float = 0.0
) -> Psis:
    r"""Smooth importance weights, and say how far they can be trusted.

    How to read k-hat:

    ========  =====================================================================================
    k-hat     reading
    ========  =====================================================================================
    exact     the weights are constant: the guide is the target
    to 0.5    good: use the draws as they are, or weighted
    to 0.7    ok: use the *weighted* draws; of the plain ones mistrust variances and quantiles
    above     bad: the guide misses parts of the target, and weights cannot repair it. Try a richer
              guide, another parametrisation, fewer latents at once
    ========  =====================================================================================

    k-hat is noisy, with standard error about :math:`(1 + k) / \sqrt{M}`: from 1,000 draws, a true
    0.9 passes as below 0.7 in one run of five. Take 10,000, and read the error. With few draws
    even a known k helps less: below S = 2,200 the bound of Vehtari et al. is lower than 0.7, it is
    :math:`1 - 1 / \log_{10} S`, and more draws are the remedy. k-hat sees only where the guide
    draws: a mode that it never visits leaves no trace. Weights that take a few values only, as
    with discrete latents, have no tail to speak of; look at ``ess`` too.

    Arguments:
        log_weights: log p(z) - log q(z) at draws of q, up to a constant, in nats, shape (S,), S at
            least 25. ``-inf`` is a weight of zero. Hand them in with the dtype in which they were
            computed: they count as constant if they differ by less than 16 eps of the largest,
            or 16 sqrt(eps) (2e-7 in float64, 0.006 in float32), where eps is that of the dtype.
        tail_size: number M of largest weights, 5 to S - 1; by default min(S / 5, 3 sqrt(S)).
        tolerance: spread of the log weights, in nats, up to which they count as constant. Weights
            that hardly differ have a tail all the same, whose shape is of no consequence.

    Returns:
        The smoothed weights, of the dtype and on the device of ``log_weights``, and k-hat.

    Raises:
        ValueError: for fewer than 25 draws, NaN or ``+inf``, or no weight above zero.

    References:
        | Pareto smoothed importance sampling (Vehtari et al., 2024)

    Example:
        An exponential guide of rate 1 for a target of rate 1 - k has weights of shape k:

        >>> z = torch.empty(100_000).exponential_(generator=torch.Generator().manual_seed(0))
        >>> print(psis(0.3 * z))
        k-hat 0.33 ± 0.04 (good: below 0.5)
        >>> print(psis(torch.full((1000,), -1130.0)))
        k-hat exact: all weights are equal up to rounding
    """
    values, eps = _checked(log_weights, num_axes=1)
    x = values - values.max()
    khat, se, size = -math.inf, 0.0, 0
    if not _constant(values, eps, tolerance):
        fit = _smooth(x[None], tail_size)
        khat, se, size = float(fit.khat[0]), float(fit.se[0]), int(fit.size[0])
    smoothed = torch.from_numpy(x - _log_sum(x[None]))
    if isinstance(log_weights, Tensor) and log_weights.is_floating_point():
        smoothed = smoothed.to(log_weights)
    return Psis(khat, se, smoothed, size)


def khat_per_column(log_weights: ArrayLike | Tensor, tolerance: float = 0.0) -> KhatTable:
    """k-hat of each column on its own, such as of each datum's latents.

    A thousand latents, each ten percent too narrow, are each fine, and hopeless in one k-hat.

    How to read many of them: each has its error, about 0.17 for 1,000 draws and a k of 0.7. Of
    1,000 good columns some therefore exceed 0.7 by noise alone, and those with a true 0.5 do so in
    one of ten cases. A few percent that exceed it by less than two standard errors are no finding;
    one column that exceeds it by three is: look at that datum, it may be an outlier. To decide
    about a column, draw again, more.

    Arguments:
        log_weights: in nats, shape (S, N), S at least 25: a column a datum.
        tolerance: as for :func:`psis`.

    Returns:
        k-hat and standard error of each column.

    Raises:
        ValueError: as :func:`psis`, with the first column at fault.

    Example:
        >>> z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> print(khat_per_column(z * torch.tensor([0.0, 0.1, 5.0])))
        row 2 of 3 is > 0.7 (2.0 ± 0.3)
    """
    values, eps = _checked(log_weights, num_axes=2)
    constant = _constant(values, eps, tolerance)
    khat, se = np.full(len(constant), -np.inf), np.zeros(len(constant))
    fit = _fit_tails(_largest((values - values.max(0))[:, ~constant].T)[1])
    khat[~constant], se[~constant] = fit.khat, fit.se
    return KhatTable(torch.from_numpy(khat), torch.from_numpy(se))


def psis_per_column(log_weights: Tensor, tolerance: float = 0.0) -> tuple[Tensor, KhatTable]:
    """Weights of each column smoothed on their own, with their k-hat.

    Arguments:
        log_weights: in nats, shape (S, N), S at least 25.
        tolerance: as for :func:`psis`.

    Returns:
        Logs of weights that sum to one in each column, shape (S, N), and k-hat of each.

    Raises:
        ValueError: as :func:`psis`, with the first column at fault.
    """
    values, eps = _checked(log_weights, num_axes=2)
    constant = _constant(values, eps, tolerance)
    khat, se = np.full(len(constant), -np.inf), np.zeros(len(constant))
    x = np.ascontiguousarray(values.T)  # (N, S)
    x -= x.max(1, keepdims=True)
    rows = x[~constant]
    fit = _smooth(rows)
    x[~constant], khat[~constant], se[~constant] = rows, fit.khat, fit.se
    x -= _log_sum(x)[:, None]
    return torch.from_numpy(x.T), KhatTable(torch.from_numpy(khat), torch.from_numpy(se))


@dataclass(frozen=True)
class _Tails:
    """Pareto fits to the tails of N sets of weights, each field of shape (N,)."""

    khat: np.ndarray
    scale: np.ndarray
    cutoff: np.ndarray
    size: np.ndarray

    @property
    def se(self) -> np.ndarray:
        """Standard error of k-hat; short tails end in a bound, and are known at least as well."""
        return (1 + np.maximum(self.khat, -0.5)) / np.sqrt(np.maximum(self.size, 1))


def _tail_size(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def _largest(x: np.ndarray, tail_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where the M + 1 largest of each row (N, S) are, in ascending order, and what they are."""
    M = tail_size or _tail_size(x.shape[1])
    where = np.argpartition(x, -M - 1, axis=1)[:, -M - 1 :]
    largest = np.take_along_axis(x, where, 1)
    order = np.argsort(largest, axis=1)
    return np.take_along_axis(where, order, 1), np.take_along_axis(largest, order, 1)


def _smooth(x: np.ndarray, tail_size: int | None = None) -> _Tails:
    """Fits to log weights (N, S) whose largest is 0 in each row; the tails are put in place."""
    from scipy.special import boxcox1p  # imported late, as it takes long

    where, tail = _largest(x, tail_size)
    fit = _fit_tails(tail)
    size, khat, scale = fit.size[:, None], fit.khat[:, None], fit.scale[:, None]
    place = np.arange(tail.shape[1]) - (tail.shape[1] - size)  # (N, M + 1), from 0 in the tail
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # scale ((1 - p)^-k - 1) / k
        excess = -scale * boxcox1p(-(place + 0.5) / size, -khat)
        smoothed = np.minimum(np.logaddexp(fit.cutoff[:, None], np.log(excess)), 0)
    tail = np.where((place >= 0) & np.isfinite(scale), smoothed, tail)
    np.put_along_axis(x, where, tail, 1)
    return fit


def _log_sum(x: np.ndarray) -> np.ndarray:
    """Log of the sum of exp of each row, whose largest is 0 or, smoothed, near it."""
    return np.log(np.exp(x).sum(1))


def _fit_tails(x: np.ndarray) -> _Tails:
    """Fits to the M + 1 largest log weights (N, M + 1), in ascending order, the largest 0.

    The tail is what exceeds the weight below the M largest: all M of them, unless there are ties.
    Ties that leave fewer than five, as among the few distinct weights of a discrete latent, leave
    too little to fit; k-hat is then that of the Pareto tail whose largest of M is the largest.
    """
    N, expected = x.shape[0], x.shape[1] - 1
    cutoff = np.maximum(x[:, 0], _ZERO)
    size = (x > cutoff[:, None]).sum(1)

    khat, scale = np.full(N, np.inf), np.full(N, np.nan)
    tied = (size < _FEWEST_IN_TAIL) & (cutoff > _ZERO)
    khat[tied], size[tied] = -cutoff[tied] / math.log(expected), expected
    for M in np.unique(size[(size >= _FEWEST_IN_TAIL) & ~tied]):
        rows = np.flatnonzero((size == M) & ~tied)
        batches = math.ceil(len(rows) * M * _grid_size(M) / _BATCH)
        for part in np.array_split(rows, batches):
            tail = x[part, -M:]
            excess = -np.exp(tail) * np.expm1(cutoff[part, None] - tail)  # w - cutoff
            khat[part], scale[part] = _fit_pareto(excess)
    khat[~np.isfinite(khat)] = np.inf  # the tail spans more than numbers can hold
    return _Tails(khat, scale, cutoff, size)


def _grid_size(tail_size: int) -> int:
    return 30 + int(math.sqrt(tail_size))


def _fit_pareto(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale of generalised Pareto distributions (Zhang and Stephens), each (N,).

    The profile likelihood of b = -k / scale is averaged over a grid; the shape is then drawn
    towards 0.5 as if by ten more observations.

    Arguments:
        excess: over the cutoff, ascending, shape (N, M).
    """
    from scipy.special import softmax

    M = excess.shape[1]
    G = _grid_size(M)
    quartile, largest = excess[:, int(M / 4 + 0.5) - 1, None], excess[:, -1:]
    spacing = 1 - np.sqrt(G / (np.arange(1, G + 1) - 0.5))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        b = spacing / (3 * quartile) + 1 / largest  # (N, G)
        k = np.log1p(-b[:, :, None] * excess[:, None, :]).mean(-1)
        profile = M * (np.log(-b / k) - k - 1)
        weights = softmax(np.where(np.isnan(profile), -np.inf, profile), axis=1)
        weights[weights < 10 * _EPS] = 0
        b = (weights * b).sum(1) / weights.sum(1)
        k = np.log1p(-b[:, None] * excess).mean(-1)
        return (M * k + 5) / (M + 10), -k / b


def _constant(values: np.ndarray, eps: float, tolerance: float) -> np.ndarray:
    """Whether all that differs along the first axis is rounding, or within the tolerance.

    The sums behind a log weight are rounded to some eps of their size, which is its own unless
    they cancel; they may, and lose half of their digits.
    """
    size = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(0)
    rounding = 16 * eps * np.maximum(size, eps**-0.5)
    return values.max(0) - values.min(0) <= np.maximum(rounding, tolerance)


def _checked(log_weights: ArrayLike | Tensor, num_axes: int) -> tuple[np.ndarray, float]:
    """The log weights in double precision, and the relative precision that they came with."""
    tensor = to_tensor(log_weights, "log_weights")
    shape, expected = tuple(tensor.shape), {1: "(S,)", 2: "(S, N)"}[num_axes]
    if len(shape) != num_axes or 0 in shape[1:]:
        raise ValueError(f"log_weights: expected shape {expected}, got {shape}")
    if shape[0] < _FEWEST_DRAWS:
        raise ValueError(
            f"log_weights: expected at least {_FEWEST_DRAWS} draws, got {shape[0]}; draw more"
        )
    values = tensor.double().numpy()
    for fault, name in ((np.isnan(values), "NaN"), (values == np.inf, "+inf")):
        if fault.any():
            raise ValueError(
                f"log_weights has {fault.sum()} {name} "
                f"(first at {np.argwhere(fault)[0].tolist()}); a density is not finite there"
            )
    empty = values.max(0) == -np.inf
    if empty.any():
        where = "" if num_axes == 1 else f" in column {int(np.argmax(empty))}"
        raise ValueError(
            f"log_weights: all are -inf{where}; the guide never draws where the target has mass"
        )
    return values, precision(log_weights)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(layout="constrained").subplots()
