r"""What a variational autoencoder is put together from: encodings, priors, flow posteriors.

Letters: B rows, L latent dimensions, K components of a prior, S draws.

References:
    | Improving variational inference with inverse autoregressive flow (Kingma et al., 2016)
    | VAE with a VampPrior (Tomczak and Welling, 2018)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from latentlab.data.checks import warn_constant
from latentlab.data.table import Table
from latentlab.diagnostics import RowEvidence
from latentlab.distributions import Columns, Gaussian, Likelihood, NormalMixture, Poisson
from latentlab.models.gmm_units import mean_and_sd, warn_far

__all__ = [
    "Encoding",
    "FlowPosterior",
    "MixturePrior",
    "NormalPrior",
    "PushesNoise",
    "flow_for",
    "read",
    "warn_of_columns",
]

_LEAST_SCALE = 1e-6  # of an encoding: a softplus may round to zero


@dataclass(frozen=True, eq=False)
class Imputation:
    """Draws of missing cells given the observed ones.

    They are taken by sampling importance resampling: of many codes from the encoder, some are
    chosen by their importance weights, and missing cells are drawn from the decoder at these. The
    error is that of the weights: where a row's effective number of codes is small, or its k-hat
    above 0.7, its draws are too much alike.

    Arguments:
        draws: rows with their missing cells filled, shape (S, N, D) or (S, N, C, H, W).
        mean: the mean of each missing cell, by the weights of all latents, shape of the rows; the
            most probable code where cells are codes; observed cells as they were.
        evidence: log-density of the observed cells of each row, with its error and k-hat.
        ess: effective number of codes behind each row's draws, shape (N,).
    """

    draws: Tensor
    mean: Tensor
    evidence: RowEvidence
    ess: Tensor

    @property
    def sd(self) -> Tensor:
        """Standard deviation over draws, two at least; zero for observed cells."""
        return self.draws.std(0)


class PushesNoise(Protocol):
    """A conditional flow, as ``latentlab.flows.make`` returns it."""

    def push(self, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The value of noise, and the log of the determinant of the Jacobian."""

    def pull(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The noise of a value, and the log of the determinant of the Jacobian."""


class Encoding(NamedTuple):
    """What an encoder says of rows.

    Arguments:
        loc: shape (B, L).
        scale: shape (B, L), positive.
        context: shape (B, C): further numbers, which a flow reads.
    """

    loc: Tensor
    scale: Tensor
    context: Tensor | None = None


def read(encoded: Tensor | Sequence[Tensor], latent_dim: int) -> Encoding:
    """An encoder's output: a pair, a triple, or one tensor of 2 L numbers or more.

    Arguments:
        encoded: ``(loc, scale)``, ``(loc, scale, context)``, or their numbers side by side, the
            scale then before a softplus.
        latent_dim: L.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> read(torch.zeros(3, 4), latent_dim=2).scale[0]
        tensor([0.6931, 0.6931])
    """
    if isinstance(encoded, Tensor):
        if encoded.dim() != 2 or encoded.shape[-1] < 2 * latent_dim:
            raise _unreadable(tuple(encoded.shape), latent_dim)
        loc, raw, rest = encoded.tensor_split([latent_dim, 2 * latent_dim], -1)
        return Encoding(loc, softplus(raw) + _LEAST_SCALE, rest if rest.shape[-1] else None)
    shapes = [tuple(part.shape) for part in encoded]
    if len(shapes) not in (2, 3) or {shape[-1] for shape in shapes[:2]} != {latent_dim}:
        raise _unreadable(shapes, latent_dim)
    return Encoding(*encoded)


def _unreadable(came: object, latent_dim: int) -> ValueError:
    return ValueError(
        f"encoder: expected (loc, scale), each of shape (B, {latent_dim}), or one tensor of shape "
        f"(B, {2 * latent_dim}), to match latent_dim={latent_dim}; got {came}"
    )


class NormalPrior(nn.Module):
    r""":math:`z \sim \mathcal{N}(0, I)`."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def distribution(self, like: Tensor) -> Any:  # noqa: ANN401
        """The prior in the type and on the device of a tensor."""
        return dist.Normal(like.new_zeros(self.latent_dim), 1.0).to_event(1)


class _LatentMixture(NormalMixture):
    """A mixture of something that is not missing."""

    support = constraints.independent(constraints.real, 1)  # type: ignore[assignment]


class MixturePrior(nn.Module):
    r""":math:`z \sim \sum_k \pi_k \, \mathcal{N}(\mu_k, \mathrm{diag}\,\sigma_k^2)`, learned.

    Arguments:
        latent_dim: L.
        num_components: K.
    """

    def __init__(self, latent_dim: int, num_components: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim))
        self.raw_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    def distribution(self, like: Tensor) -> NormalMixture:
        """The prior; its type and device are those of its parameters."""
        return _LatentMixture(self.logits.softmax(-1), self.locs, self.raw_scales.exp())


class FlowPosterior(TorchDistribution):
    r"""An encoding bent by a flow, :math:`z = f(\mu(x) + \sigma(x) \epsilon; c(x))`.

    The density of a draw that was just taken is known on the way; that of another value takes the
    flow's way back, which is slow for an autoregressive one.

    Arguments:
        encoding: loc, scale (..., L) and context (..., C).
        flow: a conditional flow with ``push`` and ``pull``.
        validate_args: as in ``torch.distributions``.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(
        self, encoding: Encoding, flow: PushesNoise, validate_args: bool | None = None
    ) -> None:
        self.encoding, self.flow = encoding, flow
        self._last: tuple[Tensor, Tensor] | None = None
        shape = encoding.loc.shape
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: Any = None,  # noqa: ANN401
    ) -> FlowPosterior:
        """The same posterior with a larger batch shape."""
        new = self._get_checked_instance(FlowPosterior, _instance)
        loc, scale, context = self.encoding
        context = None if context is None else context.expand(*batch_shape, -1)
        new.encoding = Encoding(
            loc.expand(*batch_shape, -1), scale.expand(*batch_shape, -1), context
        )
        new.flow, new._last = self.flow, None
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws (*sample_shape, *batch, L) with a gradient."""
        loc, scale, context = self.encoding
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        context = None if context is None else context.expand(*shape[:-1], -1)
        value, log_det = self.flow.push(loc + scale * noise, context)
        log_q = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - scale.log().sum(-1) - log_det
        self._last = value, log_q
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, shape of the batch."""
        if self._last is not None and self._last[0] is value:
            return self._last[1]
        loc, scale, context = self.encoding
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        context = None if context is None else context.expand(*shape, -1)
        noise, log_det = self.flow.pull(value.expand(*shape, -1), context)
        return dist.Normal(loc, scale).to_event(1).log_prob(noise) + log_det


def warn_of_columns(table: Table, likelihood: Likelihood) -> None:
    """Warn of columns that tell nothing, or where one value lies far from all others.

    Arguments:
        table: the rows; NaN cells are left out.
        likelihood: of a cell.
    """
    parts: list[tuple[Any, Sequence[int]]] = [(likelihood, range(table.x.shape[1]))]
    if isinstance(likelihood, Columns):
        parts = [*zip(likelihood.parts, likelihood.places, strict=True)]
    for part, columns in parts:
        some = Table(table.x[:, list(columns)], tuple(table.names[d] for d in columns))
        real = isinstance(part, Gaussian) and part.has_column_units
        if real or len(parts) == 1 and _all_equal(some.x):
            warn_constant(some)
        if real or isinstance(part, Poisson):
            warn_far(some, mean_and_sd(some.x)[1])


def _all_equal(x: Tensor) -> bool:
    """Whether no column varies: beside others a constant one that sets no unit does no harm."""
    least, most = x.nan_to_num(nan=torch.inf).amin(0), x.nan_to_num(nan=-torch.inf).amax(0)
    return torch.equal(least, most)


def flow_for(latent_dim: int, num_context: int) -> nn.Module:
    """An inverse autoregressive flow behind an encoding.

    Arguments:
        latent_dim: L.
        num_context: numbers that the encoder gives beyond loc and scale.
    """
    from latentlab import flows

    return flows.make("iaf", latent_dim, num_context=num_context, orientation="sample")
