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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn

from latentlab.data.checks import as_count, as_rows
from latentlab.data.table import Table
from latentlab.distributions import DiagonalGaussianMixture
from latentlab.guides import FullRank, MeanField
from latentlab.plates import rows

__all__ = ["GaussianMixture"]

_FLOOR = 1e-3  # of a column's standard deviation
_START_ROWS = 20_000  # rows that starting values look at
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
        if not 0 < concentration < float("inf"):
            raise ValueError(f"concentration: expected a number > 0, got {concentration}")
        if init not in ("k-means++", "random"):
            raise ValueError(f'init: expected "k-means++" or "random", got {init!r}')
        self.concentration, self.init = float(concentration), init
        self.register_buffer("center", torch.zeros(self.num_features))
        self.register_buffer("spread", torch.ones(self.num_features))
        self.register_buffer("num_rows", torch.tensor(0))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The model: all rows (``x``), a mini-batch (``x``, ``size``) or a draw (``size``)."""
        K, center, spread = self.num_components, self.center, self.spread
        weights = pyro.sample("weights", dist.Dirichlet(spread.new_full((K,), self.concentration)))

        with pyro.plate("components", K):
            locs = pyro.sample("locs", dist.Normal(center, 3 * spread).to_event(1))
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
        floored = (scales**2 + (_FLOOR * self.spread) ** 2).sqrt()
        return DiagonalGaussianMixture(weights, locs, floored)

    def default_guide(self) -> FullRank | MeanField:
        """A full-rank Gaussian, or a mean-field one where that would take over 80,000 numbers."""
        num_latents = self.num_components * (1 + 2 * self.num_features) - 1
        return FullRank() if num_latents <= 400 else MeanField()

    def scale_to(self, x: Tensor | Table, size: int | None = None) -> GaussianMixture:
        """Set the priors in the units of the data, in place.

        Arguments:
            x: rows, shape (N, D), NaN where a cell is missing.
            size: unused; the rows of a mini-batch have the scale of all rows.

        Returns:
            The model itself.

        Raises:
            ValueError: if x is not N rows of ``num_features`` numbers.
        """
        x = self._rows(x, min_rows=2)
        if len(x) < self.num_components:
            raise ValueError(
                f"num_components: expected at most the number of rows, got "
                f"{self.num_components} components for {len(x)} rows"
            )
        center = x.nanmean(0)
        spread = ((x - center) ** 2).nanmean(0).sqrt()
        # A constant column has no scale of its own: its size stands in, one if it is zero.
        size_of = torch.where(center == 0, torch.ones_like(center), center.abs())
        self.center = center
        self.spread = torch.where(spread > 1e-13 * center.abs(), spread, size_of)
        self.num_rows = torch.tensor(len(x))
        return self

    def starting_values(self, x: Tensor | Table, *, seed: int = 0) -> dict[str, Tensor]:
        """A start: seeds by ``init``, then expectation-maximisation until it slows down.

        Arguments:
            x: rows, shape (N, D); at most 20,000 of them, evenly spaced, are looked at.
            seed: another seed, another start.

        Returns:
            ``weights`` (K,), ``locs`` (K, D) and ``scales`` (K, D), in the units of x.
        """
        x = self._rows(x, min_rows=1)
        y = (x[:: -(-len(x) // _START_ROWS)] - self.center) / self.spread
        missing = torch.isnan(y)
        y = torch.where(missing, 0.0, y)  # the column's mean, for a start only
        generator = Generator(y.device).manual_seed(seed)
        pick = _far_rows if self.init == "k-means++" else _random_rows
        weights, locs, scales = _expectation_maximisation(y, pick(y, self.num_components, generator))
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
                ``Posterior.sample`` returns them.

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
        num_draws = torch.tensor(len(draws["weights"]))
        return self._average(x, draws, lambda joint: joint.logsumexp(-1).logsumexp(0)) - num_draws.log()

    def label_rows(self, x: Tensor | Table, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Columns for a table of rows: the most probable component, its odds, the log-density."""
        probs = self.responsibilities(x, draws)
        columns = {"component": probs.argmax(-1)}
        columns |= {f"probability_{k}": probs[:, k] for k in range(self.num_components)}
        return columns | {"log_prob": self.log_prob(x, draws)}

    def remarks(self, draws: Mapping[str, Tensor]) -> list[str]:
        """What the draws say about the number of components."""
        mean = draws["weights"].double().mean(0)
        held = mean * max(int(self.num_rows), 1)
        few = [k for k in range(self.num_components) if held[k] < 2]
        if not few:
            return []
        effective = float(torch.special.entr(mean).sum().exp())
        return [
            f"component {', '.join(map(str, few))} holds fewer than 2 rows (effective number of "
            f"components {effective:.1f} of {self.num_components}): try fewer components"
        ]

    def plot_fit(self, x: Tensor, draws: Mapping[str, Tensor], names: Sequence[str]) -> Any:  # noqa: ANN401
        """The data with the fitted components drawn on them; returns matplotlib axes."""
        from latentlab.report.plots import plot_mixture

        arrays = [draws[site].numpy(force=True) for site in ("weights", "locs", "scales")]
        return plot_mixture(x.numpy(force=True), *arrays, names)

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

    def _rows(self, x: Tensor | Table, min_rows: int) -> Tensor:
        table = as_rows(x, min_rows=min_rows, allow_missing=True)
        if table.x.shape[1] != self.num_features:
            raise ValueError(
                f"x: expected shape (N, {self.num_features}) to match "
                f"num_features={self.num_features}, got {tuple(table.x.shape)}"
            )
        return table.x

    def _average(
        self,
        x: Tensor | Table,
        draws: Mapping[str, Tensor],
        reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Reduce log-joints (S, n, K) of n rows at a time to n results."""
        x = self._rows(x, min_rows=0)
        weights, locs, scales = draws["weights"], draws["locs"], draws["scales"]
        mixture = self.likelihood(weights.unsqueeze(1), locs, scales)
        step = max(1, _CHUNK // weights.numel())
        with torch.no_grad():
            return torch.cat([reduce(mixture.component_log_prob(part)) for part in x.split(step)])


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
    """Maximise the likelihood of standardised rows from given means, with a floor on scales."""
    K, D = locs.shape
    # A small pseudo-count at the overall mean and scale keeps an emptying component alive.
    prior = 0.5
    weights, scales = y.new_full((K,), 1 / K), y.new_full((K, D), 0.5)
    previous = -float("inf")
    for _ in range(max_iter):
        joint = DiagonalGaussianMixture(weights, locs, scales).component_log_prob(y)
        total = float(joint.logsumexp(-1).mean())
        counts = (resp := joint.softmax(-1)).sum(0) + prior
        locs = (resp.T @ y) / counts[:, None]
        variance = (resp.T @ y**2 + prior * 0.25) / counts[:, None] - locs**2
        scales = variance.clamp_min(0.05**2).sqrt()
        weights = counts / counts.sum()
        if total - previous < 1e-6:
            break
        previous = total
    return weights, locs, scales
