r"""Latent sites: where their values live, and how the real line is bent to get there.

A latent z with support :math:`\mathcal{S}` is written :math:`z = T(u)` with u free on the real
line and T a bijection onto :math:`\mathcal{S}`; its density is that of u over :math:`|dz/du|`.

Guides are Gaussian in u, or flows of a Gaussian, so T should make tails Gaussian. Torch maps an
interval by the logistic function; what is uniform then has the tails :math:`e^{-|u|}`, and the
importance weights of any Gaussian have no mean there, however close it is (k-hat nears 1). The
normal distribution function :math:`\Phi` maps a standard normal to what is uniform, and the tails
of a :math:`\mathrm{Beta}(a, b)` to :math:`e^{-a u^2 / 2}` and :math:`e^{-b u^2 / 2}`. Intervals,
and simplices stick by stick, are mapped by it.

Sites and supports have a form of plain values too, so that a guide is stored without a pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import CholeskyTransform
from torch import Size, Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
)
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix
from torch.nn.functional import pad

__all__ = ["Latent", "bijection", "is_identity", "support_from_spec", "support_spec"]

_LOG_2PI = math.log(2 * math.pi)

# Supports without parameters, by the name that torch and Pyro give them.
_PLAIN = (
    "real",
    "positive",
    "nonnegative",
    "unit_interval",
    "simplex",
    "real_vector",
    "lower_cholesky",
    "unit_lower_cholesky",
    "softplus_lower_cholesky",
    "corr_cholesky",
    "corr_matrix",
    "positive_definite",
    "ordered_vector",
    "positive_ordered_vector",
    "softplus_positive",
    "sphere",
    "boolean",
    "one_hot",
)
_BOUNDED = {
    "interval": ("lower_bound", "upper_bound"),
    "half_open_interval": ("lower_bound", "upper_bound"),
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "less_than": ("upper_bound",),
    "integer_interval": ("lower_bound", "upper_bound"),
    "multinomial": ("upper_bound",),
}
# Supports of whole numbers from one on, which torch has as one class.
_WHOLE = {0: "nonnegative_integer", 1: "positive_integer"}


@dataclass(frozen=True)
class Latent:
    """One latent site of a model.

    Arguments:
        name: of the site.
        batch_shape: shape of its plates and other independent copies.
        event_shape: shape of one value.
        support: where a value lives.
        plates: name, size and dimension of each plate it stands in.

    Example:
        >>> weights = Latent("weights", (), (3,), constraints.simplex)
        >>> weights.shape, weights.free_shape
        ((3,), (2,))
    """

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    support: constraints.Constraint
    plates: tuple[tuple[str, int, int], ...] = ()

    @property
    def transform(self) -> Transform:
        """The bijection from the real line to the support."""
        try:
            return bijection(self.support)
        except ValueError as error:
            raise ValueError(f"site {self.name!r}: {error}") from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the site, batch and event."""
        return self.batch_shape + self.event_shape

    @property
    def is_discrete(self) -> bool:
        """Whether its values are separate; one that does not say is taken as continuous."""
        try:
            return bool(self.support.is_discrete)
        except NotImplementedError:
            return False

    @property
    def free_shape(self) -> tuple[int, ...]:
        """Shape of the site on the real line, a discrete one left as it is.

        A simplex has one number less.
        """
        if self.is_discrete:
            return self.shape
        return tuple(self.transform.inverse_shape(Size(self.shape)))

    def spec(self) -> dict[str, Any]:
        """The site as JSON values."""
        return {
            "name": self.name,
            "batch_shape": list(self.batch_shape),
            "event_shape": list(self.event_shape),
            "support": support_spec(self.support),
            "plates": [list(plate) for plate in self.plates],
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Latent:
        """The site that :meth:`spec` described."""
        return cls(
            spec["name"],
            tuple(spec["batch_shape"]),
            tuple(spec["event_shape"]),
            support_from_spec(spec["support"]),
            tuple((name, size, dim) for name, size, dim in spec["plates"]),
        )


def bijection(support: constraints.Constraint) -> Transform:
    """The bijection from the real line to a support, with its log |dz/du|.

    Arguments:
        support: a constraint of torch or Pyro.

    Returns:
        A transform whose ``inverse_shape`` is the shape on the real line.

    Raises:
        ValueError: if no bijection to the support is known, as to a sphere.

    Example:
        >>> bijection(constraints.positive_definite)(torch.zeros(3))  # a 2 by 2 matrix has 3
        tensor([[1., 0.],
                [0., 1.]])
    """
    if isinstance(support, constraints.independent):
        base = bijection(support.base_constraint)
        return IndependentTransform(base, support.reinterpreted_batch_ndims)
    if isinstance(support, (constraints.interval, constraints.half_open_interval)):
        low, high = support.lower_bound, support.upper_bound
        if isinstance(low, int | float) and (low, high) == (0, 1):
            return _Normal()
        return ComposeTransform([_Normal(), AffineTransform(low, high - low)])
    if type(support) is type(constraints.simplex):
        return _Sticks()
    if type(support) is type(constraints.lower_cholesky):
        return _LowerCholesky()
    if type(support) is type(constraints.positive_definite):
        return ComposeTransform([_LowerCholesky(), CholeskyTransform().inv])
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"no bijection from the real line to the support {_name(support)} is known; write the "
            "latent as a function of others (pyro.deterministic), or bring a guide of your own"
        ) from None


def is_identity(transform: Transform) -> bool:
    """Whether a transform leaves its argument as it is."""
    if isinstance(transform, IndependentTransform):
        return is_identity(transform.base_transform)
    return isinstance(transform, ComposeTransform) and not transform.parts


def support_spec(support: constraints.Constraint) -> dict[str, Any]:
    """The support as JSON values.

    Arguments:
        support: a constraint of torch or Pyro.

    Returns:
        A dict with ``"name"`` and, where the support has them, bounds or a base.

    Raises:
        ValueError: if the support is none of the known ones.

    Example:
        >>> support_spec(constraints.interval(0.0, 2.0))
        {'name': 'interval', 'lower_bound': 0.0, 'upper_bound': 2.0}
    """
    if isinstance(support, constraints.independent):
        base = support_spec(support.base_constraint)
        return {"name": "independent", "base": base, "dims": support.reinterpreted_batch_ndims}
    for name, bounds in _BOUNDED.items():
        if type(support) is getattr(constraints, name):
            return {"name": name} | {bound: _plain(getattr(support, bound)) for bound in bounds}
    if type(support) is type(constraints.nonnegative_integer):
        return {"name": _WHOLE[int(support.lower_bound)]}
    for name in _PLAIN:  # by type, for deepcopy makes further instances
        if type(support) is type(getattr(constraints, name)):
            return {"name": name}
    raise ValueError(
        f"support {_name(support)}: cannot be stored; expected one of "
        f"{', '.join((*_PLAIN, *_BOUNDED, *_WHOLE.values()))}"
    )


def support_from_spec(spec: Mapping[str, Any]) -> constraints.Constraint:
    """The constraint that :func:`support_spec` described.

    Arguments:
        spec: what :func:`support_spec` returned.

    Returns:
        The constraint.

    Raises:
        ValueError: if the name is not one of the known ones.
    """
    name = spec.get("name")
    if name == "independent":
        return constraints.independent(support_from_spec(spec["base"]), spec["dims"])
    if name in (*_PLAIN, *_WHOLE.values()):
        return getattr(constraints, name)
    if name in _BOUNDED:
        return getattr(constraints, name)(*(_bound(spec[bound]) for bound in _BOUNDED[name]))
    raise ValueError(f"support {name!r}: not known to this version of latentlab")


class _Normal(Transform):
    r"""The normal distribution function: :math:`z = \Phi(u)`."""

    domain = constraints.real
    codomain = constraints.unit_interval
    bijective = True
    sign = +1

    def _call(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        return torch.special.ndtr(x).clamp(limits.tiny, 1 - limits.eps)

    def _inverse(self, y: Tensor) -> Tensor:
        limits = torch.finfo(y.dtype)
        return torch.special.ndtri(y.clamp(limits.tiny, 1 - limits.eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * (x**2 + _LOG_2PI)


class _Sticks(Transform):
    r"""Shares of a stick that is broken K - 1 times.

    Each break leaves to share i the part :math:`v_i = \Phi(u_i + o_i)` of what is left, and
    :math:`o_i = \Phi^{-1}(1 / (K - i + 1))`, so that u = 0 stands for equal shares.
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        at = x + _equal_breaks(x)
        taken, left = torch.special.log_ndtr(at), torch.special.log_ndtr(-at).cumsum(-1)
        log_shares = pad(taken, (0, 1)) + pad(left, (1, 0))
        return log_shares.clamp_min(math.log(torch.finfo(x.dtype).tiny)).exp()

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp_min(torch.finfo(y.dtype).tiny)
        left = y.flip(-1).cumsum(-1).flip(-1)
        part, rest = y[..., :-1] / left[..., :-1], left[..., 1:] / left[..., :-1]
        # The smaller one of the two has all its digits.
        at = torch.special.ndtri(torch.minimum(part, rest)) * torch.where(part < rest, 1, -1)
        return at - _equal_breaks(at)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        at = x + _equal_breaks(x)
        left = torch.special.log_ndtr(-at).cumsum(-1)[..., :-1].sum(-1)
        return left - 0.5 * (at**2 + _LOG_2PI).sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        return Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Size) -> Size:
        return Size((*shape[:-1], shape[-1] - 1))


def _equal_breaks(x: Tensor) -> Tensor:
    num_left = torch.arange(x.shape[-1] + 1, 1, -1, dtype=x.dtype, device=x.device)
    return torch.special.ndtri(1 / num_left)


class _LowerCholesky(Transform):
    """The n (n + 1) / 2 numbers of a lower triangle, row by row; the diagonal by exp."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        tril = vec_to_tril_matrix(x)
        return tril.tril(-1) + tril.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        log_diagonal = y.diagonal(dim1=-2, dim2=-1).log()
        return tril_matrix_to_vec(y.tril(-1) + log_diagonal.diag_embed())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        n = int(((1 + 8 * shape[-1]) ** 0.5 - 1) / 2 + 0.5)
        return Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Size) -> Size:
        return Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def _plain(bound: float | Tensor) -> float | dict[str, Any]:
    if not isinstance(bound, Tensor):
        return float(bound)
    if not bound.dim():
        return float(bound.detach())
    return {"values": bound.tolist(), "dtype": str(bound.dtype).removeprefix("torch.")}


def _bound(plain: float | Mapping[str, Any]) -> float | Tensor:
    if not isinstance(plain, Mapping):
        return plain
    return torch.tensor(plain["values"], dtype=getattr(torch, plain["dtype"]))


def _name(support: constraints.Constraint) -> str:
    return str(support).removesuffix("()")
