"""What an autoencoder makes of its rows, in one figure: decoded, made up, along latents, a map.

Letters: N rows, C channels, H height, W width, D columns, L latent dimensions, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentlab.distributions import Categorical, Columns, Likelihood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLOTTED", "Coded", "plot_autoencoder"]

PLOTTED = 2_000  # rows that are looked at
_IMAGES = 10  # in a row of the picture
_DIMS = 6  # that are walked along, those used most
_STEPS = np.linspace(-2, 2, 9)  # along each
_COLUMNS = 20  # of a table whose reconstructions are compared


@dataclass(frozen=True, eq=False)
class Coded:
    """Rows, their codes and the way back.

    Arguments:
        x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
        names: of the columns of a table, D of them.
        likelihood: of a cell.
        decode: codes (..., L) -> rows.
        loc: codes of the rows, shape (N, L).
        scale: their standard deviations, shape (N, L), where the prior is standard normal.
        prior: draws of the prior, shape (S, L), where there is one.
    """

    x: Tensor
    names: Sequence[str]
    likelihood: Likelihood
    decode: Callable[[Tensor], Tensor]
    loc: Tensor
    scale: Tensor | None = None
    prior: Tensor | None = None


def plot_autoencoder(coded: Coded) -> Figure:
    """Pictures below each other, as many as there is something to show.

    Images: some above their reconstructions, some that are made up, walks along the latents.
    Tables: how near the decoded columns are to the data, and what each latent does to them. At the
    end for both a map of the codes.

    Arguments:
        coded: the rows.
    """
    from latentlab.report.canvas import WIDTH, new_figure

    has_images = coded.x.dim() == 4 and coded.x.shape[1] in (1, 3)
    panels = _of_images(coded) if has_images else _of_table(coded) if coded.x.dim() == 2 else []
    panels = [*panels, *_of_latents(coded), (3.9, lambda ax: _map(coded, ax))]
    heights = [height for height, _ in panels]
    figure = new_figure(WIDTH, sum(heights))
    # Each with margins of its own: names beside one shall not make the others narrow.
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (_, draw) in zip(parts, panels, strict=True):
        part.set_facecolor("none")
        draw(part.subplots())
    return figure


_Panel = tuple[float, "Callable[[Axes], object]"]  # height in inches, what draws it


def _of_images(coded: Coded) -> list[_Panel]:
    from latentlab.report.canvas import note
    from latentlab.report.images import plot_images, plot_reconstructions

    H, W = coded.x.shape[2:]
    some = torch.arange(len(coded.x))[:: -(-len(coded.x) // _IMAGES)]
    back = coded.decode(coded.loc[some])
    dims = _dims(coded)
    walks = torch.cat([coded.decode(_walk(coded, j, _STEPS)) for j in dims])

    def decoded(ax: Axes) -> None:
        plot_reconstructions(_numpy(coded.x[some]), _numpy(back), ax)
        note(ax, ["images above what is decoded from their codes"])

    def made_up(prior: Tensor, ax: Axes) -> None:
        plot_images(_numpy(coded.decode(prior[: 2 * _IMAGES])), _IMAGES, ax=ax)
        note(ax, ["made up: decoded from draws of the prior"])
        ax.set_label("images made up from draws of the prior")

    def along(ax: Axes) -> None:
        plot_images(_numpy(walks), len(_STEPS), [f"z[{j}]" for j in dims], ax)
        note(ax, [f"along each latent, {_range(coded)}"])
        ax.set_label("walks along the latents")

    def tall(num_rows: int, num_columns: int) -> float:
        return min(4.6 * num_rows * H / (num_columns * W) + 0.4, 7.0)

    panels: list[_Panel] = [(tall(2, len(some)), decoded)]
    if coded.prior is not None:
        panels.append((tall(2, _IMAGES), partial(made_up, coded.prior)))
    return [*panels, (tall(len(dims), len(_STEPS)), along)]


def _of_table(coded: Coded) -> list[_Panel]:
    from latentlab.report.canvas import note
    from latentlab.report.images import plot_effects
    from latentlab.report.plots import plot_intervals

    x, names = _numpy(coded.x), [*coded.names]
    numbers = [d for d, is_code in enumerate(_codes(coded)) if not is_code]
    found = [(d, _agreement(x[:, d], back)) for d, back in _decoded(coded, numbers)]
    found = [(d, limits) for d, limits in found if np.isfinite(limits).all()]
    dims, spread = _dims(coded), np.nanstd(x, 0)
    ends = np.array([_STEPS[0], _STEPS[-1]])
    walks = np.stack([_numpy(coded.decode(_walk(coded, j, ends))) for j in dims])
    change = np.full((len(dims), len(names)), np.nan)
    used = [d for d in numbers if spread[d] > 0]
    change[:, used] = (walks[:, 1] - walks[:, 0])[:, used] / spread[used]

    def decoded(ax: Axes) -> None:
        labels = [names[d] for d, _ in found[:_COLUMNS]]
        mean, lower, upper = np.array([limits for _, limits in found[:_COLUMNS]]).T
        plot_intervals(labels, mean, lower, upper, ax)
        ax.locator_params(axis="x", nbins=3)
        lines = ["correlation of data and", "decoded, 90 % interval"]
        more = [f"the first {_COLUMNS} of {len(found)} columns"] if len(found) > _COLUMNS else []
        note(ax, lines + more)
        ax.set_label("correlation of each column with its reconstruction")

    def effects(ax: Axes) -> None:
        plot_effects(change, names, dims, ax)
        note(ax, [f"change of columns, in their sd, along each latent, {_range(coded)}"])

    panels: list[_Panel] = []
    if found:
        panels.append((0.24 * max(len(found[:_COLUMNS]), 2) + 0.85, decoded))
    return [*panels, (0.35 * len(dims) + 1.6, effects)] if used else panels


def _of_latents(coded: Coded) -> list[_Panel]:
    """How much each dimension is used, where the prior says what it is not to be."""
    if coded.scale is None or len(coded.loc) < 2:
        return []
    from latentlab.diagnostics import collapse
    from latentlab.report.canvas import note
    from latentlab.report.plots import plot_intervals

    found = collapse(coded.loc, coded.scale)
    if found.kl is None or found.kl_se is None:
        return []
    mean, half = _numpy(found.kl[:_COLUMNS]), 1.645 * _numpy(found.kl_se[:_COLUMNS])
    L = coded.loc.shape[1]

    def used(ax: Axes) -> None:
        plot_intervals([f"z[{j}]" for j in range(len(mean))], mean, mean - half, mean + half, ax)
        ax.locator_params(axis="x", nbins=4)
        more = [f"the first {_COLUMNS} of {L} latents"] if L > _COLUMNS else []
        note(ax, ["KL to the prior, nats per row, 90 % interval", *more])
        ax.set_label("KL of each latent dimension to the prior")

    return [(0.24 * max(len(mean), 2) + 0.85, used)]


def _map(coded: Coded, ax: Axes) -> None:
    from latentlab.report.images import plot_latents

    scale = None if coded.scale is None else _numpy(coded.scale)
    others = coded.prior if coded.scale is None else None
    plot_latents(_numpy(coded.loc), scale, ax, None if others is None else _numpy(others))


def _dims(coded: Coded) -> list[int]:
    from latentlab.report.images import most_used

    scale = None if coded.scale is None else _numpy(coded.scale)
    return most_used(_numpy(coded.loc), scale, _DIMS)


def _walk(coded: Coded, dim: int, steps: np.ndarray) -> Tensor:
    """Codes along a dimension, (len(steps), L): in units of a normal prior, else of the codes."""
    loc = coded.loc
    normal = coded.scale is not None
    origin = torch.zeros_like(loc[0]) if normal else loc.mean(0)
    unit = 1.0 if normal else loc[:, dim].std(correction=0)
    along = origin.repeat(len(steps), 1)
    along[:, dim] += unit * torch.as_tensor(steps, dtype=loc.dtype, device=loc.device)
    return along


def _range(coded: Coded) -> str:
    whose = "of the prior" if coded.scale is not None else "of the codes"
    return f"from -2 to 2 sd {whose}"


def _decoded(coded: Coded, columns: Sequence[int]) -> list[tuple[int, np.ndarray]]:
    back = _numpy(coded.decode(coded.loc))
    return [(d, back[:, d]) for d in columns]


def _agreement(x: np.ndarray, back: np.ndarray) -> tuple[float, float, float]:
    """Correlation of the cells that are there with the decoded ones, and its 90 % interval."""
    seen = np.isfinite(x)
    x, back = x[seen], back[seen]
    if len(x) < 5 or x.std() == 0 or back.std() == 0:
        return np.nan, np.nan, np.nan
    place = np.arctanh(np.clip(np.corrcoef(x, back)[0, 1], -1 + 1e-12, 1 - 1e-12))
    half = 1.645 / np.sqrt(len(x) - 3)  # of Fisher's transform
    return tuple(np.tanh([place, place - half, place + half]).tolist())


def _codes(coded: Coded) -> list[bool]:
    """For each column whether its cells are codes, which have no size."""
    likelihood, D = coded.likelihood, coded.x.shape[1]
    if not isinstance(likelihood, Columns):
        return [isinstance(likelihood, Categorical)] * D
    found = [False] * D
    for part, columns in zip(likelihood.parts, likelihood.places, strict=True):
        for column in columns:
            found[column] = isinstance(part, Categorical)
    return found


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().numpy(force=True)
