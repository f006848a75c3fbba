"""Where Pyro runs: a place of its own for every fit, and nothing left behind.

Pyro keeps its handlers, its parameters and its validation flags in the process, torch its random
generator and its default dtype. All of them are entered together, under one lock, and put back.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.params.param_store import StateDict

from latentlab.inference.devices import CPU, running_on, seed_device

__all__ = ["LOCK", "manual_seed", "sandbox", "stream"]

LOCK = threading.RLock()
"""Held by whoever runs Pyro: its state belongs to the process, not to a thread."""

_VALIDATION = (
    "validate_distributions_pyro",
    "validate_distributions_torch",
    "validate_infer",
    "validate_poutine",
)


@contextmanager
def sandbox(
    store: StateDict,
    *,
    seed: int,
    dtype: torch.dtype,
    validate: bool = False,
    device: torch.device = CPU,
) -> Iterator[None]:
    """Enter a parameter store, a seed and a dtype; leave everything as it was found.

    Arguments:
        store: state of Pyro's parameter store, updated on leaving, in place.
        seed: of torch's CPU generator, and of that of the device.
        dtype: torch's default dtype inside.
        validate: whether distributions check their arguments inside.
        device: torch's default device inside.

    Example:
        >>> store = {"params": {}, "constraints": {}}
        >>> with sandbox(store, seed=0, dtype=torch.float64):
        ...     loc = pyro.param("loc", torch.zeros(()))
        >>> list(store["params"]), "loc" in pyro.get_param_store()
        (['loc'], False)
    """
    with LOCK:
        default_dtype, rng_state = torch.get_default_dtype(), torch.get_rng_state()
        try:
            torch.set_default_dtype(dtype)
            flags = dict.fromkeys(_VALIDATION, validate)
            with running_on(device), pyro.settings.context(**flags), _parameters(store):
                manual_seed(seed)
                yield
        finally:
            torch.set_default_dtype(default_dtype)
            torch.set_rng_state(rng_state)


@contextmanager
def _parameters(store: StateDict) -> Iterator[None]:
    """Put a store in the place of Pyro's; what is in it on leaving is kept, errors or not."""
    pyro_store = pyro.get_param_store()
    # Setting Pyro's store aside takes from its tensors the way back to their unconstrained values.
    ways_back = [
        (parameter, vars(parameter)["unconstrained"])
        for _, parameter in pyro_store.named_parameters()
        if "unconstrained" in vars(parameter)
    ]
    try:
        with pyro_store.scope():
            pyro_store.set_state(store)
            try:
                yield
            finally:
                store.update(pyro_store.get_state())
    finally:
        for parameter, way_back in ways_back:
            vars(parameter)["unconstrained"] = way_back


def stream(seed: int | str, *labels: object) -> int:
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
    """Seed torch's CPU generator, in 1 us where ``torch.manual_seed`` takes 100.

    Where the default device is another, seed that one's, too.
    """
    torch.default_generator.manual_seed(seed)
    seed_device(seed)
