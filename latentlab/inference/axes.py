"""Names of the axes of a site, and labels along them."""

from __future__ import annotations

import itertools

from latentlab.inference.pair import Pair
from latentlab.protocols import NamesDims, columns_along, owner_of

__all__ = ["coords_of", "dims_of", "labels_of", "names_of"]


def dims_of(pair: Pair, site: str, num_axes: int) -> tuple[str, ...]:
    """Names of the axes of a site: the model's own, or its name and a number.

    Arguments:
        pair: the pair.
        site: the site.
        num_axes: how many axes a value has.
    """
    owner = owner_of(pair.model)
    if isinstance(owner, NamesDims) and len(owner.dims.get(site, ())) == num_axes:
        return tuple(owner.dims[site])
    return tuple(f"{site}_dim_{i}" for i in range(num_axes))


def coords_of(pair: Pair, site: str, shape: tuple[int, ...]) -> list[list[str]]:
    """Labels along each axis of a site; a feature has the name of its column.

    Arguments:
        pair: the pair, with its data.
        site: the site.
        shape: of a value.
    """
    names, coords = pair.data.names or (), []
    # A site that is the table itself has its columns; of other sites the model has to say.
    is_table = names and site in pair.observed
    is_table = is_table and shape == tuple(pair.data.tensors()[0].shape)
    for axis, size in enumerate(shape):
        of_table = is_table and axis == 1 and len(shape) == 2
        axis_name = "feature" if of_table else dims_of(pair, site, len(shape))[axis]
        columns = columns_along(axis_name, names)
        coords.append(list(columns) if len(columns) == size else list(map(str, range(size))))
    return coords


def labels_of(pair: Pair, site: str, shape: tuple[int, ...]) -> list[str]:
    """One label for each number of a site, as ``"1, width"``.

    Arguments:
        pair: the pair, with its data.
        site: the site.
        shape: of a value.
    """
    return [", ".join(parts) for parts in itertools.product(*coords_of(pair, site, shape))]


def names_of(pair: Pair, site: str, shape: tuple[int, ...]) -> list[str]:
    """One name for each number of a site, as ``"locs[1, width]"``; a single one is the site's.

    Arguments:
        pair: the pair, with its data.
        site: the site.
        shape: of a value.
    """
    return [f"{site}[{label}]" if label else site for label in labels_of(pair, site, shape)]
