r"""Whether conclusions hang on the prior, or on the likelihood, by powers of either.

.. math:: p_\alpha(z \mid x) \propto p(z)^{\alpha} \, p(x \mid z)
          \quad \text{or} \quad p(z) \, p(x \mid z)^{\alpha}

An :math:`\alpha` above 1 makes a part stronger, one below weaker. The draws are not drawn anew but
weighted, by the part to the power :math:`\alpha - 1`. How far a figure moves is measured between
the distribution functions P of its draws and Q of the weighted ones, as cumulative Jensen-Shannon
distance, from 0 to 1,

.. math:: d^2 = \frac{\int P \log_2 \frac{P}{M} + Q \log_2 \frac{Q}{M}}{\int P + Q},
          \qquad M = \frac{P + Q}{2},

the larger of those of the figure and of its negative. Sensitivity is its slope in
:math:`\log_2 \alpha`, from both sides of 1.

Letters: S draws, F figures, A powers, G groups of draws.

References:
    | Detecting and diagnosing prior and likelihood sensitivity with power-scaling (Kallioinen,
      Paananen, Bürkner and Vehtari, 2023)
    | Non-parametric Jensen-Shannon divergence (Nguyen and Vreeken, 2015)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import strings, to_tensor, unit_of
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes, psis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sensitivity", "sensitivity"]

_THRESHOLD = 0.05
_POWERS = (0.8, 1.25)
_STEP = 1.01  # of the slope
_GROUPS = 20
_SHOWN = 8  # figures by name
_BAD = 0.7


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """Result of :func:`sensitivity`.

    Arguments:
        names: of the figures.
        prior: sensitivity to the prior, shape (F,).
        prior_se: standard errors, shape (F,).
        likelihood: sensitivity to the likelihood, shape (F,).
        likelihood_se: standard errors, shape (F,).
        prior_distance: how far each figure moves with the prior to the powers 0.8 and 1.25, shape
            (2, F).
        likelihood_distance: the same for the likelihood.
        khat: the largest of the reweightings to these powers; above 0.7, distances are too small.
        base_khat: of ``log_weights``; ``None`` without.
    """

    names: tuple[str, ...]
    prior: Tensor
    prior_se: Tensor
    likelihood: Tensor
    likelihood_se: Tensor
    prior_distance: Tensor
    likelihood_distance: Tensor
    khat: float
    base_khat: float | None

    @property
    def diagnoses(self) -> tuple[str, ...]:
        """For each figure ``"prior-data conflict"``, ``"weak likelihood"`` or ``""``."""
        pairs = zip((self.prior >= _THRESHOLD).tolist(), self.likelihood.tolist(), strict=True)
        return tuple(
            "" if not moved else "prior-data conflict" if by >= _THRESHOLD else "weak likelihood"
            for moved, by in pairs
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Sensitivity to the prior against that to the likelihood, with lines at 0.05.

        Figures in the upper right have a prior-data conflict, those in the upper left a weak
        likelihood or a strong prior; the prior hardly matters to those below.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        x, y = self.likelihood.numpy(), self.prior.numpy()
        y_se, x_se = self.prior_se.numpy(), self.likelihood_se.numpy()
        ax.errorbar(x, y, yerr=y_se, xerr=x_se, fmt="o")
        ax.axhline(_THRESHOLD, linestyle="--", color="0.5")
        ax.axvline(_THRESHOLD, linestyle="--", color="0.5")
        for f in self._worst("prior-data conflict") + self._worst("weak likelihood"):
            ax.annotate(self.names[f], (x[f], y[f]), (4, 4), textcoords="offset points")
        ax.set(xlabel="sensitivity to the likelihood", ylabel="sensitivity to the prior")
        ax.set(xlim=(0, None), ylim=(0, None))
        return ax

    def _worst(self, diagnosis: str) -> list[int]:
        order = self.prior.argsort(descending=True).tolist()
        return [f for f in order if self.diagnoses[f] == diagnosis][:_SHOWN]

    def __str__(self) -> str:
        texts = []
        for diagnosis in ("prior-data conflict", "weak likelihood"):
            number, worst = self.diagnoses.count(diagnosis), self._worst(diagnosis)
            if not number:
                continue
            named = ", ".join(self.names[f] for f in worst)
            more = f" and {number - _SHOWN} more" if number > _SHOWN else ""
            top = Estimate(float(self.prior[worst[0]]), float(self.prior_se[worst[0]]))
            texts.append(f"{diagnosis}: {named}{more} (sensitivity to the prior {top})")
        if not texts:
            f = int(self.prior.argmax())
            top = Estimate(float(self.prior[f]), float(self.prior_se[f]))
            texts.append(
                f"the prior hardly matters (sensitivity at most {top}, of {self.names[f]})"
            )
        for khat in (self.khat, self.base_khat):
            if khat is not None and khat > _BAD:
                texts.append(f"do not trust this: k-hat {khat:.2f} is above {_BAD}")
                break
        return "; ".join(texts)

    __repr__ = __str__


def sensitivity(
    draws: ArrayLike | Tensor,
    log_prior: ArrayLike | Tensor,
    log_lik: ArrayLike | Tensor,
    log_weights: ArrayLike | Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Sensitivity:
    """Ask how much figures would move, were the prior or the likelihood stronger or weaker.

    How to read it: the threshold is 0.05, which is about a mean that moves by a fifth of its
    standard deviation, or a standard deviation that changes by a fifth, as a part is doubled.
    Below it for the prior, the prior hardly matters. Above it

    ===================  ==========================================================================
    likelihood           reading
    ===================  ==========================================================================
    above 0.05           prior-data conflict: the two pull different ways. Look whether the prior
                         is what you meant, and at the data; the figure is a compromise
    below 0.05           weak likelihood: what you see is the prior. Say so, or find more data; a
                         strong prior that is meant is no fault
    ===================  ==========================================================================

    Scale a prior of hierarchical models at its top only: hand in the log-density of the
    hyperparameters as ``log_prior``.

    Arguments:
        draws: shape (S, F), S at least 100.
        log_prior: log p(z) of each draw, in nats up to a constant, shape (S,).
        log_lik: log p(x | z) of each draw, of all data together, shape (S,).
        log_weights: log p(z, x) - log q(z), not smoothed, shape (S,), for draws of a guide q.
        names: of the figures; by default their numbers.

    Returns:
        Sensitivities with standard errors, by a jackknife of 20 groups of draws in turn. A figure
        that does not vary has none.

    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, too few draws, or
            ``log_weights`` as of :func:`psis`.

    Reference:
        | Detecting and diagnosing prior and likelihood sensitivity with power-scaling (Kallioinen
          et al., 2023)

    Example:
        One observation, 6, and a prior that expects 0, both of scale 1:

        >>> from torch.distributions import Normal
        >>> z = 3 + 0.5**0.5 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
        >>> prior, lik = Normal(0.0, 1.0).log_prob(z), Normal(z, 1.0).log_prob(torch.tensor(6.0))
        >>> print(sensitivity(z[:, None], prior, lik, names=["z"]))
        prior-data conflict: z (sensitivity to the prior 0.328 ± 0.009)
    """
    handed_in = {"draws": draws, "log_prior": log_prior, "log_lik": log_lik}
    x, log_p, log_l = (to_tensor(v, argument).double() for argument, v in handed_in.items())
    _check(x, {"log_prior": log_p, "log_lik": log_l})
    labels = strings(tuple(map(str, range(x.shape[1]))) if names is None else names, "names")
    if len(labels) != x.shape[1]:
        raise ValueError(f"names: expected {x.shape[1]} of them, got {len(labels)}")
    raw = (
        torch.zeros(len(x)).double()
        if log_weights is None
        else to_tensor(log_weights, "log_weights").double()
    )
    if raw.shape != log_p.shape:
        raise ValueError(f"log_weights: expected shape {(len(x),)}, got {tuple(raw.shape)}")
    base = psis(raw if log_weights is None else log_weights)
    x = x / unit_of(x, dim=0)
    order = np.argsort(x.numpy(), axis=0, kind="stable")
    widths = np.diff(np.take_along_axis(x.numpy(), order, 0), axis=0)  # (S - 1, F)
    found, khats = [], []
    for part in (log_p, log_l):
        scaled = [psis(raw + (power - 1) * part) for power in (1 / _STEP, _STEP, *_POWERS)]
        weights = (
            torch.stack([base.log_weights.double(), *(s.log_weights for s in scaled)])
            .exp()
            .numpy()
        )
        khats += [s.khat for s in scaled[2:]]
        found.append(_slopes(weights, order, widths))
    (prior, prior_se, prior_distance), (lik, lik_se, lik_distance) = found
    return Sensitivity(
        labels,
        *(prior, prior_se, lik, lik_se, prior_distance, lik_distance),
        max(khats),
        None if log_weights is None else base.khat,
    )


def _slopes(
    weights: np.ndarray, order: np.ndarray, widths: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes (F,), their errors (F,) and distances (2, F).

    Arguments:
        weights: as they are, to two powers near 1, and to two far from it, shape (5, S).
        order: of the draws, shape (S, F).
        widths: between draws in this order, shape (S - 1, F).
    """
    step = 2 * math.log2(_STEP)
    far = torch.from_numpy(
        np.stack([_distance(weights[0], w, order, widths) for w in weights[3:]])
    )

    def slope(w: np.ndarray) -> np.ndarray:
        low, high = (_distance(w[0], other, order, widths) for other in w[1:3])
        return (low + high) / step

    value = slope(weights)
    left_out = []
    for group in np.array_split(np.arange(weights.shape[1]), _GROUPS):
        fewer = weights.copy()
        fewer[:, group] = 0
        if not fewer.sum(1).all():  # all weight is on these draws, and errors are unknown
            return torch.from_numpy(value), torch.full((len(value),), math.inf).double(), far
        left_out.append(slope(fewer))
    spread = np.var(left_out, axis=0) * (_GROUPS - 1)
    return torch.from_numpy(value), torch.from_numpy(np.sqrt(spread)), far


def _distance(p: np.ndarray, q: np.ndarray, order: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Cumulative Jensen-Shannon distance of two sets of weights (S,), for each figure (F,)."""
    P, Q = (np.cumsum((w / w.sum())[order], axis=0)[:-1] for w in (p, q))
    P, Q = np.minimum(P, 1), np.minimum(Q, 1)
    return np.maximum(_one_way(P, Q, widths), _one_way(1 - P, 1 - Q, widths))


def _one_way(P: np.ndarray, Q: np.ndarray, widths: np.ndarray) -> np.ndarray:
    from scipy.special import rel_entr

    M = (P + Q) / 2
    excess = ((rel_entr(P, M) + rel_entr(Q, M)) * widths).sum(0) / math.log(2)
    area = ((P + Q) * widths).sum(0)
    return np.sqrt(np.maximum(excess, 0) / np.where(area > 0, area, 1))


def _check(x: Tensor, parts: dict[str, Tensor]) -> None:
    if x.dim() != 2 or x.shape[0] < 100 or x.shape[1] == 0:
        raise ValueError(
            f"draws: expected shape (S, F) with at least 100 draws, got {tuple(x.shape)}"
        )
    for name, values in parts.items():
        if values.shape != x.shape[:1]:
            raise ValueError(f"{name}: expected shape {(len(x),)}, got {tuple(values.shape)}")
    for name, values in {"draws": x, **parts}.items():
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise ValueError(f"{name}: expected finite numbers, got {bad} that are not")
