r"""Maximum likelihood of a normal row with covariance :math:`W W^\top + \mathrm{diag}\,\psi`.

With S the covariance of the rows, :math:`\lambda_j` its eigenvalues in falling order and
:math:`u_j` its eigenvectors, equal noise has a closed form,

.. math:: \psi = \frac{1}{D - L} \sum_{j > L} \lambda_j, \qquad
    w_j = u_j \sqrt{\lambda_j - \psi}.

Noise of each column's own has one given :math:`\psi`, by the same of
:math:`\psi^{-1/2} S \psi^{-1/2}`; what is left is a smooth function of D numbers. Rows with
missing cells have no S: there the likelihood itself is climbed.

Letters: N rows, D features, L latent dimensions.

References:
    | Some contributions to maximum likelihood factor analysis (Joreskog, 1967)
    | Probabilistic principal component analysis (Tipping and Bishop, 1999)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentlab.distributions.low_rank import LowRankNormal

__all__ = ["Optimum", "covariance_of", "find_optimum", "principal_axes"]

_MAX_ITER = 1_000


class Optimum(NamedTuple):
    """Parameters of a row, float64.

    Arguments:
        loc: mean, shape (D,).
        factor: W, shape (D, L), columns orthogonal in units of the noise, in falling order.
        variances: of the noise, shape (D,).
    """

    loc: Tensor
    factor: Tensor
    variances: Tensor


def find_optimum(y: Tensor, latent_dim: int, *, shared: bool, least: float) -> Optimum:
    """Where the likelihood of rows is largest.

    Arguments:
        y: rows in units of their columns, shape (N, D), NaN where a cell is missing.
        latent_dim: L, below D.
        shared: whether all columns have the same noise.
        least: variance that the noise has at least.

    Returns:
        The optimum; the nearest one to the principal axes where there may be several.
    """
    y = y.double()
    loc, covariance = covariance_of(y)
    if shared:
        factor, variances = _equal_noise(covariance, latent_dim, least)
    else:
        factor, variances = _own_noise(covariance, latent_dim, least)
    if not bool(y.isnan().any()):
        return Optimum(loc, factor, variances)
    return _climbed(y, Optimum(loc, factor, variances), shared, least)


def covariance_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of rows; a missing cell counts as its column's mean.

    Arguments:
        y: rows, shape (N, D), NaN where a cell is missing.
    """
    loc = y.nanmean(0)
    away = torch.where(y.isnan(), 0.0, y - loc)
    return loc, away.T @ away / len(y)


def principal_axes(covariance: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) in falling order, and the first eigenvectors (D, L).

    Arguments:
        covariance: shape (D, D).
        latent_dim: L.
    """
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0), vectors.flip(1)[:, :latent_dim]


def _equal_noise(covariance: Tensor, latent_dim: int, least: float) -> tuple[Tensor, Tensor]:
    values, vectors = principal_axes(covariance, latent_dim)
    noise = values[latent_dim:].mean().clamp_min(least)
    factor = vectors * (values[:latent_dim] - noise).clamp_min(0.0).sqrt()
    return factor, noise.expand(len(covariance)).clone()


def _own_noise(covariance: Tensor, latent_dim: int, least: float) -> tuple[Tensor, Tensor]:
    from scipy.optimize import minimize

    S = covariance.numpy(force=True)
    total = np.maximum(S.diagonal(), least)

    def best_factor(noise: np.ndarray) -> tuple[np.ndarray, float]:
        values, vectors = np.linalg.eigh(S / np.sqrt(np.outer(noise, noise)))
        values, vectors = values[::-1], vectors[:, ::-1][:, :latent_dim]
        used = np.maximum(values[:latent_dim], 1.0)
        factor = np.sqrt(noise)[:, None] * vectors * np.sqrt(used - 1.0)
        trace = values.sum() - values[:latent_dim].sum() + (values[:latent_dim] / used).sum()
        return factor, float(np.log(noise).sum() + np.log(used).sum() + trace)

    def objective(log_noise: np.ndarray) -> tuple[float, np.ndarray]:
        noise = np.exp(log_noise)
        factor, value = best_factor(noise)
        inverse = np.linalg.inv(factor @ factor.T + np.diag(noise))
        return value, noise * (inverse - inverse @ S @ inverse).diagonal()

    bounds = [(np.log(least), np.log(max(most, 2 * least))) for most in total]
    begin = np.log(np.maximum(0.5 * total, least))
    how = {"maxiter": _MAX_ITER, "maxfun": 2 * _MAX_ITER, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=how)
    noise = np.exp(found.x)
    return (torch.from_numpy(best_factor(noise)[0]).to(covariance), covariance.new_tensor(noise))


def _climbed(y: Tensor, start: Optimum, shared: bool, least: float) -> Optimum:
    """The optimum for rows with missing cells, from a start near to it."""
    noise = start.variances.mean() if shared else start.variances
    raw = (noise - least).clamp_min(0.1 * least).log()
    parameters = [
        p.clone(memory_format=torch.contiguous_format).requires_grad_()
        for p in (start.loc, start.factor, raw)
    ]

    def at(loc: Tensor, factor: Tensor, raw: Tensor) -> LowRankNormal:
        return LowRankNormal(loc, factor, (least + raw.exp()).expand(y.shape[1]))

    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=_MAX_ITER,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -at(*parameters).log_prob(y).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    found = at(*(p.detach() for p in parameters))
    scale = found.variances.sqrt().unsqueeze(-1)
    axes, sizes, _ = torch.linalg.svd(found.factor / scale, full_matrices=False)
    return Optimum(found.loc, scale * axes * sizes, found.variances.clone())
