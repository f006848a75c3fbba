"""Where Pyro runs: a place of its own for every fit, and nothing left behind.

Pyro keeps its handlers, its parameters and its validation flags in the process, torch its random
generator and its default dtype. All of them are entered together, under one lock, and put back.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch

__all__ = ["manual_seed", "sandbox", "stream"]

_LOCK = threading.RLock()


@contextmanager
def sandbox(
    store: dict[str, Any], *, seed: int, dtype: torch.dtype, validate: bool = False
) -> Iterator[None]:
    """Enter a parameter store, a seed and a dtype; leave everything as it was found.

    Arguments:
        store: state of Pyro's parameter store, updated on leaving.
        seed: of torch's CPU generator.
        dtype: torch's default dtype inside.
        validate: whether distributions check their arguments inside.
    """
    with _LOCK:
        default_dtype, rng_state = torch.get_default_dtype(), torch.get_rng_state()
        try:
            torch.set_default_dtype(dtype)
            torch.default_generator.manual_seed(seed)
            with pyro.validation_enabled(validate), pyro.get_param_store().scope(store):
                yield
        finally:
            torch.set_default_dtype(default_dtype)
            torch.set_rng_state(rng_state)


def stream(seed: int, *labels: object) -> int:
    """A seed that depends on (seed, labels) alone, so that every part of a fit has its own noise.

    Arguments:
        seed: the user's seed.
        labels: what the noise is for, such as ``("step", 17)``.

    Returns:
        An int in [0, 2**63).

    Example:
        >>> stream(0, "step", 1) == stream(0, "step", 1) != stream(0, "step", 2)
        True
    """
    text = ":".join(map(str, (seed, *labels))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def manual_seed(seed: int) -> None:
    """Seed torch's CPU generator only: 1 us, where ``torch.manual_seed`` takes 100."""
    torch.default_generator.manual_seed(seed)
