"""Supports of latents as plain values, so that a guide can be stored without a pickle."""

from __future__ import annotations

from typing import Any

from pyro.distributions import constraints
from torch import Tensor

__all__ = ["support_from_spec", "support_spec"]

# Supports without parameters, by the name that torch and Pyro give them.
_PLAIN = (
    "real",
    "positive",
    "nonnegative",
    "unit_interval",
    "simplex",
    "real_vector",
    "lower_cholesky",
    "corr_cholesky",
    "positive_definite",
    "ordered_vector",
    "positive_ordered_vector",
    "sphere",
)
_BOUNDED = {
    "interval": ("lower_bound", "upper_bound"),
    "half_open_interval": ("lower_bound", "upper_bound"),
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "less_than": ("upper_bound",),
}


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
        dims = support.reinterpreted_batch_ndims
        return {"name": "independent", "base": base, "dims": dims}
    for name in _PLAIN:
        if support is getattr(constraints, name):
            return {"name": name}
    for name, bounds in _BOUNDED.items():
        if type(support) is getattr(constraints, name):
            return {"name": name} | {bound: _plain(getattr(support, bound)) for bound in bounds}
    for name in _PLAIN:  # singletons that were rebuilt, as deepcopy does
        if type(support) is type(getattr(constraints, name)):
            return {"name": name}
    raise ValueError(
        f"support {support}: cannot be stored; load with model= and guide= and data= instead"
    )


def support_from_spec(spec: dict[str, Any]) -> constraints.Constraint:
    """The constraint that :func:`support_spec` described.

    Arguments:
        spec: what :func:`support_spec` returned.

    Returns:
        The constraint.

    Raises:
        ValueError: if the name is not one of the known ones.
    """
    import torch

    name = spec.get("name")
    if name == "independent":
        return constraints.independent(support_from_spec(spec["base"]), spec["dims"])
    if name in _PLAIN:
        return getattr(constraints, name)
    if name in _BOUNDED:
        bounds = [spec[bound] for bound in _BOUNDED[name]]
        bounds = [torch.tensor(b) if isinstance(b, list) else b for b in bounds]
        return getattr(constraints, name)(*bounds)
    raise ValueError(f"support {name!r}: not known to this version")


def _plain(bound: float | Tensor) -> float | list:
    return bound.tolist() if isinstance(bound, Tensor) else float(bound)
