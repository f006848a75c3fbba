"""Pictures of autoencoders: images beside their reconstructions, grids, the map of the latents.

Letters: N rows, C channels, H height, W width, D columns, L latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentlab.report.canvas import (
    BLUE,
    SMALL,
    VERMILION,
    blank_axes,
    expect_shape,
    name_rows,
    note,
    short,
    thinned,
)
from latentlab.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["most_used", "plot_effects", "plot_images", "plot_latents", "plot_reconstructions"]

_POINTS = 2000  # drawn in a map
_NAMED = 16  # columns with their names below them
_ACTIVE = 0.01  # variance of the means of a dimension that is used


def plot_images(
    images: np.ndarray,
    num_columns: int = 10,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A grid of images, such as samples, or a traversal in each row.

    Arguments:
        images: shape (N, C, H, W), C 1 or 3; drawn from the smallest value, black, to the largest.
        num_columns: images in a row.
        names: of the rows of the grid.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: for another shape.
    """
    images = _checked(images)
    N, C, H, W = images.shape
    num_columns = min(num_columns, N)
    num_rows = -(-N // num_columns)
    # A pixel of air between images, not drawn.
    grid = np.full((num_rows * (H + 1) - 1, num_columns * (W + 1) - 1, C), np.nan)
    for n, image in enumerate(images):
        top, left = n // num_columns * (H + 1), n % num_columns * (W + 1)
        grid[top : top + H, left : left + W] = image.transpose(1, 2, 0)
    ax = blank_axes(ax, min(5.0 * num_rows * H / (num_columns * W) + 0.4, 7.0))
    style: dict[str, Any] = {"interpolation": "nearest", "aspect": "equal"}
    if C == 1:
        low, high = np.nanmin(grid), np.nanmax(grid)
        ax.imshow(np.ma.masked_invalid(grid[..., 0]), cmap="gray", vmin=low, vmax=high, **style)
    else:
        seen = np.isfinite(grid).all(-1, keepdims=True)
        ax.imshow(np.concatenate([np.nan_to_num(grid).clip(0, 1), seen], -1), **style)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if names is not None:
        places = [row * (H + 1) + (H - 1) / 2 for row in range(num_rows)]
        name_rows(ax, names)
        ax.set_yticks(places, [short(name) for name in names])
        ax.set_ylim(len(grid) - 0.5, -0.5)
    ax.set_label(f"grid of {N} images")
    return ax


def plot_reconstructions(
    images: np.ndarray, reconstructions: np.ndarray, ax: Axes | None = None
) -> Axes:
    """Images above their reconstructions.

    Arguments:
        images: shape (N, C, H, W), NaN where a pixel is missing.
        reconstructions: the same shape.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not agree.
    """
    images = _checked(images)
    expect_shape("reconstructions", np.asarray(reconstructions), images.shape)
    both = np.concatenate([images, np.asarray(reconstructions, float)])
    ax = plot_images(both, len(images), ("data", "decoded"), ax)
    ax.set_label(f"{len(images)} images above their reconstructions")
    return ax


def most_used(loc: np.ndarray, scale: np.ndarray | None, count: int) -> list[int]:
    """The latent dimensions that say most of the rows, the smaller number first.

    Arguments:
        loc: means of the latents of each row, shape (N, L).
        scale: their standard deviations, where a standard normal prior is what a dimension that
            is not used falls back to: the KL to it decides. ``None``: the variance of the means.
        count: how many, at the most.

    Example:
        >>> most_used(np.array([[0.0, 3.0, 1.0], [0.0, -3.0, -1.0]]), None, 2)
        [1, 2]
    """
    loc = np.asarray(loc, float)
    use = loc.var(0)
    if scale is not None:
        use = (0.5 * (loc**2 + scale**2 - 1) - np.log(scale)).mean(0)
    return sorted(np.argsort(-use, kind="stable")[:count].tolist())


def plot_latents(
    loc: np.ndarray,
    scale: np.ndarray | None = None,
    ax: Axes | None = None,
    prior: np.ndarray | None = None,
) -> Axes:
    """The means of the encodings, in the two dimensions that are used most.

    Circles are the 1 and 2 sd of a standard normal prior, dots behind are draws of another one:
    rows far outside, and holes inside, are where samples from the prior do not look like data.

    Arguments:
        loc: means of the latents of each row, shape (N, L).
        scale: their standard deviations, shape (N, L), where the prior is standard normal.
        ax: where to draw; by default a new figure.
        prior: draws of another prior, shape (S, L). With neither there is none.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not agree.
    """
    loc = np.asarray(loc, float)
    if scale is not None:
        scale = np.asarray(scale, float)
        expect_shape("scale", scale, loc.shape)
    ax = blank_axes(ax, 3.9)
    L = loc.shape[1]
    if L == 1:
        return _histogram(ax, loc[:, 0], scale is not None, prior)
    dims = most_used(loc, scale, 2)
    style: dict[str, Any] = {"markersize": 3, "markeredgewidth": 0}
    if prior is not None:
        shown = prior[thinned(len(prior), _POINTS)][:, dims]
        ax.plot(*shown.T, "o", color=VERMILION, alpha=0.25, zorder=1, **style)
    shown = loc[thinned(len(loc), _POINTS)][:, dims]
    ax.plot(*shown.T, "o", color=BLUE, alpha=0.45, **style)
    if scale is not None:
        angle = np.linspace(0, 2 * np.pi, 200)
        for sds in (1, 2):
            ax.plot(sds * np.cos(angle), sds * np.sin(angle), color=VERMILION, linewidth=1.4)
    ax.set(xlabel=f"z[{dims[0]}], mean", ylabel=f"z[{dims[1]}], mean")
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_label(f"map of the encodings in z[{dims[0]}] and z[{dims[1]}]")
    lines = ["circles: 1 and 2 sd of the prior"] if scale is not None else []
    lines += ["orange: draws of the prior"] if prior is not None else []
    active, largest = int((loc.var(0) > _ACTIVE).sum()), "variance" if scale is None else "KL"
    if L > 2:
        lines += [f"{active} of {L} dimensions are used; drawn are those of the largest {largest}"]
    return note(ax, ["map of the codes", *lines])


def _histogram(ax: Axes, loc: np.ndarray, normal: bool, prior: np.ndarray | None) -> Axes:
    """The codes of a single dimension, and the prior that there is."""
    middle, half = (loc.max() + loc.min()) / 2, (loc.max() - loc.min()) / 2
    least = 1e-6 * max(1.0, abs(middle))  # equal codes have a bar, too
    ends = (middle - max(half, least), middle + max(half, least))
    ax.hist(loc, bins=40, range=ends, density=True, color=BLUE, alpha=0.5)
    if normal:
        grid = np.linspace(-3, 3, 200)
        ax.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color=VERMILION)
    elif prior is not None:
        ax.hist(prior[:, 0], bins=40, density=True, color=VERMILION, histtype="step")
    ax.set(xlabel="z[0], mean", ylabel="density")
    ax.set_label("histogram of the means of the encodings")
    drawn = ["orange: the prior"] if normal or prior is not None else []
    return note(ax, ["map of the codes", *drawn])


def plot_effects(
    effects: np.ndarray,
    names: Sequence[str],
    dims: Sequence[int],
    ax: Axes | None = None,
) -> Axes:
    """What each latent dimension does to each column of a table.

    Arguments:
        effects: change of a column along a dimension, shape (number of dims, D), in units of the
            column's standard deviation; NaN where there is none.
        names: of the columns, D of them.
        dims: the numbers of the dimensions.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not agree.
    """
    effects = np.asarray(effects, float)
    expect_shape("effects", effects, (len(dims), len(names)))
    ax = blank_axes(ax, 0.35 * len(dims) + 1.5)
    most = max(float(np.nanmax(np.abs(effects), initial=0.0)), 1e-9)
    shown = np.ma.masked_invalid(effects)
    image = ax.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    name_rows(ax, [f"z[{j}]" for j in dims])
    ax.set_ylim(len(dims) - 0.5, -0.5)
    places = thinned(len(names), _NAMED)
    ax.set_xticks(places, [short(names[i], 14) for i in places], rotation=40, ha="right")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
    bar.ax.tick_params(colors=INK, labelsize=SMALL, width=0.8, length=3)
    bar.outline.set_visible(False)
    ax.set_label("change of each column along each latent dimension")
    return ax


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, float)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ValueError(
            f"images: expected shape (N, C, H, W) with 1 or 3 channels, got {images.shape}"
        )
    return images
