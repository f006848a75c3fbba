r"""How far means and standard deviations of a guide are off, measured with its own weights.

Draws :math:`z_s \sim q` with self-normalised importance weights :math:`w_s` give the moments of
the target

.. math:: m = \sum_s w_s z_s, \qquad v^2 = \sum_s w_s (z_s - m)^2,

next to those of the guide, :math:`\bar z` and :math:`\hat v`. The differences that a reader would
take away wrong are

.. math:: \mathrm{shift} = (\bar z - m) / v, \qquad \mathrm{ratio} = \hat v / v.

Both use the same draws, so that most of their noise cancels. k-hat says whether the weights can be
trusted; below 0.7 they find what a guide that is too narrow, or off, does to a figure, which k-hat
itself does not say.

Letters: S draws, F figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of
from latentlab.diagnostics.estimate import Estimate

__all__ = ["MomentErrors", "moment_errors"]


@dataclass(frozen=True, eq=False, repr=False)
class MomentErrors:
    """Result of :func:`moment_errors`, each field of shape (F,).

    Arguments:
        shift: mean of the guide less that of the target, in standard deviations of the target.
        shift_se: its standard error.
        ratio: standard deviation of the guide over that of the target.
        ratio_se: its standard error.
    """

    shift: Tensor
    shift_se: Tensor
    ratio: Tensor
    ratio_se: Tensor

    @property
    def worst_shift(self) -> tuple[int, Estimate]:
        """The figure whose mean is off most, and by how much."""
        f = int(self.shift.abs().argmax())
        return f, Estimate(float(self.shift[f]), float(self.shift_se[f]))

    @property
    def worst_ratio(self) -> tuple[int, Estimate]:
        """The figure whose standard deviation is off most, and by what factor."""
        f = int(self.ratio.log().abs().argmax())
        return f, Estimate(float(self.ratio[f]), float(self.ratio_se[f]))

    def __str__(self) -> str:
        shift, ratio = self.worst_shift[1], self.worst_ratio[1]
        return f"mean off by {shift} sd, sd by a factor {ratio} at most"

    __repr__ = __str__


def moment_errors(draws: ArrayLike | Tensor, log_weights: ArrayLike | Tensor) -> MomentErrors:
    """Errors of a guide's means and standard deviations, by importance weights.

    How to read it: a shift below 0.1 and a ratio between 0.85 and 1.18 are lost in what anyone
    does with a posterior; a shift above 0.3 or a ratio outside 0.5 to 2 changes conclusions. A
    ratio below 1 is a guide that is too narrow, as mean-field guides are: try correlations.

    Arguments:
        draws: of the guide, shape (S, F).
        log_weights: smoothed by :func:`psis`, in nats up to a constant, shape (S,). Believe the
            result where their k-hat is below 0.7.

    Returns:
        Shift and ratio of each figure, with standard errors. A figure that does not vary has shift
        0 and ratio 1; where all weight is on one value both are infinite, and errors NaN.

    Raises:
        ValueError: for shapes that do not fit, draws that are not finite, or weights that are NaN
            or infinite.

    Reference:
        | Pareto smoothed importance sampling (Vehtari et al., 2024)

    Example:
        A guide of standard deviation 0.8 for a standard normal target:

        >>> import torch
        >>> z = 0.8 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> errors = moment_errors(z, -0.5 * z[:, 0] ** 2 + 0.5 * (z[:, 0] / 0.8) ** 2)
        >>> print(errors.worst_ratio[1])
        0.80 ± 0.01
    """
    x, log_w = to_tensor(draws, "draws").double(), to_tensor(log_weights, "log_weights").double()
    if x.dim() != 2 or log_w.shape != x.shape[:1] or len(x) < 2:
        raise ValueError(
            "draws, log_weights: expected shapes (S, F) and (S,) with S at least 2, got "
            f"{tuple(x.shape)} and {tuple(log_w.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError(
            f"draws: expected finite numbers, got {int((~x.isfinite()).sum())} others"
        )
    if not (log_w < math.inf).all() or (log_w == -math.inf).all():
        raise ValueError("log_weights: expected numbers, one finite at least, none NaN or +inf")
    x = x / unit_of(x, dim=0)
    w, even = log_w.softmax(0)[:, None], 1 / len(x)
    mean, sd = x.mean(0), x.std(0, correction=0)
    centre = (w * x).sum(0)
    spread = (w * (x - centre) ** 2).sum(0).sqrt()
    flat, point = sd == 0, (sd > 0) & (spread == 0)
    nothing = flat | point
    sd, spread = sd.where(~nothing, 1.0), spread.where(~nothing, 1.0)
    at, weighted = (x - mean) / sd, (x - centre) / spread
    # What one draw adds to each difference; they are independent up to the normalisation.
    shift_parts = (even - w) * weighted
    log_ratio_parts = (even * (at**2 - 1) - w * (weighted**2 - 1)) / 2
    shift, ratio = (mean - centre) / spread, sd / spread
    shift_se = shift_parts.square().sum(0).sqrt()
    ratio_se = ratio * log_ratio_parts.square().sum(0).sqrt()
    endless = torch.full_like(shift, math.inf).copysign(shift)
    found = zip(
        (shift, shift_se, ratio, ratio_se),
        (0.0, 0.0, 1.0, 0.0),
        (endless, math.nan, math.inf, math.nan),
        strict=True,
    )
    return MomentErrors(
        *(
            torch.where(point, torch.as_tensor(if_point), value.where(~flat, if_flat))
            for value, if_flat, if_point in found
        )
    )
