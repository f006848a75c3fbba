"""Operations of torch that make, arrange and find numbers, in terms of ``jax.numpy``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["dtype_of", "makers", "places", "select_scatter", "shapes", "slice_scatter"]

Array = Any


def dtype_of(dtype: torch.dtype | None, default: Array = None) -> Array:
    """JAX's name for a dtype of torch."""
    if dtype is None:
        return default
    return "bool" if dtype == torch.bool else str(dtype).removeprefix("torch.")


def shapes() -> dict[str, Callable]:
    """What only arranges numbers anew."""
    from jax import numpy as jnp

    def as_it_is(x: Array, *_: Array, **__: Array) -> Array:
        return x

    def view(x: Array, size: Sequence[int]) -> Array:
        return jnp.reshape(x, tuple(size))

    copies = ("clone", "alias", "lift_fresh_copy", "contiguous")
    return {
        **{f"{name}.default": as_it_is for name in copies},
        **{f"{name}.default": view for name in ("view", "reshape", "_unsafe_view")},
        **{f"squeeze.{kind}": _squeeze for kind in ("default", "dim", "dims")},
        "expand.default": _expand,
        "unsqueeze.default": lambda x, dim: jnp.expand_dims(x, dim),
        "permute.default": lambda x, dims: jnp.transpose(x, tuple(dims)),
        "transpose.int": lambda x, a, b: jnp.swapaxes(x, a, b) if x.ndim else x,
        "t.default": lambda x: x.T,
        "movedim.int": jnp.moveaxis,
        "cat.default": _concatenate,
        "stack.default": lambda xs, dim=0: jnp.stack(xs, dim),
        "unbind.int": lambda x, dim=0: [jnp.take(x, k, axis=dim) for k in range(x.shape[dim])],
        "split.Tensor": _split,
        "split_with_sizes.default": _split,
        "flip.default": lambda x, dims: jnp.flip(x, tuple(dims)),
        "roll.default": lambda x, shifts, dims: jnp.roll(x, tuple(shifts), tuple(dims) or None),
        "repeat.default": lambda x, times: jnp.tile(x, tuple(times)),
        "_to_copy.default": _cast,
        "diagonal.default": lambda x, k=0, a=0, b=1: jnp.diagonal(x, k, a, b),
        "diag_embed.default": _diag_embed,
        "tril.default": lambda x, k=0: jnp.tril(x, k),
        "triu.default": lambda x, k=0: jnp.triu(x, k),
        "constant_pad_nd.default": _pad,
        "slice.Tensor": _slice,
        "select.int": lambda x, dim, k: jnp.take(x, k, axis=dim),
    }


def _expand(x: Array, size: Sequence[int], implicit: bool = False) -> Array:
    from jax import numpy as jnp

    added = len(size) - x.ndim
    wanted = [x.shape[d - added] if n == -1 else n for d, n in enumerate(size)]
    return jnp.broadcast_to(x, wanted)


def _squeeze(x: Array, dim: Array = None) -> Array:
    from jax import numpy as jnp

    if dim is None:
        return jnp.squeeze(x)
    dims = [dim] if isinstance(dim, int) else dim
    return jnp.squeeze(x, tuple(d for d in dims if x.ndim and x.shape[d] == 1))


def _split(x: Array, size: int | Sequence[int], dim: int = 0) -> list[Array]:
    """In parts of one size, or of given ones."""
    from jax import numpy as jnp

    if isinstance(size, int):
        return jnp.split(x, [*range(size, x.shape[dim], size)], axis=dim)
    return jnp.split(x, [*itertools.accumulate(size)][:-1], axis=dim)


def _cast(x: Array, dtype: torch.dtype | None = None, **_: Array) -> Array:
    return x if dtype is None else x.astype(dtype_of(dtype))


def _concatenate(parts: Sequence[Array], dim: int = 0) -> Array:
    from jax import numpy as jnp

    # torch takes an empty vector for nothing at all, of whatever shape the others have.
    most = max(part.ndim for part in parts)
    return jnp.concatenate([part for part in parts if part.ndim == most], dim)


def _slice(x: Array, dim: int = 0, start: Array = None, end: Array = None, step: int = 1) -> Array:
    places: list[slice] = [slice(None)] * x.ndim
    places[dim] = slice(start, None if end is None or end >= 2**62 else end, step)
    return x[tuple(places)]


def _pad(x: Array, pad: Sequence[int], value: float = 0.0) -> Array:
    from jax import numpy as jnp

    widths = [(0, 0)] * x.ndim
    for k in range(len(pad) // 2):
        widths[x.ndim - 1 - k] = (pad[2 * k], pad[2 * k + 1])
    kept = tuple(
        slice(max(-a, 0), n + min(b, 0)) for (a, b), n in zip(widths, x.shape, strict=True)
    )
    added = [(max(a, 0), max(b, 0)) for a, b in widths]
    return jnp.pad(x[kept], added, constant_values=value)


def _diag_embed(x: Array, offset: int = 0, first: int = -2, second: int = -1) -> Array:
    from jax import numpy as jnp

    if offset or (first, second) != (-2, -1):
        raise NotImplementedError("diag_embed off the main diagonal")
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def makers() -> dict[str, Callable]:
    """Arrays of one number, or of numbers in order."""
    from jax import numpy as jnp

    def full(size: Sequence[int], value: Array, dtype: Array = None, **_: Array) -> Array:
        return jnp.full(tuple(size), value, dtype_of(dtype))

    def like(x: Array, value: Array, dtype: Array = None, **_: Array) -> Array:
        return jnp.full(x.shape, value, dtype_of(dtype, x.dtype))

    def new(x: Array, size: Sequence[int], value: Array, dtype: Array = None, **_: Array) -> Array:
        return jnp.full(tuple(size), value, dtype_of(dtype, x.dtype))

    def arange(*ends: Array, dtype: Array = None, **_: Array) -> Array:
        whole = all(isinstance(end, int) for end in ends)
        default = "int64" if whole else dtype_of(torch.get_default_dtype())
        return jnp.arange(*ends, dtype=dtype_of(dtype, default))  # type: ignore[misc]

    def eye(n: int, m: int | None = None, dtype: Array = None, **_: Array) -> Array:
        return jnp.eye(n, m, dtype=dtype_of(dtype, dtype_of(torch.get_default_dtype())))

    def scalar(value: Array, dtype: Array = None, **_: Array) -> Array:
        return jnp.asarray(value, dtype_of(dtype, dtype_of(torch.get_default_dtype())))

    def filled(value: float) -> dict[str, Callable]:
        name = "ones" if value else "zeros"

        def fresh(size: Sequence[int], dtype: Array = None, **_: Array) -> Array:
            default = dtype_of(torch.get_default_dtype())
            return jnp.full(tuple(size), value, dtype_of(dtype, default))

        return {
            f"{name}.default": fresh,
            f"{name}_like.default": lambda x, **how: like(x, value, how.get("dtype")),
            f"new_{name}.default": lambda x, size, **how: new(x, size, value, how.get("dtype")),
        }

    return {
        **filled(0.0),
        **filled(1.0),
        "empty.memory_format": lambda size, dtype=None, **_: full(
            size, 0.0, dtype or torch.get_default_dtype()
        ),
        "new_empty.default": lambda x, size, dtype=None, **_: new(x, size, 0.0, dtype),
        "empty_like.default": lambda x, dtype=None, **_: like(x, 0.0, dtype),
        "full.default": full,
        "full_like.default": like,
        "new_full.default": new,
        "scalar_tensor.default": scalar,
        "arange.default": arange,
        "arange.start": arange,
        "arange.start_step": arange,
        "eye.default": eye,
        "eye.m": eye,
    }


def places() -> dict[str, Callable]:
    """What finds numbers by their places."""
    from jax import numpy as jnp

    return {
        "index.Tensor": _index,
        "_unsafe_index.Tensor": _index,
        "index_put.default": _index_put,
        "index_select.default": lambda x, dim, index: jnp.take(x, index, axis=dim),
        "gather.default": _gather,
        "scatter.src": _scatter,
        "scatter.value": _scatter,
        "scatter_add.default": functools.partial(_scatter, add=True),
        "slice_scatter.default": slice_scatter,
        "select_scatter.default": select_scatter,
        "one_hot.default": _one_hot,
        "embedding.default": lambda weight, index, *_: weight[index],
        "searchsorted.Tensor": _search,
    }


def _expect_no_mask(indices: Sequence[Array]) -> None:
    if any(str(getattr(index, "dtype", "")) == "bool" for index in indices):
        raise NotImplementedError("it takes numbers by a mask, so that shapes depend on values")


def _index(x: Array, indices: Sequence[Array]) -> Array:
    _expect_no_mask(indices)
    return x[tuple(slice(None) if index is None else index for index in indices)]


def _index_put(
    x: Array, indices: Sequence[Array], value: Array, accumulate: bool = False
) -> Array:
    from jax import numpy as jnp

    if len(indices) == 1 and str(indices[0].dtype) == "bool" and not value.ndim and not accumulate:
        mask = indices[0]
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), value, x)
    _expect_no_mask(indices)
    at = x.at[tuple(slice(None) if index is None else index for index in indices)]
    return at.add(value) if accumulate else at.set(value)


def _gather(x: Array, dim: int, index: Array, sparse_grad: bool = False) -> Array:
    from jax import numpy as jnp

    if not x.ndim:
        return jnp.broadcast_to(x, index.shape)
    # torch reads a corner of x where the other axes of the index are shorter.
    corner = [slice(None) if d == dim % x.ndim else slice(n) for d, n in enumerate(index.shape)]
    return jnp.take_along_axis(x[tuple(corner)], index, axis=dim)


def _scatter(x: Array, dim: int, index: Array, value: Array, *, add: bool = False) -> Array:
    from jax import numpy as jnp

    if getattr(value, "ndim", 0):
        value = value[tuple(slice(n) for n in index.shape)]
    at = list(jnp.indices(index.shape, sparse=True))
    at[dim % x.ndim] = index
    return x.at[tuple(at)].add(value) if add else x.at[tuple(at)].set(value)


def slice_scatter(
    x: Array, value: Array, dim: int = 0, start: Array = None, end: Array = None, step: int = 1
) -> Array:
    """An array with a slice of it in the place of another."""
    at: list[Array] = [slice(None)] * x.ndim
    at[dim] = slice(start, None if end is None or end >= 2**62 else end, step)
    return x.at[tuple(at)].set(value)


def select_scatter(x: Array, value: Array, dim: int, index: int) -> Array:
    """An array with other numbers at one place of an axis."""
    at: list[Array] = [slice(None)] * x.ndim
    at[dim] = index
    return x.at[tuple(at)].set(value)


def _one_hot(x: Array, num_classes: int = -1) -> Array:
    from jax import numpy as jnp

    if num_classes < 0:
        raise NotImplementedError("one_hot without num_classes")
    return (x[..., None] == jnp.arange(num_classes)).astype("int64")


def _search(edges: Array, x: Array, *, right: bool = False, **_: Array) -> Array:
    """Place of x among sorted edges, along the last axis."""
    above = edges[..., None, :] <= x[..., None] if right else edges[..., None, :] < x[..., None]
    return above.sum(-1)
