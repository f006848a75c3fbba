"""What goes in: files, folders of fits, and the one line that bad ones get."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

import latentlab as ll
from latentlab.cli.show import show_line
from latentlab.cli.wording import as_options

__all__ = [
    "BAD_INPUT",
    "BadInputError",
    "bad_input",
    "expect_place",
    "expect_writable",
    "listed",
    "names_of",
    "warn_of",
]

BAD_INPUT = 2


class BadInputError(typer.TyperException):
    """Bad input: one line, exit code 2."""

    exit_code = BAD_INPUT


@contextmanager
def bad_input(data: object = None) -> Iterator[None]:
    """What the library says of the input, a file, ends the command with one line."""
    try:
        yield
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        text = str(error) or type(error).__name__
        raise BadInputError(as_options(text, data)) from error


def listed(columns: str | None) -> list[str] | None:
    """``a,b`` as a list; a name with a comma in it goes in quotes, as in a file."""
    return None if columns is None else next(csv.reader([columns], skipinitialspace=True), [])


def warn_of(posterior: ll.Posterior, run: Path) -> None:
    """Do not keep the verdict quiet on a fit that is about to be used."""
    level = posterior.check().level
    if level == "do not use":
        show_line(f'warning: the verdict on this fit is "{level}"; see latentlab check {run}')


def names_of(posterior: ll.Posterior) -> tuple[str, ...]:
    """Names of the columns that were fitted."""
    return posterior.names or ll.data.Table(posterior.pair.data.args[0]).names


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


def expect_place(place: Path, data: Path | None = None) -> None:
    """Refuse a folder, or a .npz file, that images could not be written to."""
    from latentlab.inference.checkpoint import probe

    if place.suffix not in ("", ".npz"):
        raise ValueError(f"--out: expected a folder or a name that ends in .npz, got {place}")
    if data is not None and place.exists() and place.samefile(data):
        raise ValueError(f"--out: {place} holds the data; choose another name")
    if place.suffix == ".npz":
        probe(place.parent)
        return
    if importlib.util.find_spec("PIL") is None:
        raise ImportError(f"{place}: PNG files need pip install 'latentlab[images]'; or a .npz")
    if place.is_file():
        raise ValueError(f"--out: {place} is a file; expected a folder or a .npz name")
