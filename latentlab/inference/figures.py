"""The figures of a summary: mean, sd and quantiles of every number of a latent.

A value of a discrete latent that stands for a kind, as that of a ``Categorical``, has no mean: the
figures are then those of each value being taken, whose mean is how often it is. Truth values are
such figures as they are, and counts are numbers.

Letters: S draws, L numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_kind", "frame_of", "kinds_of"]

_MOST_VALUES = 20  # of a discrete site, for each to have a line


def frame_of(site: str, labels: Sequence[str], draws: Tensor, support: Any) -> pd.DataFrame:  # noqa: ANN401
    """The lines of a site.

    Arguments:
        site: its name.
        labels: of its numbers.
        draws: shape (S, ...).
        support: of one value, ``None`` where there are no draws.
    """
    import pandas as pd

    labels, draws = by_kind(labels, draws, support)
    return pd.DataFrame({"site": site, "index": labels, **_figures(draws)})


def by_kind(labels: Sequence[str], draws: Tensor, support: Any) -> tuple[list[str], Tensor]:  # noqa: ANN401
    """Labels and draws (S, L) of the figures of a site: of numbers, or of kinds being taken.

    Arguments:
        labels: of its numbers.
        draws: shape (S, ...).
        support: of one value.

    Example:
        >>> draws = torch.tensor([[0], [1], [1]])
        >>> by_kind([""], draws, constraints.integer_interval(0, 1))
        (['= 0', '= 1'], tensor([[1., 0.],
                [0., 1.],
                [0., 1.]], dtype=torch.float64))
    """
    kinds, flat = kinds_of(support), draws.reshape(len(draws), -1)
    if kinds is None:
        return [*labels], flat if flat.is_floating_point() else flat.double()
    taken = torch.stack([flat == kind for kind in kinds], -1).flatten(1).double()
    return [f"{label} = {kind}".strip() for label in labels for kind in kinds], taken


def kinds_of(support: Any) -> range | None:  # noqa: ANN401
    """The values of a site that are kinds, if they are few."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if not isinstance(support, constraints.integer_interval):
        return None
    low, high = (torch.as_tensor(b) for b in (support.lower_bound, support.upper_bound))
    first, last = int(low.min()), int(high.max())
    return range(first, last + 1) if last - first < _MOST_VALUES else None


def _figures(draws: Tensor) -> dict[str, np.ndarray]:
    """Mean, sd, quantiles and standard error of the mean of every number of draws (S, L)."""
    flat = draws.numpy(force=True).astype(float)
    mean = flat.mean(0)
    flat -= mean
    unit = np.maximum(np.abs(flat).max(0), 1e-300)  # the square of a tiny number is zero
    sd = unit * (flat / unit).std(0, ddof=1)
    q05, q50, q95 = mean + np.quantile(flat, (0.05, 0.5, 0.95), axis=0)
    mcse = sd / len(flat) ** 0.5
    return {"mean": mean, "sd": sd, "q05": q05, "q50": q50, "q95": q95, "mcse": mcse}
