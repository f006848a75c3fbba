"""Random numbers of one's own, which take none from the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch in here only, and leave its generators as they were found.

    ``torch.manual_seed`` would also reach devices not in use yet.

    Arguments:
        seed: of the CPU's generator, and of those of CUDA devices in use.

    Example:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> with seeded(7):
        ...     inside = torch.rand(2)
        >>> with seeded(7):
        ...     again = torch.rand(2)
        >>> bool((inside == again).all()), bool((inside == torch.rand(2)).any())
        (True, False)
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
