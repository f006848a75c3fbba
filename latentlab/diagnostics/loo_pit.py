r"""Where each row falls in its prediction from all the others.

.. math:: u_n = \Pr(\tilde y_n < y_n \mid y_{-n}) + v_n \Pr(\tilde y_n = y_n \mid y_{-n}), \qquad
          v_n \sim U(0, 1)

If the model is right these are uniform; the random part spreads the jumps of discrete data.

Letters: S draws, N rows, B of them in a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, whole
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.loo import blocks, smoothed
from latentlab.diagnostics.psis import KhatTable, _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LooPit", "loo_pit"]

_FAR = 3.0  # standard errors


@dataclass(frozen=True, eq=False, repr=False)
class LooPit:
    """Result of :func:`loo_pit`.

    Arguments:
        pit: of each row, between 0 and 1, shape (N,).
        khat: of each row's weights; above 0.7, do not trust that row's.
    """

    pit: Tensor
    khat: KhatTable

    @property
    def location(self) -> Estimate:
        """Mean less one half: above 0 where predictions are too low."""
        return Estimate(float(self.pit.mean()) - 0.5, math.sqrt(1 / 12 / len(self.pit)))

    @property
    def spread(self) -> Estimate:
        """Mean square from one half, 1 if uniform: above 1 where predictions are too narrow."""
        square = 12 * (self.pit - 0.5) ** 2  # of variance 0.8 if uniform
        return Estimate(float(square.mean()), math.sqrt(0.8 / len(self.pit)))

    @property
    def distance(self) -> float:
        """Largest distance of their distribution function from the uniform one."""
        ordered, N = self.pit.sort().values.double(), len(self.pit)
        steps = torch.arange(N + 1).double() / N
        return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())

    @property
    def band(self) -> float:
        """What ``distance`` exceeds once in 20 times at most, if uniform."""
        return math.sqrt(math.log(2 / 0.05) / 2 / len(self.pit))

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the predictions, as far as these rows can tell."""
        location, spread = self.location, self.spread
        found = []
        if abs(location.value) > _FAR * location.se:
            found.append(f"predictions are too {'low' if location.value > 0 else 'high'}")
        elif abs(spread.value - 1) > _FAR * spread.se:
            found.append(f"predictions are too {'narrow' if spread.value > 1 else 'wide'}")
        if not found and self.distance > self.band:
            found.append("predictions have another shape than the data")
        return tuple(found)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Distribution function of the PITs less the uniform one, within its 95 % band.

        A hill says that predictions are too high, a valley too low; up and then down that they
        are too narrow, down and then up too wide.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        ordered, N = self.pit.sort().values.numpy(), len(self.pit)
        u = np.concatenate([[0.0], np.repeat(ordered, 2), [1.0]])
        steps = np.repeat(np.arange(N + 1) / N, 2)
        ax.axhspan(-self.band, self.band, color="0.5", alpha=0.15, linewidth=0)
        ax.plot(u, steps - u)
        ax.set(xlabel="LOO-PIT", ylabel="ECDF less uniform", xlim=(0, 1), title=self._reading)
        return ax

    @property
    def _reading(self) -> str:
        return "; ".join(self.faults) or "no sign against the predictions"

    def __str__(self) -> str:
        text = (
            f"{self._reading} (LOO-PIT of {len(self.pit)} rows: largest distance "
            f"{self.distance:.2g} from uniform, 95 % band {self.band:.2g})"
        )
        return f"{text}; k-hat: {self.khat}" if len(self.khat.bad) else text

    __repr__ = __str__


def loo_pit(
    observed: ArrayLike | Tensor,
    replicated: ArrayLike | Tensor | Iterator[Tensor],
    log_lik: ArrayLike | Tensor | Iterator[Tensor],
    log_weights: ArrayLike | Tensor | None = None,
    seed: int = 0,
) -> LooPit:
    """Probability integral transform of each row, predicted as if it had been left out.

    How to read it: uniform if the model is right. Where ``faults`` are found, change the model:
    too narrow asks for heavier tails or another source of variation, too wide for a smaller
    noise, another shape for another likelihood. No fault is no proof: rows are pooled, and
    faults of different rows may cancel.

    Arguments:
        observed: the rows, shape (N,).
        replicated: a new draw of each row at each draw of the latents, shape (S, N); or an
            iterator over blocks of rows, (S, B) each, the same blocks as those of ``log_lik``.
        log_lik: as of :func:`loo`.
        log_weights: as of :func:`loo`.
        seed: of the random part, which is nothing where no replicate equals its row.

    Returns:
        The transforms, and k-hat of each row.

    Raises:
        ValueError: for shapes that do not fit, numbers in ``observed`` or ``replicated`` that
            are not finite, or as :func:`loo`.

    References:
        | Visualization in Bayesian workflow (Gabry, Simpson, Vehtari, Betancourt and Gelman, 2019)
        | Predictive model assessment for count data (Czado, Gneiting and Held, 2009)

    Example:
        Rows that vary twice as much as the model says:

        >>> from torch.distributions import Normal
        >>> g = torch.Generator().manual_seed(0)
        >>> y = 2 * torch.randn(200, generator=g)
        >>> z = 200**-0.5 * torch.randn(4000, 1, generator=g)
        >>> print(loo_pit(y, z + torch.randn(4000, 200, generator=g), Normal(z, 1.0).log_prob(y)))
        predictions are too narrow (LOO-PIT of 200 rows: largest distance 0.1... band 0.096)
    """
    y = to_tensor(observed, "observed")
    if y.dim() != 1 or y.isnan().any():
        raise ValueError(
            f"observed: expected shape (N,) without NaN, got {tuple(y.shape)} with "
            f"{int(y.isnan().sum())} NaN; leave missing rows out of all arguments"
        )
    if y.isinf().any():
        raise ValueError(
            f"observed: expected finite numbers, got {int(y.isinf().sum())} infinite (first at "
            f"{int(y.isinf().nonzero()[0])})"
        )
    pits: list[float] = []
    khats: list[float] = []
    ses: list[float] = []
    first = 0
    random = torch.rand(
        len(y), generator=torch.Generator().manual_seed(whole(seed, "seed", 0))
    ).double()
    parts = zip_longest(smoothed(log_lik, log_weights), blocks(replicated, "replicated"))
    for block, draws in parts:
        if block is None or draws is None or draws.shape != block.log_lik.shape:
            expected = None if block is None else tuple(block.log_lik.shape)
            got = None if draws is None else tuple(draws.shape)
            raise ValueError(
                f"replicated: expected the shape of log_lik, {expected}, got {got} after {first} "
                "rows; of iterators, each block"
            )
        last = first + draws.shape[1]
        if last > len(y):
            raise ValueError(f"observed: expected {last} rows or more as of log_lik, got {len(y)}")
        if draws.isnan().any():
            raise ValueError(f"replicated has {int(draws.isnan().sum())} NaN")
        if draws.isinf().any():
            raise ValueError(
                f"replicated: expected finite numbers, got {int(draws.isinf().sum())} infinite"
            )
        w, at = block.log_weights.exp(), y[first:last]
        below, equal = (w * (draws < at)).sum(0), (w * (draws == at)).sum(0)
        pits += (below + random[first:last] * equal).clamp(0, 1).tolist()
        khats += block.khat.khat.tolist()
        ses += block.khat.se.tolist()
        first = last
    if first != len(y):
        raise ValueError(f"observed: expected {first} rows as of log_lik, got {len(y)}")
    pit, khat, se = torch.tensor([pits, khats, ses], dtype=torch.float64)
    return LooPit(pit, KhatTable(khat, se))
