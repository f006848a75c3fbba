"""Rows of a mixture: how often they count, and what is missing in them.

Letters: N rows, D columns, S draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pyro.poutine as poutine
import torch
from torch import Tensor

from latentlab.distributions import NormalMixture
from latentlab.distributions.completion import completed
from latentlab.models.ppca_parts import Completed

__all__ = ["Completed", "counted", "filled"]


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


def filled(mixture: NormalMixture, x: Tensor) -> Completed:
    """Rows with their missing cells as expected from those that are there.

    Arguments:
        mixture: batch shape (S, 1).
        x: rows, shape (N, D), NaN where a cell is missing.
    """
    return Completed(*completed(mixture, x))
