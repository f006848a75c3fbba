"""``latentlab demo``: a fit that needs no file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.inputs import bad_input
from latentlab.cli.options import Json, Out, Seed
from latentlab.cli.results import fit_and_write

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["demo"]


@app.command("demo", epilog="Example: latentlab demo --out demo/")
def demo(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="gmm, hmm, vae or flow.")] = "gmm",
    out: Out = Path("latentlab-demo"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit a model to data that come along; it takes some seconds, and no file.

    gmm: three components to the petals of 150 irises. hmm: two states to 200 simulated counts.
    vae: eight latents to 400 images of digits. flow: the density of 500 points on two moons. DIR
    also gets the data, such as iris.csv, to go on with.
    """
    makers = {"gmm": _irises, "hmm": _counts, "vae": _digits, "flow": _moons}
    with bad_input():
        if model not in makers:
            raise ValueError(f"MODEL: expected {', '.join(makers)}, got {model!r}")
    built, frame, name, settings = makers[model](seed)
    read: Any = ll.data.load(frame)
    data = {name: frame.to_csv(index=False)}
    fit_and_write(built, read, out, {"seed": seed, **settings}, data, as_json=as_json)


_Demo = tuple[Any, "pd.DataFrame", str, dict[str, Any]]  # model, data, file, settings


def _irises(seed: int) -> _Demo:
    from sklearn.datasets import load_iris

    petals = load_iris(as_frame=True).frame[["petal length (cm)", "petal width (cm)"]]
    return ll.GaussianMixture(num_features=2, num_components=3), petals, "iris.csv", {}


def _counts(seed: int) -> _Demo:
    """Counts of a process that is calm or busy, for about 8 steps on end."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    busy = np.cumsum(rng.random(200) < 1 / 8) % 2
    frame = pd.DataFrame({"count": rng.poisson(np.where(busy, 9.0, 2.0))})
    model = ll.HiddenMarkovModel(2, 1, emissions="poisson")
    return model, frame, "counts.csv", {"num_restarts": 2}


def _digits(seed: int) -> _Demo:
    import pandas as pd
    from sklearn.datasets import load_digits

    pixels = load_digits().data[:400] / 16
    names = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    model = ll.VariationalAutoencoder(
        likelihood="bernoulli", latent_dim=8, num_features=64, hidden_dims=(64,)
    )
    return model, pd.DataFrame(pixels, columns=names), "digits.csv", {"max_steps": 600}


def _moons(seed: int) -> _Demo:
    import pandas as pd
    from sklearn.datasets import make_moons

    points, _ = make_moons(500, noise=0.1, random_state=seed)
    frame = pd.DataFrame(points, columns=["x", "y"])
    model = ll.FlowDensity(2, "coupling_nsf", hidden_dims=(32,))
    return model, frame, "moons.csv", {"max_steps": 400}
