r"""Where the numbers of each site stand in one vector u, and those of some rows in a part of it.

.. math:: u = (g, w_1, \dots, w_N) \text{ in the order of the sites}

The numbers g are global; each row n of the data has l numbers :math:`w_n` of its own, those of
the sites in the plate of the rows. A mini-batch of B rows has the same layout with B in the place
of N; what is said of one of its rows stands for :math:`N / B` of them.

Letters: L numbers in all, G of them global, N rows, B of them, l numbers a row, P particles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from latentlab.supports import Latent, is_identity

__all__ = ["Data", "Given", "Layout", "Part", "Site", "lay_out", "part_of", "slowed"]


class Data(Protocol):
    """What a guide may know of the data of a step."""

    @property
    def rows(self) -> Tensor | None:
        """Which rows of all data they are, shape (B,); ``None`` for all of them."""

    @property
    def stands_for(self) -> int | None:
        """How many rows those of a mini-batch stand for."""

    def tensors(self) -> list[Tensor]:
        """The tensors among them, their first axis over the rows."""


@dataclass(frozen=True)
class Given:
    """What a guide is called with as a Pyro program: all rows of the data."""

    arguments: tuple
    rows: Tensor | None = None
    stands_for: int | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [value for value in self.arguments if isinstance(value, Tensor)]


class Site(NamedTuple):
    """A site, its part of u, its transform (``None`` for a plain real line), its shapes.

    ``dim`` is the batch dimension of the rows, negative; ``None`` for a global site.
    """

    latent: Latent
    part: slice
    transform: Transform | None
    batch_shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    dim: int | None

    @property
    def is_local(self) -> bool:
        """Whether each row has its own value."""
        return self.dim is not None


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of all sites, for a number of rows.

    Arguments:
        sites: in the order of u.
        size: numbers in all L.
        outer: places in u of the global numbers, shape (G,).
        inner: places in u of those of each row, shape (N, l).
        order: place in (g, w_1, ..., w_N) of each number of u, shape (L,).
    """

    sites: tuple[Site, ...]
    size: int
    outer: Tensor
    inner: Tensor
    order: Tensor

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The global numbers (..., G) of u (..., L), and those of each row (..., N, l)."""
        return u[..., self.outer], u[..., self.inner]

    def join(self, outer: Tensor, inner: Tensor) -> Tensor:
        """The vector u (..., L) of global numbers (..., G) and those of each row (..., N, l)."""
        return torch.cat([outer, inner.flatten(-2)], -1)[..., self.order]


class Part(NamedTuple):
    """Some rows: their layout, which they are, for how many each stands, their places in u."""

    layout: Layout
    rows: Tensor  # (B,)
    scale: float  # N / B; of one of W processes that has M rows, W M / B
    places: Tensor  # (L of the part,)
    weight: Tensor  # 1 for a global number, the scale for one of a row

    def volume(self, log_det: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The log |dz/du| of each site, as much as it stands for."""
        local = {site.latent.name for site in self.layout.sites if site.is_local}
        return {k: v * (self.scale if k in local else 1.0) for k, v in log_det.items()}


def lay_out(
    latents: Sequence[Latent],
    local_plate: str | None,
    num_rows: int | None = None,
    device: torch.device | str | None = None,
) -> Layout:
    """Lay the sites out one after the other.

    Arguments:
        latents: the sites.
        local_plate: the plate of the rows, if any site stands in it.
        num_rows: a number of rows in the place of all.
        device: of the places.

    Raises:
        ValueError: if there is no bijection to the support of a site.
    """
    sites, outer, inner, start = [], [], [], 0
    total = num_rows or 0
    for latent in latents:
        transform = latent.transform
        batch, free = latent.batch_shape, latent.free_shape
        event = free[len(batch) :]
        dim = next((dim for name, _, dim in latent.plates if name == local_plate), None)
        if dim is not None:
            total = num_rows or batch[dim]
            axis = len(batch) + dim
            batch = (*batch[:axis], total, *batch[axis + 1 :])
        size = math.prod(batch + event)
        part = slice(start, start + size)
        plain = None if is_identity(transform) else transform
        sites.append(Site(latent, part, plain, batch, batch + event, dim))
        places = torch.arange(start, start + size, device=device)
        if dim is None:
            outer.append(places)
        else:
            inner.append(places.reshape(batch + event).movedim(axis, 0).reshape(total, -1))
        start += size
    none = torch.arange(0, device=device)
    first = torch.cat([none, *outer])
    rows = torch.cat(inner, -1) if inner else none.reshape(0, 0)
    order = torch.cat([first, rows.flatten()]).argsort()
    return Layout(tuple(sites), start, first, rows, order)


def part_of(
    whole: Layout, part: Layout, rows: Tensor, like: Tensor, stands_for: int | None = None
) -> Part:
    """Some rows of a layout.

    Arguments:
        whole: of all N rows.
        part: of B rows.
        rows: which they are, shape (B,).
        like: a tensor of the dtype of the weights.
        stands_for: how many rows they stand for; by default all of them.
    """
    scale = (stands_for or len(whole.inner)) / len(rows)
    places = torch.cat([whole.outer, whole.inner[rows].flatten()])[part.order]
    weight = torch.cat(
        [like.new_ones(len(part.outer)), like.new_full((part.inner.numel(),), scale)]
    )
    return Part(part, rows, scale, places, weight[part.order])


def slowed(x: Tensor, weight: Tensor | float) -> Tensor:
    """The same values, with the gradient divided by ``weight``.

    The terms of a row in a batch are scaled by N / B, so that batches are right on average. What
    only that row moves would be moved so much too far by it: here the gradient is that of the row.
    """
    own = x / weight
    return own + (x - own).detach()
