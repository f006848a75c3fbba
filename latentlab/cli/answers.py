"""What a fit says of rows: their codes, what these explain, and what is missing in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import latentlab as ll
from latentlab.cli.commands import app
from latentlab.cli.inputs import bad_input, expect_place, expect_writable, names_of, warn_of
from latentlab.cli.options import Columns, Data, DrawSeed, Id, OutFile, Run, Time, option
from latentlab.cli.results import write_images, write_table
from latentlab.cli.rows import Rows, are_images, read_for

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["encode", "impute", "reconstruct"]

DRAWS = 1000  # that an expectation is averaged over
_CELLS = 2**23  # drawn at a time
_CODES = 1000  # of a row, that its missing cells are averaged over


@app.command("encode", epilog="Example: latentlab encode run/ new.csv --out codes.csv")
def encode(
    run: Run, data: Data, out: OutFile, columns: Columns = None, seed: DrawSeed = None
) -> None:
    """Latents of rows or images: the mean and standard deviation of each.

    For a model with latents of its own for each row, such as a VAE. FILE has one line for each
    row of DATA, or for each image of a folder, with the columns z_0, z_0_sd, z_1 and so on.
    """
    with bad_input(data):
        posterior = ll.load(run)
        model = _coder(posterior, run)
        rows = read_for(posterior, data, columns)
        expect_writable(out, data)
        warn_of(posterior, run)
        if isinstance(model, ll.VariationalAutoencoder):
            mean, sd = model.encode(rows.x, seed=posterior.seed if seed is None else seed)
        else:
            mean, covariance = model.encode(rows.x, _draws(posterior, seed))
            sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    found = dict(rows.kept)
    for j in range(mean.shape[1]):
        found |= {f"z_{j}": rows.column(mean[:, j]), f"z_{j}_sd": rows.column(sd[:, j])}
    write_table(found, out)


@app.command("reconstruct", epilog="Example: latentlab reconstruct run/ new.csv --out x.csv")
def reconstruct(
    run: Run,
    data: Data,
    out: Annotated[
        Path, option("FILE", "A .csv or .parquet file; for images a folder, or a .npz file.")
    ],
    columns: Columns = None,
    seed: DrawSeed = None,
) -> None:
    """Rows or images as their latents explain them: what each cell is expected to be.

    Missing cells are filled. Images become PNG files of the same names in a folder, or the arrays
    x (N, C, H, W) and names in a .npz file.
    """
    with bad_input(data):
        posterior = ll.load(run)
        model = _coder(posterior, run)
        rows = read_for(posterior, data, columns)
        (expect_place if are_images(model) else expect_writable)(out, data)
        warn_of(posterior, run)
        if isinstance(model, ll.VariationalAutoencoder):
            x = model.reconstruct(rows.x)
        else:
            x = model.reconstruct(rows.x, _draws(posterior, seed))
        if are_images(model):
            write_images(x, rows.kept["file"], out)
            return
    write_table(_table(posterior, rows, x), out)


@app.command("impute", epilog="Example: latentlab impute run/ gaps.csv --out filled.csv")
def impute(
    run: Run,
    data: Data,
    out: OutFile,
    columns: Columns = None,
    id: Id = None,
    time: Time = None,
    seed: DrawSeed = None,
) -> None:
    """Fill missing cells with what they are expected to be, given those that are there.

    Exact for mixtures, linear models and hidden Markov models; for a VAE the mean over 1000 draws.
    Cells that are there stay as they are.
    """
    with bad_input(data):
        posterior = ll.load(run)
        model = posterior.model
        fills = _is_coder(model) or isinstance(model, (ll.GaussianMixture, ll.HiddenMarkovModel))
        if not fills or are_images(model):
            what = "images" if are_images(model) else f"a {type(model).__name__}"
            raise ValueError(f"{run}: {what}: cannot fill missing cells")
        rows = read_for(posterior, data, columns, id, time)
        expect_writable(out, data)
        x = _filled(posterior, rows, seed)
        warn_of(posterior, run)
    write_table(_table(posterior, rows, x), out)


def _is_coder(model: object) -> bool:
    """Whether rows have latents of their own; kinds are looked up late, for --help is quick."""
    kinds = (ll.VariationalAutoencoder, ll.ProbabilisticPCA, ll.FactorAnalysis)
    return isinstance(model, kinds)


def _coder(posterior: ll.Posterior, run: Path) -> Any:  # noqa: ANN401
    """The model, if its rows have latents that can be read off them."""
    model = posterior.model
    if not _is_coder(model):
        raise ValueError(f"{run}: a {type(model).__name__} has no latents of its own for each row")
    return model


def _draws(posterior: ll.Posterior, seed: int | None) -> Any:  # noqa: ANN401
    return posterior._aligned(DRAWS, seed).draws


def _table(posterior: ll.Posterior, rows: Rows, x: Tensor) -> dict[str, Any]:
    """Cells under the names of their columns."""
    names = rows.x.names if posterior.names is None else names_of(posterior)
    return {**rows.kept, **{name: rows.column(x[:, j]) for j, name in enumerate(names)}}


def _filled(posterior: ll.Posterior, rows: Rows, seed: int | None) -> Tensor:
    """All rows, below each other, with their missing cells filled."""
    model: Any = posterior.model
    if isinstance(model, ll.VariationalAutoencoder):
        return _filled_by_draws(model, rows.x.x, posterior.seed if seed is None else seed)
    draws = _draws(posterior, seed)
    mean = model.impute(rows.x, draws).mean
    return mean[rows.x.inside] if isinstance(model, ll.HiddenMarkovModel) else mean


def _filled_by_draws(model: ll.VariationalAutoencoder, x: Tensor, seed: int) -> Tensor:
    """The rows that miss a cell at their means, as many at a time as memory holds."""
    import torch

    x, gaps = x.clone(), x.isnan().any(1).nonzero()[:, 0]
    step = max(1, _CELLS // (_CODES * x.shape[1]))
    for i, part in enumerate(gaps.split(step) if len(gaps) else ()):
        drawn = model.impute(x[part], 2, _CODES, seed=seed + i)
        x[part] = torch.where(x[part].isnan(), drawn.mean.to(x), x[part])
    return x
