"""A picture of a density of rows, on one or two of their columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentlab.report.canvas import BLUE, VERMILION, blank_axes, note, short, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_density"]

_POINTS = 1_000
_GRID = 80
_MASSES = (0.95, 0.8, 0.5, 0.2)  # that the contours enclose


def plot_density(
    x: np.ndarray,
    x_new: np.ndarray,
    names: Sequence[str],
    density: Callable[[np.ndarray], np.ndarray] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Rows with the density that was fitted to them, or with rows drawn from it.

    One column gets a histogram with the density, two a scatter with contours that enclose a fifth,
    half, four fifths and 95 percent of new rows, more a scatter of the first two columns, of data
    and of new rows.

    Arguments:
        x: rows, shape (N, D).
        x_new: rows drawn from the density, shape (S, D).
        names: of the columns.
        density: points (M, D) -> densities (M,); needed up to D = 2.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = blank_axes(ax, 3.4)
    D = x.shape[1]
    ax.set_xlabel(short(names[0]))
    if D == 1 and density is not None:
        low, high = x.min(), x.max()
        grid = np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 4 * _GRID)
        ax.hist(x[:, 0], bins="sqrt", density=True, color=BLUE, alpha=0.45)
        ax.plot(grid, density(grid[:, None]), color=VERMILION)
        ax.set_ylabel("density")
        ax.set_label("histogram of the data with the density")
        return ax
    ax.set_ylabel(short(names[1]))
    rows = thinned(len(x), _POINTS)
    if D == 2 and density is not None:
        _contours(ax, x, x_new, density)
        ax.set_label("data with contours of the density")
        note(ax, ["contours enclose 20, 50, 80 and 95 % of new rows"])
    else:
        new = thinned(len(x_new), _POINTS)
        ax.plot(*x_new[new, :2].T, "o", color=VERMILION, alpha=0.4, markersize=3, mew=0)
        ax.set_label("data and new rows in the first two columns")
        note(ax, [f"red: new rows; the first two of {D} columns"])
    ax.plot(*x[rows, :2].T, "o", color=BLUE, alpha=0.45, markersize=3, mew=0)
    return ax


def _contours(
    ax: Axes, x: np.ndarray, x_new: np.ndarray, density: Callable[[np.ndarray], np.ndarray]
) -> None:
    low, high = x.min(0), x.max(0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    sides = [np.linspace(low[d], high[d], _GRID) for d in (0, 1)]
    first, second = np.meshgrid(*sides)
    height = density(np.stack([first.ravel(), second.ravel()], 1)).reshape(first.shape)
    levels = np.unique(np.quantile(density(x_new), [1 - mass for mass in _MASSES]))
    levels = levels[np.isfinite(levels) & (levels > 0)]
    if len(levels) and np.isfinite(height).all() and height.max() > levels[0]:
        ax.contour(first, second, height, levels=levels, colors=VERMILION, linewidths=1.2)
