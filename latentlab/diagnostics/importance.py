r"""The evidence of each row by importance sampling, with its error.

.. math:: \log \hat p(x_n) = \log \frac{1}{S} \sum_s w_{ns}, \qquad
          w_{ns} = \frac{p(x_n, z_{ns})}{q(z_{ns} \mid x_n)}, \quad z_{ns} \sim q(z \mid x_n)

The log of a mean is too small on average, by about half its squared error: the figure is a lower
bound that grows with S.

Letters: S draws, N rows.

References:
    | Importance weighted autoencoders (Burda, Grosse and Salakhutdinov, 2016)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import KhatTable, khat_per_column

__all__ = ["RowEvidence", "row_evidence"]


@dataclass(frozen=True, eq=False)
class RowEvidence:
    """Result of :func:`row_evidence`.

    Arguments:
        log_prob: log-density of each row in nats, shape (N,).
        se: their standard errors by the draws, shape (N,); right where they are below about 0.3.
        khat: tail shape of each row's weights; above 0.7, do not trust that row's figure.
        num_samples: draws S behind each.
    """

    log_prob: Tensor
    se: Tensor
    khat: KhatTable
    num_samples: int

    @property
    def mean(self) -> Estimate:
        """Mean over these very rows, in nats per row; the error is that of the draws alone."""
        se = float(self.se.double().square().sum().sqrt()) / len(self.se)
        return Estimate(float(self.log_prob.double().mean()), se)

    @property
    def population(self) -> Estimate:
        """Mean over rows like these; the error adds that of having N of them only."""
        spread = float(self.log_prob.double().std()) / math.sqrt(max(len(self.log_prob), 1))
        return Estimate(self.mean.value, math.hypot(spread, self.mean.se))

    def __str__(self) -> str:
        bad = len(self.khat.bad)
        rows = f"{bad} of {len(self.log_prob)} rows have k-hat > 0.7"
        return f"{self.mean} nats per row ({self.num_samples} draws; {rows})"


def row_evidence(log_weights: ArrayLike | Tensor) -> RowEvidence:
    """Log evidence of each row from its importance weights.

    Arguments:
        log_weights: log p(x, z) - log q(z | x) in nats, shape (S, N), S at least 25.

    Returns:
        A figure for each row, with its error and k-hat.

    Raises:
        ValueError: for other shapes, fewer draws, or weights that are not finite.

    Example:
        >>> weights = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> print(row_evidence(0.1 * weights))
        0.007 ± 0.002 nats per row (1000 draws; 0 of 2 rows have k-hat > 0.7)
    """
    values = to_tensor(log_weights, "log_weights").double()
    khat = khat_per_column(values)
    log_prob = values.logsumexp(0) - math.log(len(values))
    shares = (values - log_prob).exp()
    se = shares.std(0) / math.sqrt(len(values))
    return RowEvidence(log_prob, torch.where(khat.khat == -math.inf, 0.0, se), khat, len(values))
