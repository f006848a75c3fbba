r"""What a step must not do: run off, or out of memory.

A gradient far above all before it, finite as it may be, is no step to take. Adam divides by

.. math:: \sqrt{v}, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,

and would stand still for as long as it remembers it: 10,000 steps and more, in which nothing moves
and all looks converged. Such a step is treated as one without a finite loss. *Far above* is by
eight orders of magnitude, or what cannot be squared; the yardstick is the largest of the gradients
and objectives of the climb so far, in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Gauge", "is_out_of_memory"]

_FAR = 1e8  # times what was seen


@dataclass
class Gauge:
    """The largest gradient and objective that the steps of a climb have seen.

    Arguments:
        limit: what can be squared.
        seen: the largest of both, not below one.
        where: the parameter whose gradient was far above, and that gradient.

    Example:
        >>> gauge = Gauge(limit=1e154)
        >>> [gauge.accepts("loc", slope, elbo=-2.0) for slope in (5.0, 70.0, 1e30, 1.0)]
        [True, True, False, True]
        >>> gauge.where
        ('loc', 1e+30)
    """

    limit: float
    seen: float = 0.0
    where: tuple[str, float] | None = None

    @classmethod
    def of(cls, dtype: torch.dtype) -> Gauge:
        """The gauge of a climb that has not begun, for parameters of this type."""
        return cls(math.sqrt(torch.finfo(dtype).max))

    def accepts(self, name: str, slope: float, elbo: float) -> bool:
        """Whether a step, or a call of several, is like those before it; the first one is.

        Arguments:
            name: of the parameter with the largest gradient.
            slope: that gradient.
            elbo: what is climbed there.
        """
        most = min(self.limit, _FAR * self.seen if self.seen else math.inf)
        if not slope <= most:
            self.where = (name, slope) if math.isfinite(slope) else None
            return False
        self.seen = max(self.seen, 1.0, slope, abs(elbo))
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of Python, of torch's CPU or GPU, or of XLA.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        True
        >>> is_out_of_memory(RuntimeError("size mismatch"))
        False
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    says = ("out of memory", "can't allocate memory", "not enough memory", "resource_exhausted")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in says)
