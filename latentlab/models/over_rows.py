"""What the models of rows share: the shape of a row, and the columns that it has.

Letters: N rows, D columns, or C channels of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentlab.data.checks import as_rows
from latentlab.data.images import as_images
from latentlab.data.table import Table, shown

__all__ = ["OverRows", "as_latents", "expect_codes", "expect_cells"]


def as_latents(z: Any, latent_dim: int, argument: str = "z") -> Tensor:  # noqa: ANN401
    """Latents to decode, whatever they came in.

    Arguments:
        z: a tensor, array or list, shape (..., L).
        latent_dim: L.
        argument: what messages call them.

    Raises:
        ValueError: for another shape, or numbers that are not finite.
    """
    try:
        found = z if isinstance(z, Tensor) else torch.as_tensor(np.asarray(z, dtype=float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected numbers, got {shown(z)}") from error
    if found.dim() == 0 or found.shape[-1] != latent_dim or not found.numel():
        raise ValueError(
            f"{argument}: expected shape (..., {latent_dim}), one number a latent, "
            f"got {tuple(found.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{argument}: expected finite numbers, got nan or inf")
    return found


def expect_codes(finite: Tensor) -> None:
    """Refuse rows from which an encoder makes no finite numbers.

    Arguments:
        finite: whether it does, for each row, shape (N,).

    Raises:
        ValueError: by the first row of which it does not.
    """
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"x: row {row} lies so far from the rows that were fitted that its code is not finite "
            "in the precision of the networks; look at it, or leave it out"
        )


def expect_cells(params: Tensor, z: Tensor) -> Tensor:
    """The decoder's numbers, refused where they are not finite.

    Arguments:
        params: shape (..., numbers).
        z: the latents that they are of, shape (..., L).

    Raises:
        ValueError: by the largest of the latents.
    """
    if not bool(params.isfinite().all()):
        raise ValueError(
            f"z: the decoder gives no finite numbers for latents up to {float(z.abs().max()):.3g} "
            "in size; latents are in units of their prior, mostly between -3 and 3"
        )
    return params


class OverRows(nn.Module):
    """A model whose data are rows, each of ``event_shape``: (D,) of a table, (C, H, W) of images.

    Columns that have names are found by them, in data that are new to the model as in a fit.
    """

    column_names: Sequence[str] | None = None  # a fit says them
    event_shape: tuple[int, ...]
    tolerates_missing = True

    def check_data(self, x: Tensor | Table, size: int | None = None) -> None:
        """Refuse rows that the model has no density of.

        Arguments:
            x: rows, shape (N, D) or (N, C, H, W), NaN where a cell is missing.
            size: unused; as for the model.

        Raises:
            ValueError: if they have another shape, or cells that the model cannot give.
        """
        self._rows(x, min_rows=1)

    def _rows(self, x: Tensor | Table, min_rows: int) -> Tensor:
        """The numbers of rows that anything may be asked of."""
        if len(self.event_shape) == 1:
            return self._table(x, min_rows).x
        return as_images(x, self.event_shape, min_rows=min_rows)

    def _table(self, x: Tensor | Table, min_rows: int) -> Table:
        missing, names = self.tolerates_missing, self.column_names
        table = as_rows(x, min_rows=min_rows, allow_missing=missing, names=names)
        self._expect_shape(table.x)
        return table

    def _expect_shape(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.event_shape:
            sizes = ", ".join(map(str, self.event_shape))
            table = len(self.event_shape) == 1
            wanted = f"num_features={sizes}" if table else "the decoder"
            raise ValueError(
                f"x: expected shape (N, {sizes}) to match {wanted}, got {tuple(x.shape)}"
            )
