"""What comes out: a folder of results, or a table."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

import latentlab as ll
from latentlab.cli.inputs import bad_input
from latentlab.cli.show import (
    busy,
    show,
    show_json,
    show_pairs,
    show_summary,
    show_verdict,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

__all__ = ["EXIT", "facts", "fit_and_write", "summary_of", "write_images", "write_table"]

EXIT = {"use": 0, "use with care": 0, "do not use": 1}
INTERRUPTED = 130

FILES = {
    "report": "report.html",
    "posterior": "posterior.nc",
    "summary": "summary.csv",
    "model": "model.safetensors",
}


def fit_and_write(
    model: Any,  # noqa: ANN401
    data: Any,  # noqa: ANN401
    out: Path,
    settings: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    *,
    file: object = None,
    as_json: bool,
) -> None:
    """Fit, judge, write and show; ``files`` are further ones for the folder, ``file`` the data."""
    with results_in(out) as aside:
        try:
            with bad_input(file):
                posterior = ll.fit(model, data, **settings)
        except ll.FitDivergedError as error:
            raise typer.TyperException(str(error)) from error
        with busy("checking the fit and writing its report"):
            verdict, summary = posterior.check(), posterior.summary()
            figure = _figure(posterior)
            for name, content in (files or {}).items():
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_bytes(content)
            posterior.report(aside / FILES["report"])
            posterior.to_arviz().to_netcdf(str(aside / FILES["posterior"]))
            summary.to_csv(aside / FILES["summary"], index=False)
            posterior.save(aside / FILES["model"])
    paths = {what: str(out / name) for what, name in FILES.items()}
    if as_json:
        show_json({**facts(posterior, verdict, summary), "paths": paths})
    else:
        show_verdict(verdict)
        if len(summary):
            show_summary(summary, paths["summary"])
        steps = f"{len(posterior.losses)} steps in {posterior.seconds:.1f} s"
        show_pairs({name: f"{value}, {steps}" for name, value in figure.items()} | paths)
    interrupted = posterior.stop_reason.startswith("interrupted")
    raise typer.Exit(INTERRUPTED if interrupted else EXIT[verdict.level])


@contextmanager
def results_in(out: Path) -> Iterator[Path]:
    """A hidden folder in ``out``; at the end its files are put in place, or none of them is."""
    from latentlab.inference.checkpoint import probe

    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        probe(out)
        with TemporaryDirectory(dir=out, prefix=".latentlab-") as aside:
            yield Path(aside)
            for file in [path for path in Path(aside).rglob("*") if path.is_file()]:
                place = out / file.relative_to(aside)
                place.parent.mkdir(exist_ok=True)
                file.replace(place)
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_table(columns: Mapping[str, Any], file: Path | None, *, quiet: bool = False) -> None:
    """All of a file or nothing of it; without a file, CSV on standard output."""
    import pandas as pd

    from latentlab.inference.checkpoint import write_atomically

    frame = pd.DataFrame(columns)
    if file is None:
        frame.to_csv(sys.stdout, index=False)
        return
    buffer = io.BytesIO()
    frame.to_csv(buffer, index=False) if file.suffix == ".csv" else frame.to_parquet(buffer)
    write_atomically(file, buffer.getvalue())
    if not quiet:
        show(f"{file}: {len(frame)} rows of {', '.join(columns)}")


def write_images(x: Tensor, names: Sequence[str], place: Path) -> None:
    """Images (N, C, H, W) from 0 to 1 as PNG files in a folder, or as the array x of a .npz."""
    import numpy as np

    from latentlab.inference.checkpoint import write_atomically

    cells = x.numpy(force=True)
    if place.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, x=cells, names=np.array(list(names)))
        write_atomically(place, buffer.getvalue())
        show(f"{place}: x {cells.shape}, names")
        return
    from PIL import Image

    pixels = (cells.clip(0, 1) * 255).round().astype(np.uint8)
    with results_in(place) as aside:
        for name, image in zip(names, pixels, strict=True):
            layers = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            Image.fromarray(layers).save(aside / name)
    show(f"{place}: {len(pixels)} PNG files")


def summary_of(posterior: ll.Posterior) -> pd.DataFrame | None:
    """The summary; ``None`` where it is of rows that are not at hand."""
    return None if posterior.reads_data else posterior.summary()


def _figure(posterior: ll.Posterior) -> dict[str, str]:
    """How well the model fits, with an error: without latents the ELBO is no estimate."""
    if posterior.pair.latents or posterior.pair.summed_out:
        return {"ELBO": f"{posterior.elbo} nats"}
    if posterior.held_out is not None:
        return {"held out": f"{posterior.held_out} nats per row"}
    return {"log-likelihood": f"{posterior.elbo.value:.6g} nats, exact for the fitted rows"}


def facts(
    posterior: ll.Posterior, verdict: ll.Verdict, summary: pd.DataFrame | None
) -> dict[str, Any]:
    """A fit as JSON values."""
    spec, held = verdict.spec(), posterior.held_out
    return {
        "verdict": spec.pop("level"),
        **spec,
        "elbo": {"value": posterior.elbo.value, "se": posterior.elbo.se},
        "held_out": held and {"value": held.value, "se": held.se},
        "converged": posterior.converged,
        "stop_reason": posterior.stop_reason,
        "steps": len(posterior.losses),
        "seconds": posterior.seconds,
        "seed": posterior.seed,
        "summary": None if summary is None else summary.to_dict("records"),
    }
