r"""Missing cells of sequences, given all that was observed.

.. math::
    \mathbb{E}[x_{tm} \mid x_{1:T}] = \mathbb{E}_q \sum_k p(z_t = k \mid x_{1:T}, \theta) \,
        \mathbb{E}[x_{tm} \mid z_t = k, x_{to}, \theta]

Letters: B sequences, T steps, D features, K states, S draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentlab.data import Sequences
from latentlab.distributions import hmm
from latentlab.models.hmm import HiddenMarkovModel

__all__ = ["filled"]


def filled(model: HiddenMarkovModel, draws: Mapping[str, Tensor], data: Sequences) -> Tensor:
    """Sequences with their missing cells as expected from all that are there, shape (B, T, D).

    Arguments:
        model: the model; the columns of a state are independent, or missing together.
        draws: site -> draws (S, ...), as ``Posterior.sample`` returns them.
        data: the sequences, NaN where a cell is missing.

    Returns:
        The sequences; padding stays NaN.

    Raises:
        ValueError: for codes of categories, which have no mean, and for rows that miss some cells
            where states have correlated columns.
    """
    kinds = str(model.spec()["arguments"].get("emissions"))
    if "categorical" in kinds:
        raise ValueError("x: codes of categories have no mean; predict their states instead")
    missing = data.x.isnan() & data.inside.unsqueeze(-1)
    if "full" in kinds:
        _expect_whole_rows(missing)
    total, count = torch.zeros_like(data.x), 0
    with torch.no_grad():
        for chain in model.chains(draws, data):
            seen = chain.emitted(data.x)
            odds = hmm.smooth(chain.initial, chain.transitions, seen, data.lengths)
            means = chain.emission.mean  # (S, 1, 1, K, D)
            total += (odds.unsqueeze(-1) * means).sum((0, -2))
            count += len(odds)
    return torch.where(missing, total / count, data.x)


def _expect_whole_rows(missing: Tensor) -> None:
    partly = missing.any(-1) & ~missing.all(-1)
    if partly.any():
        place = partly.nonzero()[0].tolist()
        raise ValueError(
            f"x: states with correlated columns fill only steps that miss all cells, got one that "
            f"misses some at {place}; fit independent columns to fill it"
        )
