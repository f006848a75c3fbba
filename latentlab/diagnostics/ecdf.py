r"""Whether numbers are uniform: their empirical distribution inside simultaneous bands.

.. math:: \Delta(z) = \frac{1}{N} \sum_n 1[u_n \le z] - z, \qquad
          N (\Delta(z) + z) \sim \mathrm{Binomial}(N, z)

At each of K points z the count has a tail probability of its own; the smallest of them is the
statistic. Its distribution is exact: the counts at successive points are those of a Poisson
process that ends at N, whose chance to stay within bounds is a chain of K convolutions.

Letters: N values, K points, S draws behind a rank.

References:
    | Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and
      multiple sample comparison (Säilynoja, Bürkner and Vehtari, 2022)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, whole
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Uniformity", "uniformity"]

_LEVEL = 0.05
_MOST_POINTS = 100
_FEWEST = 10
_CLEAR = 2.5  # standard errors by which a mean or a spread is called off
_BONFERRONI_BELOW = 1e-9
_FAST_FROM = 400  # width from which convolutions are faster by Fourier transform


@dataclass(frozen=True, eq=False, repr=False)
class Uniformity:
    """Result of :func:`uniformity`.

    Arguments:
        points: where the distribution is looked at, shape (K,).
        difference: empirical distribution less the uniform one, shape (K,).
        lower: the lower band of it, 95 % for all points together, shape (K,).
        upper: the upper band, shape (K,).
        p_value: chance of so large a difference, at any point, if the values are uniform; exact.
        mean_z: z-score of the mean; positive if values are too large.
        spread_z: z-score of the spread about one half; positive if too many lie at the ends.
        num_values: number N of values.
    """

    points: Tensor
    difference: Tensor
    lower: Tensor
    upper: Tensor
    p_value: float
    mean_z: float
    spread_z: float
    num_values: int

    @property
    def ok(self) -> bool:
        """True where the p-value is above 0.05."""
        return self.p_value > _LEVEL

    @property
    def reading(self) -> str:
        """What the values look like, in words for the distribution that they rank the truth in."""
        found = []
        if self.spread_z > _CLEAR:
            found.append("too narrow (U-shape)")
        if self.spread_z < -_CLEAR:
            found.append("too wide (hump)")
        if abs(self.mean_z) > _CLEAR:
            found.append("biased low" if self.mean_z > 0 else "biased high")
        if abs(self.mean_z) > abs(self.spread_z):
            found.reverse()
        return " and ".join(found) or "neither narrow, wide nor biased, of another shape"

    def plot(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """The difference of the distributions, and the band that it should stay in.

        Too narrow a posterior gives a wave that is up first and then down, too wide a one the
        reverse; a bump below zero is a posterior that is too low, one above is too high.

        Arguments:
            ax: where to draw; by default a new figure.
            label: name of the line.
        """
        ax = _axes(ax)
        ax.fill_between(self.points, self.lower, self.upper, color="0.5", alpha=0.2, linewidth=0)
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.plot(self.points, self.difference, label=label, drawstyle="steps-post")
        ax.set(xlabel="fraction", ylabel="ECDF difference", title=str(self))
        return ax

    def __str__(self) -> str:
        if self.ok:
            return f"uniform (p = {self.p_value:.2g}, {self.num_values} values)"
        return f"{self.reading} (p = {self.p_value:.1g}, {self.num_values} values)"

    __repr__ = __str__


def uniformity(values: ArrayLike | Tensor, num_draws: int | None = None) -> Uniformity:
    """Test ranks or probability integral transforms for uniformity.

    How to read it: a p-value below 0.05 is a line that leaves its band somewhere. ``reading`` says
    how: many values at the ends (U-shape) come from distributions that are too narrow, many in the
    middle from too wide ones, large values from distributions that lie too low. The test is exact
    for independent values, at any N.

    Arguments:
        values: in [0, 1], or ranks 0 to ``num_draws``, shape (N,), N at least 10.
        num_draws: draws S behind each rank; ``None`` for values in [0, 1].

    Returns:
        The difference, its band and the p-value.

    Raises:
        ValueError: for another shape, fewer values, or values out of range.

    References:
        | Graphical test for discrete uniformity (Säilynoja, Bürkner and Vehtari, 2022)

    Example:
        >>> u = torch.rand(500, generator=torch.Generator().manual_seed(0))
        >>> print(uniformity(u))
        uniform (p = 0.78, 500 values)
        >>> print(uniformity(u**2))
        biased high and too narrow (U-shape) (p = 1e-48, 500 values)
    """
    u = _checked(values, num_draws)
    N = len(u)
    if num_draws is None:
        points, positions = _spaced(min(N, _MOST_POINTS)), u
        variance, fourth = 1 / 12, 1 / 80
    else:
        positions = (u + 1) / (num_draws + 1)  # rank < j is position <= j / (S + 1)
        points = _spaced(num_draws + 1)
        u = (u + 0.5) / (num_draws + 1)
        grid = (np.arange(num_draws + 1) + 0.5) / (num_draws + 1) - 0.5
        variance, fourth = float((grid**2).mean()), float((grid**4).mean())
    z = np.array(points)
    counts = np.searchsorted(np.sort(positions), z * (1 + 1e-12), side="right")
    lower, upper = _bounds(N, points, _band_level(N, points, _LEVEL))
    spread = fourth - variance**2  # zero for ranks of one draw
    return Uniformity(
        points=torch.from_numpy(z),
        difference=torch.from_numpy(counts / N - z),
        lower=torch.from_numpy(lower / N - z),
        upper=torch.from_numpy(upper / N - z),
        p_value=_p_value(N, points, counts),
        mean_z=float((u.mean() - 0.5) / math.sqrt(variance / N)),
        spread_z=float((((u - 0.5) ** 2).mean() - variance) / math.sqrt(spread / N))
        if spread > 0
        else 0.0,
        num_values=N,
    )


def _spaced(num: int) -> tuple[float, ...]:
    """Multiples of 1 / num inside (0, 1), all of them or 99 spread evenly."""
    steps = np.arange(1, num)
    if num > _MOST_POINTS:
        steps = np.round(np.linspace(0, num, _MOST_POINTS + 1)).astype(int)[1:-1]
    return tuple((steps / num).tolist())


def _p_value(N: int, points: tuple[float, ...], counts: np.ndarray) -> float:
    """Chance that the smallest two-sided tail probability is as small as that of the counts."""
    from scipy.stats import binom  # imported late, as it takes long

    z = np.array(points)
    tails = np.minimum(binom.cdf(counts, N, z), binom.cdf(N - counts, N, 1 - z))
    smallest = min(2 * float(tails.min()), 1.0)
    if smallest < _BONFERRONI_BELOW:  # where one less the chance to stay inside is all rounding
        return smallest * len(points)
    outside = 1 - _inside(N, points, *_bounds(N, points, smallest * (1 + 1e-9)))
    return min(max(outside, smallest / 2), smallest * len(points), 1.0)


@lru_cache(maxsize=256)
def _band_level(N: int, points: tuple[float, ...], level: float) -> float:
    """The largest tail probability at each point that covers 1 - level at all of them."""
    low, high = math.log(level / len(points)), 0.0
    for _ in range(30):
        middle = (low + high) / 2
        covered = _inside(N, points, *_bounds(N, points, math.exp(middle)))
        low, high = (middle, high) if covered >= 1 - level else (low, middle)
    return math.exp(low)


def _bounds(N: int, points: tuple[float, ...], gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest count at each point whose tail probability is at least gamma / 2."""
    from scipy.stats import binom  # imported late, as it takes long

    z = np.array(points)
    lower = binom.ppf(min(gamma / 2, 1.0), N, z).clip(0, N).astype(int)
    upper = N - binom.ppf(min(gamma / 2, 1.0), N, 1 - z).clip(0, N).astype(int)
    return lower, upper


def _inside(N: int, points: tuple[float, ...], lower: np.ndarray, upper: np.ndarray) -> float:
    """Chance that N uniform values have counts within the bounds at all points."""
    from scipy.signal import fftconvolve  # imported late, as it takes long
    from scipy.special import gammaln

    if (lower > upper).any():
        return 0.0

    def poisson(rate: float, most: int) -> np.ndarray:
        k = np.arange(most + 1)
        return np.exp(k * math.log(rate) - rate - gammaln(k + 1))

    state, at, before = np.ones(1), 0, 0.0
    ends = zip((*points, 1.0), (*lower, N), (*upper, N), strict=True)
    for z, low, high in ends:
        step = poisson(N * (z - before), int(high) - at)
        wide = min(len(state), len(step)) > _FAST_FROM
        state = (fftconvolve if wide else np.convolve)(state, step)[low - at : high - at + 1]
        at, before = int(low), z
    return min(float(state[0] / poisson(N, N)[N]), 1.0)


def _checked(values: ArrayLike | Tensor, num_draws: int | None) -> np.ndarray:
    u = to_tensor(values).double().numpy()
    if u.ndim != 1 or len(u) < _FEWEST:
        raise ValueError(
            f"values: expected shape (N,) with at least {_FEWEST} of them, got {u.shape}"
        )
    if num_draws is None:
        bad, expected = ~((u >= 0) & (u <= 1)), "numbers in [0, 1]"
    else:
        num_draws = whole(num_draws, "num_draws", 1)
        bad = ~((u >= 0) & (u <= num_draws) & (u == np.round(u)))
        expected = f"whole numbers from 0 to num_draws={num_draws}"
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(f"values: expected {expected}, got {u[first]:g} at [{first}]")
    return u
