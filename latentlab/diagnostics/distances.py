r"""Distances between two sets of draws: sliced Wasserstein, maximum mean discrepancy, and C2ST.

.. math::
    \mathrm{SW}_2^2 = \mathrm{E}_\theta \int_0^1 (F_\theta^{-1}(t) - G_\theta^{-1}(t))^2 \, dt,
    \qquad
    \mathrm{MMD}^2 = \mathrm{E} \, k(x, x') - 2 \, \mathrm{E} \, k(x, y) + \mathrm{E} \, k(y, y')

F and G are the distributions of x and y along a random direction; k is the kernel
:math:`\exp(-|x - y|^2 / (2 h^2))`. The classifier two-sample test (C2ST) asks how often a
classifier tells x from y: for :math:`\mathcal{N}(0, 1)` and :math:`\mathcal{N}(\mu, 1)` in
:math:`\Phi(\mu / 2)` of the cases at best, and in half of them where there is nothing to tell.

Letters: S and R draws, F quantities, P projections.

References:
    | Sliced and Radon Wasserstein barycenters of measures (Bonneel et al., 2015)
    | Central limit theorems for empirical transportation cost in general dimension
      (del Barrio and Loubes, 2019)
    | A kernel two-sample test (Gretton et al., 2012)
    | Revisiting classifier two-sample tests (Lopez-Paz and Oquab, 2017)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of, whole
from latentlab.diagnostics.estimate import Estimate

__all__ = ["C2st", "Mmd", "SlicedWasserstein", "c2st", "mmd", "sliced_wasserstein"]

_LEVEL = 0.05
_FEWEST = 20
_PERMUTED = 25  # projections that permutations look at
_SHARED = 1.25  # the spread of accuracies is wider where folds have nothing but noise to share
_MOST_SEED = 2**32 - 1  # that scikit-learn takes
_MOST_PRODUCTS = 30  # quantities whose products the classifier sees


@dataclass(frozen=True)
class SlicedWasserstein:
    """Result of :func:`sliced_wasserstein`.

    Arguments:
        value: the distance, with its error.
        se_draws: the part of it that is due to the number of draws.
        se_projections: the part that is due to the number of projections.
        noise: mean distance of sets of this size that have no difference.
        p_value: chance of so large a distance without a difference, by permutations.
    """

    value: Estimate
    se_draws: float
    se_projections: float
    noise: float
    p_value: float

    def __str__(self) -> str:
        noise = f"{self.noise:.2g} without a difference"
        return f"sliced W2 {self.value} ({noise}, p = {self.p_value:.2g})"


@dataclass(frozen=True)
class Mmd:
    """Result of :func:`mmd`.

    Arguments:
        squared: the squared discrepancy, unbiased, so that it may be below zero.
        bandwidth: h of the kernel.
        p_value: chance of so large a discrepancy without a difference, by permutations.
    """

    squared: Estimate
    bandwidth: float
    p_value: float

    def __str__(self) -> str:
        return f"MMD^2 {self.squared} (p = {self.p_value:.2g})"


@dataclass(frozen=True)
class C2st:
    """Result of :func:`c2st`.

    Arguments:
        accuracy: share of draws that are told right, each by a classifier that has not seen it.
        p_value: chance of so large a share without a difference.
    """

    accuracy: Estimate
    p_value: float

    def __str__(self) -> str:
        return f"C2ST accuracy {self.accuracy} (p = {self.p_value:.2g})"


def sliced_wasserstein(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    num_projections: int = 100,
    num_permutations: int = 100,
    seed: int = 0,
) -> SlicedWasserstein:
    r"""Sliced Wasserstein distance of order 2, in the units of the draws.

    How to read it: two normals of sd 1 a distance m apart in one of F dimensions have a sliced
    distance :math:`m / \sqrt{F}`. Even equal distributions are some distance apart in finite
    draws: compare with ``noise``; a p-value below 0.05 says that there is a difference, the
    distance less the noise roughly how large. Quantities in different units must be
    standardised first; :func:`compare_draws` does. Errors and p-values are those of independent
    draws: thin a chain.

    Arguments:
        x: shape (S, F), S at least 20.
        y: shape (R, F), R at least 20.
        num_projections: random directions P; one is enough where F is 1.
        num_permutations: for the noise and the p-value, which is at least one in so many.
        seed: of directions and permutations.

    Returns:
        The distance. Its error is that of the delta method, right where the distance is several
        times the noise.

    Raises:
        ValueError: for other shapes, fewer draws, or numbers that are not finite.

    References:
        | Sliced and Radon Wasserstein barycenters of measures (Bonneel et al., 2015)

    Example:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> y = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)).double()
        >>> print(sliced_wasserstein(x, y + torch.tensor([1.0, 0.0])))
        sliced W2 0.77 ± 0.03 (0.059 without a difference, p = 0.0099)
    """
    x, y = _pair(x, y)
    num_projections = whole(num_projections, "num_projections", 1)
    num_permutations = whole(num_permutations, "num_permutations", 1)
    generator = torch.Generator().manual_seed(whole(seed, "seed", 0))
    P = 1 if x.shape[1] == 1 else num_projections
    unit = float(unit_of(x, y))
    x, y = x / unit, y / unit
    directions = torch.randn(x.shape[1], P, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    a, b = x @ directions, y @ directions  # (S, P), (R, P)
    squares, moves_a, moves_b = _transport(a, b)
    value = math.sqrt(float(squares.mean()))
    variance = float(moves_a.var() / len(a) + moves_b.var() / len(b))
    some = min(P, _PERMUTED)
    both = torch.cat([a, b])[:, :some]
    pooled, order = both.sort(0)
    null = []
    for _ in range(num_permutations):
        chosen = torch.zeros(len(both), dtype=torch.bool)
        chosen[torch.randperm(len(both), generator=generator)[: len(a)]] = True
        first = chosen[order].T  # (some, S + R), in ascending order of the projections
        one = pooled.T[first].reshape(some, len(a)).T
        other = pooled.T[~first].reshape(some, len(b)).T
        null.append(math.sqrt(float(_squares(one, other).mean())))
    scale = 2 * value if value > 0 else 1.0
    se_draws = math.sqrt(variance) / scale
    se_projections = float(squares.std()) / math.sqrt(P) / scale if P > 1 else 0.0
    compared = math.sqrt(float(squares[:some].mean()))
    return SlicedWasserstein(
        Estimate(value * unit, math.hypot(se_draws, se_projections) * unit),
        se_draws * unit,
        se_projections * unit,
        float(np.mean(null)) * unit,
        (1 + sum(other >= compared for other in null)) / (num_permutations + 1),
    )


def mmd(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    bandwidth: float | None = None,
    num_permutations: int = 200,
    seed: int = 0,
) -> Mmd:
    """Squared maximum mean discrepancy with a Gaussian kernel.

    How to read it: a p-value below 0.05 says that there is a difference, of any kind that is as
    wide as the bandwidth. The size itself depends on kernel and units: compare discrepancies of
    the same reference only. Time and memory grow with the square of the draws: thin to some
    thousands, and thin a chain until draws are independent.

    Arguments:
        x: shape (S, F), S at least 20.
        y: shape (R, F), R at least 20.
        bandwidth: h of the kernel; by default the median distance of all pairs of draws.
        num_permutations: for the p-value, which is at least one in so many.
        seed: of the permutations.

    Returns:
        The unbiased estimate. Its error is right where there is a difference; where there is none
        the p-value is what to read.

    Raises:
        ValueError: for other shapes, fewer draws, numbers that are not finite, or a bandwidth that
            is not positive.

    References:
        | A kernel two-sample test (Gretton et al., 2012)

    Example:
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> y = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)).double()
        >>> print(mmd(x, y))
        MMD^2 -0.0012 ± 0.0006 (p = 0.94)
        >>> print(mmd(x, 1.5 * y))
        MMD^2 0.033 ± 0.006 (p = 0.005)
    """
    x, y = _pair(x, y)
    S, R = len(x), len(y)
    num_permutations = whole(num_permutations, "num_permutations", 1)
    if bandwidth is not None and not (isinstance(bandwidth, Real) and 0 < bandwidth < math.inf):
        raise ValueError(f"bandwidth: expected a positive number, got {bandwidth!r}")
    unit = float(unit_of(x, y))
    x, y = x / unit, y / unit
    squared = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).square()
    if bandwidth is None:
        rows, columns = torch.triu_indices(S + R, S + R, 1)
        h = math.sqrt(float(np.median(squared[rows, columns].numpy()))) or 1.0
    else:
        h = float(bandwidth) / unit
    kernel = torch.exp(-(squared / h / h) / 2).fill_diagonal_(0.0)
    generator = torch.Generator().manual_seed(whole(seed, "seed", 0))
    first = torch.zeros(S + R, num_permutations + 1, dtype=torch.float64)
    first[:S, 0] = 1.0
    for p in range(1, num_permutations + 1):
        first[torch.randperm(S + R, generator=generator)[:S], p] = 1.0
    total, to_first = kernel.sum(1, keepdim=True), kernel @ first
    within = (first * to_first).sum(0)
    across = ((1 - first) * to_first).sum(0)
    rest = total.sum() - within - 2 * across
    values = within / (S * (S - 1)) + rest / (R * (R - 1)) - 2 * across / (S * R)
    # What each draw adds: the mean of its kernel with its own set less that with the other.
    parts_x = to_first[:S, 0] / (S - 1) - (total[:S, 0] - to_first[:S, 0]) / R
    parts_y = (total[S:, 0] - to_first[S:, 0]) / (R - 1) - to_first[S:, 0] / S
    variance = 4 * float(parts_x.var() / S + parts_y.var() / R)
    above = int((values[1:] >= values[0] - 1e-15).sum())
    return Mmd(
        Estimate(float(values[0]), math.sqrt(variance)),
        h * unit,
        (1 + above) / (num_permutations + 1),
    )


def c2st(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    classifier: str = "logistic",
    num_folds: int = 5,
    seed: int = 0,
) -> C2st:
    """How often a classifier tells x from y: 0.5 where it cannot.

    How to read it: below 0.55 two sets of posterior draws are the same for most uses; 0.6 is a
    mean off by half a standard deviation; 0.9 are different answers. The accuracy is a lower
    bound of the best there is, and as good as its classifier: ``"logistic"`` sees means, standard
    deviations and, up to 30 quantities, correlations; ``"mlp"`` and ``"forest"`` see other shapes
    too, in ten times the time. Draws of a chain must be thinned until they are independent, or
    neighbours in two folds give each other away.

    Arguments:
        x: shape (S, F), S at least 20.
        y: shape (R, F), R at least 20. Of the larger set a part as large as the other
            is taken.
        classifier: ``"logistic"`` (on values, squares and products), ``"mlp"`` or ``"forest"``.
        num_folds: parts, each told by a classifier of the others.
        seed: of the parts, and of the classifier.

    Returns:
        The accuracy, with its binomial error, which is right where there is something to tell;
        where there is nothing, folds that share draws spread it by a fifth more, as the p-value
        knows.

    Raises:
        ValueError: for other shapes, fewer draws, numbers that are not finite, or another
            classifier.

    References:
        | Revisiting classifier two-sample tests (Lopez-Paz and Oquab, 2017)

    Example:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> y = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)).double()
        >>> print(c2st(x, y + torch.tensor([1.0, 0.0])))  # Phi(1 / 2) = 0.691
        C2ST accuracy 0.703 ± 0.007 (p = ...)
    """
    from scipy.special import ndtr  # imported late, as it takes long

    x, y = _pair(x, y)
    smaller = min(len(x), len(y))
    num_folds = whole(num_folds, "num_folds", 2, smaller)
    seed = whole(seed, "seed", 0, _MOST_SEED)
    units = unit_of(x, y, dim=0)
    x, y = x / units, y / units
    rng = np.random.default_rng(seed)
    features = np.vstack([rng.permutation(v.numpy())[:smaller] for v in (x, y)])
    truth = np.repeat([0, 1], smaller)
    value = float(_told_right(features, truth, classifier, num_folds, seed).mean())
    se, null = (math.sqrt(p * (1 - p) / len(truth)) for p in (value, 0.5))
    return C2st(Estimate(value, se), float(ndtr(-(value - 0.5) / (_SHARED * null))))


def _told_right(
    features: np.ndarray, truth: np.ndarray, classifier: str, num_folds: int, seed: int
) -> np.ndarray:
    """Whether each row was told right by a classifier of the other folds."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), *_classifier(classifier, features.shape[1], seed))
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # one that has not converged yet is a classifier all the same
        warnings.simplefilter("ignore", ConvergenceWarning)
        return cross_val_predict(model, features, truth, cv=folds) == truth


def _classifier(name: str, num_features: int, seed: int) -> tuple:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import FunctionTransformer, PolynomialFeatures, StandardScaler

    if name == "mlp":
        return (MLPClassifier((64, 64), early_stopping=True, max_iter=200, random_state=seed),)
    if name == "forest":
        return (RandomForestClassifier(100, min_samples_leaf=10, random_state=seed),)
    if name == "logistic":
        more = PolynomialFeatures(2, include_bias=False)
        if num_features > _MOST_PRODUCTS:
            more = FunctionTransformer(_with_squares)
        return more, StandardScaler(), LogisticRegression(max_iter=1000)
    raise ValueError(f'classifier: expected "logistic", "mlp" or "forest", got {name!r}')


def _with_squares(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, x**2])


def _quantiles(a: Tensor, count: int) -> Tensor:
    """The quantiles of sorted a (S, P) at (i + 1/2) / count, shape (count, P)."""
    if len(a) == count:
        return a
    at = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * len(a)).long()
    return a[at.clamp(max=len(a) - 1)]


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of sorted a (S, P) and b (R, P), shape (P,); exact if S is R."""
    count = max(len(a), len(b))
    return (_quantiles(a, count) - _quantiles(b, count)).square().mean(0)


def _transport(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances (P,), and what each draw adds to their mean: its potential, (S,), (R,)."""
    (sorted_a, order_a), (sorted_b, order_b) = a.sort(0), b.sort(0)

    def potential(at: Tensor, to: Tensor, order: Tensor) -> Tensor:
        slope = 2 * (at - _quantiles(to, len(at)))
        steps = (slope[1:] + slope[:-1]) / 2 * at.diff(dim=0)
        rising = torch.cat([torch.zeros_like(at[:1]), steps.cumsum(0)])
        return torch.empty_like(at).scatter_(0, order, rising).mean(1)

    return (
        _squares(sorted_a, sorted_b),
        potential(sorted_a, sorted_b, order_a),
        potential(sorted_b, sorted_a, order_b),
    )


def _pair(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    pair = to_tensor(x, "x").double(), to_tensor(y, "y").double()
    for value, argument in zip(pair, ("x", "y"), strict=True):
        if value.dim() != 2 or len(value) < _FEWEST or value.shape[1] == 0:
            raise ValueError(
                f"{argument}: expected shape (draws, quantities) with at least {_FEWEST} draws, "
                f"got {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            where = (~value.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{argument}: expected finite numbers, not so first at {where}")
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(
            f"y: expected {pair[0].shape[1]} quantities as of x, got {pair[1].shape[1]}"
        )
    return pair
