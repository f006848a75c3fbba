r"""The likelihood of hidden Markov chains as one operation of torch, with its derivatives.

.. math::
    \frac{\partial \log p(x)}{\partial \ell_{tk}} = p(z_t = k \mid x), \qquad
    \frac{\partial \log p(x)}{\partial A_{ij}}
        = \frac{1}{A_{ij}} \sum_t p(z_{t-1} = i, z_t = j \mid x), \qquad
    \frac{\partial \log p(x)}{\partial \pi_k} = \frac{p(z_1 = k \mid x)}{\pi_k}

A recorded graph holds ``latentlab::hmm_forward`` and ``latentlab::hmm_backward``, each once,
however long the chains are. Within, chains go through the scaled recursion in lanes, run by XLA
where jax is installed and the work is worth a compilation, and those of its lanes that lost a
path once more in logarithms.

Letters: T time, K states, G groups of chains that share their transitions, L chains of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentlab.distributions import hmm_lanes as lanes
from latentlab.distributions import hmm_xla as xla
from latentlab.distributions.hmm_lanes import Layout, Likelihoods
from latentlab.distributions.hmm_logs import LogChains

__all__ = ["hmm_forward", "log_likelihood"]

_Results = tuple[Tensor, Tensor, Tensor]


def log_likelihood(
    initial: Tensor, transitions: Tensor, log_likelihoods: Tensor, lengths: Tensor | None
) -> Tensor:
    """Log-likelihoods of chains, shape (...,): the operation, for ``hmm.log_prob``."""
    arrays = (initial, transitions, log_likelihoods)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in arrays)
    return hmm_forward(*arrays, lengths, keep)[0]


@torch.library.custom_op(
    "latentlab::hmm_forward",
    mutates_args=(),
    schema="(Tensor initial, Tensor transitions, Tensor log_likelihoods, Tensor? lengths, "
    "bool keep) -> (Tensor, Tensor, Tensor)",
)
def hmm_forward(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None,
    keep: bool,
) -> _Results:
    """Log-likelihoods, and what the way back needs of the way forward.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K).
        lengths: shape (...,), or ``None``.
        keep: whether to keep what the way back needs.

    Returns:
        Log-likelihoods (...,); scaled likelihoods and filtered probabilities, (..., 2, T, K);
        normalisers (..., T), the first one -1 where a chain took logarithms. The last two are
        empty if not kept.
    """
    arrays = (initial, transitions, log_likelihoods, lengths)
    layout = Layout.of(*arrays)
    start, A = layout.into(initial, after=[0]), layout.matrices(transitions)
    dense = lanes.is_dense(initial, transitions)
    seen = layout.into(log_likelihoods, [0], [1])
    (T, _, K, _), (G, L) = seen.shape, layout.sizes
    # One piece of memory: systems that hand back and fetch several would do so at every call.
    kept = seen.new_empty(2, T, G, K, L)
    factors = lanes.scaled(seen, lanes.absent_steps(layout, lengths, seen, T), dense, kept[0])
    run = xla.forward if xla.is_worthwhile(layout, log_likelihoods) else lanes.forward
    sums = run(start, A, factors, kept[1])
    lost = lanes.lost_lanes(kept[1], sums, dense)
    total = sums.log().sum(0, dtype=torch.float64) + factors.log_scale
    if lost.any():
        which = lost.reshape(-1).nonzero()[:, 0]
        total.view(-1)[which] = LogChains.of(layout, which, *arrays).total
        kept[1].masked_fill_(lost[:, None], 0.0)
        sums.masked_fill_(lost, 1.0)[0].masked_fill_(lost, -1.0)
    log_prob = layout.out_of(total).to(seen.dtype).contiguous()
    if not keep:
        return log_prob, seen.new_empty(0), seen.new_empty(0)
    return log_prob, layout.out_of(kept, 2, 1), layout.out_of(sums, 1)


@torch.library.custom_op(
    "latentlab::hmm_backward",
    mutates_args=(),
    schema="(Tensor seeds, Tensor initial, Tensor transitions, Tensor log_likelihoods, "
    "Tensor? lengths, Tensor kept, Tensor sums) -> (Tensor, Tensor, Tensor)",
)
def hmm_backward(
    seeds: Tensor,
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None,
    kept: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of a weighted sum of log-likelihoods.

    Arguments:
        seeds: weights of the chains, shape (...,).
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K).
        lengths: shape (...,), or ``None``.
        kept: scaled likelihoods and filtered probabilities, from the way forward.
        sums: their normalisers.

    Returns:
        Derivatives in the first three arrays, each of the shape of its array.
    """
    layout = Layout.of(initial, transitions, log_likelihoods, lengths)
    A = layout.matrices(transitions)
    dense = lanes.is_dense(initial, transitions)
    (factors, probs), sums = layout.into(kept, [0, 1], [2]), layout.into(sums, [0])
    weights = layout.into(seeds).to(probs.dtype).expand(layout.sizes)
    lost = sums[0] < 0
    absent = lanes.absent_steps(layout, lengths, probs, len(probs))
    seen = Likelihoods(factors, sums[0], absent)
    run = xla.backward if xla.is_worthwhile(layout, log_likelihoods) else lanes.backward
    any_lost = bool(lost.any())
    masked = torch.where(lost, 0.0, weights) if any_lost else weights
    starts, counts, marginals = run(A, seen, probs, sums, masked, dense)
    if any_lost:
        which = lost.reshape(-1).nonzero()[:, 0]
        logs = LogChains.of(layout, which, initial, transitions, log_likelihoods, lengths)
        _add_lanes((starts, counts, marginals), logs, which, weights)
    return (
        _reduced(layout.out_of(starts, 0, 1), initial),
        counts.reshape(transitions.shape),
        _reduced(layout.out_of(marginals, 1, 1), log_likelihoods),
    )


def _add_lanes(
    into: tuple[Tensor, Tensor, Tensor], logs: LogChains, which: Tensor, weights: Tensor
) -> None:
    """Put derivatives of single lanes, times their weights, to those of all."""
    starts, counts, marginals = into
    group, chain = which // weights.shape[1], which % weights.shape[1]
    weight, dtype = weights.reshape(-1)[which].unsqueeze(-1), starts.dtype
    starts[group, :, chain] = logs.starts().to(dtype) * weight
    counts.index_add_(0, group, logs.counts().to(dtype) * weight.unsqueeze(-1))
    marginals.movedim(-1, -2)[:, group, chain] = logs.marginals().to(dtype) * weight


def _reduced(x: Tensor, like: Tensor) -> Tensor:
    """Sums over the dimensions along which an array was repeated, in memory of their own."""
    return x.sum_to_size(like.shape)


# ---- what torch asks of an operation ---------------------------------------------------------


@hmm_forward.register_fake
def _fake_forward(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None,
    keep: bool,
) -> _Results:
    layout = Layout.of(initial, transitions, log_likelihoods, lengths)
    log_prob = log_likelihoods.new_empty(layout.batch)
    if not keep:
        return log_prob, log_prob.new_empty(0), log_prob.new_empty(0)
    (T, K), (G, L) = log_likelihoods.shape[-2:], layout.sizes
    kept, sums = log_prob.new_empty(2, T, G, K, L), log_prob.new_empty(T, G, L)
    return log_prob, layout.out_of(kept, 2, 1), layout.out_of(sums, 1)


@hmm_backward.register_fake
def _fake_backward(
    seeds: Tensor,
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    *rest: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor]:
    arrays = (initial, transitions, log_likelihoods)
    first, second, third = (x.new_empty(x.shape) for x in arrays)
    return first, second, third


def _save(ctx: Any, inputs: tuple, output: _Results) -> None:  # noqa: ANN401
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _derivatives(ctx: Any, seeds: Tensor | None, *others: None) -> tuple:  # noqa: ANN401
    if seeds is None:
        return None, None, None, None, None
    *arrays, kept, sums = ctx.saved_tensors
    if not kept.numel():  # recorded without a gradient in mind, and run with one
        _, kept, sums = hmm_forward(*arrays, True)
    return *hmm_backward(seeds, *arrays, kept, sums), None, None


def _save_first(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])


def _second_derivatives(ctx: Any, *seeds: Tensor | None) -> tuple:  # noqa: ANN401
    """Through a plain loop: what a Hessian of a few parameters needs, slowly."""
    *given, lengths = ctx.saved_tensors
    with torch.enable_grad():
        weights, initial, transitions, seen = (x.detach().requires_grad_() for x in given)
        arrays = (initial, transitions, seen)
        total = (weights * _plain(*arrays, lengths)).sum()
        # Chains of one step have no transition.
        first = torch.autograd.grad(total, arrays, create_graph=True, materialize_grads=True)
        pairs = [
            (g, s) for g, s in zip(first, seeds, strict=True) if s is not None and g.requires_grad
        ]
        found = torch.autograd.grad(
            [g for g, _ in pairs], [weights, *arrays], [s for _, s in pairs], allow_unused=True
        )
    return *found, None, None, None


def _plain(
    initial: Tensor, transitions: Tensor, log_likelihoods: Tensor, lengths: Tensor | None
) -> Tensor:
    """The scaled recursion in operations that torch can differentiate as often as it likes."""
    T = log_likelihoods.shape[-2]
    exists = torch.ones(T, dtype=torch.bool, device=log_likelihoods.device)
    if lengths is not None:
        exists = torch.arange(T, device=lengths.device) < lengths.unsqueeze(-1)
    seen = torch.where(exists.unsqueeze(-1), log_likelihoods, 0.0)
    top = seen.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    factors, total = (seen - top).exp(), top.squeeze(-1).sum(-1)
    least, now = torch.finfo(seen.dtype).tiny, initial
    for t in range(T):
        moved = now if t == 0 else (now.unsqueeze(-2) @ transitions).squeeze(-2)
        moved = moved * factors[..., t, :]
        c = moved.sum(-1, keepdim=True).clamp_min(least)
        here = exists[..., t, None]
        now = torch.where(here, moved / c, now)
        total = total + torch.where(here, c.log(), 0.0).squeeze(-1)
    return total


def _vmapped(info: Any, in_dims: tuple, *arguments: Any) -> tuple:  # noqa: ANN401
    """Every array with the new dimension in front; those after it broadcast as before."""
    is_forward = len(arguments) == 5
    tails = (1, 2, 2, 0) if is_forward else (0, 1, 2, 2, 0, 3, 1)
    given = list(zip(arguments, tails, in_dims, strict=False))
    rank = max(x.dim() - tail - (d is not None) for x, tail, d in given if x is not None)

    def in_front(x: Tensor | None, tail: int, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.reshape((len(x), *[1] * (rank + tail + 1 - x.dim()), *x.shape[1:]))

    moved = [in_front(*each) for each in given]
    if is_forward:
        return hmm_forward(*moved, arguments[4]), (0, *(0 if arguments[4] else None,) * 2)
    found = hmm_backward(*moved)
    shapes = (x.shape if dim is None else x.movedim(dim, 0).shape[1:] for x, _, dim in given[1:4])
    found = tuple(x.reshape((len(x), *shape)) for x, shape in zip(found, shapes, strict=True))
    return found, (0, 0, 0)


hmm_forward.register_autograd(_derivatives, setup_context=_save)
hmm_backward.register_autograd(_second_derivatives, setup_context=_save_first)
for _op in (hmm_forward, hmm_backward):
    _op.register_vmap(_vmapped)
