"""Data for a fit: a table, sequences or images, as the model of that fit reads them."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import latentlab as ll
from latentlab.cli.inputs import listed, names_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

__all__ = ["Rows", "are_images", "read_for"]


class Rows(NamedTuple):
    """Rows as the model reads them.

    Arguments:
        x: a ``Table``, ``Sequences``, or images of shape (N, C, H, W).
        kept: columns that are not modelled but belong to the rows: ids, times, names of files.
        order: for sequences, which row of the file each step is.
    """

    x: Any
    kept: Mapping[str, Any]
    order: Tensor | None = None

    def column(self, values: Tensor) -> np.ndarray:
        """Values of all rows, in the order of the file."""
        if self.order is not None:
            values = values[self.order.argsort()]
        return values.numpy(force=True)


def are_images(model: object) -> bool:
    """Whether the rows of a model are images."""
    return isinstance(model, ll.VariationalAutoencoder) and len(model.event_shape) == 3


def read_for(
    posterior: ll.Posterior,
    data: Path,
    columns: str | None = None,
    id: str | None = None,
    time: str | None = None,
) -> Rows:
    """Data of the kind that was fitted.

    Arguments:
        posterior: the fit.
        data: a file or, for images, a folder.
        columns: those to take, ``a,b``.
        id: the column that tells sequences apart.
        time: the column that orders their steps.

    Raises:
        ValueError: for data of another kind, or with other columns.
    """
    model = posterior.model
    if are_images(model):
        return _images(model, data)
    if isinstance(model, ll.HiddenMarkovModel):
        return _sequences(posterior, data, columns, [k for k in (id, time) if k], id, time)
    if id is not None or time is not None:
        raise ValueError(f"--id, --time: a {type(model).__name__} has no sequences")
    return Rows(_matching(posterior, data, columns), {})


def _images(model: Any, data: Path) -> Rows:  # noqa: ANN401
    channels, height, width = model.event_shape
    if data.is_file():
        raise ValueError(f"{data}: the fit is of images; expected a folder of PNG files")
    images = ll.data.load_images(data, grey=channels == 1)
    if tuple(images.x.shape[1:]) != (channels, height, width):
        came = "x".join(map(str, images.x.shape[2:]))
        raise ValueError(f"{data}: expected images of {height}x{width} as fitted, got {came}")
    return Rows(images.x, {"file": images.names})


def _matching(posterior: ll.Posterior, data: Path, columns: str | None) -> ll.data.Table:
    from latentlab.data.checks import as_rows

    names = names_of(posterior)
    table = ll.data.load(data, listed(columns))
    _refuse_more(data, table.names, names)
    return as_rows(table, argument=str(data), min_rows=1, allow_missing=True, names=names)


def _sequences(
    posterior: ll.Posterior,
    data: Path,
    columns: str | None,
    keys: list[str],
    id: str | None,
    time: str | None,
) -> Rows:
    """Sequences, and where in the file each step stands."""
    from latentlab.data.load import load_steps

    model: Any = posterior.model
    frame = load_steps(data, listed(columns), keys=keys)
    given = tuple(frame.columns)
    names = posterior.names or tuple(name for name in given if name not in keys)
    _refuse_more(data, given, (*names, *keys), " and name ids and times with --id and --time")
    # Where a step stands travels with it as one more column.
    place = max(given, key=len) + "_row"  # longer than any other name
    wide = frame.assign(**{place: range(len(frame))})
    found = ll.data.as_sequences(wide, id=id, time=time, argument=str(data))
    order = found.x[..., -1][found.inside].long()
    x = ll.data.Sequences(found.x[..., :-1], found.lengths, found.names[:-1])
    (cells, lengths), _, _ = model.arrange(x, names=posterior.names)
    kept = {key: _as_written(frame[key]) for key in keys}
    return Rows(ll.data.Sequences(cells, lengths, names), kept, order)


def _as_written(column: pd.Series) -> np.ndarray:
    """Ids or times for a table: whole numbers as such, text as it stands in the file."""
    texts = column.astype(str)
    if column.dtype.kind == "f":
        texts = texts.str.removesuffix(".0")
    whole = texts.str.fullmatch(r"0|-?[1-9]\d{0,17}").all()
    return texts.astype("int64").to_numpy() if whole else column.to_numpy()


def _refuse_more(
    data: Path, given: tuple[str, ...], names: tuple[str, ...], more: str = ""
) -> None:
    if set(given) > set(names):
        line = io.StringIO()
        csv.writer(line).writerow(names)
        way = shlex.quote(line.getvalue().strip())
        raise ValueError(f"{data}: more columns than were fitted; add --columns {way}{more}")
