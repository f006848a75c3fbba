"""Tables: rows of numbers whose columns have names and whose cells may be missing.

Shapes: N rows, D columns.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

__all__ = [
    "PRECISE",
    "Columns",
    "Table",
    "check_unique",
    "choose",
    "default_names",
    "listed",
    "not_rows",
    "shown",
]

Columns = str | int | Iterable[str | int]  # names; positions for an array, which has none
PRECISE = (torch.float64, torch.float32)  # what a table holds

_ROW_NAMES = ("", "Unnamed: 0", "rownames")  # how R and pandas head a column of row names


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """N rows of D numbers, in the units they came in.

    Arguments:
        x: the rows, shape (N, D), float64 or float32, NaN where a cell is missing; not copied.
        names: one name a column, each once; by default ``x0``, ``x1``, ...

    Raises:
        TypeError: if ``x`` is not a tensor of such numbers.
        ValueError: if ``x`` is not 2-D, or the names do not fit its columns.

    Example:
        >>> table = Table(torch.tensor([[3.6, 79.0], [1.8, torch.nan]]), ("eruptions", "waiting"))
        >>> table
        Table(2 rows, 2 columns: 'eruptions', 'waiting'; 1 missing cell)
        >>> table.complete_rows().x.shape
        torch.Size([1, 2])
    """

    x: Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor) or self.x.dtype not in PRECISE:
            came = getattr(self.x, "dtype", type(self.x).__name__)
            raise TypeError(
                f"x: expected a float64 or float32 tensor, got {came}; use latentlab.data.load(x)"
            )
        if self.x.dim() != 2:
            raise not_rows("x", tuple(self.x.shape))
        if isinstance(self.names, str):
            raise TypeError(f"names: expected one name a column, got the str {self.names!r}")
        width = self.x.shape[1]
        names = tuple(map(str, self.names)) or default_names(width)
        if len(names) != width:
            raise ValueError(
                f"names: expected {width}, one a column, got {len(names)} ({listed(names)})"
            )
        check_unique(names, "names")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "x", self.x.detach())

    @property
    def missing(self) -> Tensor:
        """True where a cell is missing, shape (N, D)."""
        return torch.isnan(self.x)

    def complete_rows(self) -> Table:
        """The rows without a missing cell, in their order."""
        return Table(self.x[~self.missing.any(1)], self.names)

    def select(self, names: Columns) -> Table:
        """The columns of these names, in this order; others are dropped.

        Arguments:
            names: the names; ``2`` stands for ``"x2"``, the third column of an array.

        Returns:
            A new table.

        Raises:
            ValueError: if the table has no such column; the message lists which.
        """
        chosen = choose(self.names, names, argument="table")
        place = {name: i for i, name in enumerate(self.names)}
        return Table(self.x[:, [place[name] for name in chosen]], chosen)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        N, D = self.x.shape
        columns = f"{D} column{'s' * (D != 1)}: {listed(self.names)}"
        lost = int(self.missing.sum())
        cells = f"{lost} missing cell{'s' * (lost != 1)}"
        return f"Table({N} row{'s' * (N != 1)}, {columns}; {cells})"


def default_names(num_columns: int) -> tuple[str, ...]:
    """``x0``, ``x1``, ...: the names of columns that came without."""
    return tuple(f"x{i}" for i in range(num_columns))


def choose(
    names: Sequence[str], columns: Columns | None = None, *, argument: str
) -> tuple[str, ...]:
    """The names that ``columns`` asks for; by default all but a first one of row names."""
    if columns is None:
        return tuple(names[1:] if len(names) > 1 and names[0] in _ROW_NAMES else names)
    wanted = [columns] if isinstance(columns, str | int) else list(columns)
    known = set(names)
    chosen = tuple(
        f"x{c}" if isinstance(c, Integral) and str(c) not in known else str(c) for c in wanted
    )
    if absent := [name for name in chosen if name not in known]:
        raise ValueError(
            f"{argument}: no column {listed(absent)}; expected some of {listed(names)}"
        )
    if not chosen:
        raise ValueError(f"{argument}: expected at least one of {listed(names)}, got none")
    check_unique(chosen, argument)
    return chosen


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for a message, in quotes, not too many of them."""
    quoted = [repr(name) for name in names]
    more = f", ... ({len(quoted)} in all)" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more


def shown(value: object) -> str:
    """A value for a message: on one line, and short."""
    return " ".join(reprlib.repr(value).split())


def check_unique(names: Sequence[str], argument: str) -> None:
    """Raise a ``ValueError`` that lists the names which are there twice."""
    if len(set(names)) < len(names):
        twice = dict.fromkeys(name for name in names if names.count(name) > 1)
        raise ValueError(f"{argument}: expected each name once, got {listed(twice)} again")


def not_rows(argument: str, shape: tuple[int, ...]) -> ValueError:
    """The error for numbers that are not N rows of D columns."""
    way = {
        1: "x.reshape(-1, 1) makes one column of it, x.reshape(1, -1) one row",
        3: "x.reshape(-1, x.shape[-1]) makes rows of it; a model of sequences takes it as a batch",
    }.get(len(shape), "give one row an observation")
    if 0 in shape:
        return ValueError(f"{argument} is empty (shape {shape}): expected rows, shape (N, D)")
    return ValueError(f"{argument}: expected rows, shape (N, D), got shape {shape}; {way}")
