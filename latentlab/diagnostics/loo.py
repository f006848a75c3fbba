r"""Leave-one-out: how well each row is predicted from all the others, without refits.

.. math:: \mathrm{elpd}_n = \log p(y_n \mid y_{-n}) \approx
          \log \frac{\sum_s w_{sn} \, p(y_n \mid z_s)}{\sum_s w_{sn}}, \qquad
          w_{sn} = \frac{p(z_s, y) / q(z_s)}{p(y_n \mid z_s)}, \quad z_s \sim q

Draws of the posterior have :math:`p(z_s, y) / q(z_s)` constant; draws of a guide bring it as their
importance weights, so that what is estimated is the exact posterior's score, not the guide's.
The weights of each row are Pareto-smoothed, and its k-hat says whether they can be trusted.

Letters: S draws, N rows, B of them in a block.

References:
    | Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC
      (Vehtari, Gelman and Gabry, 2017)
    | Bayesian leave-one-out cross-validation for large data (Magnusson, Andersen, Jonasson and
      Vehtari, 2019)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import KhatTable, _axes, psis, psis_per_column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Loo", "blocks", "loo", "smoothed", "total"]

_BATCH = 2**20  # numbers in a block
_SHOWN = 10  # rows by number


@dataclass(frozen=True, eq=False, repr=False)
class Loo:
    """Result of :func:`loo`.

    Arguments:
        elpd: sum of ``pointwise``, in nats per data set; the error is that of having these N rows
            and no others.
        p_loo: effective number of parameters: what the rows gain by being among the data.
        mcse: Monte Carlo standard error of ``elpd``, that of having S draws.
        pointwise: log score of each row, shape (N,), in nats.
        khat: of each row; above 0.7, do not trust that row's score.
        num_samples: number S of draws.
    """

    elpd: Estimate
    p_loo: Estimate
    mcse: float
    pointwise: Tensor
    khat: KhatTable
    num_samples: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """The score of each row; those whose k-hat is above 0.7 are marked, the worst by number.

        Rows far below the others are those that the model did not expect. ``khat.plot()`` shows
        the k-hats.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        scores, bad = self.pointwise.numpy(), self.khat.bad
        ax.plot(np.arange(len(scores)), scores, ".")
        ax.plot(bad.numpy(), scores[bad], "o", fillstyle="none", label="k-hat above 0.7")
        for row in bad[self.khat.khat[bad].argsort(descending=True)][:_SHOWN].tolist():
            ax.annotate(str(row), (row, scores[row]), (4, 0), textcoords="offset points")
        if len(bad):
            ax.legend()
        ax.set(xlabel="row", ylabel="log score, left out", title=f"elpd {self.elpd}")
        return ax

    def __str__(self) -> str:
        return (
            f"elpd {self.elpd} nats (p_loo {self.p_loo}, Monte Carlo error {self.mcse:.1g}); "
            f"k-hat: {self.khat}"
        )

    __repr__ = __str__


def loo(
    log_lik: ArrayLike | Tensor | Iterator[Tensor], log_weights: ArrayLike | Tensor | None = None
) -> Loo:
    """Score each row as if it had been left out.

    How to read it: larger is better; compare models with :func:`compare`, which knows that they
    share their rows. ``p_loo`` far above the number of parameters means that the model is wrong
    for some rows, or too flexible. Rows with a k-hat above 0.7 carry the posterior: their scores,
    and so ``elpd``, are too high by an unknown amount. Look at them; if they are right, use a
    likelihood with heavier tails, more draws, or leave these rows out and fit again. If nearly
    all rows are above 0.7, the guide is at fault: try a richer one. If ``mcse`` is not small
    against differences that matter, take more draws.

    Arguments:
        log_lik: log-likelihood of each row at each draw, in nats, shape (S, N), S at least 25; or,
            where that does not fit into memory, an iterator over its blocks of rows, (S, B) each,
            all of the same draws.
        log_weights: log p(z, y) - log q(z) of the draws, not smoothed, shape (S,), for draws of a
            guide q. Draws of the posterior have none, and are taken to be independent.

    Returns:
        Scores with errors, and k-hat of each row. A row with the same likelihood at all draws has
        k-hat ``-inf``.

    Raises:
        ValueError: for shapes that do not fit, fewer than 25 draws, a ``log_lik`` that is not
            finite, or ``log_weights`` as of :func:`psis`.

    References:
        | Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC
          (Vehtari, Gelman and Gabry, 2017)
        | Bayesian leave-one-out cross-validation for large data (Magnusson et al., 2019)

    Example:
        Three rows of a normal with known scale, and draws of the posterior of its mean:

        >>> from torch.distributions import Normal
        >>> y, g = torch.tensor([-1.0, 0.0, 1.0]), torch.Generator().manual_seed(0)
        >>> z = 3**-0.5 * torch.randn(10_000, 1, generator=g)
        >>> print(loo(Normal(z, 1.0).log_prob(y)).elpd)
        -4.9 ± 0.7
    """
    # Lists of numbers: small tensors that stay would keep the memory of blocks that are gone.
    pointwise: list[float] = []
    gains: list[float] = []
    khats: list[float] = []
    ses: list[float] = []
    influence: Tensor | float = 0.0
    for block in smoothed(log_lik, log_weights):
        terms = block.log_weights + block.log_lik
        elpd = terms.logsumexp(0)
        # What each draw adds to the log of a ratio of two sums; rows share their draws.
        influence = influence + ((terms - elpd).exp() - block.log_weights.exp()).sum(1)
        pointwise += elpd.tolist()
        gains += ((block.log_lik + block.base).logsumexp(0) - elpd).tolist()
        khats += block.khat.khat.tolist()
        ses += block.khat.se.tolist()
    if not pointwise:
        raise ValueError("log_lik: expected at least one block of rows, got none")
    scores, gain, khat, se = torch.tensor([pointwise, gains, khats, ses], dtype=torch.float64)
    return Loo(
        total(scores),
        total(gain),
        float(torch.as_tensor(influence).norm()),
        scores,
        KhatTable(khat, se),
        len(torch.as_tensor(influence)),
    )


class Block(NamedTuple):
    """Some rows, with the weights of the draws for each when it is left out.

    Arguments:
        log_lik: shape (S, B).
        log_weights: logs of weights that sum to one for each row, shape (S, B).
        base: logs of the weights of the draws for all data, shape (S, 1).
        khat: of each row.
    """

    log_lik: Tensor
    log_weights: Tensor
    base: Tensor
    khat: KhatTable


def smoothed(
    log_lik: ArrayLike | Tensor | Iterator[Tensor], log_weights: ArrayLike | Tensor | None
) -> Iterator[Block]:
    """The rows in blocks, with their smoothed weights.

    Arguments:
        log_lik: as of :func:`loo`.
        log_weights: as of :func:`loo`.

    Raises:
        ValueError: as of :func:`loo`.
    """
    ratios, base = None, None
    if log_weights is not None:
        ratios = to_tensor(log_weights, "log_weights")
        base = psis(ratios).log_weights.double()[:, None]
        ratios = ratios[:, None]
    first, S = 0, None
    for rows in blocks(log_lik, "log_lik"):
        S = S or len(rows)
        if len(rows) != S or ratios is not None and len(ratios) != S:
            other = f"log_weights has {len(ratios)}" if ratios is not None else f"others {S}"
            raise ValueError(f"log_lik: expected as many draws in all, got {len(rows)}, {other}")
        if not rows.isfinite().all():
            s, n = (~rows.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"log_lik: expected finite numbers, got {float(rows[s, n])} at [{s}, {first + n}]"
                "; a draw of the posterior does not rule its own data out"
            )
        log_w, khat = psis_per_column(-rows if ratios is None else ratios - rows)
        even = torch.full((S, 1), -math.log(S), dtype=torch.float64)
        yield Block(rows.double(), log_w, even if base is None else base, khat)
        first += rows.shape[1]


def blocks(values: ArrayLike | Tensor | Iterator[Tensor], name: str) -> Iterator[Tensor]:
    """Blocks of rows (S, B) of an array (S, N), or those of an iterator as they come.

    Arguments:
        values: the array or the iterator.
        name: of the argument, for errors.

    Raises:
        ValueError: for other shapes.
    """
    for part in values if isinstance(values, Iterator) else (values,):
        whole = to_tensor(part, name)
        if whole.dim() != 2 or 0 in whole.shape:
            raise ValueError(f"{name}: expected shape (S, N), got {tuple(whole.shape)}")
        yield from whole.split(max(1, _BATCH // len(whole)), 1)


def total(pointwise: Tensor) -> Estimate:
    """Sum over the rows, with the error of having these rows and no others; NaN for one row.

    Arguments:
        pointwise: a figure of each row, shape (N,).
    """
    N = len(pointwise)
    unit = float(unit_of(pointwise))
    parts = pointwise / unit
    se = math.sqrt(N) * float(parts.std(correction=0)) * unit if N > 1 else math.nan
    return Estimate(float(parts.sum()) * unit, se)
