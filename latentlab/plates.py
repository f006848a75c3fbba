r"""Plates that read one argument three ways: the whole data, a mini-batch of it, or a prior draw.

A model written as ``model(x=None, size=None)`` says ``with rows(x, size):`` once, and serves for

=============  ==========  =================================================================
``x``          ``size``    meaning
=============  ==========  =================================================================
N rows         ``None``    the whole data: every row counts once
B rows         N           a mini-batch: every row counts :math:`N / B` times, so that the
                           log-likelihood is an unbiased estimate of that of all N rows
``None``       N           a draw of N new rows from the prior (or, with the latents given,
                           from the posterior predictive)
=============  ==========  =================================================================
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from latentlab.data.checks import as_count

__all__ = ["rows", "sequences"]


def rows(
    x: Tensor | None = None, size: int | None = None, *, name: str = "rows", dim: int | None = None
) -> pyro.plate:
    r"""The plate of conditionally independent rows.

    For a mini-batch :math:`x_{1:B}` of N rows the log-density inside the plate is scaled,

    .. math:: \frac{N}{B} \sum_{b=1}^{B} \log p(x_b \mid z),

    whose expectation over batches is the sum over all rows.

    Arguments:
        x: the observed rows, shape (N, ...) or (B, ...); ``None`` for a draw.
        size: the number of rows N that ``x`` stands for; ``None`` means all of ``x``.
        name: the name of the plate, unique in a model.
        dim: the batch dimension of the plate, negative; by default the next free one.

    Returns:
        A ``pyro.plate``, to be used in a ``with`` statement.

    Raises:
        ValueError: if neither is given, there are no rows, ``size`` is not an int of at least 1,
            or a batch has more rows than it stands for.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None, size=None):
        ...     with rows(x, size):
        ...         return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> model(size=5).shape
        torch.Size([5])
    """
    if size is not None:
        size = as_count(size, "size")
    if x is None:
        if size is None:
            raise ValueError(
                "rows: expected the data x or a number of rows, got neither; "
                "for a prior draw call the model with size=..."
            )
        return pyro.plate(name, size, dim=dim)
    num_given = _num_rows(x)
    if size is None or size == num_given:
        return pyro.plate(name, num_given, dim=dim)
    if size < num_given:
        raise ValueError(
            f"size: expected at least the {num_given} rows of x, got {size}; "
            "size is the number of rows that x stands for"
        )
    return pyro.plate(name, size, subsample=torch.arange(num_given), dim=dim)


def sequences(
    x: Tensor | None = None,
    lengths: Tensor | None = None,
    size: int | None = None,
    *,
    name: str = "sequences",
    dim: int | None = None,
) -> pyro.plate:
    """The plate of independent sequences: :func:`rows`, with a sequence for a row.

    Arguments:
        x: the observed sequences, shape (B, T, D); ``None`` for a draw.
        lengths: number of steps of each of them, shape (B,); of those to draw where x is ``None``.
        size: the number of sequences that ``x`` stands for; ``None`` means all of them.
        name: the name of the plate, unique in a model.
        dim: the batch dimension of the plate, negative; by default the next free one.

    Returns:
        A ``pyro.plate``, to be used in a ``with`` statement.

    Raises:
        ValueError: as :func:`rows`, and if there is not one length a sequence.

    Example:
        >>> sequences(torch.zeros(3, 7, 1), size=30).size
        30
    """
    num_given = size if x is None else len(x)
    if lengths is not None and num_given is not None and lengths.shape != (num_given,):
        raise ValueError(
            f"lengths: expected shape ({num_given},), one a sequence, got {tuple(lengths.shape)}"
        )
    if x is None and size is None and lengths is not None:
        size = len(lengths)
    return rows(x, size, name=name, dim=dim)


def _num_rows(x: Tensor) -> int:
    if not x.dim() or not len(x):
        raise ValueError(f"x: expected at least one row, got shape {tuple(x.shape)}")
    return len(x)
