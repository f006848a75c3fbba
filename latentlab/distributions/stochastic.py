"""Rows of probabilities, looked at before they are believed."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["expect_probabilities"]

_FAR = 1e-3  # from one, for a sum in single precision
_NEGATIVE = -1e-5


def expect_probabilities(x: Tensor, name: str) -> None:
    """Refuse rows (..., K) that are no probabilities, by the index of the first of them.

    As all validation of torch it is left out where that is turned off, as within a fit, and where
    values cannot be read, as while a graph is recorded.

    Arguments:
        x: the rows.
        name: of the argument.

    Raises:
        ValueError: for a negative number, one that is not finite, or a sum that is not one.

    Example:
        >>> import torch
        >>> expect_probabilities(torch.tensor([[0.5, 0.5], [0.9, 0.9]]), "transitions")
        Traceback (most recent call last):
        ...
        ValueError: transitions: expected rows that sum to 1, got 1.8 in row 1; divide it by that
    """
    if not Distribution._validate_args or get_proxy_mode() is not None:
        return
    total, least = x.detach().sum(-1), x.detach().amin(-1)
    wrong = ~((total - 1).abs() <= _FAR) | ~(least >= _NEGATIVE)
    try:
        if not bool(wrong.any()):
            return
    except RuntimeError:  # under vmap no value can be read
        return
    where = tuple(wrong.nonzero()[0].tolist())
    row = f"row {', '.join(map(str, where))}" if where else "its row"
    if not least[where] >= _NEGATIVE:
        worst = float(least[where])
        raise ValueError(f"{name}: expected probabilities >= 0, got {worst:.4g} in {row}")
    raise ValueError(
        f"{name}: expected rows that sum to 1, got {float(total[where]):.4g} in {row}; divide it "
        "by that"
    )
