"""Pictures of a fit, drawn from arrays.

Each function draws on ``ax``, or on a figure of its own, and never touches pyplot: no window, no
backend and no setting of the caller changes. A cell that is NaN is missing and is left out.

Letters: N rows, D columns, S draws, T steps, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from latentlab.report.canvas import (
    AMBER,
    BLUE,
    GREEN,
    VERMILION,
    blank_axes,
    blank_panels,
    calm,
    expect_shape,
    legend,
    name_rows,
    note,
    rounded,
    short,
    thinned,
    word,
)
from latentlab.report.mixture import plot_mixture
from latentlab.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_intervals", "plot_khat", "plot_losses", "plot_mixture", "plot_predictive"]

_BLOCKS = 240  # of a loss
_REPLICATES, _CELLS, _PANELS = 30, 5000, 6  # draws, rows and columns of a predictive check


def plot_losses(
    losses: np.ndarray,
    stage_starts: Sequence[int],
    stage_elbos: Sequence[float] | None = None,
    ax: Axes | None = None,
    stop_reason: str | None = None,
    held_out: bool = False,
) -> Axes:
    """The climb: the loss in blocks of steps, where each stage began, and why it stopped.

    The line is the median of a block, the band holds 90 % of its steps. The axis shows where the
    climb ends; a steep beginning may leave it at the top.

    Arguments:
        losses: negative ELBO of each step in nats, shape (T,).
        stage_starts: the step at which each stage began.
        stage_elbos: the ELBO in nats at the end of each stage that ended.
        ax: where to draw; by default a new figure.
        stop_reason: why the climb ended, in words.
        held_out: whether the ELBO of a stage is that of rows kept aside, scaled to the others.

    Returns:
        The axes.
    """
    losses = np.asarray(losses, float)
    steps = np.flatnonzero(np.isfinite(losses))
    ax = blank_axes(ax, 2.9)
    ax.set(xlabel="step", ylabel="negative ELBO (nats)")
    ax.set_label(f"loss of {len(losses)} steps in {len(stage_starts)} stages")
    for start in stage_starts:
        ax.axvline(
            start, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (4, 3)), label="_stage"
        )

    elbos = np.asarray([] if stage_elbos is None else stage_elbos, float)
    ends = np.append(np.asarray(stage_starts, int)[1:], len(losses))[: len(elbos)]
    if len(steps):
        blocks = np.array_split(steps, min(len(steps), _BLOCKS))
        middle = [block.mean() for block in blocks]
        low, median, high = np.array([np.quantile(losses[b], (0.05, 0.5, 0.95)) for b in blocks]).T
        ax.fill_between(middle, low, high, color=BLUE, alpha=0.25, linewidth=0)
        ax.plot(middle, median, color=BLUE, linewidth=1.4, label="loss")
        ax.set_ylim(_robust_limits(losses[steps], -elbos))
    if len(elbos):
        label = f"{'rows kept aside' if held_out else 'ELBO'}, at a stage's end"
        ax.plot(ends, -elbos, "o", color=VERMILION, markersize=5, label=label)
        legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    ax.ticklabel_format(style="plain", useOffset=False)
    return note(ax, [f"stopped: {stop_reason}"] if stop_reason else [])


def plot_intervals(
    labels: Sequence[str],
    mean: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    ax: Axes | None = None,
) -> Axes:
    """The numbers of one site: each a dot in its interval, and written out beside it.

    Arguments:
        labels: names of the numbers.
        mean: their means, in units that can stand on one axis.
        lower: lower ends of the intervals.
        upper: upper ends.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    rows = np.arange(len(labels))
    ax = blank_axes(ax, 0.24 * max(len(labels), 2) + 0.85)
    ax.hlines(rows, lower, upper, color=BLUE, linewidth=2.2, alpha=0.55)
    ax.plot(mean, rows, "o", color=BLUE, markersize=5)
    for row, number in enumerate(zip(mean, lower, upper, strict=True)):
        # Beside a column in large units, the interval of one in small units is but a dot.
        said = "{}  [{}, {}]".format(*(rounded(n, number[2] - number[1]) for n in number))
        said = said if number[1] < number[2] else rounded(number[0], 0.0)
        word(ax, said, (1.02, row), coords=("axes fraction", "data"), ha="left")
    ax.locator_params(axis="x", nbins=5)
    ax.set_label(f"means and intervals of {len(labels)} numbers")
    return name_rows(ax, labels)


def plot_khat(
    names: Sequence[str], khat: np.ndarray, se: np.ndarray, ax: Axes | None = None
) -> Axes:
    """The k-hat of each block with its standard error: below 0.5 good, above 0.7 bad.

    Arguments:
        names: names of the B blocks.
        khat: their k-hats, shape (B,); -inf where the guide is exact.
        se: standard errors, shape (B,), NaN where not known.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    khat, se = np.asarray(khat, float), np.nan_to_num(np.asarray(se, float), posinf=0.0)
    ends = (khat - se, khat + se, np.array([0.0, 1.0]))
    seen = np.concatenate([end[np.isfinite(end)] for end in ends])
    left, right = seen.min() - 0.12, seen.max() + 0.12
    ax = blank_axes(ax, 0.3 * max(len(names), 2) + 1.0)
    readings = {"good": GREEN, "strained": AMBER, "bad": VERMILION}
    bands = pairwise((left, 0.5, 0.7, right))
    for (reading, colour), (start, end) in zip(readings.items(), bands, strict=True):
        ax.axvspan(start, end, color=colour, alpha=0.13, linewidth=0)
        word(ax, reading, ((start + end) / 2, 1), (0, 8), ("data", "axes fraction"))
    for row, (value, error) in enumerate(zip(khat, se, strict=True)):
        if np.isfinite(value):
            ax.errorbar(value, row, xerr=error, fmt="o", color=BLUE, markersize=6, linewidth=1.6)
        elif value < 0:
            ax.plot(left, row, "<", color=BLUE, markersize=7, clip_on=False)
            word(ax, "exact", (left, row), (24, 0))
        else:
            ax.plot(right, row, ">", color=VERMILION, markersize=7, clip_on=False)
            word(ax, "not finite", (right, row), (-34, 0))
    ax.set(xlim=(left, right), xlabel="k-hat")
    ax.set_label(f"k-hat of {len(names)} blocks")
    return name_rows(ax, names)


def plot_predictive(
    x: np.ndarray, x_new: np.ndarray, names: Sequence[str], ax: Axes | Sequence[Axes] | None = None
) -> Figure:
    """Posterior predictive check: the distribution of each column over those of new data.

    Shares of rows up to a value (ECDFs) need no bandwidth. New data are compared in the cells
    that the data have. Of more than six columns, the six are drawn that differ most.

    Arguments:
        x: data, shape (N, D).
        x_new: draws of new data, shape (S, N, D).
        names: names of the D columns.
        ax: one axes per column drawn; by default a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: if the shapes do not agree.
    """
    x, x_new = np.asarray(x), np.asarray(x_new)
    expect_shape("x", x, (len(x), len(names)))
    expect_shape("x_new", x_new, (len(x_new), *x.shape))
    columns = list(range(len(names)))
    if len(names) > _PANELS:
        gaps = [_gap(*_column(x, x_new, d)) for d in columns]
        columns = sorted(np.argsort(gaps, kind="stable")[-_PANELS:].tolist())
    axes = blank_panels(len(columns)) if ax is None else np.atleast_1d(np.asarray(ax, object))
    expect_shape("ax", np.asarray(axes), (len(columns),))

    for panel, d in zip(axes, columns, strict=True):
        data, replicates = _column(x, x_new, d)
        for replicate in replicates:
            panel.plot(*_ecdf(replicate), color=BLUE, alpha=0.25, linewidth=0.8)
        panel.plot([], [], color=BLUE, linewidth=1.6, label="new data")
        panel.plot(*_ecdf(data), color=INK, linewidth=1.6, label="data")
        calm(panel).set(xlabel=short(names[d]), ylabel="share of rows", ylim=(-0.02, 1.02))
    legend(axes[0], loc="upper left")
    axes[0].set_label("distributions of the data and of new data, column by column")
    if len(columns) < len(names):
        note(axes[0], [f"the {_PANELS} of {len(names)} columns that differ most"])
    return cast("Figure", axes[0].get_figure())


def _column(x: np.ndarray, x_new: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells of a column that the data have, and draws of the same cells."""
    seen = np.flatnonzero(np.isfinite(x[:, d]))
    rows = seen[thinned(len(seen), _CELLS)]
    replicates = x_new[:, :, d][thinned(len(x_new), _REPLICATES)]
    return x[rows, d].astype(float), replicates[:, rows].astype(float)


def _gap(data: np.ndarray, replicates: np.ndarray) -> float:
    """Largest distance between the distribution of the data and that of all new data."""
    samples = [np.sort(values[np.isfinite(values)]) for values in (data, replicates.ravel())]
    if not min(map(len, samples)):
        return 0.0
    grid = np.concatenate([samples[0], samples[1][thinned(len(samples[1]), _CELLS)]])
    shares = [np.searchsorted(values, grid, side="right") / len(values) for values in samples]
    return float(np.abs(shares[0] - shares[1]).max())


def _ecdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values, and the share of values up to each of them."""
    values = np.sort(values[np.isfinite(values)])
    at = thinned(len(values), 120)
    shares = (at + 1) / max(len(values), 1)
    return np.append(values[:1], values[at]), np.append(np.zeros(len(values[:1])), shares)


def _robust_limits(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(losses, (0.002, 0.95))
    shown = np.append(others[np.isfinite(others)], (low, high))
    margin = max(0.06 * np.ptp(shown), 0.1)  # less than a tenth of a nat is nothing to look at
    return float(shown.min() - margin), float(shown.max() + margin)
