r"""Stein's identities: whether draws belong to a target, from gradients of its log density alone.

For draws of a density p on the real line, and any centre :math:`m_i`,

.. math:: \mathrm{E}[\partial_i \log p(u)] = 0, \qquad
          \mathrm{E}[(u_i - m_i) \, \partial_i \log p(u)] = -1, \qquad
          \mathrm{E}[(u_i - m_i) \, \partial_j \log p(u)] = 0 \quad (i \ne j).

No normalising constant, no second set of draws. For a normal target of standard deviation
:math:`\sigma`, draws whose mean is off by :math:`\delta` and whose standard deviation is c times
right give :math:`-\delta / \sigma^2` and :math:`-c^2` in place of 0 and -1.

Letters: C chains, S draws in each, L latents.

References:
    | A bound for the error in the normal approximation to the distribution of a sum of dependent
      random variables (Stein, 1972)
    | Measuring sample quality with Stein's method (Gorham and Mackey, 2015)
    | On the removal of skewness by transformation (Hall, 1992)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import labels, to_tensor, unit_of
from latentlab.diagnostics.ess import ess
from latentlab.diagnostics.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Stein", "stein"]

_LEVEL = 0.01
_FEWEST_DRAWS = 100
_MOST_IN_PAIRS = 32
_SHOWN = 3  # latents by name


@dataclass(frozen=True, eq=False, repr=False)
class Stein:
    """Result of :func:`stein`.

    Arguments:
        names: of the latents, L of them.
        slope: mean of the score of each, to be 0, shape (L,).
        slope_se: its standard error, shape (L,).
        slope_z: its z-score, shape (L,).
        spread: mean of (u - m) times the score of each, to be -1, shape (L,).
        spread_se: its standard error, shape (L,).
        spread_z: its z-score, shape (L,).
        pair_z: z-scores of (u - m) of latent i times the score of latent j, shape (L, L), 0 on
            the diagonal; ``None`` for more than 32 latents.
        ess: the effective number of draws behind the worst of these means.
    """

    names: tuple[str, ...]
    slope: Tensor
    slope_se: Tensor
    slope_z: Tensor
    spread: Tensor
    spread_se: Tensor
    spread_z: Tensor
    pair_z: Tensor | None
    ess: float

    @property
    def num_tests(self) -> int:
        """Number of identities that were looked at."""
        L = len(self.names)
        return 2 * L + (0 if self.pair_z is None else L * (L - 1))

    @property
    def largest(self) -> float:
        """The largest z-score in absolute value."""
        z = [self.slope_z, self.spread_z, *([] if self.pair_z is None else [self.pair_z])]
        return float(torch.cat([part.flatten() for part in z]).abs().max())

    @property
    def p_value(self) -> float:
        """Chance of so large a z-score if all identities hold (Sidak's correction)."""
        from scipy.special import log_ndtr  # imported late, as it takes long

        one = 2 * math.exp(float(log_ndtr(-self.largest)))
        if math.isnan(one):
            return math.nan
        return -math.expm1(self.num_tests * math.log1p(-one)) if one < 1 else 1.0

    @property
    def ok(self) -> bool:
        """True where the draws may be those of the target: a p-value above 0.01."""
        return self.p_value > _LEVEL

    @property
    def worst(self) -> list[tuple[float, str]]:
        """Each identity's z-score and what it says, the largest first."""
        found = []
        for name, z, value, se in zip(
            self.names, *_lists(self.slope_z, self.slope, self.slope_se), strict=True
        ):
            found.append((z, f"{name}: mean slope {Estimate(value, se)}, not 0"))
        for name, z, value, se in zip(
            self.names, *_lists(self.spread_z, self.spread, self.spread_se), strict=True
        ):
            found.append((z, f"{name}: spread {Estimate(value, se)}, not -1"))
        if self.pair_z is not None:
            for i, row in enumerate(self.pair_z.tolist()):
                pairs = [(z, j) for j, z in enumerate(row) if j != i]
                found += [(z, f"{self.names[i]} with {self.names[j]}") for z, j in pairs]
        return sorted(found, key=lambda item: -abs(item[0]))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The z-scores of each latent; dashed lines are the bound for all of them together.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        from scipy.special import ndtri  # imported late, as it takes long

        from latentlab.diagnostics.psis import _axes

        ax = _axes(ax)
        bound = -ndtri(-math.expm1(math.log1p(-_LEVEL) / self.num_tests) / 2)
        reach = 4 * bound  # what is farther out is drawn at the edge
        at = range(len(self.names))
        ax.plot(at, self.slope_z.clamp(-reach, reach), "o", label="slope")
        ax.plot(at, self.spread_z.clamp(-reach, reach), "s", label="spread")
        if self.pair_z is not None and len(self.names) > 1:
            worst = self.pair_z.gather(1, self.pair_z.abs().argmax(1, keepdim=True))[:, 0]
            ax.plot(at, worst.clamp(-reach, reach), "x", label="worst pair")
        for line in (-bound, bound):
            ax.axhline(line, linestyle="--", color="0.5")
        ax.axhline(0, color="0.8", linewidth=0.8)
        if len(self.names) <= 20:
            ax.set_xticks(list(at), self.names, rotation=45, ha="right")
        ax.legend(fontsize="small")
        ax.set(ylabel="z-score", title=f"Stein's identities (p = {self.p_value:.2g})")
        return ax

    def __str__(self) -> str:
        if self.ok:
            return (
                f"draws fit the target: largest of {self.num_tests} z-scores {self.largest:.1f} "
                f"(p = {self.p_value:.2g})"
            )
        if math.isnan(self.largest):
            return "not known whether draws fit the target: z-scores are NaN"
        bound = min(self.largest / 2, 1e3)  # which may be infinite
        named = [f"{text} (z = {_short(z)})" for z, text in self.worst[:_SHOWN] if abs(z) > bound]
        return (
            f"draws do not belong to the target: {'; '.join(named)} "
            f"(p = {self.p_value:.1g} over {self.num_tests} z-scores)"
        )

    __repr__ = __str__


def stein(
    draws: ArrayLike | Tensor, scores: ArrayLike | Tensor, names: Sequence[str] | None = None
) -> Stein:
    """Check draws against the gradients of the log density that they should have.

    How to read it: a p-value below 0.01 says that these are not draws of this target. The text
    names the latents: a *spread* of -0.25 is a standard deviation half as wide as it should be, a
    *slope* is a mean off to the other side, a *pair* is a correlation that is missing or too much.
    If all latents fail, suspect the log density: a variance where a standard deviation was meant,
    a prior or a Jacobian that was left out. If one does, suspect what the draws came from. With
    many draws a small p-value may be a small error: look at the figures and their errors.

    What it cannot see: a mode that was never visited, and, beyond 32 latents, correlations;
    a mean-field guide at its optimum passes when each latent is looked at alone. The identities
    hold for any of the columns: hand in 32 at most at a time.

    Latents must be on the real line: bounded ones are transformed, and the log density has the
    log Jacobian. Means need moments: where (u - m) times the score has no variance, as for scores
    that grow faster than tails fall, z-scores are too small to alarm and too rough to trust. The
    centre m is the median, so that heavy tails of u alone, such as Cauchy's, do no harm.

    Arguments:
        draws: on the real line, shape (S, L), or chains of equal length, shape (C, S, L); S at
            least 100. Correlated draws are fine.
        scores: gradients of the target's log density there, of the same shape.
        names: of the latents, L of them; ``u[0]``, ... by default.

    Returns:
        Means, z-scores and a p-value for all of them together. A latent that does not vary has
        an infinite z-score.

    Raises:
        ValueError: for other shapes, fewer draws, or numbers that are not finite.

    References:
        | Measuring sample quality with Stein's method (Gorham and Mackey, 2015)

    Example:
        >>> u = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> print(stein(u, -u))
        draws fit the target: largest of 6 z-scores 1.5 (p = 0.6)
        >>> print(stein(u, -u / torch.tensor([1.0, 2.0]), names=["loc", "scale"]))
        draws do not belong to the target: scale: spread -0.5... (z = ...) ...
    """
    u, g = _chains(draws, "draws"), _chains(scores, "scores")
    if u.shape != g.shape:
        raise ValueError(
            f"scores: expected the shape of draws, {tuple(u.shape)}, got {tuple(g.shape)}"
        )
    L = u.shape[2]
    called = labels(names, L, "u", "latent")
    unit_u, unit_g = unit_of(u, dim=(0, 1)), unit_of(g, dim=(0, 1))
    u, g = u / unit_u, g / unit_g
    centred = u - u.flatten(0, 1).median(0).values
    slope, slope_se, slope_z, size = _against(g, torch.zeros(L).double())
    expected = -1 / unit_u / unit_g
    spread, spread_se, spread_z, size2 = _against(centred * g, expected)
    ess, pair_z = torch.minimum(size, size2).min(), None
    if L <= _MOST_IN_PAIRS:
        none = torch.zeros(L).double()
        rows = [_against(centred[:, :, i, None] * g, none)[2] for i in range(L)]
        pair_z = torch.stack(rows).fill_diagonal_(0.0)
    slope, slope_se = (part * unit_g for part in (slope, slope_se))
    spread, spread_se = (part * unit_u * unit_g + 0.0 for part in (spread, spread_se))
    return Stein(called, slope, slope_se, slope_z, spread, spread_se, spread_z, pair_z, float(ess))


def _against(chains: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of chains (C, S, L), their errors, z-scores and effective sizes, each (L,).

    Hall's transformation takes the skewness out of a mean's z-score, which for squares of a
    normal would cost false alarms far out, where many are looked at together.
    """
    size = ess(chains, "mean")
    flat = chains.flatten(0, 1)
    mean, sd = flat.mean(0) + 0.0, flat.std(0)  # + 0.0 for no "-0"
    se = sd / size.sqrt()
    off = mean - expected
    t = torch.where(off == 0, 0.0, off / se)
    safe = torch.where(sd > 0, sd, 1.0)
    a = ((flat - mean) / safe).pow(3).mean(0) / size.sqrt()
    z = t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6
    z = torch.where(z.isfinite(), z, t)  # so far out that its cube is not a number
    return mean, se, z, size


def _chains(values: ArrayLike | Tensor, argument: str) -> Tensor:
    chains = to_tensor(values, argument).double()
    if chains.dim() == 2:
        chains = chains[None]
    if chains.dim() != 3 or 0 in chains.shape or chains.shape[1] < _FEWEST_DRAWS:
        raise ValueError(
            f"{argument}: expected shape (S, L) or (C, S, L) with at least {_FEWEST_DRAWS} draws "
            f"S, got {tuple(chains.shape)}"
        )
    bad = ~chains.isfinite()
    if bad.any():
        where = bad.nonzero()[0, 1:].tolist()
        raise ValueError(
            f"{argument}: expected finite numbers, got {int(bad.sum())} that are not "
            f"(first at draw {where[0]}, latent {where[1]})"
        )
    return chains


def _short(z: float) -> str:
    return f"{z:.1f}" if abs(z) < 1e6 else f"{z:.2g}"


def _lists(*columns: Tensor) -> list[list[float]]:
    return [column.tolist() for column in columns]
