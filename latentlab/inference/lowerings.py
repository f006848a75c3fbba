"""Operations of torch in terms of ``jax.numpy``: what a recorded graph is made of, one line each.

A graph is that of a step's forward pass, after functionalisation: no operation changes its
arguments, none draws random numbers. Gradients of the loss are JAX's own; those of
``lowerings_slopes`` are taken by the pair itself. An operation that is missing here is named when
a graph is read, and the fit goes on without XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from latentlab.inference.lowerings_arrays import dtype_of, makers, places, shapes
from latentlab.inference.lowerings_linear import chains, matrices
from latentlab.inference.lowerings_slopes import slopes

__all__ = ["lowerings"]

Array = Any  # or a plain number


@functools.cache
def lowerings() -> dict[str, Callable]:
    """Name of an operation -> function of JAX arrays; made when first asked for."""
    return {
        **_arithmetic(),
        **_choices(),
        **_functions(),
        **_curves(),
        **_sums(),
        **shapes(),
        **makers(),
        **places(),
        **matrices(),
        **chains(),
        **slopes(),
    }


def _arithmetic() -> dict[str, Callable]:
    """Of two numbers."""
    from jax import numpy as jnp
    from jax.scipy import special

    binary: dict[str, Callable] = {
        "add": lambda a, b, alpha=1: a + (b if alpha == 1 else alpha * b),
        "sub": lambda a, b, alpha=1: a - (b if alpha == 1 else alpha * b),
        "rsub": lambda a, b, alpha=1: b - (a if alpha == 1 else alpha * a),
        "mul": lambda a, b: a * b,
        "div": _div,
        "pow": lambda a, b: a**b,
        "fmod": jnp.fmod,
        "remainder": jnp.remainder,
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "ge": lambda a, b: a >= b,
        "gt": lambda a, b: a > b,
        "le": lambda a, b: a <= b,
        "lt": lambda a, b: a < b,
        "bitwise_and": lambda a, b: a & b,
        "bitwise_or": lambda a, b: a | b,
        "bitwise_xor": lambda a, b: a ^ b,
        "xlogy": special.xlogy,
    }
    kinds = ("Tensor", "Scalar", "Tensor_Tensor", "Tensor_Scalar", "Scalar", "Tensor_mode")
    table = {f"{name}.{kind}": f for name, f in binary.items() for kind in kinds}
    return table | {
        "xlogy.Scalar_Other": special.xlogy,
        "xlogy.Scalar_Self": special.xlogy,
        "special_xlog1py.default": special.xlog1py,
        "maximum.default": jnp.maximum,
        "minimum.default": jnp.minimum,
        "logaddexp.default": jnp.logaddexp,
        "atan2.default": jnp.arctan2,
        "logical_and.default": jnp.logical_and,
        "logical_or.default": jnp.logical_or,
        "logical_xor.default": jnp.logical_xor,
    }


def _div(a: Array, b: Array, rounding_mode: str | None = None) -> Array:
    from jax import numpy as jnp

    if rounding_mode is None:
        return a / b
    return jnp.floor_divide(a, b) if rounding_mode == "floor" else jnp.trunc(a / b)


def _choices() -> dict[str, Callable]:
    """Numbers that are taken as they are, or not."""
    from jax import numpy as jnp

    def clamp(x: Array, low: Array = None, high: Array = None) -> Array:
        return jnp.clip(x, low, high)

    def masked_fill(x: Array, mask: Array, value: Array) -> Array:
        return jnp.where(mask, jnp.asarray(value, x.dtype), x)

    def fill(x: Array, value: Array) -> Array:
        return jnp.full(x.shape, value, x.dtype)

    def nan_to_num(x: Array, nan: Array = None, high: Array = None, low: Array = None) -> Array:
        return jnp.nan_to_num(x, nan=0.0 if nan is None else nan, posinf=high, neginf=low)

    return {
        "where.self": jnp.where,
        "where.ScalarSelf": jnp.where,
        "where.ScalarOther": jnp.where,
        "masked_fill.Scalar": masked_fill,
        "masked_fill.Tensor": masked_fill,
        "clamp.default": clamp,
        "clamp.Tensor": clamp,
        "clamp_min.default": clamp,
        "clamp_min.Tensor": clamp,
        "clamp_max.default": lambda x, high: clamp(x, None, high),
        "clamp_max.Tensor": lambda x, high: clamp(x, None, high),
        "fill.Scalar": fill,
        "fill.Tensor": fill,
        "copy.default": lambda x, value, _=False: jnp.broadcast_to(value, x.shape).astype(x.dtype),
        "nan_to_num.default": nan_to_num,
        "hardtanh.default": lambda x, low=-1.0, high=1.0: clamp(x, low, high),
        "relu.default": lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)),
        "leaky_relu.default": lambda x, slope=0.01: jnp.where(x > 0, x, slope * x),
        "logical_not.default": jnp.logical_not,
        "bitwise_not.default": jnp.bitwise_not,
    }


def _functions() -> dict[str, Callable]:
    """Of one number."""
    import jax
    from jax import numpy as jnp
    from jax.scipy import special

    same = (
        "exp exp2 expm1 log log1p log2 log10 sqrt abs sin cos tan sinh cosh tanh floor ceil round "
        "trunc sign square isnan isinf isfinite"
    )
    table = {f"{name}.default": getattr(jnp, name) for name in same.split()}
    table |= {
        f"{name}.default": getattr(jnp, f"arc{name[1:]}")
        for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh")
    }
    return table | {
        "detach.default": jax.lax.stop_gradient,
        "rsqrt.default": jax.lax.rsqrt,
        "reciprocal.default": lambda x: 1 / x,
        "neg.default": lambda x: -x,
        "sgn.default": jnp.sign,
        "frac.default": lambda x: x - jnp.trunc(x),
        "digamma.default": special.digamma,
        "lgamma.default": special.gammaln,
        "polygamma.default": special.polygamma,
        "mvlgamma.default": special.multigammaln,
        "logit.default": lambda x, eps=None: special.logit(_within(x, eps)),
        "erf.default": special.erf,
        "erfc.default": special.erfc,
        "erfinv.default": special.erfinv,
        "special_log_ndtr.default": special.log_ndtr,
        "special_ndtri.default": special.ndtri,
        "special_ndtr.default": special.ndtr,
        "special_entr.default": special.entr,
    }


def _within(x: Array, eps: float | None) -> Array:
    from jax import numpy as jnp

    return x if eps is None else jnp.clip(x, eps, 1 - eps)


def _curves() -> dict[str, Callable]:
    """Activations and losses of networks."""
    import jax
    from jax import numpy as jnp

    def softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
        bent = jax.nn.softplus(beta * jnp.where(beta * x > threshold, 0.0, x)) / beta
        return jnp.where(beta * x > threshold, x, bent)

    def elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
        below = alpha * jnp.expm1(input_scale * jnp.minimum(x, 0))
        return scale * jnp.where(x > 0, x, below)

    def bce_with_logits(
        x: Array, y: Array, weight: None = None, pos_weight: None = None, reduction: int = 1
    ) -> Array:
        if weight is not None or pos_weight is not None:
            raise NotImplementedError("weights of binary_cross_entropy_with_logits")
        loss = jax.nn.softplus(x) - x * y
        return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()

    return {
        "softplus.default": softplus,
        "elu.default": elu,
        "gelu.default": lambda x, approximate="none": jax.nn.gelu(x, approximate == "tanh"),
        "silu.default": jax.nn.silu,
        "mish.default": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
        "sigmoid.default": jax.nn.sigmoid,
        "log_sigmoid_forward.default": lambda x: (jax.nn.log_sigmoid(x), jnp.zeros(())),
        "binary_cross_entropy_with_logits.default": bce_with_logits,
        "_softmax.default": lambda x, dim, _=False: jax.nn.softmax(x, axis=dim),
        "_log_softmax.default": lambda x, dim, _=False: jax.nn.log_softmax(x, axis=dim),
    }


def _over(function: Callable) -> Callable:
    """A sum, or what is like one, over axes."""

    def reduce(x: Array, dim: Array = None, keepdim: bool = False, dtype: Array = None) -> Array:
        x = x if dtype is None else x.astype(dtype_of(dtype))
        dims = tuple(dim) if isinstance(dim, (list, tuple)) else dim
        return function(x, axis=None if dims == () else dims, keepdims=keepdim)

    return reduce


def _variance(
    x: Array, dim: Sequence[int] | None = None, correction: int | None = 1, keepdim: bool = False
) -> Array:
    from jax import numpy as jnp

    dims = tuple(dim) if dim else None
    return jnp.var(x, axis=dims, ddof=1 if correction is None else correction, keepdims=keepdim)


def _sums() -> dict[str, Callable]:
    """Over axes."""
    import jax
    from jax import numpy as jnp
    from jax.scipy import special

    def extreme(best: Callable, place: Callable) -> Callable:
        return lambda x, dim, keepdim=False: (
            best(x, axis=dim, keepdims=keepdim),
            place(x, axis=dim, keepdims=keepdim),
        )

    def norm(
        x: Array, p: float = 2, dim: Array = None, keepdim: bool = False, **_: Array
    ) -> Array:
        dims = tuple(dim) if dim else None
        return jnp.sum(jnp.abs(x) ** p, axis=dims, keepdims=keepdim) ** (1 / p)

    def sort(x: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
        order = jnp.argsort(x, axis=dim, descending=descending)
        return jnp.take_along_axis(x, order, axis=dim), order

    return {
        **{f"sum.{kind}": _over(jnp.sum) for kind in ("default", "dim_IntList")},
        **{f"mean.{kind}": _over(jnp.mean) for kind in ("default", "dim")},
        **{f"prod.{kind}": _over(jnp.prod) for kind in ("default", "dim_int")},
        **{f"all.{kind}": _over(jnp.all) for kind in ("default", "dim", "dims")},
        **{f"any.{kind}": _over(jnp.any) for kind in ("default", "dim", "dims")},
        "amax.default": _over(jnp.max),
        "amin.default": _over(jnp.min),
        "max.default": _over(jnp.max),
        "min.default": _over(jnp.min),
        "max.dim": extreme(jnp.max, jnp.argmax),
        "min.dim": extreme(jnp.min, jnp.argmin),
        "argmax.default": _over(jnp.argmax),
        "argmin.default": _over(jnp.argmin),
        "logsumexp.default": _over(special.logsumexp),
        "var.correction": _variance,
        "std.correction": lambda x, dim=None, **how: jnp.sqrt(_variance(x, dim, **how)),
        "linalg_vector_norm.default": norm,
        "cumsum.default": lambda x, dim, dtype=None: jnp.cumsum(x, dim, dtype_of(dtype)),
        "cumprod.default": lambda x, dim, dtype=None: jnp.cumprod(x, dim, dtype_of(dtype)),
        "logcumsumexp.default": lambda x, dim: jax.lax.cumlogsumexp(x, dim % x.ndim),
        "sort.default": sort,
    }
