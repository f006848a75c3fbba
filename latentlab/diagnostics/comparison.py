r"""Draws against reference draws, quantity by quantity and as a whole.

.. math:: \mathrm{shift} = (\bar x - \bar r) / s_r, \qquad
          \mathrm{log\ ratio} = \log (s_x / s_r)

Letters: C chains, S draws, F quantities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import labels, to_tensor, unit_of
from latentlab.diagnostics.distances import (
    C2st,
    Mmd,
    SlicedWasserstein,
    c2st,
    mmd,
    sliced_wasserstein,
)
from latentlab.diagnostics.ess import ess, mcse
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DrawComparison", "compare_draws"]

_FEWEST = 20
_FARTHEST = 1e150  # whose square a double can hold
_MOST = 1000  # draws of each set, thinned, for the distances


@dataclass(frozen=True, eq=False, repr=False)
class DrawComparison:
    """Result of :func:`compare_draws`.

    Arguments:
        names: of the quantities, F of them.
        shift: difference of the means in standard deviations of the reference, shape (F,).
        shift_se: its Monte Carlo standard error, shape (F,).
        log_ratio: log of the ratio of the standard deviations, shape (F,).
        log_ratio_se: its Monte Carlo standard error, shape (F,).
        sliced_wasserstein: in standard deviations of the reference.
        mmd: of quantities in standard deviations of the reference.
        c2st: of a logistic regression on values, squares and products.
    """

    names: tuple[str, ...]
    shift: Tensor
    shift_se: Tensor
    log_ratio: Tensor
    log_ratio_se: Tensor
    sliced_wasserstein: SlicedWasserstein
    mmd: Mmd
    c2st: C2st

    def plot(self, ax: Axes | None = None) -> Axes:
        """Shift and log ratio of each quantity, with two standard errors.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        at = torch.arange(len(self.names))
        for value, se, label, move in (
            (self.shift, self.shift_se, "mean (sd)", -0.1),
            (self.log_ratio, self.log_ratio_se, "log sd ratio", 0.1),
        ):
            ax.errorbar(at + move, value, 2 * se, fmt="o", markersize=4, label=label)
        ax.axhline(0, color="0.5", linewidth=0.8)
        if len(at) <= 20:
            ax.set_xticks(at.tolist(), self.names, rotation=45, ha="right")
        ax.legend(fontsize="small")
        ax.set(ylabel="error", title=str(self.c2st))
        return ax

    def __str__(self) -> str:
        columns = zip(
            self.names,
            *(v.tolist() for v in (self.shift, self.shift_se, self.log_ratio, self.log_ratio_se)),
            strict=True,
        )
        wide = max(8, *(len(name) for name in self.names))
        rows = [f"{'':{wide}}  {'mean error (sd)':18}  log sd ratio"]
        for name, shift, shift_se, ratio, ratio_se in columns:
            left, right = Estimate(shift, shift_se), Estimate(ratio, ratio_se)
            rows.append(f"{name:{wide}}  {left!s:18}  {right}")
        return "\n".join([*rows, str(self.sliced_wasserstein), str(self.mmd), str(self.c2st)])

    __repr__ = __str__


def compare_draws(
    x: ArrayLike | Tensor,
    reference: ArrayLike | Tensor,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> DrawComparison:
    """Compare draws, such as of a guide, with draws of a reference, such as of a sampler.

    How to read it: means within 0.1 standard deviations and log ratios within 0.15 are lost in
    what anyone does with a posterior; 0.3 and 0.7 change conclusions. An error is told from noise
    where it exceeds twice its standard error. The three distances look at all quantities
    together, and so at correlations: where the table is fine and they are not, it is the shape.

    Arguments:
        x: draws (S, F), or chains (C, S, F); at least 20.
        reference: draws (S, F), or chains (C, S, F), S its own; at least 20.
        names: of the quantities, F of them; ``x[0]``, ... by default.
        seed: of the distances.

    Returns:
        Errors of means and standard deviations, with Monte Carlo errors of both sets that know of
        autocorrelation, and the distances, from 1,000 draws of each at most, thinned to about
        their effective number.

    Raises:
        ValueError: for other shapes, fewer draws, numbers that are not finite, or a quantity
            that does not vary in the reference.

    Example:
        >>> x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> y = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)).double()
        >>> print(compare_draws(torch.tensor([1.0, 0.5]) * x, y, ["loc", "scale"]))
                  mean error (sd)     log sd ratio
        loc       ...
    """
    a, r = _chains(x, "x"), _chains(reference, "reference")
    F = a.shape[2]
    if r.shape[2] != F:
        raise ValueError(f"reference: expected {F} quantities as of x, got {r.shape[2]}")
    called = labels(names, F, "x", "quantity")
    units = unit_of(r, dim=(0, 1))
    a, r = a / units, r / units
    flat_a, flat_r = a.flatten(0, 1), r.flatten(0, 1)
    centre, unit = flat_r.mean(0), flat_r.std(0)
    if not (unit > 0).all():
        still = called[int((unit == 0).nonzero()[0])]
        raise ValueError(f"reference: expected quantities that vary, {still} does not")
    if not (((a - centre) / unit).abs() < _FARTHEST).all():
        raise ValueError(
            f"x: expected numbers within {_FARTHEST:g} standard deviations of the reference; are "
            "they in the same units?"
        )
    of_a = unit_of(flat_a, dim=0)
    sd = (flat_a / of_a).std(0) * of_a
    spread_a = mcse(((a - flat_a.mean(0)) / sd.where(sd > 0, 1.0)) ** 2) / 2
    spread_r = mcse(((r - centre) / unit) ** 2) / 2  # errors of the logs of the sds
    thin_a, thin_r = ((v - centre) / unit for v in (_thinned(a), _thinned(r)))
    return DrawComparison(
        called,
        (flat_a.mean(0) - centre) / unit,
        (mcse(a).square() + mcse(r).square()).sqrt() / unit,
        (sd / unit).log(),
        (spread_a.square() + spread_r.square()).sqrt(),
        sliced_wasserstein(thin_a, thin_r, seed=seed),
        mmd(thin_a, thin_r, seed=seed),
        c2st(thin_a, thin_r, seed=seed),
    )


def _thinned(chains: Tensor) -> Tensor:
    """Nearly independent draws (at most 1,000, at least 20) of chains (C, S, F)."""
    C, S = chains.shape[:2]
    size = float(ess(chains, "mean").min())
    count = int(max(_FEWEST, min(size, C * S, _MOST)))
    # Evenly over all chains, end to end.
    return chains.flatten(0, 1)[(torch.arange(count) * (C * S) / count).long()]


def _chains(values: ArrayLike | Tensor, argument: str) -> Tensor:
    chains = to_tensor(values, argument).double()
    if chains.dim() == 2:
        chains = chains[None]
    if chains.dim() != 3 or 0 in chains.shape or chains.shape[1] < _FEWEST:
        raise ValueError(
            f"{argument}: expected shape (S, F) or (C, S, F) with at least {_FEWEST} draws S, "
            f"got {tuple(chains.shape)}"
        )
    if not chains.isfinite().all():
        where = (~chains.isfinite()).nonzero()[0, 1:].tolist()
        raise ValueError(
            f"{argument}: expected finite numbers, not so first at draw {where[0]}, "
            f"quantity {where[1]}"
        )
    return chains
