r"""Whether predicted probabilities come true: calibration of classes, states and binary outcomes.

.. math:: \underbrace{\tfrac1N \textstyle\sum_n (p_n - y_n)^2}_\mathrm{Brier}
          = \mathrm{MCB} - \mathrm{DSC} + \mathrm{UNC}

With :math:`\hat c` the isotonic regression of outcomes on probabilities, which needs no bins: MCB
(miscalibration) is what is gained by putting :math:`\hat c_n` in place of :math:`p_n`, DSC
(discrimination) what :math:`\hat c_n` gains over the mean :math:`\bar y`, and
UNC (uncertainty) is :math:`\bar y (1 - \bar y)`.

Letters: N rows, K classes, R resamples.

References:
    | Stable reliability diagrams for probabilistic classifiers
      (Dimitriadis, Gneiting and Jordan, 2021)
    | Verification of forecasts expressed in terms of probability (Brier, 1950)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import precision, to_tensor, whole
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Reliability", "reliability"]

_LEVEL, _BAND = 0.05, 0.9
_FEWEST = 10
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class Reliability:
    """Result of :func:`reliability`.

    Arguments:
        probabilities: the distinct ones, ascending, shape (G,).
        calibrated: how often they came true, by isotonic regression, shape (G,).
        lower: the lower end of the band that ``calibrated`` stays in, at each probability with
            chance 90 %, if they are right; shape (G,).
        upper: its upper end, shape (G,).
        brier: mean squared difference of probability and outcome.
        miscalibration: the part of it that recalibration would save.
        expected_miscalibration: what that part is by chance, for probabilities that are right.
        discrimination: what the probabilities, recalibrated, gain over the mean outcome.
        uncertainty: Brier score of the mean outcome.
        overconfidence: mean confidence in the likelier class, less how often it is right.
        bias: mean probability less mean outcome; 0 of several classes.
        p_value: chance of so large a miscalibration if the probabilities are right.
    """

    probabilities: Tensor
    calibrated: Tensor
    lower: Tensor
    upper: Tensor
    brier: Estimate
    miscalibration: float
    expected_miscalibration: float
    discrimination: float
    uncertainty: float
    overconfidence: Estimate
    bias: Estimate
    p_value: float

    @property
    def ok(self) -> bool:
        """True where the p-value is above 0.05."""
        return self.p_value > _LEVEL

    def plot(self, ax: Axes | None = None) -> Axes:
        """How often probabilities came true, and the band that they stay in if they are right.

        Flatter than the diagonal is overconfident, steeper is underconfident.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        p = self.probabilities
        ax.fill_between(p, self.lower, self.upper, color="0.5", alpha=0.2, linewidth=0)
        ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        ax.plot(p, self.calibrated, drawstyle="steps-mid")
        title = f"Brier score {self.brier} (p = {self.p_value:.2g})"
        ax.set(xlabel="probability", ylabel="how often it came true", title=title)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        return ax

    def __str__(self) -> str:
        if self.ok:
            return f"probabilities come true (p = {self.p_value:.2g}; Brier score {self.brier})"
        over = self.overconfidence
        word = "off"
        if abs(over.value) > 2 * over.se:
            size = Estimate(abs(over.value), over.se)
            word = f"{'over' if over.value > 0 else 'under'}confident by {size}"
        elif abs(self.bias.value) > 2 * self.bias.se:
            size = Estimate(abs(self.bias.value), self.bias.se)
            word = f"too {'high' if self.bias.value > 0 else 'low'} by {size}"
        return f"probabilities are {word} (p = {self.p_value:.2g}; Brier score {self.brier})"

    __repr__ = __str__


def reliability(
    probabilities: ArrayLike | Tensor,
    outcomes: ArrayLike | Tensor,
    num_resamples: int = 200,
    seed: int = 0,
) -> Reliability:
    """Compare predicted probabilities with what happened.

    How to read it: among rows that were given 0.8, eight in ten should come true. A p-value below
    0.05 says that they do not, whatever the level; ``overconfidence`` is by how much the stated
    confidence exceeds the share of right answers. A small Brier score with a small p-value is a
    good classifier whose probabilities should be recalibrated; a large one with a large p-value is
    honest and knows little. Responsibilities of a mixture fitted to the same rows tend to be
    overconfident where components overlap: judge them on simulated data, whose labels are known.

    Arguments:
        probabilities: of a binary outcome, shape (N,), or of each class, shape (N, K), rows of
            sum one; N at least 10.
        outcomes: 0 or 1, or classes 0 to K - 1, shape (N,).
        num_resamples: outcomes R drawn from the probabilities, for the band and the p-value,
            which is at least 1 / (R + 1).
        seed: of those outcomes.

    Returns:
        The curve with its band, the parts of the Brier score, and an exact test. Classes are
        taken one against the rest, all in one curve.

    Raises:
        ValueError: for other shapes, or numbers out of range.

    References:
        | Stable reliability diagrams for probabilistic classifiers (Dimitriadis et al., 2021)

    Example:
        >>> p = torch.rand(2000, generator=torch.Generator().manual_seed(0)).double()
        >>> y = torch.bernoulli(p, generator=torch.Generator().manual_seed(1))
        >>> print(reliability(p, y))
        probabilities come true (p = 0.8...; Brier score 0.167 ± 0.004)
        >>> print(reliability(torch.sigmoid(2 * torch.logit(p)), y))
        probabilities are overconfident by 0.093 ± 0.009 (p = 0.005; Brier score 0.179 ± 0.006)
    """
    p, y = _checked(probabilities, outcomes)
    num_resamples = whole(num_resamples, "num_resamples", 1)
    seed = whole(seed, "seed", 0)
    values, group, weights = np.unique(p, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)

    def fitted(truth: np.ndarray) -> tuple[np.ndarray, float]:
        curve = _isotonic(np.bincount(group.ravel(), truth.ravel()) / weights, weights)
        at = curve[group.reshape(p.shape)]
        return curve, float(((p - truth) ** 2).mean() - ((at - truth) ** 2).mean())

    curve, gain = fitted(y)
    again = [fitted(_draw(p, rng)) for _ in range(num_resamples)]
    band = np.quantile([c for c, _ in again], [(1 - _BAND) / 2, (1 + _BAND) / 2], axis=0)
    gains = np.array([g for _, g in again])
    square = (p - y) ** 2
    uncertainty = float(((y.mean() - y) ** 2).mean())
    both, truth = (np.hstack([1 - v, v]) if v.shape[1] == 1 else v for v in (p, y))
    likelier = both.argmax(1)
    right = np.take_along_axis(truth, likelier[:, None], 1)[:, 0]
    return Reliability(
        probabilities=torch.from_numpy(values),
        calibrated=torch.from_numpy(curve),
        lower=torch.from_numpy(band[0]),
        upper=torch.from_numpy(band[1]),
        brier=Estimate.from_draws(square.mean(1)),
        miscalibration=gain,
        expected_miscalibration=float(gains.mean()),
        discrimination=uncertainty - float(square.mean()) + gain,
        uncertainty=uncertainty,
        overconfidence=Estimate.from_draws(both.max(1) - right),
        bias=Estimate.from_draws((p - y).mean(1)),
        p_value=(1 + int((gains >= gain * (1 - 1e-9)).sum())) / (num_resamples + 1),
    )


def _isotonic(mean: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nondecreasing curve nearest to the means of groups in ascending order."""
    from sklearn.isotonic import isotonic_regression

    return isotonic_regression(mean, sample_weight=weights.astype(float), y_min=0, y_max=1)


def _draw(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outcomes as likely as the probabilities say, of their shape: (N, 1) binary or (N, K)."""
    u = rng.uniform(size=(len(p), 1))
    if p.shape[1] == 1:
        return (u < p).astype(float)
    chosen = (p.cumsum(1)[:, :-1] < u).sum(1)
    return np.eye(p.shape[1])[chosen]


def _checked(
    probabilities: ArrayLike | Tensor, outcomes: ArrayLike | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, 1) or (N, K), and outcomes of that shape, zeros and ones."""
    p = to_tensor(probabilities, "probabilities").double().numpy()
    y = to_tensor(outcomes, "outcomes").double().numpy()
    if p.ndim not in (1, 2) or len(p) < _FEWEST or p.shape[1:] in ((0,), (1,)):
        raise ValueError(
            f"probabilities: expected shape (N,) or (N, K) with at least {_FEWEST} rows and 2 "
            f"classes, got {p.shape}"
        )
    if y.shape != p.shape[:1]:
        raise ValueError(f"outcomes: expected shape ({len(p)},), got {y.shape}")
    bad = ~((p >= -_ROUNDING) & (p <= 1 + _ROUNDING))
    if bad.any():
        where = np.argwhere(bad)[0].tolist()
        raise ValueError(
            f"probabilities: expected numbers in [0, 1], got {p[tuple(where)]:g} at {where}"
        )
    # Each of K numbers was rounded, to half of its eps at most.
    rounding = max(1e-4, precision(probabilities))
    if p.ndim == 2 and (abs(p.sum(1) - 1) > rounding).any():
        n = int(abs(p.sum(1) - 1).argmax())
        raise ValueError(f"probabilities: expected rows of sum 1, got {p[n].sum():g} in row {n}")
    most = p.shape[1] - 1 if p.ndim == 2 else 1
    bad = ~((y >= 0) & (y <= most) & (y == np.round(y)))
    if bad.any():
        n = int(np.argmax(bad))
        raise ValueError(f"outcomes: expected whole numbers 0 to {most}, got {y[n]:g} at [{n}]")
    p = p.clip(0, 1)
    if p.ndim == 1:
        return p[:, None], y[:, None]
    return p, np.eye(p.shape[1])[y.astype(int)]
