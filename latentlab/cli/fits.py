"""``latentlab fit``: a model to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import latentlab as ll
from latentlab.cli.commands import fit
from latentlab.cli.inputs import bad_input, listed
from latentlab.cli.options import Columns, Data, Json, Out, Seed, option
from latentlab.cli.results import fit_and_write

__all__ = ["fit_flow", "fit_gmm", "fit_hmm", "fit_vae"]

_Restarts = Annotated[int | None, option("N", "Starts; by default 4.", least=1)]
_Steps = Annotated[int, option("N", "Steps at the most.", least=1)]
_Batch = Annotated[int | None, option("N", "Rows a step; by default all.", least=1)]
_Checkpoint = Annotated[Path | None, option("DIR", "Folder to go on from after a kill.")]
_Guide = Annotated[
    str,
    option("NAME", "auto, full_rank, flow, point, ..."),
]


@fit.command("gmm", epilog="Example: latentlab fit gmm measurements.csv --components 3 --out run/")
def fit_gmm(
    data: Data,
    components: Annotated[int, option("K", "Number of components.", least=1)],
    out: Out,
    columns: Columns = None,
    covariance: Annotated[str, option("KIND", "diag, spherical, tied or full.")] = "diag",
    guide: _Guide = "auto",
    num_restarts: _Restarts = None,
    max_steps: _Steps = 20_000,
    seed: Seed = 0,
    checkpoint: _Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Fit a mixture of Gaussians.

    Writes report.html, posterior.nc (ArviZ), summary.csv and model.safetensors to DIR. Empty cells
    are integrated out. Ctrl-C ends the climb early.
    """
    with bad_input(data):
        table = _table(data, columns)
        shape: Any = covariance  # the model says which there are
        model = ll.GaussianMixture(table.x.shape[1], components, covariance=shape)
    settings: dict[str, Any] = {"guide": guide, "num_restarts": num_restarts}
    settings |= {"max_steps": max_steps, "seed": seed, "checkpoint": checkpoint}
    fit_and_write(model, table, out, settings, file=data, as_json=as_json)


@fit.command("hmm", epilog="Example: latentlab fit hmm counts.csv --states 2 --emission poisson")
def fit_hmm(
    data: Data,
    states: Annotated[int, option("K", "Number of states.", least=1)],
    out: Out,
    emission: Annotated[
        str, option("KIND", "gaussian, gaussian_full, poisson, categorical or bernoulli.")
    ] = "gaussian",
    categories: Annotated[int | None, option("C", "Codes of a category.", least=1)] = None,
    id: Annotated[str | None, option("COL", "Column that tells sequences apart.")] = None,
    time: Annotated[str | None, option("COL", "Column that orders their steps.")] = None,
    columns: Columns = None,
    guide: _Guide = "auto",
    num_restarts: _Restarts = None,
    max_steps: _Steps = 20_000,
    seed: Seed = 0,
    checkpoint: _Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Fit a hidden Markov model to one sequence, or to several with --id.

    DATA has one line for each step, in order, or with --time in any order. Empty cells are missing
    and integrated out. --columns are those that are modelled, besides --id and --time. Ids may be
    text; times are numbers or dates, as 2026-01-31.
    """
    with bad_input(data):
        from latentlab.data.load import load_steps

        if emission == "categorical" and categories is None:
            raise ValueError("--categories: expected the number of codes of a column, 0 to C - 1")
        if emission != "categorical" and categories is not None:
            raise ValueError(f"--categories: is for --emission categorical, not {emission}")
        keys = [name for name in (id, time) if name is not None]
        frame = load_steps(data, listed(columns), keys=keys)
        found = ll.data.as_sequences(frame, id=id, time=time, argument=str(data))
        model = ll.HiddenMarkovModel(
            states, found.x.shape[-1], emissions=emission, num_categories=categories
        )
    settings: dict[str, Any] = {"guide": guide, "num_restarts": num_restarts}
    settings |= {"max_steps": max_steps, "seed": seed, "checkpoint": checkpoint}
    fit_and_write(model, found, out, settings, file=data, as_json=as_json)


@fit.command("vae", epilog="Example: latentlab fit vae measurements.csv --latent 2 --out run/")
def fit_vae(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A file of rows, or a folder of PNG images.")
    ],
    latent: Annotated[int, option("L", "Number of latent dimensions.", least=1)],
    out: Out,
    likelihood: Annotated[
        str | None,
        option(
            "KIND",
            "gaussian, bernoulli, poisson or categorical:C; with commas one for each column. By "
            "default bernoulli for images, gaussian for tables.",
        ),
    ] = None,
    columns: Columns = None,
    batch_size: _Batch = None,
    max_steps: _Steps = 20_000,
    seed: Seed = 0,
    checkpoint: _Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Fit a variational autoencoder to a table, or to a folder of PNG images.

    Empty cells are missing: their factor is left out of the likelihood.
    """
    x: Any
    with bad_input(data):
        if data.is_dir():
            x, likelihood = ll.data.load_images(data).x, likelihood or "bernoulli"
            shape: Any = tuple(x.shape[1:])
        else:
            x = _table(data, columns)
            shape = x.x.shape[1]
        model = ll.VariationalAutoencoder(
            likelihood=_likelihood(likelihood or "gaussian"),
            latent_dim=latent,
            num_features=shape,
            seed=seed,
        )
    settings: dict[str, Any] = {"batch_size": batch_size, "max_steps": max_steps}
    settings |= {"seed": seed, "checkpoint": checkpoint}
    fit_and_write(model, x, out, settings, file=data, as_json=as_json)


@fit.command("flow", epilog="Example: latentlab fit flow measurements.csv --out run/")
def fit_flow(
    data: Data,
    out: Out,
    kind: Annotated[str, option("KIND", "nsf, coupling_nsf, maf or realnvp.")] = "nsf",
    columns: Columns = None,
    batch_size: _Batch = None,
    max_steps: _Steps = 20_000,
    seed: Seed = 0,
    checkpoint: _Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Fit a flow to the density of a table.

    A tenth of the rows is kept aside and tells when to stop.
    """
    with bad_input(data):
        table = _table(data, columns)
        model = ll.FlowDensity(table.x.shape[1], kind, seed=seed)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"batch_size": batch_size, "max_steps": max_steps}
    settings |= {"seed": seed, "checkpoint": checkpoint}
    fit_and_write(model, table, out, settings, file=data, as_json=as_json)


def _likelihood(words: str) -> Any:  # noqa: ANN401
    """What is meant by ``gaussian``, ``categorical:3`` or ``gaussian,poisson,categorical:3``."""
    from latentlab.distributions import Categorical, Columns

    kinds: dict[str, Any] = {word: word for word in ("gaussian", "bernoulli", "poisson")}
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        name, _, count = word.partition(":")
        if name == "categorical" and count.isdecimal():
            kinds.setdefault(word, Categorical(int(count)))
        if word not in kinds:
            raise ValueError(
                "--likelihood: expected gaussian, bernoulli, poisson or, for codes 0 to 2, "
                f"categorical:3, got {word!r}"
            )
    found = [kinds[word] for word in chosen]
    return found[0] if len(found) == 1 else Columns(found)


def _table(data: Path, columns: str | None) -> ll.data.Table:
    """The rows of a file, cells may be missing."""
    from latentlab.data.checks import as_rows

    return as_rows(ll.data.load(data, listed(columns)), argument=str(data), allow_missing=True)
