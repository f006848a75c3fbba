r"""Sequences of several lengths, side by side in one padded tensor.

.. math:: x_b = (x_{b1}, \dots, x_{b T_b}), \qquad x_{bt} \in \mathbb{R}^D

Steps beyond the end of a sequence hold NaN, as does a cell that is missing; ``lengths`` tells
the two apart.

Letters: B sequences, T steps of the longest, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentlab.data.checks import as_rows, match_columns
from latentlab.data.convert import column_names, from_frame
from latentlab.data.table import Table, default_names, listed, shown

__all__ = ["Sequences", "as_lengths", "as_sequences"]


@dataclass(frozen=True, eq=False, repr=False)
class Sequences:
    """B sequences of rows, padded to the longest of them.

    Arguments:
        x: shape (B, T, D), in the units they came in, NaN where a cell is missing or padding.
        lengths: number of steps of each sequence, shape (B,), int64.
        names: one name a column, each once; by default ``x0``, ``x1``, ...

    Raises:
        ValueError: if the shapes do not agree.

    Example:
        >>> as_sequences([[[1.0], [2.0], [4.0]], [[5.0]]])
        Sequences(2 sequences of 1 to 3 steps, 1 column: 'x0'; 0 missing cells)
    """

    x: Tensor
    lengths: Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.x.dim() != 3 or self.lengths.shape != self.x.shape[:1]:
            raise ValueError(
                "x, lengths: expected shapes (B, T, D) and (B,), got "
                f"{tuple(self.x.shape)} and {tuple(self.lengths.shape)}; "
                "latentlab.data.as_sequences makes them of a list of arrays"
            )
        width = self.x.shape[2]
        names = tuple(map(str, self.names)) or default_names(width)
        if len(names) != width:
            raise ValueError(f"names: expected {width}, one a column, got {listed(names)}")
        object.__setattr__(self, "names", names)

    @property
    def inside(self) -> Tensor:
        """True at the steps of a sequence, false at its padding, shape (B, T)."""
        return torch.arange(self.x.shape[1], device=self.x.device) < self.lengths[:, None]

    def rows(self) -> Table:
        """The steps of all sequences below each other, in their order."""
        return Table(self.x[self.inside], self.names)

    def split(self, values: Tensor) -> list[Tensor]:
        """What there is for each step, (B, T, ...), as one tensor (T_b, ...) a sequence."""
        return [v[:n] for v, n in zip(values, self.lengths.tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        B, D, (low, high) = len(self), self.x.shape[2], self.lengths.aminmax()
        of = f"{low} to {high}" if low < high else f"{high}"
        steps = f"{of} step{'s' * (int(high) != 1)}"
        lost = int((self.x.isnan() & self.inside[..., None]).sum())
        return (
            f"Sequences({B} sequence{'s' * (B != 1)} of {steps}, {D} column{'s' * (D != 1)}: "
            f"{listed(self.names)}; {lost} missing cell{'s' * (lost != 1)})"
        )


def as_sequences(
    data: Any,  # noqa: ANN401
    lengths: Any = None,  # noqa: ANN401
    *,
    id: str | None = None,
    time: str | None = None,
    names: Sequence[str] | None = None,
    argument: str = "x",
) -> Sequences:
    """Sequences, whatever they came in.

    =====================================  ====================================================
    ``data``                               read as
    =====================================  ====================================================
    list of arrays (T_b, D) or (T_b,)      one sequence each; frames and tables, too
    (T, D), (T,)                           one sequence; with ``lengths``, several one below
                                           the other, whose lengths sum to T
    (B, T, D)                              one sequence each; with ``lengths``, padded
    frame or ``Table``, ``id``, ``time``   one sequence for each id, sorted by time
    =====================================  ====================================================

    Steps are taken as equally spaced: a step that was not observed is a row of NaN.

    Arguments:
        data: the sequences; NaN where a cell is missing.
        lengths: number of steps of each sequence, whole numbers from 1 on.
        id: name of the column that tells sequences apart, of any kind.
        time: name of the column that orders the steps of a sequence: numbers or dates, also as
            text (2026-01-31).
        names: the columns that there must be, see :func:`latentlab.data.checks.match_columns`.
        argument: what messages call ``data``.

    Returns:
        The sequences; float32 stays so, all else becomes float64.

    Raises:
        TypeError: for text, complex or sparse values.
        ValueError: for an empty sequence, columns that differ between sequences, infinite values,
            lengths that do not fit, a time that a sequence has twice, or text that is no time.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"who": ["a", "b", "a"], "day": [2, 1, 1], "count": [7, 5, 6]})
        >>> as_sequences(frame, id="who", time="day").x[0, :, 0]
        tensor([6., 7.], dtype=torch.float64)
    """
    if isinstance(data, Sequences):
        return _known(data, lengths, names, argument)
    if id is not None or time is not None:
        if lengths is not None:
            raise ValueError(
                "lengths: expected none beside id or time, which tell sequences apart"
            )
        tables = _by_id(data, id, time, argument)
        return _padded([_table(t, argument, names) for t in tables], argument)
    if isinstance(data, list | tuple) and _is_several(data):
        if lengths is not None:
            raise ValueError(
                f"lengths: expected none beside a list of {len(data)} sequences, which have theirs"
            )
        return _padded(
            [_table(v, f"{argument}[{i}]", names) for i, v in enumerate(data)], argument
        )
    if _dim(data) == 3:
        return _of_batch(data, lengths, names, argument)
    table = _table(data, argument, names)
    if lengths is None:
        return _padded([table], argument)
    counts = as_lengths(lengths)
    if int(counts.sum()) != len(table):
        raise ValueError(
            f"lengths: expected whole numbers that sum to the {len(table)} rows of {argument}, "
            f"got the sum {int(counts.sum())}"
        )
    parts = table.x.split(counts.tolist())
    return _padded([Table(part, table.names) for part in parts], argument)


def _known(
    data: Sequences,
    lengths: Any,  # noqa: ANN401
    names: Sequence[str] | None,
    argument: str,
) -> Sequences:
    """Sequences as they are, their columns in the order asked for."""
    if lengths is not None:
        raise ValueError(f"lengths: expected none, {argument} has its own")
    if names is None or tuple(names) == data.names:
        return data
    B, T, D = data.x.shape
    flat = match_columns(Table(data.x.reshape(-1, D), data.names), names, argument=argument)
    return Sequences(flat.x.reshape(B, T, -1), data.lengths, flat.names)


def _of_batch(
    data: Any,  # noqa: ANN401
    lengths: Any,  # noqa: ANN401
    names: Sequence[str] | None,
    argument: str,
) -> Sequences:
    """Sequences of a padded batch; what stands beyond their ends is not looked at."""
    x = data if isinstance(data, Tensor) else torch.as_tensor(_numbers(data, argument))
    B, T, D = x.shape
    counts = torch.full((B,), T) if lengths is None else as_lengths(lengths)
    if len(counts) != B:
        raise ValueError(f"lengths: expected {B}, one a sequence, got {len(counts)}")
    if int(counts.max()) > T:
        b = int(counts.argmax())
        raise ValueError(
            f"lengths: expected at most the {T} steps of {argument}, got {int(counts[b])} at [{b}]"
        )
    if 0 in x.shape:
        raise ValueError(f"{argument} is empty (shape {tuple(x.shape)}): expected (B, T, D)")
    inside = (torch.arange(T) < counts[:, None]).to(x.device)
    table = _table(x[inside], argument, names)
    full = table.x.new_full((B, T, table.x.shape[1]), torch.nan)
    full[inside] = table.x
    return Sequences(full, counts.to(x.device), table.names)


def _by_id(data: Any, id: str | None, time: str | None, argument: str) -> list[Any]:  # noqa: ANN401
    """The rows of each id, in the order of time, without these two columns."""
    import pandas as pd

    names = column_names(data)
    keys = [key for key in (id, time) if key is not None]
    if names is None or any(key not in names for key in keys):
        raise ValueError(
            f"id, time: expected columns of {argument}, got {listed(keys)}; "
            + (f"it has {listed(names)}" if names else "its columns have no names")
        )
    if isinstance(data, Table):
        data = pd.DataFrame(data.x.numpy(force=True), columns=list(data.names))
    frame = data if isinstance(data, pd.DataFrame) else data.to_pandas()
    frame = frame.set_axis(names, axis=1)
    for key in keys:
        if frame[key].isna().any():
            row = int(frame[key].isna().to_numpy().argmax())
            raise ValueError(f"{key}: expected a value in each row, row {row} has none")
    group = np.zeros(len(frame), int) if id is None else pd.factorize(frame[id])[0]
    order = np.argsort(group, kind="stable")
    if time is not None:
        rank = _in_time(frame[time], argument).rank(method="dense").to_numpy()
        order = np.lexsort((rank, group))
        again = (np.diff(rank[order]) == 0) & (np.diff(group[order]) == 0)
        if again.any():
            row = int(order[1:][again][0])
            who = "" if id is None else f" for {id} {str(frame[id].iloc[row])!r}"
            raise ValueError(
                f"time: expected each {time!r} once in a sequence, got "
                f"{frame[time].iloc[row]} again{who} (row {row})"
            )
    rest = from_frame(frame[[name for name in names if name not in keys]], argument=argument)
    ends = np.flatnonzero(np.diff(group[order])) + 1
    parts = np.split(order, ends)
    return [Table(rest.x[torch.from_numpy(part)], rest.names) for part in parts]


def _in_time(column: Any, argument: str) -> Any:  # noqa: ANN401
    """A column of times that sorts as they passed: text of numbers or dates as what it says."""
    import pandas as pd
    from pandas.api import types

    is_text = types.is_object_dtype(column) or types.is_string_dtype(column)
    if not is_text or getattr(column.dtype, "ordered", False):
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    if not numbers.isna().any():
        return numbers
    dates = pd.to_datetime(column, format="ISO8601", errors="coerce", utc=True)
    if (odd := dates.isna().to_numpy()).any():
        row = int((odd & numbers.isna().to_numpy()).argmax())
        raise ValueError(
            f"time: expected numbers, or dates such as 2026-01-31, in {column.name!r} of "
            f"{argument}, got {shown(column.iloc[row])} (row {row}); use pandas.to_datetime"
        )
    return dates


def _table(data: Any, argument: str, names: Sequence[str] | None) -> Table:  # noqa: ANN401
    """The rows of one sequence; a vector is a column."""
    if _dim(data) == 1 and column_names(data) is None and not _is_sparse(data):
        data = data if isinstance(data, Tensor) else _numbers(data, argument)
        data = data.reshape(-1, 1)
    return as_rows(data, argument=argument, min_rows=1, allow_missing=True, names=names)


def _padded(tables: list[Table], argument: str) -> Sequences:
    first = tables[0]
    for b, table in enumerate(tables):
        if table.names != first.names:
            raise ValueError(
                f"{argument}: expected the same columns in each sequence, got "
                f"{listed(first.names)} in [0] and {listed(table.names)} in [{b}]"
            )
    x = torch.nn.utils.rnn.pad_sequence(
        [table.x for table in tables], batch_first=True, padding_value=torch.nan
    )
    lengths = torch.tensor([len(table) for table in tables], device=x.device)
    return Sequences(x, lengths, first.names)


def as_lengths(lengths: Any) -> Tensor:  # noqa: ANN401
    """Lengths of sequences: whole numbers from 1 on.

    Arguments:
        lengths: a list, array or tensor of them, shape (B,).

    Returns:
        The lengths as an int64 tensor, shape (B,).

    Raises:
        ValueError: for other numbers, or another shape.
    """
    values = lengths.numpy(force=True) if isinstance(lengths, Tensor) else np.asarray(lengths)
    if values.ndim != 1 or not values.size or values.dtype.kind not in "iu":
        raise ValueError(
            "lengths: expected whole numbers, one a sequence, got "
            f"{shown(lengths)} ({values.dtype}, shape {values.shape})"
        )
    if (values < 1).any():
        b = int((values < 1).argmax())
        raise ValueError(f"lengths: expected at least 1 step a sequence, got {values[b]} at [{b}]")
    return torch.as_tensor(values.astype(np.int64))


def _is_several(data: Sequence) -> bool:
    """Whether a list holds sequences, rather than the rows or numbers of one."""
    if not len(data):
        return False
    if all(_is_array(v) and _dim(v) for v in data):
        return True
    try:
        return np.asarray(data, dtype=object).ndim == 1 and all(
            isinstance(v, list | tuple) for v in data
        )
    except ValueError:  # lists and arrays that do not line up
        return True


def _is_array(value: object) -> bool:
    held = isinstance(value, Tensor | Table) or column_names(value) is not None
    return held or (hasattr(value, "__array__") and not isinstance(value, np.generic))


def _is_sparse(value: object) -> bool:
    return type(value).__module__.startswith("scipy.sparse")


def _dim(data: Any) -> int:  # noqa: ANN401
    """Number of axes; 2 where the data are for others to judge."""
    if isinstance(data, Table) or column_names(data) is not None or _is_sparse(data):
        return 2
    if isinstance(data, Tensor):
        return data.dim()
    try:
        return np.asarray(data).ndim
    except (TypeError, ValueError):
        return 2


def _numbers(data: Any, argument: str) -> np.ndarray:  # noqa: ANN401
    """An array of numbers that :func:`as_rows` will take, once it is two-dimensional."""
    if isinstance(data, np.ma.MaskedArray):
        return np.ma.filled(data.astype(float), np.nan)
    array = np.asarray(data)
    if array.dtype.kind == "O":  # numbers, and None for missing ones
        flat = as_rows(array.reshape(-1, 1), argument=argument, min_rows=1, allow_missing=True)
        return flat.x.numpy().reshape(array.shape)
    if array.dtype.kind not in "biuf":
        as_rows(array.reshape(-1, 1), argument=argument, min_rows=1)  # raises with the way out
    return array
