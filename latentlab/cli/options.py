"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "PLAIN",
    "Columns",
    "Data",
    "DrawSeed",
    "Id",
    "Json",
    "Out",
    "OutFile",
    "Run",
    "Seed",
    "Time",
    "option",
]

PLAIN: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # its boxes do not fit on a screen
}


def option(metavar: str, words: str, *names: str, least: int | None = None) -> Any:  # noqa: ANN401
    """An option with its help; ``least`` is the smallest number it takes."""
    return typer.Option(*names, metavar=metavar, help=words, min=least)


Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="CSV, TSV, Parquet, JSON lines, NPY or NPZ.")
]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Where a fit was written to.")]
Out = Annotated[Path, option("DIR", "Folder for the results.")]
OutFile = Annotated[Path, option("FILE", "A .csv or .parquet file.")]
Id = Annotated[str | None, option("COL", "Column that tells sequences apart.")]
Time = Annotated[str | None, option("COL", "Column that orders their steps.")]
Columns = Annotated[str | None, option("A,B", "Columns to take, in this order.")]
Seed = Annotated[int, option("N", "Same seed, same numbers.", least=0)]
DrawSeed = Annotated[
    int | None, option("N", "Of the draws; by default the fit's.", "--seed", least=0)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
