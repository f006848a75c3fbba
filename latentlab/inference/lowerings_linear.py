"""Linear algebra, convolutions and our own operations in terms of JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["chains", "matrices"]

Array = Any


def matrices() -> dict[str, Callable]:
    """Linear algebra and convolutions."""
    from jax import numpy as jnp
    from jax.scipy import linalg

    def product(a: Array, b: Array) -> Array:
        if a.ndim == b.ndim == 2 and a.shape[0] == 1:  # XLA is slow at a row times a long matrix
            return (jnp.swapaxes(b, -1, -2) @ a[0])[None]
        return a @ b

    def with_sum(c: Array, a: Array, b: Array, *, beta: float = 1, alpha: float = 1) -> Array:
        found = a @ b
        return (c if beta == 1 else beta * c) + (found if alpha == 1 else alpha * found)

    return {
        **dict.fromkeys(("mm.default", "mv.default", "bmm.default", "dot.default"), product),
        **dict.fromkeys(("addmm.default", "addmv.default", "baddbmm.default"), with_sum),
        "linalg_solve_triangular.default": _solve_triangular,
        "triangular_solve.default": _triangular_solve,
        "cholesky_solve.default": lambda b, a, upper=False: linalg.cho_solve((a, not upper), b),
        "linalg_cholesky_ex.default": _cholesky,
        "cholesky.default": lambda x, upper=False: _cholesky(x, upper)[0],
        "linalg_inv_ex.default": lambda x, **_: (jnp.linalg.inv(x), jnp.zeros(x.shape[:-2])),
        "_linalg_solve_ex.default": _solve,
        "linalg_lu_solve.default": _solve_again,
        "_linalg_slogdet.default": lambda x: (*jnp.linalg.slogdet(x), x, jnp.zeros(x.shape[:-1])),
        "_linalg_det.default": lambda x: (jnp.linalg.det(x), x, jnp.zeros(x.shape[:-1])),
        "_linalg_check_errors.default": lambda *_, **__: None,
        "trace.default": jnp.trace,
        "convolution.default": _convolution,
    }


def _broadcast(a: Array, b: Array) -> tuple[Array, Array]:
    """Two stacks of matrices of one batch shape."""
    from jax import numpy as jnp

    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return tuple(jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))  # type: ignore[return-value]


def _solve_triangular(
    a: Array, b: Array, upper: bool, left: bool = True, unitriangular: bool = False
) -> Array:
    from jax.lax import linalg

    how = {"left_side": left, "lower": not upper, "unit_diagonal": unitriangular}
    return linalg.triangular_solve(*_broadcast(a, b), **how)


def _triangular_solve(
    b: Array, a: Array, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Array, Array]:
    from jax.lax import linalg

    a, b = _broadcast(a, b)
    how = {"lower": not upper, "transpose_a": transpose, "unit_diagonal": unitriangular}
    return linalg.triangular_solve(a, b, left_side=True, **how), a


def _solve(
    a: Array, b: Array, *, left: bool = True, check_errors: bool = False
) -> tuple[Array, Array, Array, Array]:
    from jax import numpy as jnp

    # A stack of vectors is what torch takes b for where it has one axis less, and the shape of it.
    as_vectors = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    b = b[..., None] if as_vectors else b
    if left:
        found = jnp.linalg.solve(*_broadcast(a, b))
    else:
        turned = _broadcast(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2))
        found = jnp.swapaxes(jnp.linalg.solve(*turned), -1, -2)
    found = found[..., 0] if as_vectors else found
    # In the place of its factors a matrix stands for itself, as _solve_again knows.
    return found, a, jnp.zeros(a.shape[:-1], "int32"), jnp.zeros(a.shape[:-2], "int32")


def _solve_again(
    a: Array, pivots: Array, b: Array, *, left: bool = True, adjoint: bool = False
) -> Array:
    from jax import numpy as jnp

    return _solve(jnp.swapaxes(a, -1, -2) if adjoint else a, b, left=left)[0]


def _cholesky(x: Array, upper: bool = False, check_errors: bool = False) -> tuple[Array, Array]:
    from jax import numpy as jnp

    factor = jnp.linalg.cholesky(x)  # NaN where there is none
    return (jnp.swapaxes(factor, -1, -2) if upper else factor), jnp.zeros(x.shape[:-2], "int32")


def _convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Array:
    import jax
    from jax import numpy as jnp

    dims = len(stride)
    letters = "DHW"[3 - dims :]
    pads = [(p, p) for p in padding]
    strides, grown = tuple(stride), (1,) * dims
    if transposed:
        if groups != 1:
            raise NotImplementedError("it has a transposed convolution in groups")
        weight = jnp.flip(jnp.swapaxes(weight, 0, 1), tuple(range(2, 2 + dims)))
        reach = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
        sides = zip(reach, padding, output_padding, strict=True)
        pads = [(r - p, r - p + more) for r, p, more in sides]
        strides, grown = grown, strides
    found = jax.lax.conv_general_dilated(
        *(x, weight, strides, pads, grown, tuple(dilation)),
        dimension_numbers=(f"NC{letters}", f"OI{letters}", f"NC{letters}"),
        feature_group_count=groups,
    )
    return found if bias is None else found + bias.reshape(1, -1, *(1,) * dims)


def chains() -> dict[str, Callable]:
    """The likelihood of hidden Markov chains."""
    return {"latentlab.hmm_forward.default": _hmm_forward}


def _hmm_forward(
    initial: Array, transitions: Array, log_likelihoods: Array, lengths: Array | None, keep: bool
) -> tuple[Array, Array, Array]:
    """The recursion in logarithms, where a path of probability zero does no harm.

    Its gradient is JAX's own: what a way back would need is not kept.
    """
    import jax
    from jax import numpy as jnp

    K, T = transitions.shape[-1], log_likelihoods.shape[-2]
    batch = jnp.broadcast_shapes(
        initial.shape[:-1],
        transitions.shape[:-2],
        log_likelihoods.shape[:-2],
        () if lengths is None else lengths.shape,
    )
    seen = jnp.moveaxis(jnp.broadcast_to(log_likelihoods, (*batch, T, K)), -2, 0)
    least = jnp.finfo(seen.dtype).min / 4

    def log(x: Array) -> Array:  # zero has no slope
        return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), least)

    moves = log(transitions)
    seen = jnp.maximum(seen, least)

    def step(now: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        t, told = at
        after = jax.nn.logsumexp(now[..., :, None] + moves, axis=-2) + told
        if lengths is not None:
            after = jnp.where((t < lengths)[..., None], after, now)
        return after, None

    start = jnp.broadcast_to(log(initial), (*batch, K)) + seen[0]
    if lengths is not None:
        start = jnp.where((lengths > 0)[..., None], start, log(jnp.full_like(start, 1 / K)))
    last, _ = jax.lax.scan(step, start, (jnp.arange(1, T), seen[1:]))
    return jax.nn.logsumexp(last, axis=-1), seen[:0], seen[:0]
