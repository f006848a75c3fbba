r"""Label switching: the components of a mixture have no order, so draws may number them at will.

.. math:: \pi_s = \arg\min_\pi \sum_{j, f} \frac{(x_{s, \pi(j), f} - c_{jf})^2}{v_f}

renumbers draw s; c is the mean and v the variance, within components, of the draws so renumbered.
The two are repeated in turn, from a single draw as the first c, until nothing changes.

Letters: S draws, K components, F numbers for each component.

References:
    | Dealing with label switching in mixture models (Stephens, 2000)
    | The Hungarian method for the assignment problem (Kuhn, 1955)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentlab.diagnostics.estimate import Estimate

__all__ = ["Alignment", "align"]

_PASSES = 5


@dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """Result of :func:`align`.

    Arguments:
        draws: site -> tensor (S, ...), with component j the same in every draw.
        permutations: shape (S, K): component j of draw s was number ``permutations[s, j]``. A site
            of labels z, shape (S, N), follows by ``permutations.argsort(1).gather(1, z)``.
        switched: share of draws whose permutation is not the most common one.
    """

    draws: Mapping[str, Tensor]
    permutations: Tensor
    switched: Estimate

    def __str__(self) -> str:
        S = len(self.permutations)
        return f"labels switched, and put back, in a share {self.switched} of {S} draws"

    __repr__ = __str__


def align(
    draws: Mapping[str, Tensor],
    axes: Mapping[str, int | tuple[int, ...]],
    reference: Mapping[str, Tensor] | None = None,
) -> Alignment:
    """Number the components of every draw alike, so that "component 2" means something.

    Totals, densities and predictions do not depend on labels and need no alignment; means and
    quantiles of single components are meaningless without.

    How to read ``switched``: draws of a *guide* that sits in one mode should not switch. Above
    0.01 components overlap, and figures of a single one are blurred however they are aligned: try
    fewer components. Draws of a *sampler* may visit all K! modes; there it says that, and no more.

    Arguments:
        draws: site -> draws, shape (S, ...).
        axes: site -> the axis over the K exchangeable components, counted from the right: -1, -2,
            ... Several, ``(-2, -1)``, are renumbered alike, and have no say in how. Other sites of
            ``draws`` are handed on as they are.
        reference: site -> one value, shape (...), whose numbering is to be matched. By default the
            draws are matched to their own mean, and the most common numbering is kept.

    Returns:
        The aligned draws, how they were permuted, and how many were.

    Raises:
        ValueError: for sites or axes that do not fit each other, or values that are not finite.

    References:
        | Dealing with label switching in mixture models (Stephens, 2000)

    Example:
        >>> locs = torch.tensor([[0.0, 5.0], [0.1, 5.2], [5.1, 0.2], [0.0, 5.1]])
        >>> aligned = align({"locs": locs}, {"locs": -1})
        >>> aligned.draws["locs"][2]
        tensor([0.2000, 5.1000])
        >>> print(aligned)
        labels switched, and put back, in a share 0.2 ± 0.2 of 4 draws
    """
    x = _features(draws, axes)
    S, middle = len(x), x.mean((0, 1))
    reach = abs(x - middle).max((0, 1))
    unit = np.where(reach > 0, reach, 1.0)  # so that no square is zero, or infinite
    x = (x - middle) / unit
    if reference is None:
        permutations = _keep_most_common(_iterate(x, x[0]))
    else:
        one = {site: torch.as_tensor(reference[site])[None] for site in axes if site in reference}
        centre = _features(one, axes, argument="reference")
        if centre.shape[1:] != x.shape[1:]:
            raise ValueError(
                "reference: expected the shapes of one draw, "
                f"got { ({site: tuple(value.shape[1:]) for site, value in one.items()}) }"
            )
        permutations = _iterate(x, (centre[0] - middle) / unit, fixed=True)

    counts = np.unique(permutations, axis=0, return_counts=True)[1]
    share = 1 - counts.max() / S
    aligned = dict(draws)
    for site, axis in axes.items():
        for one_axis in axis if isinstance(axis, tuple) else (axis,):
            aligned[site] = _take(aligned[site], permutations, one_axis)
    se = math.sqrt(share * (1 - share) / S)
    return Alignment(aligned, torch.from_numpy(permutations), Estimate(float(share), se))


def _iterate(x: np.ndarray, centre: np.ndarray, *, fixed: bool = False) -> np.ndarray:
    """Permutations (S, K) of x (S, K, F) that bring it nearest to the centre (K, F)."""
    permutations = _match(x, centre, x.std((0, 1)))
    for _ in range(_PASSES):
        aligned = np.take_along_axis(x, permutations[:, :, None], 1)
        mean, before = aligned.mean(0), permutations
        scale = np.sqrt(((aligned - mean) ** 2).mean((0, 1)))
        permutations = _match(x, centre if fixed else mean, scale)
        if np.array_equal(permutations, before):
            break
    return permutations


def _match(x: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """For each draw the permutation (S, K) of least squared distance to the centre (K, F)."""
    from scipy.optimize import linear_sum_assignment  # imported late, as it takes long

    middle, scale = centre.mean(0), np.where(scale > 0, scale, 1.0)
    x, centre = (x - middle) / scale, (centre - middle) / scale
    cost = (centre**2).sum(-1)[:, None] - 2 * centre @ x.swapaxes(1, 2)  # (S, K, K)
    cost += (x**2).sum(-1)[:, None, :]
    nearest = cost.argmin(2)  # best for each component on its own, so best if it is a permutation
    clash = (np.sort(nearest, 1) != np.arange(x.shape[1])).any(1)
    for s in np.flatnonzero(clash):
        nearest[s] = linear_sum_assignment(cost[s])[1]
    return nearest


def _keep_most_common(permutations: np.ndarray) -> np.ndarray:
    """Renumber so that the most common permutation is none at all."""
    kinds, counts = np.unique(permutations, axis=0, return_counts=True)
    return permutations[:, np.argsort(kinds[counts.argmax()])]


def _take(value: Tensor, permutations: np.ndarray, axis: int) -> Tensor:
    moved = value.movedim(axis, 1)
    index = torch.from_numpy(permutations).to(value.device)
    index = index.reshape(*index.shape, *[1] * (moved.dim() - 2))
    return torch.take_along_dim(moved, index, 1).movedim(1, axis)


def _features(
    draws: Mapping[str, Tensor],
    axes: Mapping[str, int | tuple[int, ...]],
    argument: str = "draws",
) -> np.ndarray:
    """All that is known of each component side by side, shape (S, K, F)."""
    single = {site: axis for site, axis in axes.items() if not isinstance(axis, tuple)}
    if not single:
        raise ValueError("axes: expected at least one site with exchangeable components, got none")
    parts: list[np.ndarray] = []
    for site, axis in single.items():
        if site not in draws:
            raise ValueError(f"{argument}: expected site {site!r} as in axes, got {sorted(draws)}")
        value = draws[site].detach().cpu().double()
        if not 1 - value.dim() <= axis <= -1:
            raise ValueError(
                f"axes: expected an axis of {site!r} from the right, -1 to {1 - value.dim()}, "
                f"got {axis}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{argument}: {site!r} has values that are not finite")
        if value.numel() == 0:
            raise ValueError(f"{argument}: {site!r} is empty, shape {tuple(value.shape)}")
        moved = value.movedim(axis, 1)
        parts.append(moved.reshape(*moved.shape[:2], -1).numpy())
    if len({part.shape[:2] for part in parts}) > 1:
        sizes = {site: part.shape[:2] for site, part in zip(single, parts, strict=True)}
        raise ValueError(f"axes: expected one size (S, K) for all sites, got {sizes}")
    return np.concatenate(parts, axis=2)
