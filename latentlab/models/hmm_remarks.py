"""What can be said of the number of states that a hidden Markov model really has.

Letters: B sequences, T steps, D features, K states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentlab.distributions import hmm
from latentlab.distributions.markov import HiddenMarkov

__all__ = ["dwell_times", "remarks_on_states"]

_FEWEST = 2  # steps that a state has to hold
_SAME = 0.02  # nats a step by which two states have to differ


def dwell_times(transitions: Tensor) -> Tensor:
    r"""Mean number of steps that a chain stays in each state, :math:`1 / (1 - A_{kk})`.

    Arguments:
        transitions: shape (..., K, K).

    Returns:
        Steps, shape (..., K); infinite for a state that is never left.

    Example:
        >>> dwell_times(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
        tensor([10.0000,  2.0000])
    """
    diagonal = transitions.diagonal(dim1=-2, dim2=-1)
    return 1 / (transitions.sum(-1) - diagonal).clamp_min(0.0)


def remarks_on_states(
    chain: HiddenMarkov, x: Tensor, lengths: Tensor, left_right: bool
) -> list[str]:
    """A sentence on states that are none, or nothing.

    Arguments:
        chain: the model at one draw, batch shape (1, B).
        x: sequences, shape (B, T, D).
        lengths: shape (B,).
        left_right: whether the last state is not to be left.
    """
    with torch.no_grad():
        seen = chain.emitted(x)
        probs = hmm.smooth(chain.initial, chain.transitions, seen, lengths)
        probs, seen = probs.flatten(0, -2), seen.expand_as(probs).flatten(0, -2)
    K = probs.shape[-1]
    held = probs.sum(0)
    few = [k for k in range(K) if held[k] < _FEWEST]
    faults = [f"state {k} holds fewer than {_FEWEST} steps" for k in few]
    # KL(j || k), at the rows that belong to j.
    ratio = (seen.unsqueeze(-1) - seen.unsqueeze(-2)).clamp(-1e3, 1e3)  # (N, j, k)
    apart = (probs.unsqueeze(-1) * ratio).sum(0) / held.clamp_min(1e-12).unsqueeze(-1)
    apart = apart + apart.mT
    faults += [
        f"states {j} and {k} emit the same"
        for j in range(K)
        for k in range(j + 1, K)
        if apart[j, k] < _SAME and not {j, k} & {*few}
    ]
    remarks = [f"{', '.join(faults)}: try fewer states"] if faults else []
    stay = dwell_times(chain.transitions).reshape(K)
    longest = int(lengths.max())
    stuck = [k for k in range(K - left_right) if stay[k] > longest and k not in few and K > 1]
    if stuck:
        which = ", ".join(map(str, stuck))
        remarks.append(
            f"state {which} is left less than once in the longest sequence ({longest} steps): how "
            "long it lasts rests on the prior"
        )
    return remarks
