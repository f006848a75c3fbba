r"""Sums of exponentials of quadratic forms: the kernel under every Gaussian mixture.

.. math::
    \ell_n = \log \sum_k \exp \langle W_k, \phi(y_n) \rangle, \qquad
    \frac{\partial}{\partial W_k} \sum_n g_n \ell_n
        = \sum_n g_n \, r_{nk} \, \phi(y_n), \quad
    r_{nk} = \exp(\langle W_k, \phi(y_n) \rangle - \ell_n)

With :math:`\phi` the squares (and products) of a row's cells, the cells themselves and ones,
:math:`W_k` are the natural parameters of a component, :math:`r` its responsibilities, and the
gradient is the matrix of *expected statistics*: what the E-step of expectation-maximisation takes
from the rows. Values and statistics are each one matrix product, in pieces of rows that stay in
the cache, so that no N by K matrix is ever held.

Letters: N rows, D features of a row, F numbers of :math:`\phi`, K components, S draws.

References:
    | Stochastic variational inference (Hoffman et al., 2013)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["expected_statistics", "features", "is_traced", "log_sum_exp", "quadratic_forms"]

_CHUNK = 2**18  # numbers of a piece: 2 MiB


def is_traced() -> bool:
    """Whether a graph is being recorded: no value can be read, and every operation counts."""
    return get_proxy_mode() is not None


def features(y: Tensor, products: bool) -> Tensor:
    r""":math:`\phi` of rows, as columns.

    Arguments:
        y: rows as columns, shape (D, n), NaN where a cell is missing if there are no products.
        products: whether :math:`\phi` is :math:`(y_i y_j)_{i \le j}, y, 1`; else it is
            :math:`y_i^2, y, p, 1`, with p one where a cell is present, and the first two zero
            where it is missing.

    Returns:
        Shape (D (D + 1) / 2 + D + 1, n), or (3 D + 1, n).
    """
    ones = y.new_ones(1, y.shape[1])
    if products:
        if is_traced():
            i, j = torch.triu_indices(len(y), len(y), device=y.device)
            return torch.cat([y[i] * y[j], y, ones])
        return torch.cat([*(y[i:] * y[i] for i in range(len(y))), y, ones])
    present = (~y.isnan()).to(y.dtype)
    y = y.nan_to_num(0.0)
    return torch.cat([y * y, y, present, ones])


def log_sum_exp(coefficients: Tensor, y: Tensor, products: bool) -> Tensor:
    r""":math:`\ell` of all rows under S sets of components.

    Where a gradient is wanted, the expected statistics are gathered on the way, and are the
    gradient if all rows count alike; if not, the responsibilities are computed again. Derivatives
    of the gradient come from a plain product that keeps (S, K, N) numbers.

    Arguments:
        coefficients: :math:`W`, shape (S, K, F), float64.
        y: rows as columns, shape (D, N), float64, without a gradient.
        products: which :math:`\phi`, see :func:`features`.

    Returns:
        Shape (S, N).
    """
    if torch.is_grad_enabled() and coefficients.requires_grad:
        return _LogSumExp.apply(coefficients, y, products)[0]
    pieces = _pieces(coefficients, y, products)
    return torch.cat([_values(coefficients, phi)[0] for phi in pieces], -1)


def expected_statistics(
    coefficients: Tensor, y: Tensor, products: bool, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The sum of :math:`\ell` over all rows and its gradient, the expected statistics.

    Arguments:
        coefficients: :math:`W`, shape (K, F), float64.
        y: as for :func:`log_sum_exp`.
        products: likewise.
        counts: how often each row counts, shape (N,); once by default.

    Returns:
        A number, and shape (K, F).
    """
    value, statistics, start = coefficients.new_zeros(()), torch.zeros_like(coefficients), 0
    for phi in _pieces(coefficients.unsqueeze(0), y, products):
        joint = coefficients @ phi
        top = joint.amax(0)
        terms = joint.sub_(top).exp_()
        total = terms.sum(0)
        log_sum, share = top + total.log(), total.reciprocal()
        if counts is not None:
            part = counts[start : start + phi.shape[1]]
            log_sum, share = log_sum * part, share * part
        value = value + log_sum.sum()
        statistics.addmm_(terms.mul_(share), phi.T)
        start += phi.shape[1]
    return value, statistics


def quadratic_forms(coefficients: Tensor, y: Tensor, products: bool) -> Tensor:
    r""":math:`\langle W_k, \phi(y_n) \rangle` of all rows and components, shape (S, K, N).

    Arguments:
        coefficients: as for :func:`log_sum_exp`.
        y: likewise.
        products: likewise.
    """
    return _joint(coefficients, features(y, products))


def _pieces(coefficients: Tensor, y: Tensor, products: bool) -> Iterator[Tensor]:
    """The features (F, n) of some rows after the other; of all at once in a graph."""
    S, K, F = coefficients.shape
    step = y.shape[1] if is_traced() else max(256, _CHUNK // (F + S * K) // 64 * 64)
    for part in y.split(max(step, 1), 1):
        yield features(part, products)


def _joint(coefficients: Tensor, phi: Tensor) -> Tensor:
    return (coefficients.flatten(0, 1) @ phi).unflatten(0, coefficients.shape[:2])  # (S, K, n)


def _values(coefficients: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sums (S, n), and the terms (S, K, n) and their sums (S, 1, n) below the largest."""
    joint = _joint(coefficients, phi)
    top = joint.amax(1, keepdim=True)
    terms = (joint - top).exp()
    total = terms.sum(1, keepdim=True)
    return (top + total.log()).squeeze(1), terms, total


def _gathered(shares: Tensor, phi: Tensor) -> Tensor:
    return (shares.flatten(0, 1) @ phi.T).unflatten(0, shares.shape[:2])  # (S, K, F)


class _LogSumExp(torch.autograd.Function):
    """``log_sum_exp`` with its statistics; rows have no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, y: Tensor, products: bool) -> tuple[Tensor, Tensor]:
        values, statistics = [], torch.zeros_like(coefficients)
        for phi in _pieces(coefficients, y, products):
            value, terms, total = _values(coefficients, phi)
            values.append(value)
            statistics = statistics + _gathered(terms / total, phi)
        return torch.cat(values, -1), statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ANN401
        coefficients, y, ctx.products = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(coefficients, y, output[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        coefficients, y, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            phi = features(y, ctx.products)
            shares = _joint(coefficients, phi).softmax(1)
            return _gathered(shares * slope.unsqueeze(1), phi), None, None
        if slope.shape[-1] and slope.stride(-1) == 0:  # one number for all rows of a draw
            return statistics * slope[:, :1].unsqueeze(-1), None, None
        gradient, start = torch.zeros_like(coefficients), 0
        for phi in _pieces(coefficients, y, ctx.products):
            _, terms, total = _values(coefficients, phi)
            part = slope[:, start : start + phi.shape[1]].unsqueeze(1)
            gradient = gradient + _gathered(terms * (part / total), phi)
            start += phi.shape[1]
        return gradient, None, None
