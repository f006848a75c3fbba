r"""What a guide's means and standard deviations can be off by at most.

With :math:`w = p(z) / q(z)` normalised, all follows from one number,
:math:`\chi^2 = \mathrm{E}_q (w - 1)^2 = e^{D_2(p \| q)} - 1`, and from moments of q. By
Cauchy-Schwarz a mean is off by at most

.. math:: |m_p - m_q| = |\mathrm{E}_q (w - 1)(z - m_q)| \le \chi \, \sigma_q,

and a second moment about :math:`m_q` by
:math:`\chi \kappa, \; \kappa^2 = \mathrm{E}_q (z - m_q)^4 - \sigma_q^4`, so that

.. math:: \sigma_q^2 - \chi \kappa - \chi^2 \sigma_q^2 \;\le\; \sigma_p^2 \;\le\;
          \sigma_q^2 + \chi \kappa.

For the distance of the distributions themselves, transport only the mass that differs, through
the mean of q (Villani, 2009, theorem 6.15):

.. math:: W_2^2 \le 2 \, \mathrm{E}_q \, |w - 1| \, \|z - m_q\|^2
          \le 2 \chi \sqrt{\mathrm{E}_q \|z - m_q\|^4}.

The fourth moment is that of the length, :math:`(\mathrm{tr} \, \Sigma)^2 + 2 \, \mathrm{tr} \,
\Sigma^2` for a normal q: its D dimensions do not simply add up. The bound of each figure's own
:math:`W_2` holds for its mean and standard deviation too,
:math:`(m_p - m_q)^2 + (\sigma_p - \sigma_q)^2 \le W_2^2`, and is the smaller one where
:math:`\chi` is large. Huggins et al. have bounds of this last kind, with 4 in place of the 2.

Letters: S draws, F figures.

References:
    | Validated variational inference via practical posterior error bounds (Huggins, Kasprzak,
      Campbell and Broderick, 2020)
    | Optimal transport: old and new (Villani, 2009)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import Psis, psis

__all__ = ["ErrorBounds", "error_bounds"]

_MOST = 0.5  # k-hat above which weights have no variance


@dataclass(frozen=True, eq=False, repr=False)
class ErrorBounds:
    """Result of :func:`error_bounds`; infinite where the weights have no variance.

    Arguments:
        wasserstein: bound of the 2-Wasserstein distance, in the units of the draws.
        mean: bounds of the errors of means, in standard deviations of the guide, shape (F,).
        mean_se: their standard errors, shape (F,).
        sd: bounds of the errors of standard deviations, in those of the guide, shape (F,).
        sd_se: their standard errors, shape (F,).
        divergence: the Rényi divergence of order 2 of the target from the guide, in nats.
        psis: the weights; there are no bounds where k-hat is above 0.5.
    """

    wasserstein: Estimate
    mean: Tensor
    mean_se: Tensor
    sd: Tensor
    sd_se: Tensor
    divergence: Estimate
    psis: Psis

    @property
    def worst_mean(self) -> tuple[int, Estimate]:
        """The figure whose mean has the largest bound, and that bound."""
        f = int(self.mean.argmax())
        return f, Estimate(float(self.mean[f]), float(self.mean_se[f]))

    @property
    def worst_sd(self) -> tuple[int, Estimate]:
        """The figure whose standard deviation has the largest bound, and that bound."""
        f = int(self.sd.argmax())
        return f, Estimate(float(self.sd[f]), float(self.sd_se[f]))

    def __str__(self) -> str:
        if self.psis.khat > _MOST:
            return f"no bound: weights have no variance, {self.psis}"
        mean, sd = self.worst_mean[1], self.worst_sd[1]
        return (
            f"means off by at most {mean} sd of the guide, sds by at most {sd} of theirs "
            f"(W2 at most {self.wasserstein})"
        )

    __repr__ = __str__


def error_bounds(draws: ArrayLike | Tensor, log_weights: ArrayLike | Tensor) -> ErrorBounds:
    """Bound the errors of a guide's means and standard deviations.

    How to read it: a bound of 0.1 means that whatever the target looks like, no mean is further
    off; a large bound says nothing, since the worst case is rare: then :func:`moment_errors`
    tells what the errors most likely are. Unlike these, the bounds hold for figures on which the
    weights hardly depend, and for all at once. They are as good as the weights: a mode where the
    guide never draws is not in them.

    Arguments:
        draws: of the guide, shape (S, F), S at least 25.
        log_weights: log p(z) - log q(z) at these draws, not smoothed, in nats up to a constant,
            shape (S,).

    Returns:
        The bounds with standard errors: infinite for a k-hat above 0.5, 0 where the weights are
        constant, and for a figure that does not vary.

    Raises:
        ValueError: for shapes that do not fit, draws that are not finite, or as :func:`psis`.

    Reference:
        | Validated variational inference via practical posterior error bounds (Huggins et al.,
          2020)

    Example:
        A standard normal guide for a target 0.1 to its right, for which chi = 0.1003:

        >>> z = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> print(error_bounds(z, 0.1 * z[:, 0]))
        means off by at most 0.10... sd of the guide, sds by at most 0.08... (W2 at most 0.5...)
    """
    x, log_w = to_tensor(draws, "draws").double(), to_tensor(log_weights, "log_weights")
    if x.dim() != 2 or 0 in x.shape or log_w.shape != x.shape[:1]:
        raise ValueError(
            "draws, log_weights: expected shapes (S, F) and (S,), got "
            f"{tuple(x.shape)} and {tuple(log_w.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError(
            f"draws: expected finite numbers, got {int((~x.isfinite()).sum())} others"
        )
    found = psis(log_weights)
    whole, units = unit_of(x), unit_of(x, dim=0)
    in_units = x / units
    sd = in_units.std(0, correction=0)
    flat = x.amax(0) == x.amin(0)
    if found.exact or found.khat > _MOST:
        return _without_weights(found, flat)
    w = found.log_weights.double().exp() * len(x)
    square = (in_units - in_units.mean(0)) ** 2
    at = x / whole
    length = ((at - at.mean(0)) ** 2).sum(1, keepdim=True)
    all_flat = bool(flat.all())
    bounds, se = _with_errors(w, torch.cat([square / sd.where(~flat, 1.0) ** 2, length], 1))
    keep = ~flat
    second = (w**2).mean()
    influence = w**2 / second - 2 * w  # of each draw on the log of E w^2 / (E w)^2
    return ErrorBounds(
        Estimate(0.0, 0.0)
        if all_flat
        else Estimate(*(float(v[-1, 2] * whole) for v in (bounds, se))),
        bounds[:-1, 0].where(keep, 0.0),
        se[:-1, 0].where(keep, 0.0),
        bounds[:-1, 1].where(keep, 0.0),
        se[:-1, 1].where(keep, 0.0),
        Estimate(float(second.log()), float(influence.std()) / math.sqrt(len(x))),
        found,
    )


def _without_weights(found: Psis, flat: Tensor) -> ErrorBounds:
    """The guide is the target, or the weights have no variance."""
    value, se = (0.0, 0.0) if found.exact else (math.inf, math.nan)
    bound, error = (torch.where(flat, 0.0, v).double() for v in (value, se))
    whole = Estimate(0.0, 0.0) if bool(flat.all()) else Estimate(value, se)
    return ErrorBounds(whole, bound, error, bound, error, Estimate(value, se), found)


def _with_errors(w: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds and their standard errors, by the delta method, each of shape (F, 3).

    Arguments:
        w: weights of mean 1, shape (S,).
        square: squared distances of each figure from its mean, shape (S, F).
    """
    S, F = square.shape
    parts = (w[:, None].expand(S, F), w[:, None].expand(S, F) ** 2, square, square**2)
    means = torch.stack([part.mean(0) for part in parts], 1).requires_grad_()  # (F, 4)
    with torch.enable_grad():
        bounds = _bounds(means)
        slopes = [
            torch.autograd.grad(bounds[:, i].sum(), means, retain_graph=True)[0] for i in range(3)
        ]
    ses = []
    for slope in slopes:
        influence = sum(slope[:, k] * part for k, part in enumerate(parts))
        ses.append(torch.as_tensor(influence).std(0) / math.sqrt(S))
    return bounds.detach(), torch.stack(ses, 1)


def _bounds(means: Tensor) -> Tensor:
    """From means of w, w^2, r^2 and r^4, (F, 4): bounds of mean and sd in sds, and of W2."""
    w, w2, square, fourth = means.unbind(1)
    chi = (w2 / w**2 - 1).sqrt()
    sd, kappa = square.sqrt(), (fourth - square**2).clamp(min=1e-30).sqrt()
    wasserstein = (2 * chi * fourth.sqrt()).sqrt()
    above = (square + chi * kappa).sqrt() - sd
    least = square * (1 - chi**2) - chi * kappa
    below = sd - torch.where(least > 0, least.where(least > 0, 1.0).sqrt(), 0.0)
    mean = torch.minimum(chi * sd, wasserstein)
    spread = torch.minimum(torch.maximum(above, below), wasserstein)
    return torch.stack([mean / sd, spread / sd, wasserstein], 1)
