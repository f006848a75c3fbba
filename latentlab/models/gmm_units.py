"""The units of a table: where its columns lie, how far they spread, and what spoils that.

Letters: N rows, D columns.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from latentlab.data.table import Table

__all__ = ["as_counts", "check_one_a_row", "mean_and_sd", "warn_far"]

_SAMPLE_ROWS = 20_000
_FAR = 100  # interquartile ranges in a standard deviation: the floor is a tenth of one


def as_counts(weights: Tensor, num_rows: int, argument: str = "weights", of: str = "x") -> Tensor:
    """Weights of rows that can be computed with.

    Arguments:
        weights: how often each row counts, shape (N,).
        num_rows: the number of rows N.
        argument: what messages call the weights.
        of: what messages call the rows.

    Returns:
        The weights, float64.

    Raises:
        TypeError: if they are no tensor of numbers.
        ValueError: for another shape, negative, infinite or NaN weights, or none above zero.

    Example:
        >>> as_counts(torch.tensor([1, 2]), 3)
        Traceback (most recent call last):
        ValueError: weights: expected shape (3,), one for each row of x, got (2,)
    """
    check_one_a_row(weights, num_rows, argument, of)
    counts = weights.detach().double()
    bad = ~(counts >= 0) | counts.isinf()
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ValueError(
            f"{argument}: expected finite numbers >= 0, got {float(counts[n]):g} for row {n}; "
            "leave a row out with weight 0"
        )
    if not counts.any():
        raise ValueError(f"{argument}: expected at least one above 0, but every weight is zero")
    return counts


def check_one_a_row(
    weights: Tensor, num_rows: int, argument: str = "weights", of: str = "x"
) -> None:
    """Refuse weights that are not one number a row.

    Arguments:
        weights: how often each row counts, shape (N,).
        num_rows: the number of rows N.
        argument: what messages call the weights.
        of: what messages call the rows.

    Raises:
        TypeError: if they are no tensor of real numbers.
        ValueError: for another shape.
    """
    if not isinstance(weights, Tensor) or weights.is_complex():
        hint = "; for the number of rows write size=..." if isinstance(weights, int) else ""
        kind = type(weights).__name__
        raise TypeError(f"{argument}: expected a tensor of real numbers, got {kind}{hint}")
    if tuple(weights.shape) != (num_rows,):
        raise ValueError(
            f"{argument}: expected shape ({num_rows},), one for each row of {of}, "
            f"got {tuple(weights.shape)}"
        )


def mean_and_sd(x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column (D,), whatever the units; NaN cells left out.

    Arguments:
        x: rows, shape (N, D).
        counts: how often each row counts, shape (N,); once by default.
    """
    mean = _mean(x, counts)
    away = x - mean
    unit = away.abs().nan_to_num(0.0).amax(0)
    unit = torch.where(unit > 0, unit, 1.0)
    return mean, unit * _mean((away / unit).square(), counts).sqrt()


def _mean(x: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return x.nanmean(0)
    share = counts.to(x)[:, None] * ~x.isnan()
    return (share / share.sum(0) * x.nan_to_num(0.0)).sum(0)


def warn_far(table: Table, spread: Tensor) -> None:
    """Warn of columns where one far value widens the floor under the scales of all others.

    Arguments:
        table: the rows; NaN cells are left out.
        spread: standard deviation of each column, shape (D,).
    """
    x = table.x[:: -(-len(table) // _SAMPLE_ROWS)].double().sort(0).values  # NaN last
    count = (~x.isnan()).sum(0)
    quarter, half, three = (x.gather(0, (count * q // 4)[None])[0] for q in (1, 2, 3))
    far = spread > _FAR * (three - quarter)
    for d in far.nonzero().flatten().tolist():
        away = (table.x[:, d] - half[d]).abs().nan_to_num(0.0)
        row, unit, name = int(away.argmax()), (three - quarter)[d], "interquartile ranges"
        if unit == 0:  # most of the column is one number: the others say what is far
            others = torch.cat([table.x[:row, d], table.x[row + 1 :, d]])[:, None].double()
            unit, name = mean_and_sd(others)[1][0], "standard deviations of the others"
            if not away[row] > 1e4 * unit > 0:
                continue
        warnings.warn(
            f"x: row {row} of column {table.names[d]!r} ({float(table.x[row, d]):g}) is "
            f"{float(away[row] / unit):.0e} {name} from the median: "
            "beside it the other rows look alike; look at it, leave it out or take logarithms",
            stacklevel=3,
        )
