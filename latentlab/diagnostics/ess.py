r"""Effective sample size: how many independent draws would do as well as these.

.. math:: \mathrm{ESS} = \frac{C S}{\tau}, \qquad \tau = -1 + 2 \sum_{k=0}^{K} P_k, \qquad
          P_k = \rho_{2k} + \rho_{2k+1},

where the autocorrelations :math:`\rho_t` are measured against the variance of all chains
together, so that chains which do not agree count for little. In a reversible chain the sums of
pairs are positive and fall (Geyer): the sum ends at the first that is not positive, and none
counts for more than the one before it.

Letters: C chains, S draws in each, P quantities, t lag, L = S // 2.

References:
    | Practical Markov chain Monte Carlo (Geyer, 1992)
    | Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021)
"""

from __future__ import annotations

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentlab.diagnostics.arguments import unit_of
from latentlab.diagnostics.chains import halves, to_chains, z_scores

__all__ = ["ess", "mcse"]

_KINDS = ("bulk", "tail", "mean", "sd")
_TAIL = (0.05, 0.95)
_BATCH = 2**22  # numbers in memory at once


def ess(x: ArrayLike | Tensor, kind: str = "bulk") -> Tensor:
    """Effective sample size of each column, of all chains together.

    How to read it: the error of a mean is the standard deviation over its root. Above 100 for
    each chain, in bulk and tail, figures and R-hat itself can be trusted; below, run longer, or
    look for a parametrisation that mixes better. More than the number of draws is possible:
    draws that alternate have better means than independent ones.

    Arguments:
        x: one chain, shape (S, P), or several of equal length, shape (C, S, P); S at least 4.
            Every chain is cut in two, so that a trend counts.
        kind: what the draws are for: ``"bulk"`` (the centre, by ranks; right for any draws),
            ``"tail"`` (the worse of the 5 % and 95 % quantiles), ``"mean"`` or ``"sd"``.

    Returns:
        Shape (P,), at most C S log10(C S). The number of draws for a column that is constant, and
        NaN for one with a NaN, or an infinity of which ``"mean"`` or ``"sd"`` is asked.

    Raises:
        ValueError: for other shapes, fewer than four draws, or another kind.

    Example:
        Draws that keep 0.9 of the one before are worth a nineteenth, (1 - 0.9) / (1 + 0.9):

        >>> noise = torch.randn(19_000, 1, generator=torch.Generator().manual_seed(0))
        >>> x = torch.zeros(19_000, 1)
        >>> for t in range(1, len(x)):
        ...     x[t] = 0.9 * x[t - 1] + noise[t]
        >>> bool((900 < ess(x)) & (ess(x) < 1100))
        True
    """
    chains = to_chains(x)
    chains = chains / unit_of(chains, dim=(0, 1))
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    if kind == "bulk":
        found = _ess(z_scores(halves(chains)))
    elif kind == "mean":
        found = _ess(halves(chains))
    elif kind == "sd":
        found = _ess(halves((chains - chains.mean((0, 1))) ** 2))
    else:
        ordered = chains.flatten(0, 1).sort(0).values
        below = [_ess(halves((chains <= _quantile(ordered, q)).double())) for q in _TAIL]
        found = torch.minimum(*below)
    return found.where(~chains.isnan().any(0).any(0), math.nan)


def mcse(x: ArrayLike | Tensor, kind: str = "mean") -> Tensor:
    """Monte Carlo standard error of the mean, or of the standard deviation, of each column.

    How to read it: digits below it are noise. A tenth of the standard deviation (about 100
    effective draws) does for most uses of a posterior mean.

    Arguments:
        x: one chain, shape (S, P), or several of equal length, shape (C, S, P); S at least 4.
        kind: ``"mean"`` or ``"sd"``.

    Returns:
        Shape (P,). 0 for a column that is constant, NaN for one with a number that is not finite.

    Raises:
        ValueError: for other shapes, fewer than four draws, or another kind.

    Example:
        >>> x = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0))
        >>> mcse(x), mcse(x, "sd")
        (tensor([0.010], dtype=torch.float64), tensor([0.007], dtype=torch.float64))
    """
    if kind not in ("mean", "sd"):
        raise ValueError(f"kind: expected 'mean' or 'sd', got {kind!r}")
    chains = to_chains(x)
    unit, size = unit_of(chains, dim=(0, 1)), ess(chains, kind)
    chains = chains / unit
    if kind == "mean":
        return chains.flatten(0, 1).std(0) / size.sqrt() * unit
    square = ((chains - chains.mean((0, 1))) ** 2).flatten(0, 1)
    variance = square.mean(0)
    error = (((square**2).mean(0) - variance**2).clamp(min=0) / variance / size).sqrt() / 2
    return error.where(variance != 0, 0.0) * unit


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Of each column of sorted draws, linear between them.

    Rounding decides nothing: a quantile that is a draw is that draw, and so is one between ties.
    """
    place = round(len(ordered) * q + (1 - q), 9)  # counted from one
    k = math.floor(place)
    low, high = ordered[k - 1], ordered[min(k, len(ordered) - 1)]
    return low + (place - k) * (high - low)


def _ess(chains: Tensor) -> Tensor:
    """Of (C, L, P): in parts, as the transforms take some times the memory of the draws."""
    C, L, P = chains.shape
    width = max(1, _BATCH // (4 * C * L))
    return (
        torch.cat([_ess_of_part(part) for part in chains.split(width, -1)]) if P else chains[0, 0]
    )


def _ess_of_part(chains: Tensor) -> Tensor:
    C, L, _ = chains.shape
    rho = _autocorrelations(chains)  # (L, P)
    last = max((L - 3) // 2, 0)  # the last pair whose sum decides
    pairs = rho[: 2 * last + 2].unflatten(0, (-1, 2)).sum(1)  # (last + 1, P)

    ends = pairs <= 0
    ends[-1] = True
    K = ends.double().argmax(0)  # the first pair that is not positive
    falling = pairs.cummin(0).values
    before = torch.cat([torch.zeros_like(falling[:1]), falling.cumsum(0)]).gather(0, K[None])[0]
    even, pair = rho.gather(0, 2 * K[None])[0], pairs.gather(0, K[None])[0]
    tau = -1 + 2 * before + even.where(pair >= 0, even.clamp(min=0))
    found = C * L / tau.clamp(min=1 / math.log10(C * L))
    constant = chains.amax((0, 1)) == chains.amin((0, 1))
    return found.where(~constant, float(C * L))


def _autocorrelations(chains: Tensor) -> Tensor:
    """At lags 0 to L - 1, against the variance of all chains together, shape (L, P)."""
    L = chains.shape[1]
    size = 2 ** math.ceil(math.log2(2 * L))  # zeros, so that the ends do not meet
    spectrum = torch.fft.rfft(chains - chains.mean(1, keepdim=True), size, dim=1)
    covariance = torch.fft.irfft(spectrum.abs() ** 2, size, dim=1)[:, :L].mean(0) / L
    within = covariance[0] * L / (L - 1)
    everywhere = covariance[0] + chains.mean(1).var(0)
    rho = 1 - (within - covariance) / everywhere
    rho[0] = 1.0
    return rho
