"""Which values a site takes, and whether those of the model are those of the guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import constraints

from latentlab.supports import bijection

__all__ = ["all_inside", "goes_beyond", "is_discrete", "is_scored", "is_same", "name_of"]


def all_inside(fn: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether a draw of one distribution has values that another one may have."""
    try:
        value = fn.sample()
        value = value if value.is_floating_point() else value.long()
        return bool(other.support.check(value).all())
    except (NotImplementedError, RuntimeError, ValueError):
        return True


def goes_beyond(
    support: constraints.Constraint, other: constraints.Constraint, like: Tensor
) -> bool:
    """Whether points all over a support are not all in another one."""
    transform = bijection(support)
    free = 3 * torch.randn(100, *transform.inverse_shape(like.shape))
    return not bool(other.check(transform(free)).all())


def is_scored(site: Mapping[str, Any]) -> bool:
    """Whether draws of a site of the guide do not move with its parameters."""
    return not site["fn"].has_rsample and not isinstance(site["fn"], Delta)


def is_discrete(site: Mapping[str, Any]) -> bool:
    """Whether a site takes separate values; one that does not say is taken as continuous."""
    try:
        return bool(site["fn"].support.is_discrete)
    except NotImplementedError:
        return False


def is_same(a: object, b: object) -> bool:
    """Whether two supports, or what they are made of, are equal."""
    if isinstance(a, constraints.Constraint):
        return type(a) is type(b) and is_same(vars(a), vars(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, Tensor | float | int) and isinstance(b, Tensor | float | int):
        return torch.equal(*(torch.as_tensor(v, dtype=torch.float64) for v in (a, b)))
    return a == b


def name_of(support: constraints.Constraint) -> str:
    """A support as messages call it."""
    return str(support).removesuffix("()")
