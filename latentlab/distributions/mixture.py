r"""A mixture of Gaussians with its labels summed out.

.. math::
    p(x) = \sum_k \pi_k \, \mathcal{N}(x \mid \mu_k, \Sigma_k), \qquad
    \Sigma_k = \mathrm{diag}(\sigma_k^2) \text{ or } L_k L_k^\top

Each component's log-density is linear in the squares and products of a row's cells, so that all
rows against all components are one matrix product, see :mod:`latentlab.distributions.quadratic`.
Rows are taken about the mean of the components, in units of their mean Cholesky factor, so that
data far from the origin or close to a line lose no digits and no unit overflows. What is left is
rounding of about :math:`10^{-16} R^2` nats, where R is the distance of a row from that mean in
scales of its component.

A cell that is NaN is missing. Its marginal is exact: a diagonal Gaussian leaves the factor out;
with :math:`L_k`, rows are taken by the pattern of their missing cells, each with the rows and
columns of :math:`\Sigma_k` that are there.

Letters: N rows, D features, K components, S draws.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Categorical, constraints

from latentlab.distributions.components import Diagonal, Kernel, Tilted, missing_patterns
from latentlab.distributions.quadratic import log_sum_exp, quadratic_forms

__all__ = ["NormalMixture"]

_LOG_2PI = math.log(2 * math.pi)
_CELLS = 1000  # numbers of (S, N, K, D) that cost what the matrices of one pattern do


class _RealOrMissing(constraints.Constraint):
    """Finite numbers, and NaN for a missing cell."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ~torch.isinf(value).any(-1)


class NormalMixture(TorchDistribution):
    r"""Distribution of a row x under a mixture of Gaussians, labels summed out.

    Arguments:
        weights: mixture weights, shape (..., K), on the simplex.
        locs: means, shape (..., K, D), in the units of x.
        scales: standard deviations of independent cells, positive, in the units of x; any shape
            (..., K or 1, D or 1).
        scale_trils: instead of these, Cholesky factors :math:`L_k` of the covariances, shape
            (..., K or 1, D, D).
        assume_missing: whether to reckon with missing cells in rows that cannot be looked at,
            as while a graph is recorded; where not, such a row has the log-density NaN. Without
            ``scale_trils`` it makes no difference.
        validate_args: as in ``torch.distributions``.

    Raises:
        ValueError: if the shapes do not agree in K and D.

    Example:
        >>> import torch
        >>> weights, locs = torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]])
        >>> mixture = NormalMixture(weights, locs, torch.ones(2, 1))
        >>> mixture.log_prob(torch.tensor([[0.0]]))       # log N(0 | 1, 1), twice halved
        tensor([-1.4189])
        >>> mixture.responsibilities(torch.tensor([[0.0]]))
        tensor([[0.5000, 0.5000]])
        >>> tilted = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> NormalMixture(torch.ones(1), torch.zeros(1, 2), scale_trils=tilted[None]).variance
        tensor([1., 1.])
    """

    support = _RealOrMissing()
    weights: Tensor
    locs: Tensor
    scales: Tensor | None
    scale_trils: Tensor | None

    def __init__(
        self,
        weights: Tensor,
        locs: Tensor,
        scales: Tensor | None = None,
        *,
        scale_trils: Tensor | None = None,
        assume_missing: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        _check_shapes(weights, locs, scales, scale_trils)
        self.weights, self.locs, self.assume_missing = weights, locs, assume_missing
        self.scales, self.scale_trils = scales, scale_trils
        super().__init__(self._parameter_batch, locs.shape[-1:], validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """Where parameters live, of those that are given."""
        found = {
            "weights": constraints.simplex,
            "locs": constraints.independent(constraints.real, 2),
        }
        if self.scales is not None:
            return found | {"scales": constraints.independent(constraints.positive, 2)}
        return found | {"scale_trils": constraints.independent(constraints.lower_cholesky, 1)}

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> NormalMixture:
        """The same mixture with a larger batch shape; parameters are not copied."""
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != Size(batch_shape):
            raise ValueError(
                f"batch_shape: expected a shape that {tuple(self.batch_shape)} expands to, "
                f"got {tuple(batch_shape)}"
            )
        new = self._get_checked_instance(NormalMixture, _instance)
        new.weights, new.locs, new.assume_missing = self.weights, self.locs, self.assume_missing
        new.scales, new.scale_trils = self.scales, self.scale_trils
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def component_log_prob(self, x: Tensor) -> Tensor:
        r"""Joint log-density :math:`\log \pi_k + \log \mathcal{N}(x \mid \mu_k, \Sigma_k)`.

        Arguments:
            x: rows, shape (..., D), NaN where a cell is missing.

        Returns:
            Log-densities in nats, shape (..., K).
        """
        layout = self._layout(x)
        if layout is None:
            joint = self._directly(x)
        else:
            joint = self._in_products(x, quadratic_forms).movedim(1, -1)
            joint = joint.reshape(*layout, self.weights.shape[-1])
        return joint.to(torch.promote_types(self.locs.dtype, x.dtype))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of rows in nats, shape of the batch; missing cells integrated out."""
        if self._validate_args:
            self._validate_sample(value)
        layout = self._layout(value)
        if layout is None:
            log_prob = self._directly(value).logsumexp(-1)
        else:
            log_prob = self._in_products(value, log_sum_exp).reshape(layout)
        log_prob = log_prob.to(torch.promote_types(self.locs.dtype, value.dtype))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities of the labels by Bayes' rule, shape (..., K)."""
        return self.component_log_prob(x).softmax(-1)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch_shape, D)``."""
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad():
            labels = Categorical(self.weights.expand(*shape[:-1], -1)).sample()[..., None]
            noise = torch.randn(shape, dtype=self.locs.dtype, device=self.locs.device)
            draws = torch.zeros_like(noise)
            for k in range(self.locs.shape[-2]):
                draw = self.locs[..., k, :] + self._coloured(noise, k)
                draws = torch.where(labels == k, draw, draws)
            return draws

    @property
    def mean(self) -> Tensor:
        """Mean of a row, shape ``(*batch_shape, D)``."""
        mean = (self.weights[..., None] * self.locs).sum(-2)
        return mean.expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        """Variance of each column, shape ``(*batch_shape, D)``."""
        mean = (self.weights[..., None] * self.locs).sum(-2, keepdim=True)
        if self.scale_trils is None:
            within = self._scales**2
        else:
            within = self.scale_trils.square().sum(-1)
        spread = within + (self.locs - mean) ** 2
        return (self.weights[..., None] * spread).sum(-2).expand(*self.batch_shape, -1)

    # ---- two ways to a density --------------------------------------------------------------

    def _layout(self, x: Tensor) -> Size | None:
        """The shape of log-densities where rows share their components; ``None`` where not."""
        if x.requires_grad and torch.is_grad_enabled():
            return None
        batch = self._parameter_batch
        if not batch:
            return x.shape[:-1]
        shares_rows = x.dim() == 2 and batch[-1] == 1
        return Size((*batch[:-1], len(x))) if shares_rows else None

    def _in_products(self, x: Tensor, kernel: Kernel) -> Tensor:
        """Rows through a kernel of S sets of components, shape (S, ..., N)."""
        x = x.double().reshape(-1, x.shape[-1])
        components = self._components()
        if isinstance(components, Diagonal):
            return components.through(kernel, x)
        found = missing_patterns(x)
        if (not self.assume_missing) if found is None else bool(found[0].all()):
            return components.through(kernel, x)
        if found is None or components.locs[..., 0].numel() * x.numel() <= _CELLS * len(found[0]):
            S, K = components.log_weights.shape
            joint = self._directly(x).reshape(S, len(x), K)
            return joint.logsumexp(-1) if kernel is log_sum_exp else joint.movedim(-1, 1)
        parts, places = [], []
        for m, present in enumerate(found[0]):
            place, there = (found[1] == m).nonzero()[:, 0], present.nonzero()[:, 0]
            places.append(place)
            parts.append(components.marginal(there).through(kernel, x[place][:, there]))
        return torch.cat(parts, -1)[..., torch.cat(places).argsort()]

    def _components(self) -> Diagonal | Tilted:
        """The parameters in float64, all batch dimensions in one: S.

        Squares in float32 would lose whole nats, whatever the rows came in.
        """
        batch, (K, D) = self._parameter_batch, self.locs.shape[-2:]
        log_weights = self.weights.double().log().expand(*batch, K).reshape(-1, K)
        locs = self.locs.double().expand(*batch, K, D).reshape(-1, K, D)
        if self.scale_trils is not None:
            trils = self.scale_trils.double().expand(*batch, K, D, D)
            return Tilted(log_weights, locs, trils.reshape(-1, K, D, D))
        scales = self._scales.double().expand(*batch, K, D)
        return Diagonal(log_weights, locs, scales.reshape(-1, K, D))

    def _directly(self, x: Tensor) -> Tensor:
        """Log-joints (..., K) of rows of any batch, cell by cell."""
        present = ~x.isnan().unsqueeze(-2)  # (..., 1, D)
        away = x.double().nan_to_num(0.0).unsqueeze(-2) - self.locs.double()
        away = torch.where(present, away, 0.0)  # (..., K, D)
        log_weights = self.weights.double().log()
        if self.scale_trils is None:
            scales = self._scales.double()
            cells = -0.5 * (away / scales) ** 2 - scales.log() - 0.5 * _LOG_2PI
            return torch.where(present, cells, 0.0).sum(-1) + log_weights
        unit = self.scale_trils.detach().double().abs().sum(-1)  # (..., K, D)
        rows = self.scale_trils.double() / unit.unsqueeze(-1) * present.unsqueeze(-1)
        # A missing cell becomes a standard normal of its own, and adds nothing.
        absent = (~present).double().diag_embed()
        trils = torch.linalg.cholesky(rows @ rows.mT + absent)
        standard = torch.linalg.solve_triangular(trils, (away / unit).unsqueeze(-1), upper=False)
        log_det = trils.diagonal(dim1=-2, dim2=-1).log() + unit.log() + 0.5 * _LOG_2PI
        log_det = torch.where(present, log_det, 0.0).sum(-1)
        return log_weights - 0.5 * standard.square().sum((-2, -1)) - log_det

    @property
    def _scales(self) -> Tensor:
        if self.scales is None:
            raise ValueError("scales: expected those of a diagonal mixture, got scale_trils")
        return self.scales

    @property
    def _parameter_batch(self) -> Size:
        """The batch shape of the parameters, before any expansion."""
        spread = self.scales if self.scale_trils is None else self.scale_trils[..., 0]
        batches = (v.shape[:-2] for v in (self.locs, spread) if v is not None)
        return torch.broadcast_shapes(self.weights.shape[:-1], *batches)

    def _coloured(self, noise: Tensor, k: int) -> Tensor:
        """Standard normal noise (..., D) with the covariance of component k."""
        if self.scale_trils is None:
            return self._scales[..., min(k, self._scales.shape[-2] - 1), :] * noise
        tril = self.scale_trils[..., min(k, self.scale_trils.shape[-3] - 1), :, :].to(noise.dtype)
        if tril.dim() == 2:
            return noise @ tril.mT
        if noise.dim() > 1 and tril.shape[-3] == 1:
            return noise @ tril.squeeze(-3).mT
        return (tril @ noise.unsqueeze(-1)).squeeze(-1)


def _check_shapes(
    weights: Tensor, locs: Tensor, scales: Tensor | None, scale_trils: Tensor | None
) -> None:
    if (scales is None) == (scale_trils is None):
        given = "neither" if scales is None else "both"
        raise ValueError(f"scales, scale_trils: expected one of the two, got {given}")
    name, spread, last = "scales", scales, "D"
    if spread is None:
        name, spread, last = "scale_trils", scale_trils, "D, D"
    shape = tuple(spread.shape) if spread is not None else ()
    agree = locs.dim() >= 2 and weights.shape[-1:] == locs.shape[-2:-1]
    if agree:
        K, D = locs.shape[-2:]
        tail = ((1, K), (1, D)) if scale_trils is None else ((1, K), (D,), (D,))
        ends = shape[len(shape) - len(tail) :]
        agree = len(ends) == len(tail) and all(n in t for n, t in zip(ends, tail, strict=True))
    if not agree:
        raise ValueError(
            f"weights, locs, {name}: expected shapes (..., K), (..., K, D), (..., K, {last}), "
            f"got {tuple(weights.shape)}, {tuple(locs.shape)}, {shape}"
        )
