r"""The distribution of pushed noise.

.. math::
    \log q(x) = \log \mathcal{N}(f^{-1}(x); 0, I)
        + \log \left| \det \frac{\partial f^{-1}}{\partial x} \right|

Letters: D features, C numbers of context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

__all__ = ["FlowDistribution", "Invertible", "kind_of", "standard_normal_log_prob"]

_LOG_2PI = math.log(2 * math.pi)


@runtime_checkable
class Invertible(Protocol):
    """What every flow can do; a map of your own that does so is one."""

    num_features: int

    def push(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Value (..., D) of noise (..., D), and the log-determinant (...,) of d value / d noise.

        Arguments:
            noise: shape (..., D).
            context: shape (..., C), for a conditional flow.
        """

    def pull(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise (..., D) of value (..., D), and the log-determinant (...,) of d noise / d value.

        Arguments:
            value: shape (..., D).
            context: shape (..., C), for a conditional flow.
        """


def standard_normal_log_prob(noise: Tensor) -> Tensor:
    """Log-density (...,) in nats of the standard normal at noise (..., D)."""
    return -0.5 * (noise * noise).sum(-1) - 0.5 * noise.shape[-1] * _LOG_2PI


def kind_of(flow: Invertible) -> Tensor:
    """A tensor with the dtype and device of a flow: a parameter of it, if it has one."""
    found = next(flow.parameters(), None) if isinstance(flow, nn.Module) else None
    return torch.empty(()) if found is None else found


class FlowDistribution(TorchDistribution):
    """Standard normal noise, pushed through a flow: a distribution for Pyro.

    Arguments:
        flow: the map.
        context: shape (..., C), for a conditional flow; its leading axes are the batch shape.
        like: a tensor whose dtype and device the noise takes; by default the context, else a
            parameter of the flow.

    Example:
        >>> from latentlab import flows
        >>> q = FlowDistribution(flows.make("iaf", num_features=2))
        >>> x = q.rsample((5,))
        >>> q.log_prob(x).shape
        torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, flow: Invertible, context: Tensor | None = None, like: Tensor | None = None
    ) -> None:
        self.flow, self.context = flow, context
        self._like = next((t for t in (like, context) if t is not None), kind_of(flow))
        batch_shape = Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, Size((flow.num_features,)), validate_args=False)

    def expand(
        self,
        batch_shape: Size | Sequence[int],
        _instance: FlowDistribution | None = None,  # the signature that torch asks for
    ) -> FlowDistribution:
        """The same distribution over a larger batch.

        Arguments:
            batch_shape: the new one.
            _instance: unused.
        """
        batch_shape = Size(batch_shape)
        context = self.context
        if context is not None:
            context = context.expand(*batch_shape, context.shape[-1])
        wider = FlowDistribution(self.flow, context, self._like)
        wider._batch_shape = batch_shape
        return wider

    def rsample(self, sample_shape: Size | Sequence[int] = ()) -> Tensor:
        """Draws (sample, batch, D), differentiable in the parameters and the context.

        Arguments:
            sample_shape: leading axes of the draws.
        """
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self._like.dtype, device=self._like.device)
        return self.flow.push(noise, self.context)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...,) in nats of values (..., D).

        Arguments:
            value: shape (..., D).
        """
        noise, log_det = self.flow.pull(value, self.context)
        return standard_normal_log_prob(noise) + log_det
