r"""Ready-made emissions, each with priors in the units of the data.

Each of them is what a state says of a row, see :mod:`latentlab.distributions.emissions`.

Letters: N rows, D features, K states, C categories, P = D (D - 1) / 2 pairs of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from latentlab.distributions.cells import Cells, exactly
from latentlab.distributions.correlations import (
    PartialCorrelations,
    correlation_tril,
    partial_correlations,
)
from latentlab.distributions.factors import Beta, Dirichlet, Factor, Gamma, Sites
from latentlab.distributions.normal_row import NormalRow, normal_cells

__all__ = ["BernoulliEmission", "CategoricalEmission", "GaussianEmission", "PoissonEmission"]

_FLOOR = 1e-3  # of a column's standard deviation
_LEAST = 1e-9  # of the floor: the scale of a state that is at the floor, as good as zero
_ROUNDING = 1e-13  # of a variance: a correlation matrix keeps its Cholesky factor


class GaussianEmission(nn.Module):
    r"""Rows that are normal in each state: sites ``locs``, ``scales`` and ``correlations``.

    .. math:: \mu_{kd} \sim \mathcal{N}(m_d, (3 s_d)^2), \quad
              \sigma_{kd} \sim \mathrm{LogNormal}(\log \tfrac{s_d}{2}, 1), \quad
              R_k \sim \mathrm{LKJ}(1 + \tfrac{D}{2})

    with m and s the mean and standard deviation of each column. Variances have the floor
    :math:`(10^{-3} s_d)^2`, so that no state collapses onto one row.

    Arguments:
        num_features: number of columns D.
        covariance: ``"diag"`` takes columns as independent within a state, ``"full"`` does not.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, num_features: int, covariance: str = "diag") -> None:
        super().__init__()
        if covariance not in ("diag", "full"):
            raise ValueError(f'covariance: expected "diag" or "full", got {covariance!r}')
        self.num_features, self.covariance = num_features, covariance
        self.misses_cells = True  # until rows were measured that do not
        self.register_buffer("center", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(num_features, dtype=torch.float64))

    def sites(self) -> Mapping[str, Any]:
        """Priors in the units of the data."""
        log_half = (self.spread / 2).log()
        found = {
            "locs": normal_cells(self.center, 3 * self.spread).to_event(1),
            "scales": dist.LogNormal(log_half, torch.ones_like(log_half)).to_event(1),
        }
        if self._is_tilted:
            eta = self.spread.new_full((), 1 + self.num_features / 2)
            found["correlations"] = PartialCorrelations(self.num_features, eta)
        return found

    def distribution(
        self, locs: Tensor, scales: Tensor, correlations: Tensor | None = None
    ) -> Any:  # noqa: ANN401
        """Rows in each state.

        Arguments:
            locs: means, shape (..., K, D).
            scales: standard deviations, shape (..., K, D).
            correlations: partial correlations, shape (..., K, P).
        """
        scales = scales / self.spread  # first: of a tiny scale the square is zero
        floored = (scales.square() + _FLOOR**2).sqrt()
        if correlations is None:
            standard = dist.Normal((locs - self.center) / self.spread, floored)
            return Cells(standard, event_dim=1, origin=self.center, unit=self.spread)
        # The floor widens scales, and shrinks correlations by what it adds.
        share = scales / floored
        tril = share.unsqueeze(-1) * correlation_tril(correlations, self.num_features)
        rest = (1 - share) * (1 + share) + _ROUNDING
        tril = torch.linalg.cholesky_ex(tril @ tril.mT + rest.diag_embed())[0]
        return NormalRow(locs, (self.spread * floored).unsqueeze(-1) * tril)

    def measure(self, x: Tensor) -> None:
        """Take mean and standard deviation of the columns as units, in place."""
        nan = x.isnan()
        self.misses_cells = bool((nan.any(1) & ~nan.all(1)).any())
        center = x.nanmean(0)
        away = (x - center).abs().nan_to_num(0.0)
        unit = torch.where(away.amax(0) > 0, away.amax(0), 1.0)
        spread = unit * ((x - center) / unit).square().nanmean(0).sqrt()
        # Where rounding alone tells rows apart, a column's size is its scale, one if it is zero.
        rounding = 8 * torch.finfo(x.dtype).eps * center.abs()
        size = torch.where(center == 0, 1.0, center.abs())
        self.center = center.to(self.center)
        self.spread = torch.where(spread > rounding, spread, size).to(self.spread)

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Means, scales and correlations of weighted rows."""
        y = (x - self.center) / self.spread
        mean, held = _weighted_mean(y, weights)
        away = (y[:, None] - mean).nan_to_num(0.0)  # (N, K, D)
        square = torch.einsum("nk,nkd->kd", weights, away.square())
        prior = 1.0  # of a row at half a standard deviation, so that no variance is zero
        variance = (square + prior / 4) / (held + prior)
        found = {
            "locs": self.center + self.spread * mean,
            "scales": self.spread * (variance - _FLOOR**2).clamp_min(_FLOOR**2).sqrt(),
        }
        if self._is_tilted:
            whole = (~x.isnan()).all(1)
            part = weights * whole[:, None]
            product = torch.einsum("nk,nki,nkj->kij", part, away, away)
            scale = product.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt()
            scaled = product / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
            eye = torch.eye(self.num_features, dtype=x.dtype, device=x.device)
            shrink = (part.sum(0) / (part.sum(0) + self.num_features))[:, None, None]
            tril = torch.linalg.cholesky(shrink * scaled + (1 - shrink) * eye)
            found["correlations"] = partial_correlations(tril)
        return found

    @property
    def has_maximum(self) -> bool:
        """Whether it is in closed form: rows that miss some cells of correlated ones have none."""
        return not (self._is_tilted and self.misses_cells)

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Weights (K, D), sums (K, D) and of squares (K, D) or products (K, D, D) of cells."""
        y = ((x - self.center) / self.spread).nan_to_num(0.0)
        there = (~x.isnan()).to(weights)
        found = {"held": weights.mT @ there, "first": weights.mT @ y}
        if not self._is_tilted:
            return found | {"second": weights.mT @ y.square()}
        pairs = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(1)
        return found | {"second": (weights.mT @ pairs).unflatten(1, y.shape[1:] * 2)}

    def maximise(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means, scales and correlations; no variance is below the floor."""
        held = statistics["held"]
        mean = statistics["first"] / held
        found = {"locs": self.center + self.spread * mean}
        least = (_LEAST * _FLOOR) ** 2
        if not self._is_tilted:
            variance = statistics["second"] / held - mean.square() - _FLOOR**2
            return found | {"scales": self.spread * variance.clamp_min(least).sqrt()}
        product = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        spread = statistics["second"] / held.unsqueeze(-1) - product
        empty = spread.isnan()
        # Likelihood with a floor under all axes: those below it are lifted to it.
        size, axes = torch.linalg.eigh(torch.where(empty, 0.0, spread))
        root = (size - _FLOOR**2).clamp_min(least).sqrt().unsqueeze(-1) * axes.mT
        triangle = torch.linalg.qr(root)[1].mT  # a Cholesky factor that needs no positive matrix
        scale = triangle.square().sum(-1).sqrt()
        tril = triangle * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        partial = partial_correlations(tril / scale.unsqueeze(-1))
        scale = torch.where(empty.any(-1), torch.nan, scale)
        partial = torch.where(empty.any((-2, -1)).unsqueeze(-1), torch.nan, partial)
        return found | {"scales": self.spread * scale, "correlations": partial}

    @property
    def _is_tilted(self) -> bool:
        return self.covariance == "full" and self.num_features > 1


class PoissonEmission(nn.Module):
    r"""Counts: site ``rates``, :math:`\lambda_{kd} \sim \mathrm{Exponential}` of the data's mean.

    Arguments:
        num_features: number of columns D.
    """

    center: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("center", torch.ones(num_features, dtype=torch.float64))

    def sites(self) -> Mapping[str, Any]:
        """Priors in the units of the data."""
        return {"rates": dist.Gamma(torch.ones_like(self.center), 1 / self.center).to_event(1)}

    def distribution(self, rates: Tensor) -> Any:  # noqa: ANN401
        """Rows in each state.

        Arguments:
            rates: means, shape (..., K, D).
        """
        return Cells(dist.Poisson(rates), event_dim=1)

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for cells that are no counts."""
        _refuse(x, (x < 0) | (x != x.floor()), argument, "counts, whole numbers from 0 on", "")

    def measure(self, x: Tensor) -> None:
        """Take the mean of each column as its unit, in place."""
        least = 0.5 / max(len(x), 1)  # of a column without a single count
        self.center = x.nanmean(0).clamp_min(least).to(self.center)

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Rates of weighted rows."""
        mean, held = _weighted_mean(x, weights)
        return {"rates": (mean * held + 0.01 * self.center) / (held + 0.01)}

    has_maximum = True

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Weights (K, D) and sums (K, D) of the cells that are there."""
        return _sums(x, weights)

    def maximise(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean counts, kept off zero."""
        rates = statistics["first"] / statistics["held"]
        return {"rates": rates.clamp_min(torch.finfo(rates.dtype).tiny)}

    is_conjugate = True

    def priors(self) -> dict[Sites, Factor]:
        """The prior of the rates, a gamma family."""
        return {("rates",): Gamma(torch.ones_like(self.center), 1 / self.center)}

    def posteriors(self, statistics: Mapping[str, Tensor]) -> dict[Sites, Factor]:
        """That of the rates."""
        held, first = statistics["held"], statistics["first"]
        return {("rates",): Gamma(1 + first, 1 / self.center + held)}

    def expected_log_prob(self, x: Tensor, found: Mapping[Sites, Factor]) -> Tensor:
        """Expected log-density of rows in each state."""
        rates: Gamma = found["rates",]  # type: ignore[assignment]
        there, x = (~x.isnan()).to(x), x.nan_to_num(0.0)
        own = x @ rates.expected_log().mT - there @ rates.expected().mT
        return own - (x + 1).lgamma().sum(-1, keepdim=True)


class CategoricalEmission(nn.Module):
    r"""Codes 0 to C - 1: site ``probs``, :math:`p_{kd} \sim \mathrm{Dirichlet}(1)`.

    Arguments:
        num_features: number of columns D.
        num_categories: number of codes C of a column.
    """

    alpha: Tensor

    def __init__(self, num_features: int, num_categories: int) -> None:
        super().__init__()
        self.num_features, self.num_categories = num_features, num_categories
        ones = torch.ones(num_features, num_categories, dtype=torch.float64)
        self.register_buffer("alpha", ones, persistent=False)

    def sites(self) -> Mapping[str, Any]:
        """Uniform priors."""
        return {"probs": dist.Dirichlet(self.alpha).to_event(1)}

    def distribution(self, probs: Tensor) -> Any:  # noqa: ANN401
        """Rows in each state.

        Arguments:
            probs: probabilities of the codes, shape (..., K, D, C).
        """
        return Cells(dist.Categorical(probs), event_dim=1, dtype=probs.dtype)

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for cells that are no codes."""
        expected = f"codes from 0 to {self.num_categories - 1}"
        _refuse(x, (x < 0) | (x != x.floor()), argument, expected, "; number them from 0 on")
        way = "; give the model num_categories=, one more than the largest code"
        _refuse(x, x >= self.num_categories, argument, expected, way)

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Shares of the codes among weighted rows."""
        counts = self.statistics(x, weights)["counts"] + 1 / self.num_categories
        return {"probs": counts / counts.sum(-1, keepdim=True)}

    has_maximum = True

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Weights (K, D, C) of the cells with each code."""
        codes = torch.arange(self.num_categories, device=x.device)
        found = (x.unsqueeze(-1) == codes).to(weights)  # (N, D, C), none where missing
        return {"counts": (weights.mT @ found.flatten(1)).unflatten(1, found.shape[1:])}

    def maximise(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shares of the codes."""
        counts = statistics["counts"]
        return {"probs": counts / counts.sum(-1, keepdim=True)}

    is_conjugate = True

    def priors(self) -> dict[Sites, Factor]:
        """The prior of the probabilities, a Dirichlet family."""
        return {("probs",): Dirichlet(self.alpha)}

    def posteriors(self, statistics: Mapping[str, Tensor]) -> dict[Sites, Factor]:
        """That of the probabilities."""
        return {("probs",): Dirichlet(self.alpha + statistics["counts"])}

    def expected_log_prob(self, x: Tensor, found: Mapping[Sites, Factor]) -> Tensor:
        """Expected log-density of rows in each state."""
        probs: Dirichlet = found["probs",]  # type: ignore[assignment]
        columns = probs.expected_log().movedim(-3, -1)  # (D, C, K)
        codes, missing = x.nan_to_num(0.0).long(), x.isnan().unsqueeze(-1)
        cells = [column[codes[..., d]] for d, column in enumerate(columns)]
        return torch.where(missing, 0.0, torch.stack(cells, -2)).sum(-2)


class BernoulliEmission(nn.Module):
    r"""Zeros and ones: site ``probs``, :math:`p_{kd} \sim \mathrm{Uniform}(0, 1)`.

    Arguments:
        num_features: number of columns D.
    """

    alpha: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        ones = torch.ones(num_features, dtype=torch.float64)
        self.register_buffer("alpha", ones, persistent=False)

    def sites(self) -> Mapping[str, Any]:
        """Uniform priors."""
        return {"probs": dist.Beta(self.alpha, self.alpha).to_event(1)}

    def distribution(self, probs: Tensor) -> Any:  # noqa: ANN401
        """Rows in each state.

        Arguments:
            probs: probabilities of a one, shape (..., K, D).
        """
        return Cells(dist.Bernoulli(probs), event_dim=1)

    def check(self, x: Tensor, argument: str = "x") -> None:
        """Raise for cells that are neither."""
        _refuse(x, (x != 0) & (x != 1), argument, "zeros and ones", "")

    def estimate(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Shares of ones among weighted rows."""
        mean, held = _weighted_mean(x, weights)
        return {"probs": (mean * held + 0.5) / (held + 1)}

    has_maximum = True

    def statistics(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Weights (K, D) and sums (K, D) of the cells that are there."""
        return _sums(x, weights)

    def maximise(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shares of ones, kept off zero and one."""
        probs = statistics["first"] / statistics["held"]
        finfo = torch.finfo(probs.dtype)
        return {"probs": probs.clamp(finfo.tiny, 1 - finfo.eps)}

    is_conjugate = True

    def priors(self) -> dict[Sites, Factor]:
        """The prior of the probabilities, a beta family."""
        return {("probs",): Beta(self.alpha, self.alpha)}

    def posteriors(self, statistics: Mapping[str, Tensor]) -> dict[Sites, Factor]:
        """That of the probabilities."""
        held, first = statistics["held"], statistics["first"]
        return {("probs",): Beta(self.alpha + first, self.alpha + (held - first))}

    def expected_log_prob(self, x: Tensor, found: Mapping[Sites, Factor]) -> Tensor:
        """Expected log-density of rows in each state."""
        probs: Beta = found["probs",]  # type: ignore[assignment]
        ones, zeros = probs.expected_logs()
        return x.nan_to_num(0.0) @ ones.mT + (1 - x).nan_to_num(0.0) @ zeros.mT


def _sums(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the cells that are there weigh (K, D), and their sum (K, D)."""
    held = weights.mT @ (~x.isnan()).to(weights)
    return {"held": held, "first": weights.mT @ x.nan_to_num(0.0)}


def _weighted_mean(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the cells that are there (K, D), and what they weigh (K, D)."""
    held, total = _sums(x, weights).values()
    return total / held.clamp_min(1e-12), held


def _refuse(x: Tensor, wrong: Tensor, argument: str, expected: str, way: str) -> None:
    found = (wrong & ~x.isnan()).nonzero()
    if len(found):
        place = found[0].tolist()
        value = float(x[tuple(place)])
        raise ValueError(f"{argument}: expected {expected}, got {exactly(value)} at {place}{way}")
