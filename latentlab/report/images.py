"""Pictures of autoencoders: images beside their reconstructions, grids, the map of the latents.

Letters: N rows, C channels, H height, W width, L latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentlab.report.canvas import (
    BLUE,
    VERMILION,
    blank_axes,
    expect_shape,
    name_rows,
    note,
    short,
    thinned,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_images", "plot_latents", "plot_reconstructions"]

_POINTS = 2000  # drawn in a map
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


def plot_latents(loc: np.ndarray, scale: np.ndarray, ax: Axes | None = None) -> Axes:
    """The means of the encodings, in the two dimensions that are used most.

    Circles are the 1 and 2 sd of a standard normal prior: rows far outside of them, and holes
    inside, are where samples from the prior do not look like data.

    Arguments:
        loc: means of the latents of each row, shape (N, L).
        scale: their standard deviations, shape (N, L).
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not agree.
    """
    loc, scale = np.asarray(loc, float), np.asarray(scale, float)
    expect_shape("scale", scale, loc.shape)
    ax = blank_axes(ax, 3.9)
    rows = thinned(len(loc), _POINTS)
    L = loc.shape[1]
    kl = (0.5 * (loc**2 + scale**2 - 1) - np.log(scale)).mean(0)
    dims = sorted(np.argsort(-kl, kind="stable")[:2].tolist())
    if L == 1:
        ax.hist(loc[:, 0], bins=40, density=True, color=BLUE, alpha=0.5)
        grid = np.linspace(-3, 3, 200)
        ax.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color=VERMILION)
        ax.set(xlabel="z[0], mean", ylabel="density")
        ax.set_label("histogram of the means of the encodings, with the prior")
        return ax
    (dots,) = ax.plot(*loc[rows][:, dims].T, "o", color=BLUE, alpha=0.45)
    dots.set(markersize=3, markeredgewidth=0)
    angle = np.linspace(0, 2 * np.pi, 200)
    for sds in (1, 2):
        ax.plot(sds * np.cos(angle), sds * np.sin(angle), color=VERMILION, linewidth=1.4)
    ax.set(xlabel=f"z[{dims[0]}], mean", ylabel=f"z[{dims[1]}], mean", aspect="equal")
    ax.set_label(f"map of the encodings in z[{dims[0]}] and z[{dims[1]}]")
    lines = ["circles: 1 and 2 sd of the prior"]
    active = int((loc.var(0) > _ACTIVE).sum())
    if L > 2:
        lines += [f"{active} of {L} dimensions are used; drawn are those of the largest KL"]
    note(ax, lines)
    return ax


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, float)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ValueError(
            f"images: expected shape (N, C, H, W) with 1 or 3 channels, got {images.shape}"
        )
    return images
