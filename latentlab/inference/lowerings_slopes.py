"""Gradients that a pair takes itself, such as the score of a flow, in terms of ``jax.numpy``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from latentlab.inference.lowerings_arrays import select_scatter, slice_scatter

__all__ = ["slopes"]

Array = Any


def slopes() -> dict[str, Callable]:
    """The gradient g of a loss with respect to what an operation gave, led back through it."""
    import jax
    from jax import numpy as jnp

    def elu(
        g: Array, alpha: float, scale: float, input_scale: float, is_result: bool, x: Array
    ) -> Array:
        bottom = alpha * scale
        inner = x + bottom if is_result else bottom * jnp.exp(input_scale * jnp.minimum(x, 0))
        return jnp.where(x <= 0, g * input_scale * inner, g * scale)

    def softplus(g: Array, x: Array, beta: float, threshold: float) -> Array:
        return jnp.where(beta * x > threshold, g, g * jax.nn.sigmoid(beta * x))

    def gelu(g: Array, x: Array, approximate: str = "none") -> Array:
        return jax.vjp(lambda x: jax.nn.gelu(x, approximate == "tanh"), x)[1](g)[0]

    def softmax(g: Array, y: Array, dim: int, _: Array = None) -> Array:
        return y * (g - (g * y).sum(dim, keepdims=True))

    def log_softmax(g: Array, y: Array, dim: int, _: Array = None) -> Array:
        return g - jnp.exp(y) * g.sum(dim, keepdims=True)

    def slice_(g: Array, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Array:
        return slice_scatter(jnp.zeros(tuple(sizes), g.dtype), g, dim, start, end, step)

    def select(g: Array, sizes: Sequence[int], dim: int, index: int) -> Array:
        return select_scatter(jnp.zeros(tuple(sizes), g.dtype), g, dim, index)

    table: dict[str, Callable] = {
        "tanh": lambda g, y: g * (1 - y * y),
        "sigmoid": lambda g, y: g * y * (1 - y),
        "silu": lambda g, x: jax.vjp(jax.nn.silu, x)[1](g)[0],
        "threshold": lambda g, x, threshold: jnp.where(x <= threshold, 0, g),
        "leaky_relu": lambda g, x, slope, _: jnp.where(x > 0, g, g * slope),
        "hardtanh": lambda g, x, low, high: jnp.where((x <= low) | (x >= high), 0, g),
        "log_sigmoid": lambda g, x, _: g * jax.nn.sigmoid(-x),
        "elu": elu,
        "gelu": gelu,
        "softplus": softplus,
        "select": select,
        "slice": slice_,
    }
    return {
        **{f"{name}_backward.default": function for name, function in table.items()},
        "_softmax_backward_data.default": softmax,
        "_log_softmax_backward_data.default": log_softmax,
    }
