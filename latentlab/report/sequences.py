"""Pictures of a hidden Markov model: states over time, transitions, dwell times, residuals.

Letters: T steps, D columns, K states, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentlab.report.canvas import (
    COLOURS,
    WIDTH,
    blank_axes,
    calm,
    expect_shape,
    legend,
    new_figure,
    note,
    short,
    thinned,
)
from latentlab.report.plots import plot_intervals
from latentlab.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

__all__ = [
    "plot_chain",
    "plot_dwell_times",
    "plot_residuals",
    "plot_states",
    "plot_transitions",
]

_COLUMNS = 3  # of the data that are drawn
_POINTS = 2000  # steps that are drawn
_WRITTEN = 6  # states between which moves are written out
_WIDE = 30  # times the shortest stay, from where on stays are on a logarithmic axis


def plot_chain(
    x: np.ndarray,
    probs: np.ndarray,
    means: np.ndarray,
    names: Sequence[str],
    transitions: np.ndarray,
    residuals: np.ndarray | None = None,
) -> Figure:
    """A sequence with its states; below it how they follow each other, and what they miss.

    Arguments:
        x: as for :func:`plot_states`.
        probs: as for :func:`plot_states`.
        means: as for :func:`plot_states`.
        names: as for :func:`plot_states`.
        transitions: draws, shape (S, K, K); one state has none to be drawn.
        residuals: as for :func:`plot_residuals`; ``None`` where they are not known.

    Returns:
        The figure.
    """
    K = transitions.shape[-1]
    heights = [1.6 * min(len(names), _COLUMNS) + 1.6]
    heights += [0.9 + 0.42 * K, 0.9 + 0.24 * K] if K > 1 else []
    heights += [2.7] if residuals is not None else []
    figure = new_figure(WIDTH, sum(heights))
    # Each with margins of its own.
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part in parts:
        part.set_facecolor("none")
    plot_states(x, probs, means, names, parts[0])
    if K > 1:
        plot_transitions(transitions, parts[1].subplots())
        plot_dwell_times(transitions, parts[2].subplots())
    if residuals is not None:
        plot_residuals(residuals, names, parts[-1])
    return figure


def plot_states(
    x: np.ndarray,
    probs: np.ndarray,
    means: np.ndarray,
    names: Sequence[str],
    figure: FigureBase | None = None,
) -> Axes:
    """A sequence over time on what its states emit, above the probability of each state.

    Arguments:
        x: the sequence, shape (T, D), NaN where a cell is missing.
        probs: probability of each state, shape (T, K).
        means: mean of each column in each state, shape (K, D).
        names: names of the D columns.
        figure: where to draw; by default a new one.

    Returns:
        The upper axes of the figure.

    Raises:
        ValueError: if the shapes do not agree.
    """
    x, probs, means = (np.asarray(a, float) for a in (x, probs, means))
    T, D = x.shape
    K = len(means)
    expect_shape("probs", probs, (T, K))
    expect_shape("means", means, (K, len(names)))
    shown = min(D, _COLUMNS)
    heights = [1.6] * shown + [1.1]
    figure = new_figure(WIDTH, sum(heights) + 0.5) if figure is None else figure
    axes = figure.subplots(shown + 1, 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    steps = thinned(T, _POINTS)
    state = probs.argmax(1)
    for d, ax in enumerate(axes[:-1]):
        level = np.where(np.isfinite(means[state, d]), means[state, d], np.nan)
        ax.plot(steps, x[steps, d], color=INK, alpha=0.45, linewidth=0.8)
        for k in range(K):
            here = steps[state[steps] == k]
            colour = COLOURS[k % len(COLOURS)]
            dots = ax.plot(here, x[here, d], "o", color=colour, label=f"state {k}")
            dots[0].set(markersize=3, markeredgewidth=0)
        ax.step(steps, level[steps], where="mid", color=INK, linewidth=1.2)
        calm(ax).set_ylabel(short(names[d], 20))
    ends = np.vstack([np.zeros(T), probs.cumsum(1).T])
    for k in range(K):
        colour = COLOURS[k % len(COLOURS)]
        axes[-1].fill_between(
            steps, ends[k][steps], ends[k + 1][steps], color=colour, alpha=0.8, linewidth=0
        )
    calm(axes[-1]).set(xlabel="step", ylabel="probability", ylim=(0, 1), xlim=(0, max(T - 1, 1)))
    axes[0].set_label("a sequence over time with the state of each step and its probability")
    if K <= 8:
        legend(axes[0], loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, markerscale=1.6)
    if D > shown:
        note(axes[-1], [f"the first {shown} of {D} columns"])
    return axes[0]


def plot_transitions(transitions: np.ndarray, ax: Axes | None = None) -> Axes:
    """The transition matrix with 90 % intervals.

    Arguments:
        transitions: draws, shape (S, K, K).
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    draws = np.asarray(transitions, float)
    K = draws.shape[-1]
    expect_shape("transitions", draws, (len(draws), K, K))
    low, high = np.quantile(draws, (0.05, 0.95), axis=0)
    mean = draws.mean(0)
    ax = blank_axes(ax, 1.2 + 0.55 * K)
    ax.imshow(mean, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for i, j in np.ndindex(K, K) if K <= _WRITTEN else ():
        text = f"{mean[i, j]:.2f}"
        text += f"\n{low[i, j]:.2f}–{high[i, j]:.2f}" if low[i, j] < high[i, j] else ""
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color="black")
    ax.set(xticks=range(K), yticks=range(K), xlabel="to state", ylabel="from state")
    ax.set_label("probability of each move, with its 90 % interval")
    return note(ax, ["probability of a move"])


def plot_dwell_times(transitions: np.ndarray, ax: Axes | None = None) -> Axes:
    """Mean number of steps in each state, with 90 % intervals; a last state has none.

    Arguments:
        transitions: draws, shape (S, K, K).
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    draws = np.asarray(transitions, float)
    K = draws.shape[-1]
    expect_shape("transitions", draws, (len(draws), K, K))
    leave = draws.sum(-1) - np.diagonal(draws, axis1=1, axis2=2)
    left = np.flatnonzero(leave.max(0) > 0)
    steps = 1 / np.maximum(leave[:, left], 1e-12)
    low, middle, high = np.quantile(steps, (0.05, 0.5, 0.95), axis=0)
    ax = plot_intervals([f"state {k}" for k in left], middle, low, high, ax)
    if left.size and high.max() > _WIDE * low.min():
        ax.set_xscale("log")
    ax.set_xlabel("steps")
    ax.set_label("mean number of steps in each state, with its 90 % interval")
    return note(ax, ["mean number of steps in a state"])


def plot_residuals(
    residuals: np.ndarray, names: Sequence[str], figure: FigureBase | None = None
) -> FigureBase:
    """Pseudo-residuals against the normal distribution, and over time.

    Points on the line: the model describes each step given those before. A bend at the ends says
    that extremes are too many or too few; a drift over time, that the chain misses something.

    Arguments:
        residuals: shape (T, D), NaN where a cell is missing.
        names: names of the D columns.
        figure: where to draw; by default a new one.

    Returns:
        The figure.
    """
    from scipy.special import ndtri

    r = np.asarray(residuals, float)
    expect_shape("residuals", r, (len(r), len(names)))
    figure = new_figure(WIDTH, 2.6) if figure is None else figure
    left, right = figure.subplots(1, 2)
    for d in range(min(r.shape[1], _COLUMNS)):
        seen = np.flatnonzero(np.isfinite(r[:, d]))
        value = r[seen, d]
        n, colour = len(value), COLOURS[d % len(COLOURS)]
        at = ndtri((np.arange(n) + 0.5) / max(n, 1))
        keep = thinned(n, _POINTS) if n else np.arange(0)
        style = {"color": colour, "markersize": 3, "markeredgewidth": 0, "alpha": 0.7}
        left.plot(at[keep], np.sort(value)[keep], "o", label=short(names[d], 16), **style)
        right.plot(seen[keep], value[keep], "o", **style)
    left.axline((0, 0), slope=1, color=INK, linewidth=1)
    for level in (-2, 0, 2):
        right.axhline(level, color=INK, linewidth=0.7, alpha=0.6)
    calm(left).set(xlabel="normal quantile", ylabel="residual")
    calm(right).set(xlabel="step")
    left.set_label("pseudo-residuals against the normal distribution")
    right.set_label("pseudo-residuals over time")
    note(
        left,
        ["residuals of each step given those before: on", "the line where the model is right"],
    )
    if r.shape[1] > 1:
        legend(left, loc="upper left")
    return figure
