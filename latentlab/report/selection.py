"""A picture of a selection: values of a keyword and how far each is from the best.

Letters: V values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentlab.report.canvas import COLOURS, blank_axes, expect_shape, legend, note, short
from latentlab.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_selection"]


def plot_selection(
    name: str,
    values: Sequence[str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    best: int,
    ax: Axes | None = None,
) -> Axes:
    """Scores less that of the best value, with bars of one standard error.

    Arguments:
        name: the keyword.
        values: its V values, as text.
        curves: name of a score -> difference and standard error of each value in nats, shape
            (V, 2); larger is better, NaN where there is none.
        best: the place of the value that was taken.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not agree.
    """
    places = np.arange(len(values))
    ax = blank_axes(ax, 2.9)
    ax.axhline(0, color=INK, alpha=0.5, linewidth=0.8)
    ax.axvline(best, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (4, 3)))
    for i, (label, curve) in enumerate(curves.items()):
        figures = np.asarray(curve, float)
        expect_shape(label, figures, (len(values), 2))
        shift = 0.12 * (i - (len(curves) - 1) / 2)
        gap, se = figures.T
        bars = np.where(np.isfinite(se), se, 0.0)
        colour, marker = COLOURS[i % len(COLOURS)], "os"[i % 2]
        (line, *_) = ax.errorbar(places + shift, gap, bars, color=colour, capsize=2.5, label=label)
        line.set(linewidth=1.2, marker=marker, markersize=4)
    ax.set_xticks(places, [short(value, 12) for value in values])
    ax.set(xlabel=short(name, 40), ylabel="nats less the best")
    ax.set_label(f"{name}: scores of {len(values)} values, less the best")
    note(ax, [f"{name} = {values[best]}: the first within one standard error of the best"])
    legend(ax, loc="lower right")
    return ax
