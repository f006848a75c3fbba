"""Checks of what users hand in: each fault is named, with its place and the way out.

Shapes: N rows, D columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import overload

import torch

from latentlab.data.convert import as_table, column_names
from latentlab.data.table import Table, choose, default_names, listed, shown

__all__ = [
    "as_count",
    "as_rows",
    "as_seed",
    "expect_spans",
    "match_columns",
    "warn_constant",
]

# Beyond these, squares and sums of squares overflow.
_LARGEST = {torch.float64: 1e150, torch.float32: 1e15}
_NARROWEST = {torch.float64: 1e-290, torch.float32: 1e-30}  # less has not all of its digits


def as_rows(
    x: object,
    *,
    argument: str = "x",
    min_rows: int = 2,
    allow_missing: bool = False,
    names: Sequence[str] | None = None,
) -> Table:
    """Rows that can be computed with, whatever they came in.

    Arguments:
        x: a ``Table``, a pandas or polars frame, a tensor, an array or a list of rows, shape
            (N, D). A float32 tensor stays so, all else becomes float64; the device is kept.
        argument: what messages call ``x``.
        min_rows: the least number of rows. From 2 on, there is something to learn, and a column
            without a single number is an error.
        allow_missing: whether NaN is a missing cell or an error.
        names: the columns that ``x`` must have, see :func:`match_columns`.

    Returns:
        The table: finite numbers, and NaN where a cell is missing and may be.

    Raises:
        TypeError: for text, complex or sparse values.
        ValueError: for other shapes than (N, D), too few rows, infinite or huge values, NaN.

    Example:
        >>> as_rows([[1, 2], [3, 4]])
        Table(2 rows, 2 columns: 'x0', 'x1'; 0 missing cells)
        >>> as_rows([[1.0, 2.0], [3.0, float("nan")]], allow_missing=True).missing.sum().item()
        1
    """
    if names is None:
        table = as_table(x, argument=argument)
    else:
        table = match_columns(x, names, argument=argument)
    N, D = table.x.shape
    if N < min_rows or D == 0:
        need = f"at least {max(min_rows, 1)} row{'s' * (min_rows > 1)} and 1 column"
        came = f"is empty (shape {(N, D)})" if 0 in (N, D) else f"has {N} row{'s' * (N != 1)}"
        raise ValueError(f"{argument} {came}: expected {need}, shape (N, D); add data")
    _check_values(table, argument, allow_missing=allow_missing, learning=min_rows > 1)
    if min_rows > 1:
        expect_spans(table, _NARROWEST[table.x.dtype], argument=argument)
    return table


def _check_values(table: Table, argument: str, *, allow_missing: bool, learning: bool) -> None:
    size = table.x.abs()
    limit = _LARGEST[table.x.dtype]
    if not table.x.numel() or size.max() <= limit:  # as a rule; false where there is a NaN
        return
    missing = table.missing
    empty = [name for name, lost in zip(table.names, missing.all(0), strict=True) if lost]
    if empty and learning:
        raise ValueError(
            f"{argument}: expected numbers, but column {listed(empty)} is all NaN; leave it out"
        )
    faults = [
        (torch.isinf(size), "inf", "replace it by a number, or by NaN where it is not known"),
        (size > limit, f"beyond {limit:.0e} ({table.x.dtype})", "choose a larger unit"),
    ]
    if not allow_missing:
        way = (
            "drop those rows with latentlab.data.load(x).complete_rows(), "
            "or take a model that integrates missing cells out"
        )
        faults.insert(1, (missing, "NaN", way))
    for found, what, way in faults:
        if found.any():
            n, d = found.nonzero()[0].tolist()
            name = table.names[d]
            column = "" if name == f"x{d}" else f" in column {name!r}"
            raise ValueError(
                f"{argument} has {int(found.sum())} {what} (first at [{n}, {d}]){column}; {way}"
            )


def expect_spans(table: Table, narrowest: float, *, argument: str = "x") -> None:
    """Refuse columns that vary, but by too little to be computed with.

    Arguments:
        table: the rows; NaN cells are left out.
        narrowest: the least span of a column.
        argument: what the message calls the table.

    Raises:
        ValueError: names the column.

    Example:
        >>> expect_spans(Table(torch.tensor([[0.0], [1e-40]])), 1e-30)
        Traceback (most recent call last):
        ValueError: x: column 'x0' spans 1e-40, too little for float32; choose a smaller unit
    """
    low = table.x.nan_to_num(nan=torch.inf).amin(0)
    span = table.x.nan_to_num(nan=-torch.inf).amax(0) - low
    for name, width in zip(table.names, span.tolist(), strict=True):
        if 0 < width < narrowest:
            kind = str(table.x.dtype).removeprefix("torch.")
            raise ValueError(
                f"{argument}: column {name!r} spans {width:.0e}, too little for {kind}; "
                "choose a smaller unit"
            )


def match_columns(table: object, names: Sequence[str], *, argument: str = "x") -> Table:
    """New rows with the columns of those that a model was fitted to, in their order.

    Arguments:
        table: a ``Table``, frame, tensor or array. Columns with names may be permuted; those
            without are taken as they stand. A first column of row names is no extra column.
        names: the names to match; ``x0``, ``x1``, ... count as none, and match by number.
        argument: what messages call ``table``.

    Returns:
        The table with exactly these columns; its cells may be missing.

    Raises:
        TypeError: for text, complex or sparse values.
        ValueError: for missing or extra columns, which the message lists.

    Example:
        >>> new = Table(torch.tensor([[79.0, 3.6]]), ("waiting", "eruptions"))
        >>> match_columns(new, ("eruptions", "waiting"))
        Table(1 row, 2 columns: 'eruptions', 'waiting'; 0 missing cells)
    """
    names = tuple(names)
    have = column_names(table)
    if have is None or names == default_names(len(names)):
        unnamed = as_table(table, argument=argument)
        if unnamed.x.shape[1] != len(names):
            raise ValueError(
                f"{argument}: expected {len(names)} columns ({listed(names)}), "
                f"got {unnamed.x.shape[1]}; give those the model was fitted to, in their order"
            )
        return Table(unnamed.x, names)
    missing = [name for name in names if name not in have]
    extra = [name for name in choose(have, argument=argument) if name not in names]
    if missing or extra:
        faults = [("missing", missing), ("extra", extra)]
        found = " and ".join(f"{what} {listed(which)}" for what, which in faults if which)
        raise ValueError(
            f"{argument}: expected the columns {listed(names)}, got {found}; "
            f"choose them with latentlab.data.load({argument}, columns=[...])"
        )
    return as_table(table, names, argument=argument)


def warn_constant(table: Table, *, argument: str = "x") -> None:
    """Warn, once, of columns with one value only: they tell components or states nothing.

    Arguments:
        table: the rows, at least 2 of them, or nothing is said.
        argument: what the warning calls the table.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_constant(Table(torch.tensor([[1.0, 2.0], [1.0, 3.0]])))
        >>> print(caught[0].message)
        x: constant column 'x0' does not tell rows apart; leave it out
    """
    if len(table) < 2:
        return
    low = table.x.nan_to_num(nan=torch.inf).amin(0)
    high = table.x.nan_to_num(nan=-torch.inf).amax(0)
    constant = [
        name for name, same in zip(table.names, (low == high).tolist(), strict=True) if same
    ]
    if len(constant) == len(table.names):
        text = f"all {len(table)} rows are equal, every column is constant ({listed(constant)})"
    else:
        text = f"constant column {listed(constant)} does not tell rows apart; leave it out"
    if constant:
        warnings.warn(f"{argument}: {text}", UserWarning, stacklevel=3)


def as_count(value: object, name: str, minimum: int = 1) -> int:
    """A whole number that is large enough.

    Arguments:
        value: an int, Python's or NumPy's; a bool is none.
        name: what messages call it.
        minimum: the smallest one allowed.

    Returns:
        The number as a plain int.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> as_count(3, "num_components")
        3
        >>> as_count(2.5, "num_components")
        Traceback (most recent call last):
        ValueError: num_components must be an int >= 1, got 2.5 (float)
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum:
        return int(value)
    raise ValueError(
        f"{name} must be an int >= {minimum}, got {shown(value)} ({type(value).__name__})"
    )


@overload
def as_seed(value: None, name: str = "seed") -> None: ...
@overload
def as_seed(value: int, name: str = "seed") -> int: ...
def as_seed(value: object, name: str = "seed") -> int | None:
    """A seed that every generator takes.

    Arguments:
        value: an int from 0 to 2**63 - 1, or ``None``.
        name: what messages call it.

    Returns:
        The seed as a plain int; ``None`` stays ``None``.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> as_seed(7), as_seed(None)
        (7, None)
    """
    if value is None:
        return None
    seed = as_count(value, name, minimum=0)
    if seed >= 2**63:
        raise ValueError(f"{name} must be an int >= 0 and < 2**63, got {shown(seed)} (int)")
    return seed
