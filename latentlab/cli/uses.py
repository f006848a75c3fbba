"""What is done with a fit: check it, label rows, draw new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.inputs import bad_input, expect_writable, load_run, matching, names_of
from latentlab.cli.options import Columns, Data, DrawSeed, Json, Run, option
from latentlab.cli.results import EXIT, facts, write_table
from latentlab.cli.show import busy, show, show_json, show_pairs, show_verdict

__all__ = ["check", "predict", "sample"]

DRAWS = 1000  # that a label is averaged over


@app.command("check", epilog="Example: latentlab check run/ --data measurements.csv")
def check(
    run: Run,
    data: Annotated[Path | None, option("DATA", "The data that were fitted.")] = None,
    columns: Columns = None,
    seed: DrawSeed = None,
    as_json: Json = False,
) -> None:
    """Say whether to use a fit, and what that rests on.

    A fit does not hold its data: without --data this is the verdict that was stored with it, with
    --data everything is measured anew.
    """
    with bad_input(), busy("checking the fit"):
        posterior = ll.load(run)
        if data is not None:
            posterior = ll.load(run, data=matching(posterior, data, columns))
        verdict = posterior.check(seed=seed)
    if as_json:
        show_json(facts(posterior, verdict, posterior.summary()))
    else:
        show_verdict(verdict)
        show_pairs(verdict.evidence)
        if data is None:
            show("\n  stored with the fit; --data DATA measures it anew")
    raise typer.Exit(EXIT[verdict.level])


@app.command("predict", epilog="Example: latentlab predict run/ new.csv --out labels.csv")
def predict(
    run: Run,
    data: Data,
    out: Annotated[Path, option("FILE", "A .csv or .parquet file.")],
    columns: Columns = None,
    seed: DrawSeed = None,
) -> None:
    """Label rows: component, probability of each one, log-density.

    FILE has one line for each row of DATA, in the same order. Components are numbered as in
    summary.csv.
    """
    with bad_input():
        from latentlab.protocols import LabelsRows

        posterior = load_run(run)
        model = posterior.model
        if not isinstance(model, LabelsRows):
            raise ValueError(f"{run}: a {type(model).__name__} has no labels for rows")
        table = matching(posterior, data, columns)
        expect_writable(out, data)
        labels = model.label_rows(posterior._aligned(DRAWS, seed).draws, table.x)
    write_table({name: value.numpy(force=True) for name, value in labels.items()}, out)


@app.command("sample", epilog="Example: latentlab sample run/ -n 1000 --out new.csv")
def sample(
    run: Run,
    num_rows: Annotated[int, option("N", "Number of rows.", "-n", least=1)],
    out: Annotated[
        Path | None, option("FILE", "A .csv or .parquet file; by default CSV is printed.")
    ] = None,
    seed: DrawSeed = None,
) -> None:
    """Draw new rows of data from the fit.

    Each row has a posterior draw of its own, so that rows also differ by what the fit does not
    know. Draws of the parameters are in posterior.nc.
    """
    with bad_input():
        posterior = load_run(run)
        if out is not None:
            expect_writable(out)
        blank = posterior.pair.data.args[0][:1] * 0
        (rows,) = posterior.predict(num_rows, blank, seed=seed).values()
    columns = dict(zip(names_of(posterior), rows[:, 0].T.numpy(force=True), strict=True))
    write_table(columns, out)
