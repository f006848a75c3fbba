"""Images: a folder of PNG files as one tensor.

Letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentlab.data.convert import from_array
from latentlab.data.table import Table, listed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Images", "as_images", "load_images"]

_DEEP = 65_535  # the white of 16 bits


class Images(NamedTuple):
    """Images of one size.

    Arguments:
        x: shape (N, C, H, W), float32, from 0 (black) to 1 (white).
        names: of the files, without the folder.
    """

    x: Tensor
    names: tuple[str, ...]


def load_images(
    folder: str | os.PathLike, size: tuple[int, int] | None = None, *, grey: bool = True
) -> Images:
    """Read all PNG files of a folder, in the order of their names.

    Arguments:
        folder: a path; folders in it are not looked into.
        size: (H, W) that images are resized to; by default they must be of one size.
        grey: one channel; else three, red, green and blue. Transparent pixels are white.

    Returns:
        The images, and the names of their files.

    Raises:
        FileNotFoundError: if there is no such folder.
        NotADirectoryError: if it is a file.
        ValueError: if it holds no PNG file, a broken one, or images of several sizes.
        ImportError: if Pillow is not installed.

    Example:
        >>> import tempfile, PIL.Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PIL.Image.new("L", (6, 4), 255).save(f"{folder}/white.png")
        ...     images = load_images(folder)
        >>> images.x.shape, images.x.min().item(), images.names
        (torch.Size([1, 1, 4, 6]), 1.0, ('white.png',))
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; the current folder is {Path.cwd()}")
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder of PNG files, got a file")
    files = sorted(
        entry for entry in path.iterdir() if entry.suffix.lower() == ".png" and entry.is_file()
    )
    if not files:
        found = listed(sorted(entry.name for entry in path.iterdir()), 5) or "nothing"
        raise ValueError(f"{path}: expected PNG files, found {found}")
    size = None if size is None else _checked_size(size)
    pictures: list[np.ndarray] = []
    for file in files:
        picture = _read(file, size, grey)
        if pictures and picture.shape != pictures[0].shape:
            (_, H, W), (_, height, width) = pictures[0].shape, picture.shape
            raise ValueError(
                f"{file}: expected {H} x {W} pixels (height x width) as {files[0].name} has, got "
                f"{height} x {width}; resize all with size=({H}, {W})"
            )
        pictures.append(picture)
    return Images(torch.from_numpy(np.stack(pictures)), tuple(file.name for file in files))


def as_images(
    x: object, shape: tuple[int, ...], *, argument: str = "x", min_rows: int = 1
) -> Tensor:
    """Images that can be computed with, whatever they came in.

    Arguments:
        x: a tensor, an array or a nested list, shape (N, C, H, W), NaN where a pixel is missing. A
            floating tensor stays as it is, all else becomes torch's default type.
        shape: (C, H, W) that they must have.
        argument: what messages call ``x``.
        min_rows: the least number of images. From 2 on, there is something to learn, and a pixel
            that is never there is an error.

    Returns:
        The images, shape (N, C, H, W); after a warning if all of several are equal.

    Raises:
        TypeError: for text, complex or sparse values.
        ValueError: for another shape, too few images, infinite or huge values.

    Example:
        >>> as_images(np.zeros((2, 1, 4, 4)), (1, 4, 4)).dtype
        torch.float32
    """
    values: Any = x.x if isinstance(x, Table) else x
    if not isinstance(values, Tensor):
        values = np.asarray(values)
    if tuple(values.shape[1:]) != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(
            f"{argument}: expected shape (N, {sizes}) to match the decoder, got "
            f"{tuple(values.shape)}"
        )
    if len(values) < min_rows:
        raise ValueError(
            f"{argument}: expected at least {min_rows} images, got {len(values)}; add data"
        )
    cells = from_array(values.reshape(len(values), -1), argument=argument).x
    cells = cells.detach().reshape(-1, *shape)
    size = cells.abs()
    limit = torch.finfo(cells.dtype).max ** 0.4  # beyond it, sums of squares overflow
    for found, what, way in (
        (size.isinf(), "inf", "replace it by a number, or by NaN where it is not known"),
        (size > limit, f"beyond {limit:.0e} ({cells.dtype})", "choose a larger unit"),
    ):
        if found.any():
            first = found.nonzero()[0].tolist()
            raise ValueError(f"{argument} has {int(found.sum())} {what} (first at {first}); {way}")
    empty = cells.isnan().all(0)
    if min_rows > 1 and empty.any():
        first = empty.nonzero()[0].tolist()
        raise ValueError(
            f"{argument}: expected numbers, but {int(empty.sum())} pixels are NaN in all images "
            f"(first at {first}); cut the images to those that are there"
        )
    if min_rows > 1 and len(cells) and bool(((cells == cells[:1]) | cells.isnan()).all()):
        warnings.warn(f"{argument}: all {len(cells)} images are equal", stacklevel=2)
    float_tensor = isinstance(values, Tensor) and values.is_floating_point()
    return cells if float_tensor else cells.to(torch.get_default_dtype())


def _checked_size(size: Any) -> tuple[int, int]:  # noqa: ANN401
    pair = isinstance(size, tuple | list) and len(size) == 2
    if not pair or not all(type(n) is int and n >= 1 for n in size):
        raise ValueError(f"size: expected (height, width), two ints >= 1, got {size!r}")
    return (size[0], size[1])


def _read(file: Path, size: tuple[int, int] | None, grey: bool) -> np.ndarray:
    """One picture, shape (C, H, W), in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        way = "pip install 'latentlab[images]'"
        raise ImportError(f"{file}: reading it needs Pillow; {way}") from error
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
            cells = _cells(image, grey)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file}: not readable as PNG: {reason}; mend the file, or take it out of the folder"
        ) from error
    if size is None:
        return cells
    H, W = size
    layers = [Image.fromarray(layer).resize((W, H), Image.Resampling.BOX) for layer in cells]
    return np.stack([np.asarray(layer) for layer in layers]).clip(0, 1)


def _cells(image: Image, grey: bool) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel, which are always grey
        deep = (np.asarray(image, dtype=np.float32) / _DEEP).clip(0, 1)
        return np.repeat(deep[None], 1 if grey else 3, 0)
    if "A" in image.mode or "transparency" in image.info:
        from PIL import Image

        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    cells = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / 255
    return cells[None] if grey else cells.transpose(2, 0, 1).copy()
