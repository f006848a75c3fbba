r"""Monte Carlo figures, each with its error.

.. math:: \hat\mu = \frac{1}{S} \sum_s v_s, \qquad
          \mathrm{se} = \sqrt{\frac{1}{S (S - 1)} \sum_s (v_s - \hat\mu)^2}

Letter: S draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of

__all__ = ["Estimate", "log_mean_exp"]


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; as text, rounded by that error.

    Read ``value ± se`` as about two chances in three that the truth is within one ``se``, and 19
    in 20 within two, given at least some dozens of independent draws.

    Arguments:
        value: the figure.
        se: its standard error, 0 where the figure is exact, NaN where it is not known.

    Example:
        >>> elbo = Estimate(-1130.2648, 0.0412)
        >>> print(elbo)
        -1130.26 ± 0.04
        >>> float(elbo) < -1130
        True
        >>> print(Estimate(0.5, 0.0))
        0.5
    """

    value: float
    se: float

    @classmethod
    def from_draws(cls, values: ArrayLike | Tensor) -> Estimate:
        r"""The mean of independent draws, and sd / :math:`\sqrt{S}`.

        Arguments:
            values: one number a draw, shape (S,), S at least 2.

        Returns:
            The estimate. Infinite draws make the value infinite and its error NaN.

        Raises:
            ValueError: for another shape, or fewer than two draws.

        Example:
            >>> print(Estimate.from_draws([1.0, 2.0, 3.0]))
            2.0 ± 0.6
        """
        draws = to_tensor(values).double()
        if draws.dim() != 1 or len(draws) < 2:
            raise ValueError(
                f"values: expected shape (S,) with at least 2 draws, got {tuple(draws.shape)}"
            )
        unit = float(unit_of(draws))
        draws = draws / unit
        return cls(draws.mean().item() * unit, draws.std().item() / math.sqrt(len(draws)) * unit)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        value, se = float(self.value), float(self.se)
        if se <= 1e-12 * abs(value):  # none, or rounding
            return f"{value:.10g}"
        if not (math.isfinite(value) and math.isfinite(se)):
            return f"{value:.6g} ± {se:.2g}"
        digits, exponent = f"{se:.1e}".split("e")
        more = int(digits[0] == "1")  # a second digit, where rounding to one would be coarse
        places = more - int(exponent)
        if se >= 1e-6 and max(abs(value), se) < 1e9:
            shown = [round(v, places) + 0.0 for v in (value, se)]  # + 0.0 for no "-0.0"
            return " ± ".join(f"{v:.{max(places, 0)}f}" for v in shown)
        size = math.floor(math.log10(max(abs(value), se)))
        return f"{value:.{max(places + size, 0)}e} ± {se:.{more}e}"


def log_mean_exp(
    log_values: ArrayLike | Tensor, dim: int = 0, counts: Tensor | None = None
) -> Estimate:
    r"""Log of a mean, from the logs of draws, such as the evidence from importance weights.

    .. math:: \ell = \log \frac{1}{S} \sum_s e^{v_s}, \qquad
              \mathrm{se}(\ell) \approx \frac{\mathrm{sd}(e^{v - \ell})}{\sqrt{S}}

    The error is that of the delta method, right while it is small against 1. It is as
    trustworthy as the weights: where their k-hat is above 0.7 the largest weights have not been
    drawn yet, the value is too small and so is the error; see :func:`psis`.

    Arguments:
        log_values: logs of draws in nats, shape (S,). With more axes (rows n that share their
            draws) the logs of the means are summed over n, and the error is that of the sum.
        dim: the axis of the draws.
        counts: how often each n counts, shape (N,); once by default.

    Returns:
        The estimate in nats.

    Raises:
        ValueError: for fewer than two draws.

    Reference:
        | Importance weighted autoencoders (Burda, Grosse and Salakhutdinov, 2016)

    Example:
        >>> import torch
        >>> print(log_mean_exp(torch.tensor([1.0, 2.0, 3.0]).log()))
        0.7 ± 0.3
    """
    draws = to_tensor(log_values, "log_values").double()
    if draws.dim() == 0 or draws.shape[dim] < 2:
        raise ValueError(
            f"log_values: expected at least 2 draws along dim={dim}, got {tuple(draws.shape)}"
        )
    draws = draws.movedim(dim, 0).flatten(1) if draws.dim() > 1 else draws[:, None]
    logs = draws.logsumexp(0) - math.log(len(draws))
    shares = (draws - logs).exp()
    if counts is not None:
        logs, shares = counts.to(logs) * logs, counts.to(logs) * shares
    shares = shares.sum(1)
    return Estimate(logs.sum().item(), shares.std().item() / math.sqrt(len(draws)))
