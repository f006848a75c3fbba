"""Whether a pair can be fitted to some of its rows at a time, and which rows a step takes.

Index, plate and local latents have to agree: a batch stands for all rows in every site of the
model, and the guide draws the latents of the rows of the batch, and these alone. A pair of which
that cannot be said is refused.
"""

from __future__ import annotations

import warnings

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide

from latentlab.guides import Guide
from latentlab.inference.batches import Batches, take
from latentlab.inference.check import accepts_size
from latentlab.inference.pair import Pair
from latentlab.inference.sandbox import stream

__all__ = ["aligned_batch_size", "batches_of"]


def aligned_batch_size(pair: Pair, batch_size: int | None) -> int | None:
    """The size of a mini-batch that can be taken, or ``None`` for the whole data.

    Arguments:
        pair: the pair, looked at.
        batch_size: what was asked for.

    Raises:
        ValueError: if the pair cannot be aligned with its batches; the message says why.
    """
    if batch_size is None:
        return None
    tensors = pair.data.tensors()
    if not tensors or any(t.dim() == 0 or len(t) != len(tensors[0]) for t in tensors):
        raise ValueError("batch_size: expected data whose tensors have one row for each datum")
    if not accepts_size(pair.model):
        raise ValueError(
            "batch_size: the model must accept size=..., the number of rows a batch stands for; "
            "write model(x=None, size=None) with rows(x, size)"
        )
    local = pair.local_plate()
    if isinstance(pair.guide, Guide | AutoGuide) and local and not _follows_rows(pair, local):
        raise ValueError(
            f"batch_size: latents are local to plate {local!r}, which this guide cannot follow "
            'through mini-batches; take guide="mean_field" or "structured", '
            "latentlab.guides.Amortised, or a guide of your own that computes them from the batch"
        )
    if batch_size > len(tensors[0]):
        warnings.warn(
            f"batch_size: {batch_size} is more than the {len(tensors[0])} rows; all are taken",
            stacklevel=4,
        )
        return None
    if batch_size == len(tensors[0]):
        return None
    _expect_scaled(pair, batch_size, len(tensors[0]))
    return batch_size


def _expect_scaled(pair: Pair, batch_size: int, total: int) -> None:
    """A mini-batch has to stand for all rows: the model says so with ``size``, or is refused."""
    part = take(pair.data, torch.arange(batch_size))
    scales = []
    with pair.entered(seed=0), torch.no_grad():
        for size in (batch_size, total):
            try:
                model = poutine.trace(pair.model)
                nodes = model.get_trace(*part.args, **{**part.kwargs, "size": size}).nodes
            except Exception as error:
                raise ValueError(
                    f"batch_size: the model does not run on {batch_size} of the {total} rows "
                    f"({' '.join(str(error).split())}); its plate must be rows(x, size)"
                ) from error
            scales.append({site: torch.as_tensor(nodes[site]["scale"]) for site in pair.observed})
    some, all_of_them = scales
    unscaled = [
        site
        for site in pair.observed
        if not torch.allclose(all_of_them[site] * batch_size, some[site] * total)
    ]
    plate = pair.rows_plate()
    of_rows = [s for s in unscaled if plate in {name for name, _, _ in pair.plates[s]}]
    # Without a plate of rows, sites that are scaled by hand are told from those of no row by that.
    if of_rows or (plate is None and len(unscaled) == len(pair.observed)):
        raise ValueError(
            f"batch_size: the model counts {batch_size} rows as {batch_size}, where they stand "
            f"for size={total} (site {unscaled[0]!r}); put its sites into rows(x, size), or in "
            "pyro.plate(name, size, subsample=x)"
        )


def _follows_rows(pair: Pair, local_plate: str) -> bool:
    """Whether a guide draws the latents of the rows of a mini-batch, and these alone."""
    # A flow is laid over a guide of another kind first.
    follows = isinstance(pair.guide, Guide) and pair.guide.follows_rows
    return follows and pair.rows_plate() == local_plate


def batches_of(pair: Pair, batch_size: int | None, seed: int) -> Batches:
    """The data of each step.

    Arguments:
        pair: the pair, looked at.
        batch_size: rows of a batch; ``None`` for all.
        seed: of the order of the rows.

    Raises:
        ValueError: if a guide of the user's own does not accept ``size``.
    """
    is_known = isinstance(pair.guide, Guide | AutoGuide)
    if batch_size is not None and not is_known and not accepts_size(pair.guide):
        raise ValueError("batch_size: the guide must accept size=..., as the model does")
    return Batches(pair.data, batch_size, stream(seed, "batch"))
