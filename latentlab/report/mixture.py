"""A picture of a mixture: the data, and the components drawn on them.

Letters: N rows, D columns, K components, S draws, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentlab.report.canvas import (
    COLOURS,
    blank_axes,
    expect_shape,
    legend,
    note,
    short,
    thinned,
    word,
)
from latentlab.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_mixture"]

_MARKERS = "o^sDv"  # repeat the message of the colours
_ROWS = 2000  # drawn in a scatter
_DRAWS = 200  # behind a density


def plot_mixture(
    x: np.ndarray,
    weights: np.ndarray,
    locs: np.ndarray,
    scales: np.ndarray,
    names: Sequence[str],
    correlations: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Data with a Gaussian mixture drawn on them.

    One column: a histogram, the fitted density with its 90 % band over draws, and the components.
    More: a scatter of two columns, each row in the colour of its most probable component, with
    the ellipses of 1 and 2 sd at the posterior mean. Of three columns and more, the two are drawn
    in which the components lie furthest apart.

    Arguments:
        x: data, shape (N, D).
        weights: draws of the mixture weights, shape (S, K), labels aligned.
        locs: draws of the means, shape (S, K, D), in the units of x.
        scales: draws of the standard deviations, shape (S, K, D), in the units of x.
        names: names of the D columns.
        correlations: correlation matrices of the components at the posterior mean, shape
            (K, D, D); by default columns are independent within a component.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not agree.
    """
    x, weights, locs, scales = (np.asarray(a, float) for a in (x, weights, locs, scales))
    shape = (*weights.shape, len(names))
    expect_shape("x", x, (len(x), len(names)))
    expect_shape("locs", locs, shape)
    expect_shape("scales", scales, shape)
    K, D = shape[1:]
    correlations = np.eye(D)[None].repeat(K, 0) if correlations is None else correlations
    expect_shape("correlations", correlations, (K, D, D))
    ax = blank_axes(ax, 3.7)
    if D == 1:
        _draw_density(ax, x, weights, locs, scales, names)
    else:
        _draw_ellipses(ax, x, weights, locs, scales, correlations, names)
    if weights.shape[1] < 10:
        legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, markerscale=1.8)
    return ax


def _draw_density(
    ax: Axes,
    x: np.ndarray,
    weights: np.ndarray,
    locs: np.ndarray,
    scales: np.ndarray,
    names: Sequence[str],
) -> None:
    values = x[np.isfinite(x)]
    draws = thinned(len(weights), _DRAWS)
    weights, locs, scales = weights[draws], locs[draws, :, 0], scales[draws, :, 0]
    held = weights.mean(0) >= min(0.02, weights.mean(0).max())  # components worth a look
    reach = 2.5 * scales.mean(0)
    ends = (values, (locs.mean(0) - reach)[held], (locs.mean(0) + reach)[held])
    grid = np.linspace(np.min(np.concatenate(ends)), np.max(np.concatenate(ends)), 300)

    standard = (grid[:, None] - locs[:, None]) / scales[:, None]  # (S, G, K)
    parts = weights[:, None] * np.exp(-(standard**2) / 2) / (scales[:, None] * np.sqrt(2 * np.pi))
    whole = parts.sum(-1)
    if len(values):
        heights, edges = np.histogram(values, _bins(values), density=True)
        ax.stairs(heights, edges, fill=True, color=INK, alpha=0.18, label="data")
    low, high = np.quantile(whole, (0.05, 0.95), axis=0)
    ax.fill_between(grid, low, high, color=INK, alpha=0.35, linewidth=0)
    ax.plot(grid, whole.mean(0), color=INK, linewidth=1.6, label="fitted density, 90 % band")
    for k, part in enumerate(parts.mean(0).T if weights.shape[1] > 1 else ()):
        label, colour = _component(k, weights), COLOURS[k % len(COLOURS)]
        ax.plot(grid, part, linewidth=1.4, linestyle=(0, (5, 2)), color=colour, label=label)
    ax.set(xlabel=short(names[0], 40), ylabel="density", ylim=(0, None))
    ax.set_label(f"histogram of {names[0]} with the fitted density")


def _draw_ellipses(
    ax: Axes,
    x: np.ndarray,
    weights: np.ndarray,
    locs: np.ndarray,
    scales: np.ndarray,
    correlations: np.ndarray,
    names: Sequence[str],
) -> None:
    from matplotlib.patches import Ellipse

    weight, loc, scale = weights.mean(0), locs.mean(0), scales.mean(0)
    dims = _furthest_apart(weight, loc, scale)
    whole = np.flatnonzero(np.isfinite(x[:, dims]).all(1))
    rows = whole[thinned(len(whole), _ROWS)]
    labels = _most_probable(x[rows], weight, loc, scale, correlations)
    for k in range(len(weight)):
        colour, marker = COLOURS[k % len(COLOURS)], _MARKERS[k % len(_MARKERS)]
        points = x[rows[labels == k]][:, dims].T
        (dots,) = ax.plot(*points, marker, color=colour, alpha=0.65, label=_component(k, weights))
        dots.set(markersize=3.6, markeredgewidth=0)
        size, angle = _axes_of(scale[k, dims], correlations[k][np.ix_(dims, dims)])
        for sds in (1, 2):
            width, height = 2 * sds * size
            ellipse = Ellipse(loc[k, dims], width, height, angle=angle, fill=False)
            ellipse.set(edgecolor=colour, linewidth=1.5)
            ax.add_patch(ellipse)
        word(ax, str(k), loc[k, dims] + (0, 2 * scale[k, dims[1]]), (0, 7))
    ax.autoscale_view()
    ax.locator_params(axis="x", nbins=6)
    ax.set(xlabel=short(names[dims[0]], 40), ylabel=short(names[dims[1]], 30))
    ax.set_label(f"scatter of {names[dims[0]]} and {names[dims[1]]} with the fitted components")

    notes = []
    if len(names) > 2:
        notes += [f"the two of {len(names)} columns that set components apart best"]
    if len(rows) < len(whole):
        notes += [f"{len(rows):,} of {len(whole):,} rows are drawn, evenly thinned"]
    if len(whole) < len(x):
        notes += [f"{len(x) - len(whole):,} rows with a missing cell are not drawn"]
    note(ax, notes)


def _furthest_apart(weight: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> list[int]:
    """The two columns with the largest spread of components in pooled sds; empty ones count 0."""
    spread = weight @ (loc - weight @ loc) ** 2 / (weight @ scale**2)
    return sorted(int(d) for d in np.argsort(-spread, kind="stable")[:2])


def _axes_of(scale: np.ndarray, correlation: np.ndarray) -> tuple[np.ndarray, float]:
    """Half axes (2,) of the ellipse of one sd, and the angle of the first in degrees."""
    if correlation[0, 1] == 0:
        return scale, 0.0
    unit = scale.max()  # squares of it may not be floats
    variance, axes = np.linalg.eigh(scale[:, None] / unit * correlation * scale / unit)
    angle = np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
    return unit * np.sqrt(np.maximum(variance[::-1], 0.0)), float(angle)


def _most_probable(
    x: np.ndarray,
    weight: np.ndarray,
    loc: np.ndarray,
    scale: np.ndarray,
    correlations: np.ndarray,
) -> np.ndarray:
    """Labels of rows (N, D), by the cells that are there."""
    standard = (x[:, None] - loc) / scale  # (N, K, D)
    joint = np.tile(np.log(np.maximum(weight, 1e-300)), (len(x), 1))
    seen = np.isfinite(x)
    for present in np.unique(seen, axis=0):
        rows = (seen == present).all(1)
        part = correlations[:, present][:, :, present] + 1e-9 * np.eye(present.sum())
        z = standard[rows][..., present]
        square = np.einsum("nki,kij,nkj->nk", z, np.linalg.inv(part), z)
        log_det = np.linalg.slogdet(part)[1] / 2 + np.log(scale[:, present]).sum(1)
        joint[rows] -= square / 2 + log_det
    return joint.argmax(-1)


def _bins(values: np.ndarray) -> int:
    """Number of bins by the rule of Freedman and Diaconis, more where there are several modes."""
    quarter, three_quarters = np.quantile(values, (0.25, 0.75))
    width = 2 * (three_quarters - quarter) / len(values) ** (1 / 3)
    least = min(len(values) ** 0.5, 40) if np.ptp(values) else 1
    return int(np.clip(np.ptp(values) / width if width else 1, least, 80))


def _component(k: int, weights: np.ndarray) -> str:
    return f"component {k} ({100 * weights[:, k].mean():.0f} %)"
