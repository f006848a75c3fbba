"""What is done with a fit: check it, label rows, draw new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.inputs import bad_input, expect_place, expect_writable, names_of, warn_of
from latentlab.cli.options import Columns, Data, DrawSeed, Id, Json, OutFile, Run, Time, option
from latentlab.cli.results import EXIT, facts, summary_of, write_images, write_table
from latentlab.cli.rows import are_images, read_for
from latentlab.cli.show import busy, show, show_json, show_pairs, show_verdict

__all__ = ["check", "predict", "sample"]

DRAWS = 1000  # that a label is averaged over


@app.command("check", epilog="Example: latentlab check run/ --data measurements.csv")
def check(
    run: Run,
    data: Annotated[Path | None, option("DATA", "The data that were fitted.")] = None,
    columns: Columns = None,
    id: Id = None,
    time: Time = None,
    seed: DrawSeed = None,
    as_json: Json = False,
) -> None:
    """Say whether to use a fit, and what that rests on.

    A fit does not hold its data: without --data this is the verdict that was stored with it, with
    --data everything is measured anew.
    """
    with bad_input(data), busy("checking the fit"):
        posterior = ll.load(run)
        if data is not None:
            posterior = ll.load(run, data=read_for(posterior, data, columns, id, time).x)
        verdict = posterior.check(seed=seed)
    if as_json:
        show_json(facts(posterior, verdict, summary_of(posterior)))
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
    out: OutFile,
    columns: Columns = None,
    id: Id = None,
    time: Time = None,
    seed: DrawSeed = None,
) -> None:
    """Label rows: component or state, probability of each one, log-density.

    FILE has one line for each row of DATA, in the same order; the columns of --id and --time stay
    with them. Numbers of components and states are those of summary.csv.
    """
    with bad_input(data):
        from latentlab.protocols import LabelsRows

        posterior = ll.load(run)
        model = posterior.model
        if not isinstance(model, LabelsRows):
            raise ValueError(f"{run}: a {type(model).__name__} has no labels for rows")
        rows = read_for(posterior, data, columns, id, time)
        expect_writable(out, data)
        warn_of(posterior, run)
        draws = {} if posterior.reads_data else posterior._aligned(DRAWS, seed).draws
        labels = model.label_rows(draws, rows.x)
    write_table({**rows.kept, **{k: rows.column(v) for k, v in labels.items()}}, out)


@app.command("sample", epilog="Example: latentlab sample run/ -n 1000 --out new.csv")
def sample(
    run: Run,
    num_rows: Annotated[int, option("N", "Number of rows, images or sequences.", "-n", least=1)],
    out: Annotated[
        Path | None,
        option("FILE", "A .csv or .parquet file, printed by default; images: a folder or .npz."),
    ] = None,
    steps: Annotated[
        int | None, option("T", "Of a sequence; by default as the longest fitted.", least=1)
    ] = None,
    seed: DrawSeed = None,
) -> None:
    """Draw new rows, images or sequences of data from the fit.

    Each has a posterior draw of its own, so that they also differ by what the fit does not know.
    A sequence has one line for each step, with its number and state. Draws of the parameters are
    in posterior.nc.
    """
    with bad_input():
        posterior = ll.load(run)
        model = posterior.model
        if are_images(model):
            if out is None:
                raise ValueError("--out: expected a folder, or a .npz name, for images")
            expect_place(out)
        elif out is not None:
            expect_writable(out)
        if steps is not None and not isinstance(model, ll.HiddenMarkovModel):
            raise ValueError(f"--steps: a {type(model).__name__} has no sequences")
        warn_of(posterior, run)
        if are_images(model) and out is not None:
            _sample_images(posterior, num_rows, out, seed)
            return
        if isinstance(model, ll.HiddenMarkovModel):
            columns = _sample_sequences(posterior, num_rows, steps, seed)
        else:
            blank = posterior.pair.data.args[0][:1] * 0
            (rows,) = posterior.predict(num_rows, blank, seed=seed).values()
            cells = rows[:, 0].T.numpy(force=True)
            columns = dict(zip(names_of(posterior), cells, strict=True))
    write_table(columns, out)


def _sample_images(posterior: ll.Posterior, num_images: int, out: Path, seed: int | None) -> None:
    """New images, one file each."""
    model: Any = posterior.model
    x = model.sample(num_images, seed=posterior.seed if seed is None else seed)
    width = len(str(num_images - 1))
    write_images(x, [f"{i:0{width}}.png" for i in range(num_images)], out)


def _sample_sequences(
    posterior: ll.Posterior, num_sequences: int, num_steps: int | None, seed: int | None
) -> dict[str, Any]:
    """New sequences below each other, with their states."""
    import torch

    from latentlab.seeds import seeded

    model: Any = posterior.model
    T = num_steps or int(model.num_steps)
    seed = posterior.seed if seed is None else seed
    draws = posterior._aligned(num_sequences, seed).draws
    names = posterior.names or ll.data.Table(torch.zeros(1, model.num_features)).names
    empty = torch.full((1, T, len(names)), torch.nan, dtype=torch.float64)
    with seeded(seed):
        chain = model.chain(draws, ll.data.Sequences(empty, torch.tensor([T])))
        rows, states = chain.sample_with_states()
    order = torch.arange(num_sequences * T)
    columns = {"sequence": order // T, "step": order % T, "state": states.flatten()}
    cells = rows.reshape(-1, len(names)).T
    columns |= dict(zip(names, cells, strict=True))
    return {name: value.numpy(force=True) for name, value in columns.items()}
