"""Images: a folder of PNG files as one tensor.

Letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentlab.data.table import listed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Images", "load_images"]

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
