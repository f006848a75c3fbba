"""Calm axes and the words on them, for the plots of this folder."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from latentlab.report.svg import INK, figure_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "blank_axes",
    "blank_panels",
    "calm",
    "expect_shape",
    "four_digits",
    "legend",
    "name_rows",
    "new_figure",
    "note",
    "plain",
    "rounded",
    "short",
    "thinned",
    "word",
]

# The colours of Okabe and Ito, told apart by all eyes.
BLUE, VERMILION, GREEN, AMBER = "#0072b2", "#d55e00", "#009e73", "#e69f00"
COLOURS = (BLUE, VERMILION, GREEN, "#cc79a7", "#56b4e9", AMBER)
WIDTH = 5.0  # inches
SMALL, LARGE = 10, 11  # of text, in points: still legible on a phone


def blank_axes(ax: Axes | None, height: float) -> Axes:
    """The axes handed in, or those of a new figure of that height in inches; calm."""
    if ax is None:
        ax = _figure(height).subplots()
    return calm(ax)


def blank_panels(count: int) -> list[Axes]:
    """So many axes on a new figure, two in a row: a phone shows no more."""
    rows = -(-count // 2)
    axes = _figure(2.3 * rows).subplots(rows, min(count, 2), squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    return list(axes.flat[:count])


def _figure(height: float) -> Figure:
    return new_figure(WIDTH, height)


def new_figure(width: float, height: float) -> Figure:
    """A figure that a notebook shows without pyplot; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    vars(figure)["_repr_svg_"] = partial(figure_svg, figure)
    return figure


def calm(ax: Axes) -> Axes:
    """Axes that stand behind the data: no box, all in the ink."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=INK, alpha=0.6, linewidth=0.8)
    ax.tick_params(colors=INK, labelsize=SMALL, width=0.8, length=3)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set(color=INK, size=LARGE)
    return ax


def name_rows(ax: Axes, labels: Sequence[str]) -> Axes:
    """One row of the picture per label, from the top."""
    ax.set_yticks(range(len(labels)), [short(label) for label in labels])
    ax.set_ylim(max(len(labels), 1) - 0.4, -0.6)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, pad=8)
    return ax


def note(ax: Axes, lines: Sequence[str]) -> Axes:
    """Say above the picture what it does not show by itself."""
    text = "\n".join(part for line in lines for part in textwrap.wrap(plain(line), 52))
    ax.set_title(text, loc="left", fontsize=SMALL, color=INK)
    return ax


def word(
    ax: Axes,
    text: str,
    at: Sequence[float] | np.ndarray,
    shift: tuple[float, float] = (0, 0),
    coords: Any = "data",  # noqa: ANN401
    ha: str = "center",
) -> None:
    """A word at a place, moved by some points."""
    style: dict[str, Any] = {"ha": ha, "va": "center_baseline", "color": INK, "fontsize": SMALL}
    ax.annotate(text, (at[0], at[1]), shift, coords, "offset points", **style)


def legend(ax: Axes, **place: Any) -> None:  # noqa: ANN401
    """What the colours mean, at a place."""
    style: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handletextpad": 0.5}
    ax.legend(labelcolor=INK, **style, **place)


def plain(name: str) -> str:
    """A name as matplotlib shall write it: no formula, no character that XML forbids."""
    return "".join(c if c.isprintable() else " " for c in str(name)).replace("$", r"\$")


def short(name: str, most: int = 24) -> str:
    """A name that fits beside a picture."""
    name = str(name)
    return plain(name if len(name) <= most else f"{name[: most - 1]}…")


def thinned(count: int, most: int) -> np.ndarray:
    """At most so many places out of ``range(count)``, evenly spread, ends included."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def four_digits(value: float) -> str:
    """A number with four significant digits."""
    return format(value, "#.4g").rstrip(".")


def rounded(value: float, width: float) -> str:
    """A number with three digits of a width, such as that of its interval."""
    size = max(abs(value), width)
    if not (0 < width < math.inf and size < math.inf):
        return four_digits(value)
    places = 2 - math.floor(math.log10(width))
    if 1e-4 <= size < 1e12:
        return f"{round(value, max(places, 0)) + 0.0:.{max(places, 0)}f}"  # + 0.0 for no "-0.00"
    return f"{value:.{max(places + math.floor(math.log10(size)), 0)}e}"


def expect_shape(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if an argument has another shape."""
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
