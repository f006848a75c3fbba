r"""Hidden Markov chains from arrays: likelihood, states, paths.

.. math::
    p(x_{1:T}) = \sum_{z_1, \dots, z_T} \pi_{z_1} \, p(x_1 \mid z_1)
        \prod_{t=2}^T A_{z_{t-1} z_t} \, p(x_t \mid z_t)

The functions take :math:`\pi`, A and :math:`\ell_{tk} = \log p(x_t \mid z_t = k)`, and never learn
what emits. There is a transition between two observations, and none before the first one.

- Initial probabilities have the shape (..., K), transitions (..., K, K) from row i to column j,
  log-likelihoods (..., T, K), in nats. Dimensions before these broadcast: parameters of S draws,
  (S, 1, K) and (S, 1, K, K), go with the likelihoods of B chains, (B, T, K) or (S, B, T, K).
- A missing observation has log-likelihood 0 in every state.
- ``lengths`` (...,), whole numbers: steps from there on do not exist, whatever stands there. In
  what is returned they have probability 0, and state -1 in paths.
- Rows that are no probabilities are refused, each by its index, while torch validates arguments.

The likelihood can be differentiated, twice if need be. All else has no derivatives.
A module to be used by its name, as ``filter`` is also a word of Python.

Letters: T time, K states, B chains, S draws.

Example:
    >>> import torch
    >>> from latentlab.distributions import hmm
    >>> initial, transitions = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> seen = torch.tensor([[0.8, 0.1], [0.1, 0.7]]).log()  # two steps
    >>> hmm.log_prob(initial, transitions, seen).exp()
    tensor(0.0930)
    >>> hmm.smooth(initial, transitions, seen)
    tensor([[0.6882, 0.3118],
            [0.3978, 0.6022]])

References:
    | A tutorial on hidden Markov models (Rabiner, 1989)
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentlab.distributions import hmm_op, hmm_paths
from latentlab.distributions.hmm_lanes import Layout, absent_steps
from latentlab.distributions.hmm_logs import LogChains
from latentlab.distributions.stochastic import expect_probabilities

__all__ = [
    "decode",
    "filter",
    "forecast",
    "log_prob",
    "pairwise",
    "predict_next",
    "sample_paths",
    "smooth",
]


def log_prob(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Log-likelihood of chains, states summed out.

    Its derivatives are the probabilities of states and of transitions, by one more recursion:
    :math:`\partial \log p(x) / \partial \ell_{tk} = p(z_t = k \mid x)`. In a recorded graph it
    is one operation, however long the chains are. Numbers are scaled at each step; chains that
    lose a path so, as may happen where transitions are impossible, are gone through once more in
    logarithms. Impossible observations have the log-likelihood -inf, and derivatives 0.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Nats, shape (...,).

    Raises:
        TypeError: if an array is no tensor of real numbers, or lengths are not whole ones.
        ValueError: if shapes do not agree.

    References:
        | A tutorial on hidden Markov models (Rabiner, 1989)

    Example:
        >>> coin, stay = torch.tensor([0.5, 0.5]), torch.eye(2)
        >>> seen = torch.tensor([[0.9, 0.5], [0.9, 0.5]]).log()
        >>> log_prob(coin, stay, seen).exp()  # (0.81 + 0.25) / 2
        tensor(0.5300)
    """
    arrays = _checked(initial, transitions, log_likelihoods, lengths)
    return hmm_op.log_likelihood(*arrays, lengths)


@torch.no_grad()
def filter(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Probabilities of each state given what was seen so far, :math:`p(z_t \mid x_{1:t})`.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Shape (..., T, K).

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``.

    Example:
        >>> coin, stay = torch.tensor([0.5, 0.5]), torch.eye(2)
        >>> filter(coin, stay, torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log())
        tensor([[0.6000, 0.4000],
                [0.6923, 0.3077]])
    """
    arrays = _checked(initial, transitions, log_likelihoods, lengths)
    return _log_filtered(*arrays, lengths).exp().to(arrays[0].dtype)


@torch.no_grad()
def smooth(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Probabilities of each state given all that was seen, :math:`p(z_t \mid x_{1:T})`.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Shape (..., T, K).

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``.

    Example:
        >>> coin, stay = torch.tensor([0.5, 0.5]), torch.eye(2)
        >>> smooth(coin, stay, torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log())
        tensor([[0.6923, 0.3077],
                [0.6923, 0.3077]])
    """
    initial, transitions, seen = _checked(initial, transitions, log_likelihoods, lengths)
    batch = Layout.of(initial, transitions, seen, lengths).batch
    seen = seen.expand(*batch, *seen.shape[-2:])
    _, *kept = hmm_op.hmm_forward(initial, transitions, seen, lengths, True)
    seeds = seen.new_ones(batch)
    return hmm_op.hmm_backward(seeds, initial, transitions, seen, lengths, *kept)[2]


@torch.no_grad()
def pairwise(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Probabilities of two successive states given all, :math:`p(z_t, z_{t+1} \mid x_{1:T})`.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Shape (..., T - 1, K, K), state at t in rows, at t + 1 in columns.

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``.

    Example:
        >>> coin, stay = torch.tensor([0.5, 0.5]), torch.eye(2)
        >>> pairwise(coin, stay, torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log())
        tensor([[[0.6923, 0.0000],
                 [0.0000, 0.3077]]])
    """
    arrays = _checked(initial, transitions, log_likelihoods, lengths)
    initial, transitions, seen = arrays
    filtered = filter(*arrays, lengths)[..., :-1, :]
    predicted = filtered @ transitions
    smoothed = smooth(*arrays, lengths)[..., 1:, :]
    ratio = torch.where(predicted > 0, smoothed / predicted, 0.0)
    found = filtered.unsqueeze(-1) * transitions.unsqueeze(-3) * ratio.unsqueeze(-2)
    layout, which = _in_logs(*arrays, lengths)[:2]
    if not len(which):
        return found
    lanes, L = layout.into(found, [0], [1, 2]).contiguous(), layout.sizes[1]
    pairs = LogChains.of(layout, which, *arrays, lengths).pairs()  # (T - 1, n, K, K)
    lanes.movedim(-1, 2)[:, which // L, which % L] = pairs.to(found.dtype)
    return layout.out_of(lanes, 1, 2)


@torch.no_grad()
def predict_next(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Probabilities of each state before it is seen, :math:`p(z_t \mid x_{1:t-1})`.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Shape (..., T, K).

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``.

    Example:
        >>> initial, switch = torch.tensor([0.9, 0.1]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> predict_next(initial, switch, torch.zeros(2, 2))  # two missing observations
        tensor([[0.9000, 0.1000],
                [0.1000, 0.9000]])
    """
    initial, transitions, seen = _checked(initial, transitions, log_likelihoods, lengths)
    filtered = filter(initial, transitions, seen, lengths)
    first = initial.unsqueeze(-2).expand_as(filtered[..., :1, :])
    found = torch.cat([first, filtered[..., :-1, :] @ transitions], -2)
    found = found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
    if lengths is None:
        return found
    exists = torch.arange(found.shape[-2], device=lengths.device) < lengths.unsqueeze(-1)
    return torch.where(exists.unsqueeze(-1), found, 0.0)


@torch.no_grad()
def forecast(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Probabilities of the state after the last one, :math:`p(z_{T+1} \mid x_{1:T})`.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Shape (..., K).

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``.

    Example:
        >>> initial, switch = torch.tensor([0.9, 0.1]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> forecast(initial, switch, torch.zeros(2, 2))
        tensor([0.9000, 0.1000])
    """
    initial, transitions, seen = _checked(initial, transitions, log_likelihoods, lengths)
    filtered = filter(initial, transitions, seen, lengths)
    if lengths is None:
        last = filtered[..., -1:, :]
    else:
        place = (lengths.clamp(1, seen.shape[-2]) - 1)[..., None, None]
        shape = (*filtered.shape[:-2], 1, filtered.shape[-1])
        last = filtered.gather(-2, place.long().expand(shape))
    found = (last @ transitions).squeeze(-2)
    return found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)


@torch.no_grad()
def decode(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The likeliest path, :math:`\arg\max_z p(z, x)`.

    Of equally likely ones the first by number of the last state, and so on backwards.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.

    Returns:
        Paths, whole numbers, shape (..., T), -1 throughout if there is no possible one, and
        their log joint densities with the observations in nats, shape (...,).

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``.

    References:
        | Error bounds for convolutional codes (Viterbi, 1967)

    Example:
        >>> coin, sticky = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> seen = torch.tensor([[0.9, 0.2], [0.4, 0.6], [0.9, 0.2]]).log()
        >>> decode(coin, sticky, seen)[0]  # one weak hint is not enough to leave
        tensor([0, 0, 0])
    """
    initial, transitions, seen = _checked(initial, transitions, log_likelihoods, lengths)
    layout = Layout.of(initial, transitions, seen, lengths)
    G, L = layout.sizes
    lanes = layout.into(seen, [0], [1]).double()
    lanes = lanes.expand(-1, G, -1, -1)
    start = layout.into(initial, after=[0]).double().log().expand(G, -1, -1)
    moves = layout.matrices(transitions).double().log()
    paths, joint = hmm_paths.best_paths(start, moves, lanes, _lanes_exist(layout, seen, lengths))
    return layout.out_of(paths, 1), layout.out_of(joint).to(seen.dtype)


@torch.no_grad()
def sample_paths(
    initial: Tensor,
    transitions: Tensor,
    log_likelihoods: Tensor,
    lengths: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draws of whole paths given all that was seen, :math:`z \sim p(z \mid x)`.

    Arguments:
        initial: shape (..., K).
        transitions: shape (..., K, K).
        log_likelihoods: shape (..., T, K), in nats.
        lengths: number of steps of each chain, shape (...,), or ``None``: all have T.
        num_samples: S.
        generator: of random numbers; ``None`` is torch's own.

    Returns:
        Whole numbers, shape (S, ..., T).

    Raises:
        TypeError: as ``log_prob``.
        ValueError: as ``log_prob``, or if ``num_samples`` is less than 1.

    References:
        | Bayesian methods for hidden Markov models (Scott, 2002)

    Example:
        >>> coin, stay = torch.tensor([0.5, 0.5]), torch.eye(2)
        >>> paths = sample_paths(coin, stay, torch.zeros(4, 2), num_samples=3)
        >>> bool((paths == paths[:, :1]).all())  # none moves
        True
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples: expected an int >= 1, got {num_samples!r}")
    arrays = _checked(initial, transitions, log_likelihoods, lengths)
    layout = Layout.of(*arrays, lengths)
    seen = arrays[2]
    filtered = layout.into(_log_filtered(*arrays, lengths), [0], [1])
    moves = layout.matrices(arrays[1]).double().log()
    shape = (seen.shape[-2], num_samples, *layout.sizes)
    uniforms = torch.rand(shape, dtype=torch.float64, device=seen.device, generator=generator)
    exists = _lanes_exist(layout, seen, lengths)
    paths = hmm_paths.draw_paths(filtered, moves, exists, uniforms)
    return torch.stack([layout.out_of(path, 1) for path in paths.unbind(1)])


# ---- parts of these --------------------------------------------------------------------------


def _checked(
    initial: Tensor, transitions: Tensor, log_likelihoods: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The arrays in their common precision, if types, shapes and rows are right."""
    named = {
        "initial": initial,
        "transitions": transitions,
        "log_likelihoods": log_likelihoods,
    }
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}; use .double()")
    shapes = {name: tuple(x.shape) for name, x in named.items()}
    K = shapes["initial"][-1:]
    fits = len(K) == 1 and K[0] > 0 and shapes["transitions"][-2:] == K * 2
    fits = fits and shapes["log_likelihoods"][-1:] == K and log_likelihoods.dim() > 1
    if not fits or log_likelihoods.shape[-2] == 0:
        raise ValueError(
            "initial, transitions, log_likelihoods: expected shapes (..., K), (..., K, K), "
            f"(..., T, K) with K, T >= 1, got {', '.join(map(str, shapes.values()))}"
        )
    batches = [initial.shape[:-1], transitions.shape[:-2], log_likelihoods.shape[:-2]]
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths: expected a tensor or None, got {type(lengths).__name__}")
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}; use .long()")
        batches.append(lengths.shape)
    try:
        torch.broadcast_shapes(*batches)
    except RuntimeError:
        raise ValueError(
            "initial, transitions, log_likelihoods, lengths: expected batch shapes that "
            f"broadcast, got {', '.join(str(tuple(shape)) for shape in batches)}; parameters of S "
            "draws go with B chains as (S, 1, ...)"
        ) from None
    expect_probabilities(initial, "initial")
    expect_probabilities(transitions, "transitions")
    dtype = torch.promote_types(initial.dtype, transitions.dtype)
    dtype = torch.promote_types(dtype, log_likelihoods.dtype)
    return initial.to(dtype), transitions.to(dtype), log_likelihoods.to(dtype)


def _in_logs(
    initial: Tensor, transitions: Tensor, log_likelihoods: Tensor, lengths: Tensor | None
) -> tuple[Layout, Tensor, Tensor]:
    """The layout, the numbers of chains that take logarithms, and filtered ones in lanes."""
    arrays = (initial, transitions, log_likelihoods, lengths)
    layout = Layout.of(*arrays)
    _, kept, sums = hmm_op.hmm_forward(*arrays, True)
    lost = layout.into(sums, [0])[0] < 0
    return layout, lost.reshape(-1).nonzero()[:, 0], layout.into(kept, [0, 1], [2])[1]


def _log_filtered(
    initial: Tensor, transitions: Tensor, log_likelihoods: Tensor, lengths: Tensor | None
) -> Tensor:
    """Log-probabilities of states given the past in float64, shape (..., T, K)."""
    arrays = (initial, transitions, log_likelihoods, lengths)
    layout, which, probs = _in_logs(*arrays)
    found, L = probs.double().log(), layout.sizes[1]
    if len(which):
        logs = LogChains.of(layout, which, *arrays).filtered()
        found.movedim(-1, 2)[:, which // L, which % L] = logs
    return layout.out_of(found, 1, 1)


def _lanes_exist(layout: Layout, log_likelihoods: Tensor, lengths: Tensor | None) -> Tensor:
    """Whether a step exists, shape (T, G, L)."""
    T = log_likelihoods.shape[-2]
    absent = absent_steps(layout, lengths, log_likelihoods, T)
    if absent is None:
        absent = log_likelihoods.new_zeros(T, 1, 1)
    return absent.expand(-1, *layout.sizes) == 0
