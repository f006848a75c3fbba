r"""Models compared by their scores on the same rows.

.. math:: \Delta = \sum_n d_n, \quad d_n = \mathrm{elpd}_n - \mathrm{elpd}^\star_n, \qquad
          \mathrm{se}(\Delta) = \sqrt{N \, \mathrm{var}_n \, d_n}

A row that is hard for one model is hard for the other: the error of a difference is far smaller
than those of the scores. Stacking weights are those of the mixture of predictions that scores
best,

.. math:: \max_{w \ge 0, \, \sum_k w_k = 1} \; \sum_n \log \sum_k w_k \, e^{\mathrm{elpd}_{kn}}.

Letters: N rows, K models.

References:
    | Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC
      (Vehtari, Gelman and Gabry, 2017)
    | Using stacking to average Bayesian predictive distributions (Yao, Vehtari, Simpson and
      Gelman, 2018)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.loo import Loo, total
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare", "stacking_weights"]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Result of :func:`compare`; each field has one entry for each model, the best first.

    Arguments:
        names: of the models.
        scores: as they came in.
        differences: elpd less that of the best, with the error of the difference.
        weights: of stacking, shape (K,).
    """

    names: tuple[str, ...]
    scores: tuple[Loo, ...]
    differences: tuple[Estimate, ...]
    weights: Tensor

    @property
    def best(self) -> str:
        """The name of the model with the highest elpd."""
        return self.names[0]

    @property
    def as_good(self) -> tuple[str, ...]:
        """The others whose difference is within one standard error of it."""
        pairs = zip(self.names, self.differences, strict=True)
        return tuple(name for name, gap in pairs if -gap.value <= gap.se and name != self.best)

    @property
    def unreliable(self) -> tuple[str, ...]:
        """The models with rows whose k-hat is above 0.7."""
        pairs = zip(self.names, self.scores, strict=True)
        return tuple(name for name, score in pairs if len(score.khat.bad))

    def frame(self) -> pd.DataFrame:
        """A frame with a row for each model; an error stands beside each figure."""
        import pandas as pd

        columns = {
            "elpd": [score.elpd.value for score in self.scores],
            "elpd_se": [score.elpd.se for score in self.scores],
            "difference": [gap.value for gap in self.differences],
            "difference_se": [gap.se for gap in self.differences],
            "p_loo": [score.p_loo.value for score in self.scores],
            "weight": self.weights.tolist(),
            "bad_rows": [len(score.khat.bad) for score in self.scores],
        }
        return pd.DataFrame(columns, index=pd.Index(self.names, name="model"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The differences to the best model, with their errors.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        places = np.arange(len(self.names))
        gaps = [gap.value for gap in self.differences]
        ax.errorbar(gaps, places, xerr=[gap.se for gap in self.differences], fmt="o")
        ax.axvline(0, linestyle="--", color="0.5")
        ax.set(yticks=places, yticklabels=self.names, xlabel="elpd less that of the best (nats)")
        ax.set(title=self._reading)
        ax.invert_yaxis()
        return ax

    @property
    def _reading(self) -> str:
        if not self.as_good:
            return f"{self.best} is best"
        be = "is" if len(self.as_good) == 1 else "are"
        return f"{', '.join(self.as_good)} {be} as good as {self.best} within 1 se"

    def __str__(self) -> str:
        head = ("", "elpd", "difference", "weight")
        rows = [
            (name, str(score.elpd), str(gap), f"{weight:.2f}")
            for name, score, gap, weight in zip(
                self.names, self.scores, self.differences, self.weights.tolist(), strict=True
            )
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        lines.append(self._reading)
        if self.unreliable:
            lines.append(
                f"do not trust {', '.join(self.unreliable)}: k-hat above 0.7 in "
                + ", ".join(
                    f"{len(score.khat.bad)} of {len(score.pointwise)} rows"
                    for score in self.scores
                    if len(score.khat.bad)
                )
            )
        return "\n".join(lines)

    __repr__ = __str__


def compare(scores: Mapping[str, Loo]) -> Comparison:
    """Rank models by their leave-one-out scores of the same rows.

    How to read it: a difference of several standard errors is a finding; one within its error
    says that the data do not tell, so take the simpler model. Errors of differences are too small
    by up to a half with fewer than 100 rows, and where models differ by less than 4 nats or are
    both wrong in the same rows. Scores of a model with rows whose k-hat is above 0.7 are too
    high; it may be ranked above its place. Weights are for averaging predictions: two models
    that are alike share theirs, or one has all.

    Arguments:
        scores: results of :func:`loo` by the names of the models, two at least.

    Returns:
        The models, the best first.

    Raises:
        ValueError: for one model, or other numbers of rows.

    References:
        | Uncertainty in Bayesian leave-one-out cross-validation based model comparison
          (Sivula, Magnusson, Matamoros and Vehtari, 2020)
        | Using stacking to average Bayesian predictive distributions (Yao et al., 2018)

    Example:
        The mean of 50 rows is 0.8; the second model knows only that it is near 0:

        >>> from latentlab.diagnostics import loo
        >>> from torch.distributions import Normal
        >>> g = torch.Generator().manual_seed(0)
        >>> y, noise = 0.8 + torch.randn(50, generator=g), torch.randn(1000, 1, generator=g)
        >>> one, other = y.mean() + 50**-0.5 * noise, 0.1 * noise
        >>> found = compare({m: loo(Normal(z, 1).log_prob(y)) for m, z in zip("ab", (one, other))})
        >>> found.best, found.as_good
        ('a', ())
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores: expected name -> result of loo, got {type(scores).__name__}")
    for name, score in scores.items():
        if not isinstance(score, Loo):
            raise TypeError(
                f"scores[{name!r}]: expected a result of loo, got {type(score).__name__}"
            )
    if len(scores) < 2:
        raise ValueError(f"scores: expected at least two models, got {list(scores)}")
    sizes = {name: len(score.pointwise) for name, score in scores.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"scores: expected the same rows for all models, got numbers {sizes}")
    names = sorted(scores, key=lambda name: -scores[name].elpd.value)
    ranked = tuple(scores[name] for name in names)
    top = ranked[0].pointwise
    gaps = [Estimate(0.0, 0.0), *(total(score.pointwise - top) for score in ranked[1:])]
    weights = stacking_weights(torch.stack([score.pointwise for score in ranked], 1))
    return Comparison(tuple(names), ranked, tuple(gaps), weights)


def stacking_weights(pointwise: Tensor) -> Tensor:
    """Weights of the mixture of predictions that scores best.

    Arguments:
        pointwise: log scores, shape (N, K).

    Returns:
        Shape (K,), of sum one.
    """
    from scipy.optimize import minimize  # imported late, as it takes long

    scores = pointwise.double()
    shares = (scores - scores.amax(1, keepdim=True)).exp().numpy()  # (N, K)
    N, K = shares.shape

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.maximum(shares @ weights, 1e-300)
        return -np.log(mixed).mean(), -(shares / mixed[:, None]).mean(0)

    even = np.full(K, 1 / K)
    bounds, whole = [(0, 1)] * K, {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(
        loss, even, jac=True, bounds=bounds, constraints=whole, method="SLSQP", tol=1e-12
    )
    weights = torch.from_numpy(found.x).clamp(min=0)
    return weights / weights.sum()
