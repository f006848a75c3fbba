r"""The log evidence between bounds from below and from above.

.. math::
    \underbrace{\mathrm{E} \log w}_{\mathrm{ELBO}} \;\le\;
    \underbrace{\mathrm{E} \log \tfrac1K \textstyle\sum_k w_k}_{\mathrm{IWAE}_K} \;\le\;
    \log \mathrm{E} \, w = \log p(x) \;\le\;
    \underbrace{\tfrac1n \log \mathrm{E} \, w^n}_{\mathrm{CUBO}_n}, \qquad
    w = \frac{p(x, z)}{q(z)}, \quad z \sim q

All are equal where the guide is the posterior. The gap below is what the fit has not reached,

.. math:: \log p(x) - \mathrm{ELBO} = \mathrm{KL}(q \,\|\, p).

Letters: S draws, K particles, n order.

References:
    | Importance weighted autoencoders (Burda, Grosse and Salakhutdinov, 2016)
    | Variational inference via chi upper bound minimization (Dieng, Tran, Ranganath, Paisley and
      Blei, 2017)
    | Pareto smoothed importance sampling (Vehtari et al., 2024)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor
from latentlab.diagnostics.estimate import Estimate, log_mean_exp
from latentlab.diagnostics.psis import Psis, _axes, psis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sandwich", "sandwich"]

_FEWEST_GROUPS = 20
_BAD = 0.7


@dataclass(frozen=True, eq=False, repr=False)
class Sandwich:
    """Result of :func:`sandwich`; all figures in nats.

    Arguments:
        elbo: the bound that was fitted.
        iwae: by number of particles K, tighter as that grows.
        evidence: log p(x), by smoothed weights.
        cubo: the bound from above.
        kl: evidence less ELBO, which is KL(q || p); it is known better than either.
        order: n of the bound from above.
        psis: the weights; k-hat above 0.7 says that ``evidence`` and ``kl`` are too small, and
            above 0.7 / n that ``cubo`` is.
    """

    elbo: Estimate
    iwae: Mapping[int, Estimate]
    evidence: Estimate
    cubo: Estimate
    kl: Estimate
    order: float
    psis: Psis

    @property
    def unreliable(self) -> tuple[str, ...]:
        """The figures that these draws cannot tell."""
        limits = (("evidence", _BAD), ("CUBO", _BAD / self.order))
        return tuple(name for name, limit in limits if self.psis.khat > limit)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The bounds from below by K, the evidence with its error, and the bound from above.

        A curve that still rises at its end, or evidence far above it, asks for more draws.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        lower = {1: self.elbo, **self.iwae}
        values, errors = [e.value for e in lower.values()], [e.se for e in lower.values()]
        ax.errorbar(list(lower), values, yerr=errors, fmt="o-", label="ELBO, IWAE")
        low, high = (self.evidence.value + sign * self.evidence.se for sign in (-1, 1))
        ax.axhspan(low, high, color="C1", alpha=0.3, linewidth=0)
        ax.axhline(self.evidence.value, color="C1", label="evidence")
        if math.isfinite(self.cubo.value):
            ax.axhline(
                self.cubo.value, color="C2", linestyle="--", label=f"CUBO, n = {self.order:g}"
            )
        ax.set(xscale="log", xlabel="particles K", ylabel="nats", title=f"KL(q || p) {self.kl}")
        ax.legend()
        return ax

    def __str__(self) -> str:
        iwae = [f"IWAE-{K} {bound}" for K, bound in list(self.iwae.items())[-1:]]
        figures = (
            *(f"ELBO {self.elbo}", *iwae, f"evidence {self.evidence}"),
            f"CUBO-{self.order:g} {self.cubo}",
        )
        text = f"{' <= '.join(figures)}; KL(q || p) {self.kl}"
        if not self.unreliable:
            return text
        return (
            f"{text}; too small by an unknown amount: {', '.join(self.unreliable)} ({self.psis})"
        )

    __repr__ = __str__


def sandwich(log_weights: ArrayLike | Tensor, order: float = 2.0) -> Sandwich:
    """Bound the log evidence from both sides, by the weights of one set of draws.

    How to read it: the width from ELBO to CUBO bounds what any comparison of models by their
    ELBOs can be wrong by. A KL below 0.1 nats is a guide that is as good as exact; above some
    nats, compare models by ``evidence``, if its k-hat allows, and take a richer guide. The bound
    from above is exact on average only before its logarithm is taken, and needs far more of the
    weights: where it is among ``unreliable`` it bounds nothing.

    Arguments:
        log_weights: log p(x, z) - log q(z) at draws of q, in nats, shape (S,), S at least 25. A
            draw of weight zero, ``-inf``, makes the ELBO ``-inf``.
        order: n of the bound from above, above 1.

    Returns:
        The bounds with errors. IWAE is given for K = 10, 100, ... as far as the draws make 20
        groups of K.

    Raises:
        ValueError: for another order, or as :func:`psis`.

    References:
        | Variational inference via chi upper bound minimization (Dieng et al., 2017)

    Example:
        A guide of scale 0.9 for a standard normal, whose log evidence is 0:

        >>> import torch
        >>> z = 0.9 * torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
        >>> found = sandwich(math.log(0.9) + 0.5 * z**2 * (0.9**-2 - 1))
        >>> for figure in (found.elbo, found.evidence, found.cubo, found.kl):
        ...     print(figure)
        -0.012 ± 0.002
        0.000 ± 0.003
        0.016 ± 0.005
        0.0113 ± 0.0009
    """
    if not (isinstance(order, Real) and 1 < order < math.inf):
        raise ValueError(f"order: expected a number above 1, got {order!r}")
    log_w = to_tensor(log_weights, "log_weights").double()
    found = psis(log_w)
    S = len(log_w)
    iwae = {}
    K = 10
    while S // K >= _FEWEST_GROUPS:
        groups = log_w[: S // K * K].view(-1, K)
        iwae[K] = Estimate.from_draws(groups.logsumexp(1) - math.log(K))
        K *= 10
    shares = found.log_weights.double()
    level = _level(log_w, shares, found)
    smooth = shares + level  # as smoothed, but of their own height
    evidence, powers = log_mean_exp(smooth), log_mean_exp(order * smooth)
    elbo = Estimate.from_draws(log_w)
    influence = (smooth - evidence.value).exp() - log_w  # of each draw on the gap
    kl = Estimate(evidence.value - elbo.value, float(influence.std()) / math.sqrt(S))
    cubo = Estimate(powers.value / order, powers.se / order)
    return Sandwich(elbo, iwae, evidence, cubo, kl, order, found)


def _level(log_w: Tensor, shares: Tensor, found: Psis) -> float:
    """Log of the sum of the smoothed weights: the largest that is not in the tail is as it was."""
    below = log_w.sort().values[len(log_w) - found.tail_size - 1]
    if below == -math.inf:  # all are in the tail
        return float(log_w.logsumexp(0))
    at = int((log_w == below).nonzero()[0, 0])
    return float(log_w[at] - shares[at])
