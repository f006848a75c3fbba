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
    from matplotlib.figure import Figure

__all__ = ["plot_dwell_times", "plot_residuals", "plot_states", "plot_transitions"]

_COLUMNS = 3  # of the data that are drawn
_POINTS = 2000  # steps that are drawn


def plot_states(x: np.ndarray, probs: np.ndarray, means: np.ndarray, names: Sequence[str]) -> Axes:
    """A sequence over time on what its states emit, above the probability of each state.

    Arguments:
        x: the sequence, shape (T, D), NaN where a cell is missing.
        probs: probability of each state, shape (T, K).
        means: mean of each column in each state, shape (K, D).
        names: names of the D columns.

    Returns:
        The upper axes of a figure.

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
    figure = new_figure(WIDTH, sum(heights) + 0.5)
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
    for i in range(K):
        for j in range(K):
            text = f"{mean[i, j]:.2f}\n{low[i, j]:.2f}–{high[i, j]:.2f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=9, color="black")
    ax.set(xticks=range(K), yticks=range(K), xlabel="to state", ylabel="from state")
    ax.set_label("probability of each move, with its 90 % interval")
    return ax


def plot_dwell_times(transitions: np.ndarray, ax: Axes | None = None) -> Axes:
    """Mean number of steps in each state, with 90 % intervals.

    Arguments:
        transitions: draws, shape (S, K, K).
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    draws = np.asarray(transitions, float)
    K = draws.shape[-1]
    expect_shape("transitions", draws, (len(draws), K, K))
    leave = 1 - np.diagonal(draws, axis1=1, axis2=2)
    steps = 1 / np.maximum(leave, 1e-12)
    low, middle, high = np.quantile(steps, (0.05, 0.5, 0.95), axis=0)
    ax = plot_intervals([f"state {k}" for k in range(K)], middle, low, high, ax)
    ax.set_xlabel("steps that it lasts on average")
    return ax


def plot_residuals(residuals: np.ndarray, names: Sequence[str]) -> Figure:
    """Pseudo-residuals against the normal distribution, and over time.

    Points on the line: the model describes each step given those before. A bend at the ends says
    that extremes are too many or too few; a drift over time, that the chain misses something.

    Arguments:
        residuals: shape (T, D), NaN where a cell is missing.
        names: names of the D columns.

    Returns:
        The figure.
    """
    from scipy.special import ndtri

    r = np.asarray(residuals, float)
    expect_shape("residuals", r, (len(r), len(names)))
    figure = new_figure(WIDTH, 2.6)
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
    legend(left, loc="upper left")
    return figure
