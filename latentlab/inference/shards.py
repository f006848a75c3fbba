"""The rows of each of several processes: blocks of all of them, of which no copy is made."""

from __future__ import annotations

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from latentlab.guides import Amortised, Guide
from latentlab.inference.batches import Batches, BatchRows, follows_rows, num_rows, take
from latentlab.inference.check import accepts_size
from latentlab.inference.minibatches import aligned_batch_size
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.ranks import Ranks

__all__ = ["Shard", "block_of", "share_out"]


def block_of(total: int, rank: int, size: int) -> range:
    """The rows of a rank: blocks whose lengths differ by one at most.

    Arguments:
        total: number of rows N.
        rank: number of the process.
        size: how many there are.

    Example:
        >>> [len(block_of(10, rank, 3)) for rank in range(3)]
        [3, 3, 4]
    """
    return range(total * rank // size, total * (rank + 1) // size)


class Shard(Batches):
    """The data of each step of one of several processes.

    Arguments:
        pair: the pair, with its processes.
        batch_size: number of rows of a step, those of all processes together; ``None`` for all.
        seed: the rows of a step depend on (seed, rank, step) alone.
    """

    def __init__(self, pair: Pair, batch_size: int | None, seed: int) -> None:
        super().__init__(pair.data)
        rank, size = pair.ranks.rank, pair.ranks.size
        block = block_of(num_rows(pair.data) or 0, rank, size)
        self._first, self._stands_for = block.start, size * len(block)
        device = pair.data.tensors()[0].device
        self._all = torch.arange(block.start, block.stop, device=device)
        self._part = pair.data.map(lambda tensor: tensor[block.start : block.stop])
        if batch_size is not None:
            own = block_of(batch_size, rank, size)
            count = min(max(1, len(own)), len(block))
            self._rows = BatchRows(len(block), count, seed, device)

    def rows(self, step: int) -> Tensor | None:
        """See :meth:`Batches.rows`."""
        rows = super().rows(step)
        return None if rows is None else rows + self._first

    def __call__(self, step: int) -> Arguments:
        """See :meth:`Batches.__call__`."""
        rows = self.rows(step)
        part = self._part if rows is None else take(self.data, rows)
        kwargs = {**part.kwargs, "size": self._stands_for}
        return Arguments(part.args, kwargs, part.names, self._all if rows is None else rows)


def share_out(pair: Pair, ranks: Ranks, batch_size: int | None) -> None:
    """Give a pair the processes that fit it together, in place.

    Arguments:
        pair: the pair, looked at.
        ranks: the processes.
        batch_size: rows of a step.

    Raises:
        ValueError: if its rows cannot be shared out; the message says why, and what to do.
    """
    if not ranks:
        return
    _expect_shareable(pair, ranks, batch_size)
    pair.ranks, ranks.device = ranks, pair.device
    # Latents that all rows share have the same draw on all ranks; where all are of rows, these
    # are other rows on each, and should not go up and down together.
    ranks.has_own_noise = follows_rows(pair)
    if pair.local_plate() is None and not ranks.has_own_noise:
        ranks.part = Shard(pair, None, 0)(0)


def _expect_shareable(pair: Pair, ranks: Ranks, batch_size: int | None) -> None:
    size, total = ranks.size, num_rows(pair.data)
    start = f"{size} processes cannot share this fit: "
    if total is None or total < 2 * size:
        rows = "have no rows" if total is None else f"have {total} rows, fewer than two for each"
        raise ValueError(f"{start}the data {rows}; start one process")
    known = isinstance(pair.guide, Guide | AutoGuide)
    if not known and pair.latents and not accepts_size(pair.guide):
        raise ValueError(f"{start}the guide must accept size=..., as the model does")
    if pair.local_plate() is not None and known and not isinstance(pair.guide, Amortised):
        raise ValueError(
            f"{start}the guide has numbers of its own for each row; take "
            'guide="amortised", a guide of your own that computes them from the rows, or one '
            "process"
        )
    if pair.bound is not None and pair.bound.plate is None:
        raise ValueError(
            f"{start}{type(pair.bound.objective).__name__} weighs all data in one, of which each "
            "process has a part; take ELBO(), or one process"
        )
    try:
        aligned_batch_size(pair, max(1, (batch_size or total) // size))
    except ValueError as error:
        raise ValueError(start + str(error).removeprefix("batch_size: ")) from error
