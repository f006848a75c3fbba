r"""Rows so many that a look at all of them at once is dear.

Where a model says of N rows

.. math:: \log p(x, z) = \log p(z) + \sum_n \log p(x_n \mid z)

and all latents are shared by them, the sum is taken over some rows after the other, and what needs
no more than a glance, such as where to start, looks at M rows that stand for all, each of them
N / M times. A fit in mini-batches takes that for granted in each step; others are not asked to.

Letters: N rows, M of them, P particles.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace

import torch

from latentlab.inference import objectives
from latentlab.inference.batches import chosen, num_rows, take
from latentlab.inference.pair import Arguments, Pair

__all__ = ["adds_up", "are_many", "glance", "parts"]

_MANY = 2**22  # numbers, above which rows are many
_GLANCE = 2**18  # numbers of the rows that stand for all
_PART = 2**18  # numbers of the rows that are added up at once, of one particle


def are_many(data: Arguments) -> bool:
    """Whether data are so many that a look at all of them at once is dear."""
    return num_rows(data) is not None and sum(t.numel() for t in data.tensors()) > _MANY


def adds_up(pair: Pair) -> bool:
    """Whether log p(x, z) is a sum over rows that share all latents; call it entered.

    Arguments:
        pair: a pair that was looked at, at few rows: half of them have to say of themselves what
            they say among all.
    """
    total, plate = num_rows(pair.data), pair.rows_plate()
    if total is None or plate is None or not pair.vectorised or "size" in pair.data.kwargs:
        return False
    if any(plate in {name for name, _, _ in latent.plates} for latent in pair.latents):
        return False
    if any(plate not in {name for name, _, _ in pair.plates[z]} for z in pair.summed_out):
        return False
    rows = torch.arange(total // 2)
    with torch.no_grad():
        draws = objectives.draw(pair, 1)
        every = objectives.site_log_probs(pair, draws)
        half = objectives.site_log_probs(pair, draws, take(pair.data, rows))
    for name, value in every.items():
        dims = {label: dim for label, _, dim in pair.plates[name]}
        if plate in dims and value.shape[dims[plate]] == total:
            value = value.index_select(dims[plate], rows.to(value.device))
        if value.shape != half[name].shape or not torch.allclose(value, half[name], rtol=1e-4):
            return False
    return True


def glance(pair: Pair, seed: int) -> Pair:
    """The pair at some of its rows, which stand for all of them.

    Arguments:
        pair: a pair whose rows are added up, or any other, which is returned as it is.
        seed: of the choice.
    """
    if not pair.in_parts:
        return pair
    total = num_rows(pair.data) or 1
    rows = chosen(max(1, _GLANCE // _width(pair.data)), total, seed)
    some = take(pair.data, rows)
    batch = Arguments(some.args, {**some.kwargs, "size": total}, some.names, rows)
    return replace(pair, data=batch, in_parts=False)


def parts(data: Arguments, size: int | None = None) -> Iterator[Arguments]:
    """Some rows after the other, in their order; so many at once as are cheap, or ``size``."""
    size = size or max(1, _PART // _width(data))
    for start in range(0, num_rows(data) or 0, size):
        yield data.map(operator.itemgetter(slice(start, start + size)))


def _width(data: Arguments) -> int:
    """Numbers of a row."""
    return max(1, sum(t[:1].numel() for t in data.tensors()))
