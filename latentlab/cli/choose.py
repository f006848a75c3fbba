"""``latentlab select``: how many components."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.inputs import bad_input, expect_writable, listed
from latentlab.cli.options import Columns, Data, Json, Seed, option
from latentlab.cli.results import write_table
from latentlab.cli.show import busy, show, show_json

__all__ = ["select"]


@app.command("select", epilog="Example: latentlab select measurements.csv --components 1:6")
def select(
    data: Data,
    components: Annotated[str, option("A:B", "Numbers of components, from A to B.")],
    covariance: Annotated[str, option("KIND", "diag, spherical, tied or full.")] = "diag",
    out: Annotated[
        Path | None, option("FILE", "A .csv or .parquet file for the table, too.")
    ] = None,
    columns: Columns = None,
    num_folds: Annotated[int, option("N", "Parts, each held out once.", least=2)] = 5,
    num_restarts: Annotated[int | None, option("N", "Starts; by default 4.", least=1)] = None,
    max_steps: Annotated[int, option("N", "Steps of a fit at the most.", least=1)] = 20_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare mixtures of A to B components, and recommend one.

    Each is fitted to all folds but one, and scored on that one: the held-out score, in nats, is
    better the larger; the BIC the smaller. Recommended is the fewest components within one
    standard error of the best score.
    """
    with bad_input(data):
        numbers = _range(components)
        table = ll.data.load(data, listed(columns))
        shape: Any = covariance
        ll.GaussianMixture(table.x.shape[1], 1, covariance=shape)
        if out is not None:
            expect_writable(out, data)
        settings = {"num_restarts": num_restarts, "max_steps": max_steps, "progress": False}
        try:
            with busy(f"fitting {len(numbers)} mixtures, {num_folds + 1} times each"):
                found = ll.select(
                    ll.GaussianMixture,
                    table,
                    num_components=numbers,
                    covariance=covariance,
                    num_folds=num_folds,
                    seed=seed,
                    settings=settings,
                )
        except ll.FitDivergedError as error:
            raise typer.TyperException(str(error)) from error
    frame = found.frame()
    if as_json:
        facts = {"recommended": found.best, "highest": found.highest}
        show_json({**facts, "num_folds": num_folds, "candidates": frame.to_dict("records")})
    else:
        show(f"{found}")
    if out is not None:
        write_table(frame.to_dict("list"), out, quiet=as_json)


def _range(text: str) -> list[int]:
    """``1:6`` as the numbers from 1 to 6; ``3`` alone is one."""
    first, _, last = text.partition(":")
    ends = [end.strip() for end in (first, last or first)]
    if not all(end.isascii() and end.isdigit() for end in ends) or text.endswith(":"):
        raise ValueError(f"--components: expected a range such as 1:6, got {text!r}")
    low, high = map(int, ends)
    if not 1 <= low <= high:
        raise ValueError(f"--components: expected 1 <= A <= B, such as 1:6, got {text!r}")
    return [*range(low, high + 1)]
