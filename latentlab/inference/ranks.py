r"""Several processes that fit one pair together, by plain ``torch.distributed``.

Of N rows rank r of W has :math:`N_r`, and looks at :math:`B_r` of them in a step. It calls the
pair with ``size=`` :math:`W N_r`, so that each of its rows counts :math:`W N_r / B_r` times, and

.. math:: \frac{1}{W} \sum_r \left[ \log p(z) - \log q(z)
          + \frac{W N_r}{B_r} \sum_{n \in B_r} \log p(x_n \mid z) \right]

counts each of all rows once on average, whatever the shards, and what belongs to no row once. Its
gradient is the mean of those of the ranks; where all rows are taken and the noise is the same it
is that of one process. All ranks take the same step, and so stay where the others are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from latentlab.inference.devices import CPU

if TYPE_CHECKING:
    from latentlab.inference.pair import Arguments

__all__ = ["ALONE", "Ranks", "is_first", "joined"]

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets

_groups = itertools.count()  # so that no two fits of a process meet at one place of the store


@dataclass(eq=False)
class Ranks:
    """The processes of a fit; one of them alone does nothing here.

    Arguments:
        rank: number of this one r.
        size: how many there are W.
        device: of the tensors that they exchange.
        differed: whether they were found apart, against all expectation.
        part: the rows of this one, standing for all, where the density of all data is the mean of
            those of the ranks; ``None`` where each rank looks at all rows.
        has_own_noise: whether the noise of steps is another one on each.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    differed: bool = False
    part: Arguments | None = None
    has_own_noise: bool = False

    def __bool__(self) -> bool:
        return self.size > 1

    def notes(self) -> Iterator[str]:
        """What a posterior says of them."""
        if self:
            yield f"{self.size} processes took each step together, each with a part of the rows"
        if self.differed:
            yield (
                "the processes were found at different places at the end of a stage, as of "
                "machines of different kinds; that of the first was taken"
            )

    def seed(self, seed: int) -> int | str:
        """The seed of the noise of steps here.

        Arguments:
            seed: that of a single process.
        """
        return f"{seed}:rank {self.rank}" if self.has_own_noise else seed

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the tensors of all ranks, the same bytes on each of them.

        Arguments:
            value: the tensor of this one.
        """
        if not self:
            return value
        total = value.detach().to(self.device, copy=True).contiguous()
        dist.all_reduce(total)
        return (total / self.size).to(value.device)

    def same(self, value: float) -> float:
        """What the first rank found, so that all decide alike.

        Arguments:
            value: what this one found.
        """
        if not self:
            return value
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(found, 0)
        return found.item()

    def align(self, state: Mapping[str, Tensor]) -> None:
        """Check that all ranks are at one place, in place; if not, that of the first is taken.

        Arguments:
            state: what moves. What networks keep of their batches, ``"buffer..."``, and guides
                of their past draws, ``"baseline..."``, is of other rows or noise on each rank:
                the mean of all is taken.
        """
        if not self:
            return
        for name, value in state.items():
            if name.startswith(("buffer.", "baseline.")):
                value.copy_(self.mean(value))
                continue
            first = value.detach().to(self.device, copy=True).contiguous()
            dist.broadcast(first, 0)
            apart = torch.tensor(float(not _equal(first, value.to(self.device))))
            if self.mean(apart).item():
                self.differed = True
                value.copy_(first)


ALONE = Ranks()
"""One process."""


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def is_first() -> bool:
    """Whether this process is the one of several that writes files and shows how a fit goes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _is_launched() or os.environ["RANK"] == "0"


def _is_launched() -> bool:
    return all(name in os.environ for name in _VARIABLES)


@contextmanager
def joined(device: torch.device | None) -> Iterator[Ranks]:
    """The processes that this one was started with; a group of them is left as it was found.

    They are those of the default group of ``torch.distributed`` where there is one, else those
    that ``torchrun`` started.

    Arguments:
        device: where the fit runs; ``None`` is not known yet, and taken for the CPU.

    Example:
        >>> with joined(None) as ranks:
        ...     ranks.size
        1
    """
    where, made = device or CPU, False
    if not dist.is_available():
        yield ALONE
        return
    if not dist.is_initialized() and _is_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        store, rank, size = next(rendezvous("env://"))
        store = PrefixStore(f"latentlab/{next(_groups)}", store)
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        made = True
    try:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield ALONE
            return
        if where.type == "cpu" and dist.get_backend() == "nccl":
            raise ValueError(
                "device: the group of processes is of nccl, which knows no CPU; give "
                'device="cuda", or start a group of gloo'
            )
        yield Ranks(dist.get_rank(), dist.get_world_size(), where)
    finally:
        if made:
            dist.destroy_process_group()
