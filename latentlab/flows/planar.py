r"""The planar flow: the smallest one there is, to learn from.

.. math::
    f(x) = x + \hat u \tanh(w^\top x + b), \qquad
    \log \left| \det \frac{\partial f}{\partial x} \right|
        = \log \left( 1 + w^\top \hat u \, (1 - \tanh^2(w^\top x + b)) \right)

It bends space along one direction. :math:`\hat u` is u with its part along w changed so that
:math:`w^\top \hat u > -1`, where f is invertible. The inverse has no formula, but needs one number
only: :math:`a = w^\top x + b` solves

.. math:: a + w^\top \hat u \tanh a = w^\top y + b,

whose left side rises with a, so that halving an interval finds it.

Letters: D features.

Reference:
    | Variational inference with normalizing flows (Rezende and Mohamed, 2015)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentlab.flows.memory import LastPush

__all__ = ["Planar"]

_LOG_E_MINUS_1 = math.log(math.e - 1)
_HALVINGS = 60  # to the last digit of a double


class Planar(nn.Module):
    r"""A chain of planar maps, the identity to begin with.

    A value is pulled back by halving an interval 60 times and one step of Newton's, which leaves
    an error of :math:`10^{-12}` in double precision, :math:`10^{-5}` in single precision, relative
    to the size of the value; towards :math:`w^\top \hat u = -1`, where the map is about to fold,
    it grows.

    Arguments:
        num_features: D.
        num_transforms: maps in the chain.

    Example:
        >>> flow = Planar(2, num_transforms=4)
        >>> noise = torch.randn(5, 2)
        >>> value, log_det = flow.push(noise)
        >>> torch.allclose(flow.pull(value)[0], noise)
        True
    """

    num_context = 0

    def __init__(self, num_features: int, num_transforms: int = 3) -> None:
        super().__init__()
        self.num_features = num_features
        directions = torch.randn(num_transforms, num_features) / num_features**0.5
        self.weight = nn.Parameter(directions)
        self.shift = nn.Parameter(torch.zeros(num_transforms, num_features))
        self.bias = nn.Parameter(torch.zeros(num_transforms))
        self._last, self.remembers = LastPush(), True

    def push(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values of noise.

        Arguments:
            noise: shape (..., D).
            context: none.

        Returns:
            Values (..., D), and ``log |det d value / d noise|``, shape (...,).
        """
        self._expect(noise, context, "noise")
        x, log_det = noise, noise.new_zeros(noise.shape[:-1])
        for w, u, b in zip(self.weight, self._shifts(), self.bias, strict=True):
            bent = torch.tanh(x @ w + b)
            log_det = log_det + torch.log1p((w @ u) * (1 - bent * bent))
            x = x + bent.unsqueeze(-1) * u
        if self.remembers:
            self._last.keep(self, noise, x, log_det, context)
        return x, log_det

    def pull(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise of values: the inverse of :meth:`push`, found numerically.

        Arguments:
            value: shape (..., D).
            context: none.

        Returns:
            Noise (..., D), and ``log |det d noise / d value|``, shape (...,).
        """
        self._expect(value, context, "value")
        remembered = self._last.recall(self, value, context)
        if remembered is not None:
            return remembered[0], -remembered[1]
        y, log_det = value, value.new_zeros(value.shape[:-1])
        maps = list(zip(self.weight, self._shifts(), self.bias, strict=True))
        for w, u, b in reversed(maps):
            bent = torch.tanh(_root(y @ w + b, w @ u))
            log_det = log_det - torch.log1p((w @ u) * (1 - bent * bent))
            y = y - bent.unsqueeze(-1) * u
        return y, log_det

    def to_identity(self) -> None:
        """Make the map the identity, in place; its directions stay as they are."""
        with torch.no_grad():
            self.shift.zero_()
            self.bias.zero_()

    def _shifts(self) -> Tensor:
        """All u-hat, shape (num_transforms, D)."""
        along = (self.weight * self.shift).sum(-1, keepdim=True)
        wanted = functional.softplus(along + _LOG_E_MINUS_1) - 1
        square = (self.weight * self.weight).sum(-1, keepdim=True)
        return self.shift + (wanted - along) * self.weight / square

    def _expect(self, x: Tensor, context: Tensor | None, name: str) -> None:
        if not x.dim() or x.shape[-1] != self.num_features:
            raise ValueError(
                f"{name}: expected shape (..., {self.num_features}) to match "
                f"num_features={self.num_features}, got {tuple(x.shape)}"
            )
        if context is not None:
            raise ValueError("context: a planar flow takes none; use another kind of flow")


def _root(target: Tensor, strength: Tensor) -> Tensor:
    """The a with a + strength tanh(a) = target, elementwise, with its gradient."""
    with torch.no_grad():
        low, high = target - strength.abs(), target + strength.abs()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = middle + strength * torch.tanh(middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        found = (low + high) / 2
        slope = 1 + strength * (1 - torch.tanh(found) ** 2)
    # A step of Newton's from the root moves nothing, and has the gradient of the root.
    return found - (found + strength * torch.tanh(found) - target) / slope
