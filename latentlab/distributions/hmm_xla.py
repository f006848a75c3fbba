r"""The recursions of :mod:`latentlab.distributions.hmm_lanes` compiled by XLA, where jax is there.

A loop of small steps costs torch some microseconds for each operation, XLA almost nothing; its
price is a compilation of about 0.3 s for every shape; large steps gain nothing.

Letters: T time, K states, G groups of chains that share their transitions, L chains of a group.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentlab.distributions.hmm_lanes import Layout, Likelihoods

__all__ = ["backward", "forward", "is_worthwhile"]

_LEAST_CELLS = 2**14
_LARGEST_STEP = 2**11
_MOST_STATES = 16
_SMALLEST_PRODUCT = 2**12  # multiplications


@functools.cache
def _has_jax() -> bool:
    return importlib.util.find_spec("jax") is not None


def is_worthwhile(layout: Layout, log_likelihoods: Tensor) -> bool:
    """Whether to use XLA: from the shape and the device alone, so that a repeat is the same.

    It is where there are many small steps: 16384 numbers or more in all (T times K times chains),
    2048 or fewer in a step, and up to 16 states.
    """
    T, K = log_likelihoods.shape[-2:]
    G, L = layout.sizes
    fits = K <= _MOST_STATES and K * G * L <= _LARGEST_STEP and T * K * G * L >= _LEAST_CELLS
    return fits and log_likelihoods.device.type == "cpu" and _has_jax()


def forward(initial: Tensor, transitions: Tensor, seen: Likelihoods, out: Tensor) -> Tensor:
    """As :func:`latentlab.distributions.hmm_lanes.forward`."""
    probs, sums = _call(_compiled()[0], initial, transitions, seen.scaled, seen.absent)
    out.copy_(probs)
    return sums


def backward(
    transitions: Tensor, seen: Likelihoods, probs: Tensor, sums: Tensor, seeds: Tensor, dense: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`latentlab.distributions.hmm_lanes.backward`."""
    arrays = (transitions, seen.scaled, seen.absent, probs, sums, seeds)
    return _call(_compiled()[1], *arrays)


def _call(function: Callable, *arrays: Tensor | None) -> Any:  # noqa: ANN401
    """Tensors in and out, without a copy, in the precision they have."""
    import jax

    with jax.enable_x64(True):
        own = [None if x is None else x.detach().contiguous() for x in arrays]
        given = [None if x is None else jax.dlpack.from_dlpack(x) for x in own]
        found = jax.block_until_ready(function(*given))
        return tuple(torch.utils.dlpack.from_dlpack(x) for x in found)


@functools.cache
def _compiled() -> tuple[Callable, Callable]:
    """The two recursions, to be compiled once for each shape."""
    import jax
    from jax import numpy as jnp

    def forwards(initial: Any, transitions: Any, factors: Any, absent: Any) -> tuple:  # noqa: ANN401
        transposed = jnp.swapaxes(transitions, -1, -2)

        def step(predicted: Any, now: tuple) -> tuple:  # noqa: ANN401
            factor, gap = now
            joint = predicted * factor
            c = joint.sum(1) if gap is None else joint.sum(1) + gap
            probs = joint / c[:, None]
            return moved(transposed, probs), (probs, c)

        start = jnp.broadcast_to(initial, (len(transitions), *factors.shape[2:]))
        return jax.lax.scan(step, start, (factors, absent))[1]

    def backwards(
        transitions: Any,  # noqa: ANN401
        factors: Any,  # noqa: ANN401
        absent: Any,  # noqa: ANN401
        probs: Any,  # noqa: ANN401
        sums: Any,  # noqa: ANN401
        seeds: Any,  # noqa: ANN401
    ) -> tuple:
        cap = float(jnp.finfo(probs.dtype).tiny) ** (-1 / 3)
        seeds = seeds[:, None]

        def step(carry: tuple, now: tuple) -> tuple:
            ahead, counts = carry
            prob, factor, c, gap = now
            counts = counts + product(prob, jnp.swapaxes(ahead, -1, -2))
            beta = jnp.clip(moved(transitions, ahead), -cap, cap) + gap[:, None] * seeds
            return (beta * factor / c[:, None], counts), prob * beta

        if absent is None:
            absent = jnp.zeros((len(sums), 1, 1), probs.dtype)
        ends = jnp.concatenate([absent[1:], jnp.ones_like(absent[:1])])
        start = jnp.zeros_like(probs[0]), jnp.zeros_like(transitions)
        steps = (probs, factors, sums, ends)
        found: Any = jax.lax.scan(step, start, steps, reverse=True)
        return *found[0], found[1]

    def product(a: Any, b: Any) -> Any:  # noqa: ANN401
        return (a[0] @ b[0])[None] if len(a) == len(b) == 1 else a @ b

    def moved(a: Any, b: Any) -> Any:  # noqa: ANN401
        if a[0].size * b.shape[-1] > _SMALLEST_PRODUCT:
            return product(a, b)
        return (a[..., None] * b[:, None]).sum(2)  # a call of a product would take longer

    return jax.jit(forwards), jax.jit(backwards)
