r"""What an encoder tells, and how far its codes together are from the prior.

.. math::
    \underbrace{\mathrm{E}_n \mathrm{KL}(q(z \mid x_n) \,\|\, p)}_\text{KL}
    = \underbrace{\mathrm{E}_n \mathrm{KL}(q(z \mid x_n) \,\|\, q)}_\text{mutual information}
    + \underbrace{\mathrm{KL}(q \,\|\, p)}_\text{marginal KL}, \qquad
    q(z) = \frac1N \sum_n q(z \mid x_n)

With a standard normal prior the marginal KL has two parts,

.. math::
    \mathrm{KL}(q \,\|\, p) = \underbrace{\mathrm{KL}(q \,\|\, \textstyle\prod_j q(z_j))}_
    \text{total correlation} + \sum_j \underbrace{\mathrm{KL}(q(z_j) \,\|\, p(z_j))}_
    \text{dimensions}

q(z) is summed over all pairs of rows. If codes are normal, :math:`\mathcal{N}(B x, s^2)` with
means of covariance C, and :math:`A = C + \mathrm{diag}\, s^2`, then mutual information is
:math:`\tfrac12 \log |A| - \sum_j \log s_j` and total correlation
:math:`\tfrac12 (\sum_j \log A_{jj} - \log |A|)`.

Letters: N rows, S draws, L latent dimensions.

References:
    | ELBO surgery: yet another way to carve up the variational evidence lower bound
      (Hoffman and Johnson, 2016)
    | Isolating sources of disentanglement in variational autoencoders (Chen et al., 2018)
    | On variational bounds of mutual information (Poole et al., 2019)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, whole
from latentlab.diagnostics.estimate import Estimate
from latentlab.diagnostics.psis import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Information", "information", "information_from_densities"]

_BATCH = 2**22  # pairs of a draw and a row in memory at once
_LOG_2PI = math.log(2 * math.pi)
_MOST = 1e150  # whose square a double can hold
_LOOSE = 0.2  # share of the mutual information, between its bounds, that is worth a warning


@dataclass(frozen=True, eq=False, repr=False)
class Information:
    """Result of :func:`information`, all in nats per row.

    Arguments:
        num_rows: number N of rows that were compared with each other.
        kl: mean KL of the codes to the prior, by the same draws as the rest, so that the parts
            add up.
        mutual_information: of code and row among these N; a lower bound of that among all rows
            there could be, and at most log N.
        upper: an upper bound of the latter.
        marginal_kl: KL of all codes together to the prior.
        total_correlation: what the dimensions of a code tell about each other, all rows together;
            ``None`` where densities of single dimensions are not known.
        dimensions: KL of each dimension's codes, all rows together, to its prior, summed;
            ``None`` where they are not known.
    """

    num_rows: int
    kl: Estimate
    mutual_information: Estimate
    upper: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate | None
    dimensions: Estimate | None

    @property
    def enough_rows(self) -> bool:
        """False where more rows would tell more: the bounds of the mutual information differ."""
        gap = self.upper.value - self.mutual_information.value
        return gap <= max(_LOOSE * self.mutual_information.value, 2 * self.upper.se, 0.01)

    def plot(self, ax: Axes | None = None) -> Axes:
        """KL and its parts, with two standard errors.

        Arguments:
            ax: where to draw; by default a new figure.
        """
        ax = _axes(ax)
        parts = {
            "KL": self.kl,
            "mutual information": self.mutual_information,
            "marginal KL": self.marginal_kl,
            "total correlation": self.total_correlation,
            "dimensions": self.dimensions,
        }
        known = {name: part for name, part in parts.items() if part is not None}
        values = [part.value for part in known.values()]
        ax.barh(list(known), values, xerr=[2 * part.se for part in known.values()], color="C0")
        ax.axvline(math.log(self.num_rows), linestyle="--", color="0.5", label="log N")
        ax.legend(fontsize="small")
        ax.invert_yaxis()
        ax.set(xlabel="nats per row")
        return ax

    def __str__(self) -> str:
        parts = f"mutual information {self.mutual_information}, marginal KL {self.marginal_kl}"
        if self.total_correlation is not None:
            parts += f", of which total correlation {self.total_correlation}"
        text = f"KL {self.kl} nats per row: {parts}"
        if not self.enough_rows:
            text += (
                f"; {self.num_rows} rows are too few, mutual information may be up to {self.upper}"
            )
        return text

    __repr__ = __str__


def information(
    loc: ArrayLike | Tensor,
    scale: ArrayLike | Tensor,
    num_samples: int = 2000,
    max_rows: int = 5000,
    seed: int = 0,
) -> Information:
    """Mutual information, marginal KL and total correlation of normal codes.

    How to read it: *mutual information* is what a code tells about its row; near 0 is posterior
    collapse (:func:`collapse` says in which dimensions). *Marginal KL* is how far all codes
    together are from the prior: above some tenths of a nat, draws of the prior decode into things
    that no row looks like: fit the prior to the codes (a mixture, a flow), or sample from a
    mixture on the codes. *Total correlation* is the part of it that is dependence among
    dimensions. At the optimum of a linear decoder marginal KL is 0, and KL is all information. No
    more than log N can be seen among N rows: where the text says so, hand in more.

    Arguments:
        loc: means of the codes, shape (N, L), N at least 10.
        scale: standard deviations, shape (N, L).
        num_samples: draws S of codes, spread over the rows.
        max_rows: rows that are compared with each other, at random if there are more.
        seed: of rows and draws.

    Returns:
        The parts with their errors. The prior is the standard normal.

    Raises:
        ValueError: for other shapes, numbers that are not finite, or scales that are not positive.

    References:
        | ELBO surgery (Hoffman and Johnson, 2016)
        | Isolating sources of disentanglement in variational autoencoders (Chen et al., 2018)

    Example:
        Means of variance 0.75 and codes of variance 0.25: as the prior, all together, and
        log 2 = 0.69 nats that they tell about their row.

        >>> loc = 0.75**0.5 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
        >>> print(information(loc, torch.full((2000, 1), 0.5)))
        KL 0.71 ± 0.02 nats per row: mutual information 0.71 ± 0.02, marginal KL 0.0013 ± ...
    """
    loc, scale = _checked(loc, scale)
    num_samples = whole(num_samples, "num_samples", 10)
    max_rows = whole(max_rows, "max_rows", 10)
    generator = torch.Generator().manual_seed(whole(seed, "seed", 0))
    order = torch.randperm(len(loc), generator=generator)[:max_rows]
    loc, scale = loc[order], scale[order]
    rows, repeats = min(len(loc), num_samples), max(num_samples // len(loc), 1)
    noise = torch.randn(repeats, rows, loc.shape[1], generator=generator, dtype=torch.float64)
    found = []
    size = max(_BATCH // len(loc), 1)
    for draw in noise:
        z = loc[:rows] + scale[:rows] * draw
        for own in torch.arange(rows).split(size):
            found.append(_terms(z[own], own, loc, scale))
    # Draws of one row are averaged: rows are what is independent.
    own, joint, others, prior, each = (
        torch.cat([part[k] for part in found]).reshape(repeats, rows).mean(0) for k in range(5)
    )
    return _parts(len(loc), own, joint, others, prior, each)


def information_from_densities(
    log_q: ArrayLike | Tensor, log_prior: ArrayLike | Tensor
) -> Information:
    """Mutual information and marginal KL of any encoder, from its log densities.

    Read it as :func:`information`; total correlation needs densities of single dimensions, and is
    not known here.

    Arguments:
        log_q: log q(z_n | x_m) of a code drawn for row n, under the encoder's distribution for row
            m, shape (N, N), N at least 10.
        log_prior: log p(z_n), shape (N,).

    Returns:
        The parts with their errors.

    Raises:
        ValueError: for other shapes, NaN, or a code that its own row or the prior rules out.

    Example:
        >>> loc = torch.arange(10.0)[:, None]
        >>> q = torch.distributions.Normal(loc[:, 0], 0.01)
        >>> print(information_from_densities(q.log_prob(loc), -0.5 * loc[:, 0] ** 2))
        KL 18 ± 4 nats per row: mutual information 2.302585..., marginal KL 16 ± 4; 10 rows are ...
    """
    q, prior = to_tensor(log_q, "log_q").double(), to_tensor(log_prior, "log_prior").double()
    N = len(q) if q.dim() else 0
    if N < 10 or q.shape != (N, N) or prior.shape != (N,):
        raise ValueError(
            "log_q, log_prior: expected shapes (N, N) and (N,) with N at least 10, got "
            f"{tuple(q.shape)} and {tuple(prior.shape)}"
        )
    own = q.diagonal()
    if q.isnan().any() or not (own.isfinite().all() and prior.isfinite().all()):
        raise ValueError(
            "log_q, log_prior: expected numbers, finite on the diagonal and for the prior; a code "
            "is drawn where its density is 0 or infinite"
        )
    others = q.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf).logsumexp(1)
    return _parts(N, own, q.logsumexp(1) - math.log(N), others - math.log(N - 1), prior, None)


def _terms(z: Tensor, own: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Log densities of draws (B, L) of rows `own`, each (B,).

    Under the own row, under all N, under all others, under the prior, and under the product over
    dimensions of all N.
    """
    N, L = loc.shape
    joint = torch.zeros(len(z), N, dtype=torch.float64)
    each = torch.zeros(len(z), dtype=torch.float64)
    for j in range(L):
        log = -0.5 * ((z[:, j, None] - loc[:, j]) / scale[:, j]) ** 2 - scale[:, j].log()
        joint += log - 0.5 * _LOG_2PI
        each += log.logsumexp(1) - math.log(N) - 0.5 * _LOG_2PI
    at = torch.arange(len(z))
    mine, total = joint[at, own], joint.logsumexp(1) - math.log(N)
    joint[at, own] = -math.inf
    others = joint.logsumexp(1) - math.log(N - 1)
    each = total if L == 1 else each  # the same but for rounding
    prior = -0.5 * (z.square().sum(1) + L * _LOG_2PI)
    return mine, total, others, prior, each


def _parts(
    N: int, own: Tensor, joint: Tensor, others: Tensor, prior: Tensor, each: Tensor | None
) -> Information:
    estimate = Estimate.from_draws
    return Information(
        N,
        estimate(own - prior),
        estimate(own - joint),
        estimate(own - others),
        estimate(joint - prior),
        None if each is None else estimate(joint - each),
        None if each is None else estimate(each - prior),
    )


def _checked(loc: ArrayLike | Tensor, scale: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    m, s = to_tensor(loc, "loc").double(), to_tensor(scale, "scale").double()
    if m.dim() != 2 or len(m) < 10 or m.shape[1] == 0:
        raise ValueError(f"loc: expected shape (N, L) with at least 10 rows, got {tuple(m.shape)}")
    if s.shape != m.shape:
        raise ValueError(
            f"scale: expected the shape of loc, {tuple(m.shape)}, got {tuple(s.shape)}"
        )
    for value, argument in ((m, "loc"), (s, "scale")):
        if not (value.abs() < _MOST).all():
            where = (~(value.abs() < _MOST)).nonzero()[0].tolist()
            raise ValueError(
                f"{argument}: expected finite numbers below {_MOST:g}, not so first at {where}"
            )
    if not (s > 0).all():
        raise ValueError(f"scale: expected positive numbers, got {float(s.min()):g}")
    return m, s
