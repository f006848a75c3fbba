r"""Where a Gaussian mixture starts: seeds far apart, then expectation-maximisation.

Of several sets of seeds the one that is best after a few steps on some of the rows goes on, so
that two components on one cluster seldom stay there.

Rows are standardised. Half a pseudo-row for each component, of mean 0 and scale 1/2, keeps
components from emptying, and their scales from zero.

Letters: N rows, D features, K components.

References:
    | k-means++: the advantages of careful seeding (Arthur and Vassilvitskii, 2007)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor

from latentlab.models.gmm_em import Covariance, Point, expected, maximum

__all__ = ["around", "clustered", "far_rows", "find_start", "greedy_rows", "random_rows"]

_CANDIDATES = 5  # sets of seeds
_GLANCE_STEPS, _GLANCE_ROWS = 8, 2_000  # after so many steps on so many rows, one goes on
_MAX_STEPS = 100
_TOL = 1e-6  # nats a row
_MEANS = 20  # steps of k-means
_SETS = 5  # of greedy seeds
_PSEUDO, _VARIANCE = 0.5, 0.25


def find_start(
    y: Tensor,
    counts: Tensor,
    num_components: int,
    covariance: Covariance,
    init: Literal["k-means++", "random"],
    generator: Generator,
) -> Point:
    """A start near a good maximum of the likelihood.

    Arguments:
        y: standardised rows, shape (N, D), NaN where a cell is missing.
        counts: how often each row counts, shape (N,), positive.
        num_components: number of components K.
        covariance: the shape of the covariances.
        init: seeds far apart, or any rows.
        generator: all chance comes from it.

    Returns:
        The parameters, in standardised units.
    """
    y, counts = y.double(), counts.double()
    filled = y.nan_to_num(0.0)  # with the mean
    order = _order(filled, generator)
    y, counts, filled = y[order], counts[order], filled[order]
    some = _at_most(_GLANCE_ROWS, y, generator)
    best, height = None, -math.inf
    for _ in range(_CANDIDATES if num_components > 1 else 1):
        if init == "random":
            seeds = random_rows(filled, counts, num_components, generator)
        else:
            seeds = far_rows(filled, counts, num_components, generator)
        found, reached = around(seeds, covariance), -math.inf
        if num_components > 1:
            found, reached = _climb(y[some], counts[some], found, covariance, _GLANCE_STEPS)
        # Rounding does not choose between two that are one with other labels.
        if best is None or reached > height + _TOL * float(counts.sum()):
            best, height = found, reached
    return _climb(y, counts, best or found, covariance, _MAX_STEPS)[0]


def far_rows(y: Tensor, counts: Tensor, num_components: int, generator: Generator) -> Tensor:
    """Rows chosen in turn with probability of the squared distance to the nearest one so far.

    Arguments:
        y: rows without a missing cell, shape (N, D).
        counts: how often each row counts, shape (N,).
        num_components: number of rows to choose.
        generator: all chance comes from it.

    Returns:
        The chosen rows, shape (K, D).
    """
    chosen = y[_draw(counts, generator)]
    nearest = torch.full((len(y),), float("inf"), dtype=y.dtype, device=y.device)
    while len(chosen) < num_components:
        nearest = torch.minimum(nearest, ((y - chosen[-1]) ** 2).sum(-1))
        odds = nearest * counts
        odds = odds if odds.sum() > 0 else counts
        chosen = torch.cat([chosen, y[_draw(odds, generator)]])
    return chosen


def greedy_rows(y: Tensor, counts: Tensor, num_components: int, generator: Generator) -> Tensor:
    """As :func:`far_rows`, each the best of a few: the one that leaves the least distance.

    Of several sets of them, the one that does after some steps of k-means.

    Arguments:
        y: rows without a missing cell, shape (N, D).
        counts: how often each row counts, shape (N,).
        num_components: number of rows to choose.
        generator: all chance comes from it.

    Returns:
        The chosen rows, shape (K, D).
    """
    best, least = None, math.inf
    for _ in range(_SETS if num_components > 1 else 1):
        seeds = _greedy(y, counts, num_components, generator)
        shares = clustered(y, counts, seeds)
        number = shares.sum(1, keepdim=True)
        seeds = torch.where(number > 0, shares @ y / number.clamp_min(1e-300), seeds)
        left = float(counts @ _squared(y, seeds).amin(1))
        if best is None or left < least:
            best, least = seeds, left
    return seeds if best is None else best


def _greedy(y: Tensor, counts: Tensor, num_components: int, generator: Generator) -> Tensor:
    tries = 2 + int(math.log(num_components))
    chosen = [y[_draw(counts, generator)]]
    nearest = _squared(y, chosen[0])[:, 0]
    while len(chosen) < num_components:
        odds = nearest * counts
        odds = odds if bool(odds.sum() > 0) else counts
        rows = torch.cat([_draw(odds, generator) for _ in range(tries)])
        left = torch.minimum(nearest[:, None], _squared(y, y[rows]))
        best = int((counts @ left).argmin())
        nearest = left[:, best]
        chosen.append(y[rows[best]][None])
    return torch.cat(chosen)


def clustered(y: Tensor, counts: Tensor, seeds: Tensor) -> Tensor:
    """Clusters of rows around seeds, by k-means.

    Arguments:
        y: rows without a missing cell, shape (N, D).
        counts: how often each row counts, shape (N,).
        seeds: shape (K, D).

    Returns:
        How often each row counts in each cluster, shape (K, N); every row is in one of them.
    """
    nearest = None
    for _ in range(_MEANS):
        before, nearest = nearest, _squared(y, seeds).argmin(1)
        shares = torch.zeros(len(seeds), len(y), dtype=y.dtype, device=y.device)
        shares[nearest, torch.arange(len(y), device=y.device)] = counts
        number = shares.sum(1, keepdim=True)
        seeds = torch.where(number > 0, shares @ y / number.clamp_min(1e-300), seeds)
        if before is not None and bool((before == nearest).all()):
            break
    return shares


def _squared(y: Tensor, seeds: Tensor) -> Tensor:
    """Squared distances (N, K)."""
    far = y.square().sum(1, keepdim=True) + seeds.square().sum(1)
    return torch.addmm(far, y, seeds.T, alpha=-2).clamp_min_(0.0)


def _climb(
    y: Tensor, counts: Tensor, at: Point, covariance: Covariance, max_steps: int
) -> tuple[Point, float]:
    """Climb the likelihood with its pseudo-rows until a step gains next to nothing.

    Returns:
        Where that leads, and the log-likelihood before the last step.
    """
    height = -math.inf
    for _ in range(max_steps):
        moments = expected(at, y, counts)
        at = maximum(moments, covariance, pseudo=_PSEUDO)
        gain, height = float(moments.log_likelihood) - height, float(moments.log_likelihood)
        if gain < _TOL * float(counts.sum()):
            break
    return at, height


def random_rows(y: Tensor, counts: Tensor, num_components: int, generator: Generator) -> Tensor:
    """Rows chosen by how often they count, none twice while there are others.

    Arguments:
        y: as for :func:`far_rows`.
        counts: as for :func:`far_rows`.
        num_components: number of rows to choose.
        generator: all chance comes from it.
    """
    odds, chosen = counts.clone(), []
    for _ in range(num_components):
        row = _draw(odds if odds.sum() > 0 else counts, generator)
        odds[row] = 0.0
        chosen.append(y[row])
    return torch.cat(chosen)


def _draw(odds: Tensor, generator: Generator) -> Tensor:
    """The number (1,) of a row, by its odds; one row of odds 2 is two equal ones of odds 1."""
    ends = odds.cumsum(0)
    place = torch.rand(1, dtype=odds.dtype, device=odds.device, generator=generator) * ends[-1]
    return torch.searchsorted(ends, place, right=True).clamp_max(len(odds) - 1)


def _order(y: Tensor, generator: Generator) -> Tensor:
    """An order of the rows that does not depend on the one they came in."""
    direction = torch.rand(y.shape[1], dtype=y.dtype, device=y.device, generator=generator)
    return (y @ direction).argsort(stable=True)


def _at_most(num_rows: int, y: Tensor, generator: Generator) -> Tensor:
    """Numbers of all rows or, where they are more, of so many random ones."""
    if len(y) <= num_rows:
        return torch.arange(len(y), device=y.device)
    return torch.randperm(len(y), generator=generator, device=y.device)[:num_rows]


def around(seeds: Tensor, covariance: Covariance, variance: float = _VARIANCE) -> Point:
    """Equal components around seeds.

    Arguments:
        seeds: shape (K, D).
        covariance: the shape of the covariances.
        variance: of each column, in each component.
    """
    spreads = torch.full_like(seeds, variance)
    if covariance in ("full", "tied"):
        spreads = spreads.diag_embed()
    return Point(seeds.new_full((len(seeds),), -math.log(len(seeds))), seeds, spreads)
