"""From outside to a table: pandas and polars frames, arrays, tensors and lists of rows.

Shapes: N rows, D columns.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentlab.data.table import (
    PRECISE,
    Columns,
    Table,
    check_unique,
    choose,
    default_names,
    listed,
    not_rows,
    shown,
)

__all__ = ["as_table", "column_names", "from_array", "from_frame"]


def as_table(source: object, columns: Columns | None = None, *, argument: str = "x") -> Table:
    """A table, whatever the rows came in.

    Arguments:
        source: a ``Table``, a pandas or polars frame, a tensor, an array or a list of rows.
        columns: those to take, in this order; all by default.
        argument: what messages call ``source``.

    Returns:
        The table, as :func:`from_frame` and :func:`from_array` make it.

    Raises:
        TypeError: if the source holds no real numbers.
        ValueError: if it is not 2-D, lacks a column, or a column is not numeric.

    Example:
        >>> as_table([[1, 2, 3], [4, 5, 6]], columns=[2, 0])
        Table(2 rows, 2 columns: 'x2', 'x0'; 0 missing cells)
    """
    if _is_frame(source):
        return from_frame(source, columns, argument=argument)
    table = source if isinstance(source, Table) else from_array(source, argument=argument)
    return table if columns is None else table.select(columns)


def from_array(values: object, names: Sequence[str] = (), *, argument: str = "x") -> Table:
    """A table of an array, a tensor or a list of rows.

    Arguments:
        values: shape (N, D). A float32 tensor stays so, all else becomes float64; a tensor keeps
            its device and, where it can, its memory, an array is copied. Masked cells are missing.
        names: one name a column; by default ``x0``, ``x1``, ...
        argument: what messages call ``values``.

    Returns:
        The table, after one warning where the numbers came in half precision.

    Raises:
        TypeError: for text, dates, complex or sparse values.
        ValueError: if the values are not 2-D.

    Example:
        >>> from_array([[True, 2], [3, 4]]).x
        tensor([[1., 2.],
                [3., 4.]], dtype=torch.float64)
    """
    x = values if isinstance(values, Tensor) else _tensor_of(values, argument)
    if x.layout != torch.strided or x.is_nested:
        kind = "nested tensor" if x.is_nested else f"{x.layout} tensor"
        raise TypeError(f"{argument}: dense required, got a {kind}; use x.to_dense()")
    if x.is_complex():
        raise _not_real(argument, x.dtype)
    if x.dim() != 2:
        raise not_rows(argument, tuple(x.shape))
    if x.is_floating_point() and x.dtype not in PRECISE:
        warnings.warn(f"{argument}: {x.dtype} is coarse; converted to float64", stacklevel=2)
    return Table(x if x.dtype in PRECISE else x.double(), tuple(names))


def from_frame(
    frame: Any,  # noqa: ANN401
    columns: Columns | None = None,
    *,
    argument: str = "frame",
    place: Callable[[int], str] = "row {}".format,
) -> Table:
    """A table of a pandas or polars frame.

    Arguments:
        frame: the frame; NA, None, null and NaN are missing cells.
        columns: names of those to take, in this order. By default all, but for a first column
            called ``""``, ``"Unnamed: 0"`` or ``"rownames"``: R and pandas put the names of the
            rows there.
        argument: what messages call ``frame``.
        place: what messages call a row, given its position from 0.

    Returns:
        The table, float64.

    Raises:
        ValueError: if a column is absent, twice there or not numeric.

    Example:
        >>> import pandas as pd
        >>> from_frame(pd.DataFrame({"rownames": ["a", "b"], "mass": [2.0, None]}))
        Table(2 rows, 1 column: 'mass'; 1 missing cell)
    """
    names = column_names(frame) or ()
    if not names:
        raise not_rows(argument, (len(frame), 0))
    check_unique(names, argument)
    chosen = choose(names, columns, argument=argument)
    position = {name: i for i, name in enumerate(names)}
    series = {name: _series(frame, position[name]) for name in chosen}
    cells = {name: _floats(column) for name, column in series.items()}
    numeric = [name for name, values in cells.items() if values is not None]
    for name, values in cells.items():
        if values is None:
            row, value = _first_text(series[name])
            way = f"choose columns=[{listed(numeric)}] or " if numeric else ""
            raise ValueError(
                f"{argument}: column {name!r} is not numeric ({shown(value)} in {place(row)}, "
                f"{series[name].dtype}); {way}convert it; missing cells are empty or NA"
            )
    x = np.stack([values for values in cells.values() if values is not None], axis=1)
    return Table(torch.from_numpy(x), chosen)


def column_names(source: object) -> tuple[str, ...] | None:
    """The names of the columns of a frame or ``Table``; ``None`` where they have none."""
    if isinstance(source, Table):
        return source.names if source.names != default_names(len(source.names)) else None
    return tuple(map(str, source.columns)) if _is_frame(source) else None  # type: ignore[attr-defined]


def _is_frame(source: object) -> bool:
    """A pandas or polars frame; who has one has imported its package."""
    packages = (sys.modules.get(name) for name in ("pandas", "polars"))
    return any(isinstance(source, package.DataFrame) for package in packages if package)


def _tensor_of(values: object, argument: str) -> Tensor:
    """The numbers of an array or nested list, copied; half precision as it is."""
    from scipy import sparse

    if sparse.issparse(values):
        kind = type(values).__name__
        raise TypeError(f"{argument}: dense required, got a sparse {kind}; use x.toarray()")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument}: expected rows of equal length, got a ragged {type(values).__name__}; "
            "sequences of several lengths need a model of sequences"
        ) from error
    if array.ndim == 0 and array.dtype.kind not in "biuf":
        raise TypeError(
            f"{argument}: expected a Table, frame, array or tensor, got {shown(values)} "
            f"({type(values).__name__}); latentlab.data.load reads files"
        )
    if array.dtype.kind not in "biufO":
        raise _not_real(argument, array.dtype)
    if array.ndim != 2:
        raise not_rows(argument, array.shape)
    if array.dtype.kind == "O":
        import pandas as pd

        names = default_names(array.shape[1])
        return from_frame(pd.DataFrame(array, columns=names), argument=argument).x
    dtype = np.float16 if array.dtype == np.float16 else np.float64
    if isinstance(values, np.ma.MaskedArray):
        array = np.ma.filled(values.astype(dtype), np.nan)
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _series(frame: Any, position: int) -> Any:  # noqa: ANN401
    """A column as a pandas series."""
    import pandas as pd

    if isinstance(frame, pd.DataFrame):
        return frame.iloc[:, position]
    return pd.Series(frame.to_series(position).to_numpy())


def _floats(series: Any) -> np.ndarray | None:  # noqa: ANN401
    """The cells of a series as float64, NaN where missing; ``None`` if it is not numeric."""
    from pandas.api import types

    if types.is_numeric_dtype(series.dtype) and not types.is_complex_dtype(series.dtype):
        return series.to_numpy("float64", na_value=np.nan)
    present = series.notna().to_numpy()
    if series.dtype == object and all(map(_is_number, series[present])):
        values = np.full(len(series), np.nan)
        values[present] = [float(value) for value in series[present]]
        return values
    return None


def _is_number(value: object) -> bool:
    if not isinstance(value, Real | Decimal | np.bool_):
        return False
    try:
        float(value)
    except OverflowError:  # an int of more than 308 digits
        return False
    return True


def _first_text(series: Any) -> tuple[int, object]:  # noqa: ANN401
    """The first cell that does not read as a number, else the first that is none: row, value."""
    present = [(int(row), series.iloc[row]) for row in np.flatnonzero(series.notna())]
    odd = [cell for cell in present if not _is_number(cell[1])] or present
    for row, value in odd:
        try:
            float(str(value))
        except ValueError:
            return row, value
    return odd[0]


def _not_real(argument: str, dtype: object) -> TypeError:
    kind = {"U": "text, ", "S": "text, ", "M": "dates, "}.get(getattr(dtype, "kind", ""), "")
    way = "take x.real" if "complex" in str(dtype) else "convert them with x.astype(float)"
    return TypeError(f"{argument}: expected real numbers, got {kind}dtype {dtype}; {way}")
