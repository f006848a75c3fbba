"""What goes in: files, folders of fits, and the one line that bad ones get."""

from __future__ import annotations

import csv
import importlib.util
import io
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

import latentlab as ll
from latentlab.cli.show import show_line

__all__ = [
    "BAD_INPUT",
    "BadInputError",
    "bad_input",
    "expect_writable",
    "listed",
    "load_run",
    "matching",
    "names_of",
]

BAD_INPUT = 2


class BadInputError(typer.TyperException):
    """Bad input: one line, exit code 2."""

    exit_code = BAD_INPUT


@contextmanager
def bad_input() -> Iterator[None]:
    """What the library says of the input ends the command with one line."""
    try:
        yield
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        raise BadInputError(str(error) or type(error).__name__) from error


def listed(columns: str | None) -> list[str] | None:
    """``a,b`` as a list; a name with a comma in it goes in quotes, as in a file."""
    return None if columns is None else next(csv.reader([columns], skipinitialspace=True), [])


def load_run(run: Path) -> ll.Posterior:
    """A posterior to draw from, whose verdict is not kept quiet."""
    posterior = ll.load(run)
    level = posterior.check().level
    if level == "do not use":
        show_line(f'warning: the verdict on this fit is "{level}"; see latentlab check {run}')
    return posterior


def names_of(posterior: ll.Posterior) -> tuple[str, ...]:
    """Names of the columns that were fitted."""
    return posterior.names or ll.data.Table(posterior.pair.data.args[0]).names


def matching(posterior: ll.Posterior, data: Path, columns: str | None) -> ll.data.Table:
    """Rows with the columns that were fitted."""
    from latentlab.data.checks import as_rows

    names = names_of(posterior)
    table = ll.data.load(data, listed(columns))
    if set(table.names) > set(names):
        line = io.StringIO()
        csv.writer(line).writerow(names)
        way = shlex.quote(line.getvalue().strip())
        raise ValueError(f"{data}: more columns than were fitted; add --columns {way}")
    return as_rows(table, argument=str(data), min_rows=1, allow_missing=True, names=names)


def expect_writable(file: Path, data: Path | None = None) -> None:
    """Refuse a file that could not be written, before the work."""
    from latentlab.inference.checkpoint import probe

    if file.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out: expected a name that ends in .csv or .parquet, got {file}")
    if file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{file}: writing it needs pip install 'latentlab[parquet]'")
    if data is not None and file.exists() and file.samefile(data):
        raise ValueError(f"--out: {file} holds the data; choose another name")
    probe(file.parent)
