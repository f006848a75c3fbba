"""``latentlab demo``: a fit that needs no file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.inputs import bad_input
from latentlab.cli.options import Json, Out, Seed
from latentlab.cli.results import fit_and_write

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
    vae: eight latents to 1000 images of digits. flow: the density of 500 points on two moons. DIR
    also gets the data, such as iris.csv, to go on with.
    """
    makers = {"gmm": _irises, "hmm": _counts, "vae": _digits, "flow": _moons}
    with bad_input():
        if model not in makers:
            raise ValueError(f"MODEL: expected {', '.join(makers)}, got {model!r}")
    built, read, files, settings = makers[model](seed)
    fit_and_write(built, read, out, {"seed": seed, **settings}, files, as_json=as_json)


_Demo = tuple[Any, Any, dict[str, bytes], dict[str, Any]]  # model, data, their files, settings


def _table(frame: Any, name: str) -> tuple[Any, dict[str, bytes]]:  # noqa: ANN401
    """A frame as a table, and as a file."""
    return ll.data.load(frame), {name: frame.to_csv(index=False).encode()}


def _irises(seed: int) -> _Demo:
    from sklearn.datasets import load_iris

    petals = load_iris(as_frame=True).frame[["petal length (cm)", "petal width (cm)"]]
    model = ll.GaussianMixture(num_features=2, num_components=3)
    return model, *_table(petals, "iris.csv"), {}


def _counts(seed: int) -> _Demo:
    """Counts of a process that is calm or busy, for about 8 steps on end."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    busy = np.cumsum(rng.random(200) < 1 / 8) % 2
    frame = pd.DataFrame({"count": rng.poisson(np.where(busy, 9.0, 2.0))})
    model = ll.HiddenMarkovModel(2, 1, emissions="poisson")
    return model, *_table(frame, "counts.csv"), {"num_restarts": 2}


def _digits(seed: int) -> _Demo:
    """Images of handwritten digits, 8 by 8 pixels; rows kept aside say when to stop."""
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:1000] / 16 * 255).round().astype("uint8")
    files = {}
    for i, picture in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        files[f"digits/{i:03}.png"] = buffer.getvalue()
    model = ll.VariationalAutoencoder(
        likelihood="bernoulli",
        latent_dim=8,
        num_features=(1, 8, 8),
        hidden_dims=(64,),
        seed=seed,
    )
    settings = {"batch_size": 128, "held_out": 0.1, "max_steps": 10_000}
    return model, torch.from_numpy(pixels).float()[:, None] / 255, files, settings


def _moons(seed: int) -> _Demo:
    import pandas as pd
    from sklearn.datasets import make_moons

    points, _ = make_moons(500, noise=0.1, random_state=seed)
    model = ll.FlowDensity(2, "coupling_nsf", hidden_dims=(32,), seed=seed)
    frame = pd.DataFrame(points, columns=["x", "y"])
    return model, *_table(frame, "moons.csv"), {"max_steps": 6000}
