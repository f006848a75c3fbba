"""How often the rows of a mixture count.

Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pyro.poutine as poutine
import torch
from torch import Tensor

__all__ = ["counted"]


@contextmanager
def counted(weights: Tensor | None) -> Iterator[None]:
    """Rows count as often as their weights say; those of weight zero not at all.

    Arguments:
        weights: shape (N,); ``None`` where each row counts once.
    """
    if weights is None:
        yield
        return
    there = cast(torch.BoolTensor, weights > 0)
    with poutine.mask(mask=there), poutine.scale(scale=torch.where(there, weights, 1.0)):
        yield
