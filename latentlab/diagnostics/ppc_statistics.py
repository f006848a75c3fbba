"""Statistics of data sets, for predictive checks.

Letters: N rows, D features, R replicates, T statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentlab.diagnostics.arguments import to_tensor, unit_of

__all__ = ["Statistic", "default_statistics", "lag", "named", "values_of"]

Statistic = Callable[[Tensor], Tensor | float]


def default_statistics(
    y: Tensor, rep: Tensor, ordered: bool
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names, and values for the data (T,) and for each replicate (R, T)."""
    both = torch.cat([y[None], rep])  # (R + 1, N, D)
    unit = unit_of(both, dim=(0, 1))
    both = both / unit
    parts = {
        "mean": both.mean(1) * unit,
        "sd": both.std(1) * unit,
        "min": both.amin(1) * unit,
        "max": both.amax(1) * unit,
    }
    if ((y >= 0) & (y == y.round())).all():
        parts["zeros"] = (both == 0).double().mean(1)
    if ordered:
        parts["lag 1"] = lag(both)
    names = tuple(name for part in parts for name in named(part, y))
    values = torch.cat(list(parts.values()), 1)
    return names, values[0], values[1:]


def named(statistic: str, y: Tensor) -> tuple[str, ...]:
    """Names of a statistic of each feature of y (N, D)."""
    D = y.shape[1]
    return (statistic,) if D == 1 else tuple(f"{statistic} [{d}]" for d in range(D))


def lag(both: Tensor) -> Tensor:
    """Correlation of neighbouring rows, (R, N, D) -> (R, D)."""
    both = both / unit_of(both, dim=1)[:, None]
    centred = both - both.mean(1, keepdim=True)
    total = centred.square().sum(1)
    return (centred[:, 1:] * centred[:, :-1]).sum(1) / total.where(total > 0, 1.0)


def values_of(statistics: Mapping[str, Statistic], data: Tensor) -> Tensor:
    """Statistics of one data set (N, D), shape (T,).

    Arguments:
        statistics: name -> function of it, of shape (N,) where D is 1.
        data: the data set.

    Raises:
        TypeError: for what is no mapping to functions.
        ValueError: for a statistic that is not one number.
    """
    if not isinstance(statistics, Mapping):
        raise TypeError(
            "statistics: expected name -> function of one data set, got "
            f"{type(statistics).__name__}"
        )
    data = data[:, 0] if data.shape[1] == 1 else data
    return torch.tensor(
        [_value(name, f, data) for name, f in statistics.items()], dtype=torch.float64
    )


def _value(name: str, statistic: Statistic, data: Tensor) -> float:
    if not callable(statistic):
        raise TypeError(
            f"statistics[{name!r}]: expected a function of one data set, got {statistic!r}"
        )
    value = to_tensor(statistic(data), f"statistics[{name!r}]")
    if value.numel() != 1:
        raise ValueError(
            f"statistics[{name!r}]: expected one number of a data set of shape "
            f"{tuple(data.shape)}, got shape {tuple(value.shape)}; make one statistic of each"
        )
    return float(value)
