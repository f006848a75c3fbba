"""``latentlab fit``: a model to a file."""

from __future__ import annotations

from typing import Annotated

import latentlab as ll
from latentlab.cli.commands import fit
from latentlab.cli.inputs import bad_input, listed
from latentlab.cli.options import Columns, Data, Json, Out, Seed, option
from latentlab.cli.results import fit_and_write

__all__ = ["fit_gmm"]


@fit.command("gmm", epilog="Example: latentlab fit gmm measurements.csv --components 3 --out run/")
def fit_gmm(
    data: Data,
    components: Annotated[int, option("K", "Number of components.", least=1)],
    out: Out,
    columns: Columns = None,
    guide: Annotated[str, option("NAME", "full_rank, mean_field, point or auto.")] = "auto",
    num_restarts: Annotated[int | None, option("N", "Starts; by default 4.", least=1)] = None,
    max_steps: Annotated[int, option("N", "Steps at the most.", least=1)] = 20_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit a mixture of diagonal Gaussians.

    Writes report.html, posterior.nc (ArviZ), summary.csv and model.safetensors to DIR. Empty cells
    are missing and integrated out. Ctrl-C ends the climb; what it reached is judged and written.
    """
    with bad_input():
        from latentlab.data.checks import as_rows

        table = ll.data.load(data, listed(columns))
        table = as_rows(table, argument=str(data), allow_missing=True)
        model = ll.GaussianMixture(table.x.shape[1], components)
    settings = {"guide": guide, "num_restarts": num_restarts, "max_steps": max_steps, "seed": seed}
    fit_and_write(model, table, out, settings, as_json=as_json)
