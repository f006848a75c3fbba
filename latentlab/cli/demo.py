"""``latentlab demo``: a fit that needs no file."""

from __future__ import annotations

from pathlib import Path

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.options import Json, Out, Seed
from latentlab.cli.results import fit_and_write

__all__ = ["demo"]


@app.command("demo", epilog="Example: latentlab demo --out demo/")
def demo(out: Out = Path("latentlab-demo"), seed: Seed = 0, as_json: Json = False) -> None:
    """Fit three components to the petals of 150 irises.

    Takes some seconds, and no file. DIR also gets the data, iris.csv, to go on with.
    """
    from sklearn.datasets import load_iris

    petals = load_iris(as_frame=True).frame[["petal length (cm)", "petal width (cm)"]]
    model = ll.GaussianMixture(num_features=2, num_components=3)
    data = {"iris.csv": petals.to_csv(index=False)}
    fit_and_write(model, ll.data.load(petals), out, {"seed": seed}, data, as_json=as_json)
