"""The rows of data: some of them, a mini-batch of them, those that are kept aside.

Letters: N rows, B of them in a batch.
"""

from __future__ import annotations

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from latentlab.guides import Guide
from latentlab.inference import predictive
from latentlab.inference.devices import CPU
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import stream

__all__ = ["BatchRows", "Batches", "chosen", "follows_rows", "num_rows", "parted", "split", "take"]


def num_rows(data: Arguments) -> int | None:
    """The number of rows that all tensors of the data share; ``None`` where they have none."""
    tensors = data.tensors()
    if not tensors or any(not t.dim() or len(t) != len(tensors[0]) for t in tensors):
        return None
    return len(tensors[0])


def take(data: Arguments, rows: Tensor) -> Arguments:
    """Those rows of all tensors, as data of their own."""
    return data.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))


def chosen(count: int, total: int, seed: int) -> Tensor:
    """``count`` of so many rows, in their order, by a seed; all of them where there are fewer."""
    if count >= total:
        return torch.arange(total, device=CPU)
    generator = torch.Generator().manual_seed(stream(seed, "rows"))
    return torch.randperm(total, generator=generator, device=CPU)[:count].sort().values


class BatchRows:
    """The rows of the mini-batch of a step: each row at most once in an epoch, in another order.

    All batches have B rows, so that N / B scales each of them exactly: what is left of an epoch
    after its last whole batch is left out, other rows in each epoch, and every row is as likely.

    Arguments:
        total: number of rows N.
        size: number of rows B of a batch.
        seed: the rows of a step depend on (seed, step) alone.
        device: of the rows, those of the data, so that a batch is taken there.

    Example:
        >>> rows = BatchRows(total=10, size=5, seed=0)
        >>> sorted([*rows(2).tolist(), *rows(3).tolist()])
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(
        self, total: int, size: int, seed: int, device: torch.device | None = None
    ) -> None:
        self.total, self.size, self.seed, self.device = total, size, seed, device
        self._order: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tensor:
        """The rows (B,) of a step.

        Arguments:
            step: its number, from 0.
        """
        epoch, place = divmod(step, self.total // self.size)
        if self._order is None or self._order[0] != epoch:  # an order costs more than a step
            generator = torch.Generator().manual_seed(stream(self.seed, "epoch", epoch))
            order = torch.randperm(self.total, generator=generator, device=CPU)
            self._order = epoch, order.to(self.device or CPU)
        return self._order[1][place * self.size : (place + 1) * self.size]


class Batches:
    """The data of each step: all rows, or those of its mini-batch.

    Arguments:
        data: all of them.
        size: number of rows B of a batch; ``None`` for all.
        seed: the rows of a step depend on (seed, step) alone.
    """

    def __init__(self, data: Arguments, size: int | None = None, seed: int = 0) -> None:
        self.data = data
        self._rows: BatchRows | None = None
        if size is not None:
            first = data.tensors()[0]
            self._rows = BatchRows(len(first), size, seed, first.device)

    def rows(self, step: int) -> Tensor | None:
        """The rows (B,) of a step; ``None`` for all.

        Arguments:
            step: its number, from 0.
        """
        return None if self._rows is None else self._rows(step)

    def __call__(self, step: int) -> Arguments:
        """The data of a step.

        Arguments:
            step: its number, from 0.
        """
        if self._rows is None:
            return self.data
        rows = self._rows(step)
        part = take(self.data, rows)
        return Arguments(part.args, {**part.kwargs, "size": self._rows.total}, part.names, rows)


def split(data: Arguments, share: float, seed: int) -> tuple[Arguments, Arguments]:
    """The rows to fit to, and those that are kept aside.

    Arguments:
        data: with rows.
        share: of the rows to be kept aside, in (0, 1).
        seed: of the choice.

    Raises:
        ValueError: if the data have no rows, or too few to share.
    """
    total = num_rows(data)
    if total is None:
        raise ValueError("held_out: expected data whose tensors have one row for each datum")
    count = round(share * total)
    if count < 2 or total - count < 2:
        raise ValueError(
            f"held_out: expected a share that leaves at least 2 rows on either side, got {share} "
            f"of {total} rows; leave it at 0"
        )
    return parted(data, count, seed)


def parted(data: Arguments, count: int, seed: int) -> tuple[Arguments, Arguments]:
    """All rows but so many, and these.

    Arguments:
        data: with rows, more than ``count``.
        count: rows that are kept aside.
        seed: of the choice.
    """
    total = num_rows(data) or 0
    kept = chosen(count, total, stream(seed, "held out"))
    all_rows = torch.ones(total, dtype=torch.bool, device=CPU)
    others = all_rows.index_fill(0, kept, False).nonzero()[:, 0]
    return take(data, others), take(data, kept)


def follows_rows(pair: Pair) -> bool:
    """Whether all latents are local to the rows, and the guide follows the rows it is given."""
    total = num_rows(pair.data)
    plate = predictive.datum_plate(pair)
    if total is None or plate is None or not pair.vectorised or not pair.observed:
        return False
    if "size" in pair.data.kwargs or pair.summed_out:
        return False
    if pair.latents and isinstance(pair.guide, Guide | AutoGuide):
        return False
    sites = [*pair.observed, *(latent.name for latent in pair.latents)]
    plates = [{(name, size) for name, size, _ in pair.plates[site]} for site in sites]
    return all((plate, total) in found for found in plates)
