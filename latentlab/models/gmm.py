r"""Gaussian mixtures with diagonal covariances.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad
    \mu_{kd} \sim \mathcal{N}(m_d, (3 s_d)^2), \quad
    \sigma_{kd} \sim \mathrm{LogNormal}(\log \tfrac{s_d}{2}, 1), \quad
    x_n \sim \textstyle\sum_k \pi_k \, \mathcal{N}(\mu_k, \mathrm{diag}\,(\sigma_k^2 + f^2 s^2))

:math:`m_d` and :math:`s_d` are the mean and standard deviation of column d, so that the prior says
the same whatever the units, and means, scales and the ELBO come out in the units of the data. The
log-normal prior and the floor :math:`f = 10^{-3}` keep a component from collapsing onto one row,
where the likelihood has no maximum. The labels :math:`z_n` are summed out, so that every latent
left is continuous and every guide applies.

Letters: N rows, D features, K components, S draws.

References:
    | Bayesian regularization for normal mixture estimation (Fraley and Raftery, 2007)
    | k-means++: the advantages of careful seeding (Arthur and Vassilvitskii, 2007)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn
from torch.distributions import AffineTransform

from latentlab.data.checks import as_count, as_rows, warn_constant
from latentlab.data.table import Table
from latentlab.distributions import DiagonalGaussianMixture
from latentlab.guides import FullRank, MeanField
from latentlab.plates import rows

__all__ = ["GaussianMixture"]

_FLOOR = 1e-3  # of a column's standard deviation
_START_ROWS = 20_000  # rows that starting values look at
_FAR = 100  # interquartile ranges in a standard deviation: the floor is a tenth of one
_SAME = 0.95  # affinity of two components a third of a scale to either side of their mean
_CHUNK = 2**24  # elements of (S, N, K) held at a time


class GaussianMixture(nn.Module):
    r"""Mixture of K diagonal Gaussians over rows of D numbers.

    Sites: ``weights`` (K,), ``locs`` (K, D), ``scales`` (K, D) and the observed ``x`` (N, D). NaN
    cells of ``x`` count as missing and are integrated out exactly.

    Arguments:
        num_features: number of columns D.
        num_components: number of components K.
        concentration: :math:`\alpha` of the Dirichlet prior; below 1 favours few components.
        init: how starting means are chosen, ``"k-means++"`` (far apart) or ``"random"`` rows.

    Raises:
        ValueError: if a count is not an int of at least 1, or another argument is out of range.

    Example:
        >>> import latentlab as ll
        >>> x = ll.data.simulate.eruptions(num_rows=100)
        >>> model = ll.GaussianMixture(num_features=2, num_components=2)
        >>> model(size=5).shape                                  # a prior draw
        torch.Size([5, 2])
        >>> model.scale_to(x.x)(x.x[:10], size=100).shape        # 10 rows stand for 100
        torch.Size([10, 2])
    """

    center: Tensor
    spread: Tensor
    num_rows: Tensor
    tolerates_missing = True
    exchangeable: Mapping[str, int] = {"weights": -1, "locs": -2, "scales": -2}
    dims: Mapping[str, Sequence[str]] = {
        "weights": ("component",),
        "locs": ("component", "feature"),
        "scales": ("component", "feature"),
        "x": ("row", "feature"),
    }

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        concentration: float = 1.0,
        init: Literal["k-means++", "random"] = "k-means++",
    ) -> None:
        super().__init__()
        self.num_features = as_count(num_features, "num_features")
        self.num_components = as_count(num_components, "num_components")
        if not isinstance(concentration, int | float) or not 0 < concentration < math.inf:
            raise ValueError(f"concentration: expected a number > 0, got {concentration!r}")
        if init not in ("k-means++", "random"):
            raise ValueError(f'init: expected "k-means++" or "random", got {init!r}')
        self.concentration = float(concentration)
        self.init: Literal["k-means++", "random"] = init
        self.register_buffer("center", torch.zeros(self.num_features))
        self.register_buffer("spread", torch.ones(self.num_features))
        self.register_buffer("num_rows", torch.tensor(0))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model: all rows (``x``), a mini-batch (``x``, ``size``) or a draw (``size``)."""
        if x is not None and x.shape[-1] != self.num_features:
            raise self._other_width(x)
        K, center, spread = self.num_components, self.center, self.spread
        weights = pyro.sample("weights", dist.Dirichlet(spread.new_full((K,), self.concentration)))

        with pyro.plate("components", K):
            locs = pyro.sample("locs", _normal(center, 3 * spread).to_event(1))
            scales = pyro.sample("scales", dist.LogNormal((spread / 2).log(), 1.0).to_event(1))

        with rows(x, size):
            return pyro.sample("x", self.likelihood(weights, locs, scales), obs=x)

    def likelihood(self, weights: Tensor, locs: Tensor, scales: Tensor) -> DiagonalGaussianMixture:
        """The distribution of a row given the latents, labels summed out.

        Arguments:
            weights: shape (K,), or (S, 1, K) for S draws, the 1 for the plate of rows.
            locs: shape (K, D), or (S, K, D).
            scales: shape (K, D), or (S, K, D).

        Returns:
            The mixture, batch shape () or (S, 1).
        """
        if locs.dim() > 2:  # K left its plate and became an event: make room for the rows
            locs, scales = locs.unsqueeze(-3), scales.unsqueeze(-3)
        floored = self.spread * ((scales / self.spread) ** 2 + _FLOOR**2).sqrt()
        return DiagonalGaussianMixture(weights, locs, floored)

    def default_guide(self) -> FullRank | MeanField:
        """A full-rank Gaussian, or a mean-field one where that would take over 80,000 numbers."""
        num_latents = self.num_components * (1 + 2 * self.num_features) - 1
        return FullRank() if num_latents <= 400 else MeanField()

    def scale_to(self, x: Tensor | Table, size: int | None = None) -> GaussianMixture:
        """Set the priors in the units of the data, in place.

        Warns of constant columns, and of a value so far away that the rest look alike.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            size: the number of rows that x stands for; by default its own.

        Returns:
            The model itself.

        Raises:
            ValueError: if x is not N rows of ``num_features`` numbers.
        """
        table = self._table(x, min_rows=2)
        if len(table) < self.num_components:
            raise ValueError(
                f"num_components: expected at most the number of rows, got "
                f"{self.num_components} components for {len(table)} rows"
            )
        center, spread = _mean_and_sd(table.x)
        warn_constant(table)
        _warn_far(table, spread)
        # Where rounding alone tells rows apart, a column's size is its scale, one if it is zero.
        rounding = 8 * torch.finfo(table.x.dtype).eps * center.abs()
        size_of = torch.where(center == 0, 1.0, center.abs())
        self.center = center
        self.spread = torch.where(spread > rounding, spread, size_of)
        self.num_rows = torch.tensor(len(table) if size is None else size)
        return self

    def starting_values(
        self, x: Tensor | Table, size: int | None = None, *, seed: int = 0
    ) -> dict[str, Tensor]:
        """A start: seeds by ``init``, then expectation-maximisation until it slows down.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing; 20,000 of them are looked at.
            size: unused; as for :meth:`scale_to`.
            seed: another seed, another start.

        Returns:
            ``weights`` (K,), ``locs`` (K, D) and ``scales`` (K, D), in the units of x.
        """
        x = self._table(x, min_rows=1).x
        generator = Generator(x.device).manual_seed(seed)
        some = torch.randperm(len(x), generator=generator, device=x.device)[:_START_ROWS]
        y = (x[some] - self.center) / self.spread
        pick = _far_rows if self.init == "k-means++" else _random_rows
        seeds = pick(y.nan_to_num(0.0), self.num_components, generator)  # the mean, to start with
        weights, locs, scales = _expectation_maximisation(y, seeds)
        return {
            "weights": weights,
            "locs": self.center + self.spread * locs,
            "scales": self.spread * scales,
        }

    def responsibilities(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Tensor:
        r"""Probability of each label for each row, averaged over posterior draws.

        .. math:: r_{nk} = \mathbb{E}_{q}\, p(z_n = k \mid x_n, \pi, \mu, \sigma)

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: ``weights`` (S, K), ``locs`` (S, K, D), ``scales`` (S, K, D), as
                ``Posterior.sample`` returns them; component k is the same one in each draw.

        Returns:
            Probabilities, shape (N, K), rows sum to one.
        """
        return self._average(x, draws, lambda joint: joint.softmax(-1).mean(0))

    def log_prob(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> Tensor:
        """Log posterior predictive density of each row in nats, shape (N,).

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            draws: as for :meth:`responsibilities`.
        """
        log_sum = self._average(x, draws, lambda joint: joint.logsumexp(-1).logsumexp(0))
        return log_sum - math.log(len(draws["weights"]))

    def label_rows(self, draws: Mapping[str, Tensor], x: Tensor | Table) -> dict[str, Tensor]:
        """Columns for a table of rows: the most probable component, its odds, the log-density."""
        probs = self.responsibilities(x, draws)
        columns = {"component": probs.argmax(-1)}
        columns |= {f"probability_{k}": probs[:, k] for k in range(self.num_components)}
        return columns | {"log_prob": self.log_prob(x, draws)}

    def remarks(self, draws: Mapping[str, Tensor], *data: Any) -> list[str]:  # noqa: ANN401
        r"""What the draws say about the number of components.

        A component may hold no rows, or be another one twice. The effective number counts neither:
        with the affinity :math:`Z_{jk} = \int \sqrt{p_j p_k}` of components at their posterior
        mean, it is :math:`\exp(-\sum_k \pi_k \log (Z \pi)_k)`.

        Reference:
            | Measuring diversity: the importance of species similarity (Leinster, Cobbold, 2012)
        """
        weights, locs, scales = (
            draws[site].double().mean(0) for site in ("weights", "locs", "scales")
        )
        held = weights * max(int(self.num_rows), 1)
        affinity = _affinity(locs / self.spread, scales / self.spread)
        few = [k for k in range(self.num_components) if held[k] < 2]
        same = [(j, k) for j, k in (affinity > _SAME).nonzero().tolist() if j < k]
        faults = [f"component {k} holds fewer than 2 rows" for k in few]
        faults += [f"components {j} and {k} are the same" for j, k in same if not {j, k} & {*few}]
        if not faults:
            return []
        effective = float((-weights @ (affinity @ weights).log()).exp())
        return [
            f"{', '.join(faults)} (effective number of components {effective:.1f} of "
            f"{self.num_components}): try fewer components"
        ]

    def plot_fit(self, draws: Mapping[str, Tensor], names: Sequence[str], x: Tensor) -> Any:  # noqa: ANN401
        """The data with the fitted components drawn on them; returns matplotlib axes."""
        from latentlab.report.plots import plot_mixture

        sites = ("weights", "locs", "scales")
        weights, locs, scales = (draws[site].numpy(force=True) for site in sites)
        return plot_mixture(x.numpy(force=True), weights, locs, scales, names)

    def spec(self) -> dict[str, Any]:
        """What builds this model again."""
        return {
            "class": "GaussianMixture",
            "arguments": {
                "num_features": self.num_features,
                "num_components": self.num_components,
                "concentration": self.concentration,
                "init": self.init,
            },
        }

    def _table(self, x: Tensor | Table, min_rows: int) -> Table:
        table = as_rows(x, min_rows=min_rows, allow_missing=True)
        if table.x.shape[1] != self.num_features:
            raise self._other_width(table.x)
        return table

    def _other_width(self, x: Tensor) -> ValueError:
        return ValueError(
            f"x: expected shape (N, {self.num_features}) to match "
            f"num_features={self.num_features}, got {tuple(x.shape)}"
        )

    def _average(
        self,
        x: Tensor | Table,
        draws: Mapping[str, Tensor],
        reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Reduce log-joints (S, n, K) of n rows at a time to n results."""
        x = self._table(x, min_rows=0).x
        weights, locs, scales = draws["weights"], draws["locs"], draws["scales"]
        mixture = self.likelihood(weights.unsqueeze(1), locs, scales)
        step = max(1, _CHUNK // weights.numel())
        with torch.no_grad():
            return torch.cat([reduce(mixture.component_log_prob(part)) for part in x.split(step)])


def _normal(loc: Tensor, scale: Tensor) -> dist.TransformedDistribution:
    """N(loc, scale) whose density squares no scale, so that none is too small or too large."""
    standard = dist.Normal(torch.zeros_like(loc), 1.0)
    return dist.TransformedDistribution(standard, [AffineTransform(loc, scale)])


def _affinity(locs: Tensor, scales: Tensor) -> Tensor:
    """Bhattacharyya's coefficient of each two diagonal Gaussians, shape (K, K), one if equal."""
    variance = (scales[:, None] ** 2 + scales**2) / 2  # (K, K, D)
    ratio = scales[:, None] * scales / variance
    return (0.5 * ratio.log() - (locs[:, None] - locs) ** 2 / (8 * variance)).sum(-1).exp()


def _mean_and_sd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column (D,), whatever the units; NaN cells left out."""
    mean = x.nanmean(0)
    away = x - mean
    unit = away.abs().nan_to_num(0.0).amax(0)
    unit = torch.where(unit > 0, unit, 1.0)
    return mean, unit * (away / unit).square().nanmean(0).sqrt()


def _warn_far(table: Table, spread: Tensor) -> None:
    """Warn of columns where one far value widens the floor under the scales of all others."""
    x = table.x[:: -(-len(table) // _START_ROWS)].double().sort(0).values  # NaN last
    count = (~x.isnan()).sum(0)
    quarter, half, three = (x.gather(0, (count * q // 4)[None])[0] for q in (1, 2, 3))
    far = (spread > _FAR * (three - quarter)) & (three > quarter)
    for d in far.nonzero().flatten().tolist():
        away = (table.x[:, d] - half[d]).abs().nan_to_num(0.0)
        row = int(away.argmax())
        warnings.warn(
            f"x: row {row} of column {table.names[d]!r} ({float(table.x[row, d]):g}) is "
            f"{float(away[row] / (three - quarter)[d]):.0e} interquartile ranges from the median: "
            "beside it the other rows look alike; look at it, leave it out or take logarithms",
            stacklevel=3,
        )


def _random_rows(y: Tensor, num_components: int, generator: Generator) -> Tensor:
    return y[torch.randperm(len(y), generator=generator, device=y.device)[:num_components]]


def _far_rows(y: Tensor, num_components: int, generator: Generator) -> Tensor:
    """Rows chosen in turn with probability of the squared distance to the nearest one so far."""
    chosen = y[torch.randint(len(y), (1,), generator=generator, device=y.device)]
    nearest = torch.full((len(y),), float("inf"), dtype=y.dtype, device=y.device)
    while len(chosen) < num_components:
        nearest = torch.minimum(nearest, ((y - chosen[-1]) ** 2).sum(-1))
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen = torch.cat([chosen, y[torch.multinomial(odds, 1, generator=generator)]])
    return chosen


def _expectation_maximisation(
    y: Tensor, locs: Tensor, max_iter: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the likelihood of standardised rows from given means."""
    K, D = locs.shape
    # A pseudo-count at mean 0 and scale 1/2 keeps components from emptying, and scales from zero.
    prior = 0.5
    weights, scales = y.new_full((K,), 1 / K), y.new_full((K, D), 0.5)
    seen, filled = (~y.isnan()).to(y), y.nan_to_num(0.0)
    previous = -float("inf")
    for _ in range(max_iter):
        joint = DiagonalGaussianMixture(weights, locs, scales).component_log_prob(y)
        total = float(joint.logsumexp(-1).mean())
        held = (resp := joint.softmax(-1)).sum(0) + prior
        counts = resp.T @ seen + prior  # (K, D)
        locs = resp.T @ filled / counts
        scales = ((resp.T @ filled**2 + prior * 0.25) / counts - locs**2).sqrt()
        weights = held / held.sum()
        if total - previous < 1e-6:
            break
        previous = total
    return weights, locs, scales
