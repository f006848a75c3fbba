r"""Where a Gaussian mixture starts: seeds far apart, then expectation-maximisation.

Of several sets of seeds the one that is best after a few steps on some of the rows goes on, so
that two components on one cluster seldom stay there. A step takes what it needs from the slope of
the log-likelihood :math:`\ell`, which by Fisher's identity holds the expected statistics, whatever
cells are missing and whatever shape the covariances have:

.. math::
    n_k = \pi_k \frac{\partial \ell}{\partial \pi_k}, \quad
    \mathbb{E} \sum_n r_{nk} (x_n - \mu_k) = \Sigma_k \frac{\partial \ell}{\partial \mu_k}, \quad
    \mathbb{E} \sum_n r_{nk} (x_n - \mu_k)(x_n - \mu_k)^\top
        = n_k \Sigma_k + 2 \, \Sigma_k \frac{\partial \ell}{\partial \Sigma_k} \Sigma_k

Rows are standardised. Half a pseudo-row for each component, of mean 0 and scale 1/2, keeps
components from emptying, and their scales from zero.

Letters: N rows, D features, K components.

References:
    | k-means++: the advantages of careful seeding (Arthur and Vassilvitskii, 2007)
    | Optimization with EM and expectation-conjugate-gradient (Salakhutdinov, Roweis and
      Ghahramani, 2003)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from latentlab.distributions import NormalMixture
from latentlab.distributions.correlations import partial_correlations

__all__ = ["Covariance", "Point", "expectation_maximisation", "far_rows", "find_start"]

Covariance = Literal["full", "tied", "diag", "spherical"]

_CANDIDATES = 5  # sets of seeds
_GLANCE_STEPS, _GLANCE_ROWS = 8, 2_000  # after so many steps on so many rows, one goes on
_MAX_STEPS = 100
_TOL = 1e-6  # nats a row
_PSEUDO, _PSEUDO_VARIANCE = 0.5, 0.25


@dataclass(frozen=True)
class Point:
    """Parameters of a mixture of standardised rows, float64.

    Arguments:
        weights: shape (K,).
        locs: shape (K, D).
        spreads: covariances (K, D, D) of "full" and "tied", else variances (K, D).
        log_likelihood: of the rows, before the last step.
    """

    weights: Tensor
    locs: Tensor
    spreads: Tensor
    log_likelihood: float = -math.inf

    def mixture(self) -> NormalMixture:
        """The distribution of a row."""
        if self.spreads.dim() == 2:
            return NormalMixture(self.weights, self.locs, self.spreads.sqrt(), validate_args=False)
        trils = torch.linalg.cholesky(self.spreads)
        return NormalMixture(self.weights, self.locs, scale_trils=trils, validate_args=False)

    def without_floor(self, floor: float) -> tuple[Tensor, Tensor | None]:
        """Standard deviations (K, D) and partial correlations (K, P) that a floor widens to these.

        Arguments:
            floor: standard deviation that is added to each column.
        """
        if self.spreads.dim() == 2:
            above = self.spreads - floor**2
            return torch.where(self.spreads > 4 * floor**2, above, self.spreads).sqrt(), None
        eye = torch.eye(self.spreads.shape[-1]).to(self.spreads)
        tril, fault = torch.linalg.cholesky_ex(self.spreads - floor**2 * eye)
        whole = torch.linalg.cholesky(self.spreads)
        tril = torch.where((fault == 0)[:, None, None], tril, whole)
        scales = tril.square().sum(-1).sqrt()
        return scales, partial_correlations(tril / scales.unsqueeze(-1))


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
    best: Point | None = None
    for _ in range(_CANDIDATES if num_components > 1 else 1):
        if init == "random":
            seeds = _random_rows(filled, counts, num_components, generator)
        else:
            seeds = far_rows(filled, counts, num_components, generator)
        found = _around(seeds, covariance)
        if num_components > 1:
            steps = _GLANCE_STEPS
            found = expectation_maximisation(y[some], counts[some], found, covariance, steps)
        # Rounding does not choose between two that are one with other labels.
        margin = _TOL * float(counts.sum())
        if best is None or found.log_likelihood > best.log_likelihood + margin:
            best = found
    return expectation_maximisation(y, counts, best or found, covariance, _MAX_STEPS)


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


def expectation_maximisation(
    y: Tensor, counts: Tensor, start: Point, covariance: Covariance, max_steps: int
) -> Point:
    """Climb the likelihood with its pseudo-rows until a step gains next to nothing.

    Arguments:
        y: standardised rows, shape (N, D), NaN where a cell is missing.
        counts: how often each row counts, shape (N,).
        start: where to begin.
        covariance: the shape of the covariances.
        max_steps: steps at the most.
    """
    at, previous = start, -math.inf
    for _ in range(max_steps):
        at = _step(y, counts, at, covariance)
        if at.log_likelihood - previous < _TOL * float(counts.sum()):
            break
        previous = at.log_likelihood
    return at


def _random_rows(y: Tensor, counts: Tensor, num_components: int, generator: Generator) -> Tensor:
    """Rows chosen by how often they count, none twice while there are others."""
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


def _around(seeds: Tensor, covariance: Covariance) -> Point:
    """Equal components around seeds (K, D), half as wide as the rows."""
    K, D = seeds.shape
    spreads = torch.full_like(seeds, _PSEUDO_VARIANCE)
    if covariance in ("full", "tied"):
        spreads = spreads.diag_embed()
    return Point(seeds.new_full((K,), 1 / K), seeds, spreads)


def _step(y: Tensor, counts: Tensor, at: Point, covariance: Covariance) -> Point:
    """One step: expected statistics from slopes, then the maximum given them."""
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in (at.weights, at.locs, at.spreads)]
        value = (Point(leaves[0], leaves[1], leaves[2]).mixture().log_prob(y) * counts).sum()
        slopes = torch.autograd.grad(value, leaves)
    num = at.weights * slopes[0]  # (K,)
    is_matrix = at.spreads.dim() == 3
    if is_matrix:
        slope = (slopes[2] + slopes[2].mT) / 2
        away = (at.spreads @ slopes[1].unsqueeze(-1)).squeeze(-1)
        square = num[:, None, None] * at.spreads + 2 * at.spreads @ slope @ at.spreads
        cross = at.locs[:, :, None] * away[:, None, :]
        moment = square + cross + cross.mT + num[:, None, None] * _outer(at.locs)
        moment = moment + _PSEUDO * _PSEUDO_VARIANCE * torch.eye(y.shape[1]).to(moment)
    else:
        away = at.spreads * slopes[1]
        square = num[:, None] * at.spreads + 2 * at.spreads**2 * slopes[2]
        moment = square + 2 * at.locs * away + num[:, None] * at.locs**2
        moment = moment + _PSEUDO * _PSEUDO_VARIANCE
    held = num + _PSEUDO
    locs = (num[:, None] * at.locs + away) / held[:, None]
    squares = _outer(locs) if is_matrix else locs**2
    share = held.reshape(-1, *[1] * (moment.dim() - 1))
    spreads = moment / share - squares
    if covariance == "tied":
        spreads = ((spreads * share).sum(0) / held.sum()).expand_as(spreads)
    if covariance == "spherical":
        spreads = spreads.mean(-1, keepdim=True).expand_as(spreads)
    return Point(held / held.sum(), locs, spreads, float(value.detach()))


def _outer(locs: Tensor) -> Tensor:
    return locs[:, :, None] * locs[:, None, :]
