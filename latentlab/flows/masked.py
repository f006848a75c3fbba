r"""Autoregressive and coupling flows, over the masked networks and splines of zuko.

.. math::
    y_d = h(x_d;\, \theta_d(x_{<d}, c)), \qquad
    \log \left| \det \frac{\partial y}{\partial x} \right|
        = \sum_d \log \left| \frac{\partial h}{\partial x_d} \right|

h is affine or a monotone rational-quadratic spline, :math:`\theta_d` a masked network. Several of
these maps follow each other, in changing orders of the features, and an affine map
:math:`b + L y` comes last on the side of the values: splines are the identity outside of
:math:`[-5, 5]`, so that location and scale have to be somebody else's work.

In the direction of the formula one pass gives all features; the other one takes a pass for each
feature (for coupling maps: two in all). *Orientation* says which of them is the cheap one:
``"sample"`` for a guide, which draws; ``"density"`` for data, which are scored. Both directions
work either way. A new flow is the identity.

Letters: D features, C numbers of context.

References:
    | Improved variational inference with inverse autoregressive flow (Kingma et al., 2016)
    | Masked autoregressive flow for density estimation (Papamakarios et al., 2017)
    | Density estimation using Real NVP (Dinh et al., 2017)
    | Neural spline flows (Durkan et al., 2019)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import _InverseTransform

from latentlab.flows.memory import LastPush

__all__ = ["MaskedFlow"]

Affine = Literal["diagonal", "triangular", "none"]
Orientation = Literal["sample", "density"]

_IMPORT = threading.Lock()


class MaskedFlow(nn.Module):
    """A chain of masked maps with an affine one on the side of the values.

    Arguments:
        num_features: D.
        num_context: numbers of context C, 0 for none.
        orientation: the cheap direction, ``"sample"`` (push) or ``"density"`` (pull).
        hidden_dims: widths of the hidden layers of each network.
        num_transforms: masked maps in the chain.
        num_bins: of the splines; 0 for affine maps.
        coupling: half of the features given the other half, instead of one by one.
        affine: ``"diagonal"``, ``"triangular"`` or ``"none"``.

    Raises:
        ValueError: for a layer that is narrower than D, unless ``coupling``.

    Example:
        >>> flow = MaskedFlow(3, num_bins=8)
        >>> noise = torch.randn(5, 3)
        >>> value, log_det = flow.push(noise)
        >>> torch.allclose(flow.pull(value)[0], noise)
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_context: int = 0,
        orientation: Orientation = "sample",
        hidden_dims: Sequence[int] = (64, 64),
        num_transforms: int = 3,
        num_bins: int = 0,
        coupling: bool = False,
        affine: Affine = "diagonal",
    ) -> None:
        super().__init__()
        if not coupling and min(hidden_dims, default=num_features) < num_features:
            # The units of a masked layer take turns in seeing the first features, the first two...
            raise ValueError(
                f"hidden_dims: expected widths of at least num_features={num_features}, got "
                f"{list(hidden_dims)}; a narrower masked network cuts dependences between features"
            )
        self.num_features, self.num_context = num_features, num_context
        self.orientation: Orientation = orientation
        self.transforms = nn.ModuleList(
            _masked(num_features, num_context, order, coupling, num_bins, hidden_dims)
            for order in _orders(num_features, num_transforms, coupling)
        )
        if affine != "none":
            self.loc = nn.Parameter(torch.zeros(num_features))
            self.log_scale = nn.Parameter(torch.zeros(num_features))
        if affine == "triangular":
            self.lower = nn.Parameter(torch.zeros(num_features, num_features))
        self.affine: Affine = affine
        self.to_identity()
        self._last, self.remembers = LastPush(), True

    def push(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values of noise.

        Arguments:
            noise: shape (..., D).
            context: shape (..., C), where the flow has one.

        Returns:
            Values (..., D), and ``log |det d value / d noise|``, shape (...,).
        """
        self._expect(noise, context, "noise")
        along = self._pass if self.orientation == "sample" else self._undo
        inner, log_det = along(_wide(noise, context), context)
        value, stretch = self._to_value(inner)
        log_det = log_det + stretch
        if self.remembers:
            self._last.keep(self, noise, value, log_det, context)
        return value, log_det

    def pull(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise of values: the inverse of :meth:`push`.

        Of the value that was pushed last, the noise is remembered.

        Arguments:
            value: shape (..., D).
            context: shape (..., C), where the flow has one.

        Returns:
            Noise (..., D), and ``log |det d noise / d value|``, shape (...,).
        """
        self._expect(value, context, "value")
        remembered = self._last.recall(self, value, context)
        if remembered is not None:
            return remembered[0], -remembered[1]
        inner, stretch = self._to_inner(_wide(value, context))
        along = self._undo if self.orientation == "sample" else self._pass
        noise, log_det = along(inner, context)
        return noise, log_det - stretch

    def to_identity(self) -> None:
        """Make the map the identity, in place; hidden layers stay as they are."""
        with torch.no_grad():
            for transform in self.transforms:
                for output in _outputs(transform):
                    output.zero_()
            for parameter in self.parameters(recurse=False):
                parameter.zero_()

    def _pass(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Through all maps in the direction of a single pass each."""
        total: Tensor | None = None
        for transform in self.transforms:
            x, log_det = transform(context).call_and_ladj(x)
            total = log_det if total is None else total + log_det
        return x, x.new_zeros(x.shape[:-1]) if total is None else total.expand(x.shape[:-1])

    def _undo(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Back through all maps."""
        total = y.new_zeros(y.shape[:-1])
        for lazy in reversed(self.transforms):
            transform = lazy(context)
            y = transform.inv(y)
            total = total - transform.call_and_ladj(y)[1]
        return y, total

    def _to_value(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        if self.affine == "none":
            return inner, inner.new_zeros(())
        y = inner @ self._tril().T if self.affine == "triangular" else inner * self.log_scale.exp()
        return self.loc + y, self.log_scale.sum()

    def _to_inner(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.affine == "none":
            return value, value.new_zeros(())
        y = value - self.loc
        if self.affine == "diagonal":
            return y * (-self.log_scale).exp(), self.log_scale.sum()
        solved = torch.linalg.solve_triangular(self._tril(), y.unsqueeze(-1), upper=False)
        return solved.squeeze(-1), self.log_scale.sum()

    def _tril(self) -> Tensor:
        return self.lower.tril(-1) + self.log_scale.exp().diag()

    def _expect(self, x: Tensor, context: Tensor | None, name: str) -> None:
        if not x.dim() or x.shape[-1] != self.num_features:
            raise ValueError(
                f"{name}: expected shape (..., {self.num_features}) to match "
                f"num_features={self.num_features}, got {tuple(x.shape)}"
            )
        if (context is None) != (self.num_context == 0):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(
                f"context: expected {'one' if self.num_context else 'none'} for a flow with "
                f"num_context={self.num_context}, got {got}"
            )
        if context is not None and context.shape[-1:] != (self.num_context,):
            raise ValueError(
                f"context: expected shape (..., {self.num_context}), got {tuple(context.shape)}"
            )


def _wide(x: Tensor, context: Tensor | None) -> Tensor:
    """With a row for each context."""
    if context is None:
        return x
    batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    return x.expand(*batch, x.shape[-1])


def _orders(num_features: int, num_transforms: int, coupling: bool) -> list[Tensor]:
    """Orders of the features, one a map: each of them turns the one before around.

    A coupling map divides the features in two halves: the first against the last, then the odd
    ones against the even ones, and so on, so that all of them meet.
    """
    natural = torch.arange(num_features)
    orders = []
    for i in range(num_transforms):
        order = natural
        if coupling and i // 2 % 2:
            order = torch.cat([natural[::2], natural[1::2]]).argsort()
        orders.append(num_features - 1 - order if i % 2 else order)
    return orders


def _masked(
    num_features: int,
    num_context: int,
    order: Tensor,
    coupling: bool,
    num_bins: int,
    hidden_dims: Sequence[int],
) -> nn.Module:
    """A masked map of zuko."""
    zuko = _zuko()
    univariate: dict[str, Any] = {}
    if num_bins:
        univariate["univariate"] = partial(zuko.transforms.MonotonicRQSTransform, bound=5.0)
        univariate["shapes"] = [(num_bins,), (num_bins,), (num_bins - 1,)]
    # One feature alone is taken for an elementwise map, whose network is there for a context only.
    # ELU is smooth: with kinks a flow fits as well in the middle, and tails come out wrong. Its
    # slope, in place, comes from what it gave, without another exponential.
    net = {"hidden_features": tuple(hidden_dims), "activation": partial(nn.ELU, inplace=True)}
    net = net if num_features > 1 or num_context else {}
    made = zuko.flows.autoregressive.MaskedAutoregressiveTransform(
        features=num_features,
        context=num_context,
        passes=2 if coupling else None,
        order=order,
        **univariate,
        **net,
    )
    for layer in made.modules():
        if isinstance(layer, zuko.nn.MaskedLinear):
            # A mask of booleans would be turned into numbers again at every step, twice.
            layer.mask = layer.mask.to(layer.weight)
    return made


def _outputs(transform: nn.Module) -> list[Tensor]:
    """The parameters that give the identity where they are zero."""
    children = dict(transform.named_children())
    if "hyper" in children:
        return [*list(children["hyper"].children())[-1].parameters()]
    return [*children["phi"].parameters()]  # one feature without a context has no network


def _zuko() -> ModuleType:
    """zuko, imported so that the rest of the process does not notice.

    Importing it turns off the validation of arguments for all distributions of the process, and
    renames a class of torch. Both are put back, and zuko's own distributions keep what it wants.
    """
    with _IMPORT:  # a second thread would find, and leave, what the first has not put back yet
        found = {name: vars(Distribution)[name] for name in ("_validate_args", "arg_constraints")}
        name = _InverseTransform.__name__
        try:
            import zuko
        finally:
            for attribute, value in found.items():
                setattr(Distribution, attribute, value)
            _InverseTransform.__name__ = name
        for own in zuko.distributions.__all__:
            kind = getattr(zuko.distributions, own)
            if Distribution in kind.__bases__:
                kind._validate_args = False
                kind.arg_constraints = vars(kind).get("arg_constraints", {})
    return zuko
