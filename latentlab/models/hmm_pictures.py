"""What a hidden Markov model looks like on its data.

Letters: B sequences, T steps, D features, K states, S draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentlab.data.sequences import Sequences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from latentlab.models.hmm import HiddenMarkovModel

__all__ = ["picture_of"]

_STEPS = 20_000  # that residuals are drawn of


def picture_of(
    model: HiddenMarkovModel, draws: Mapping[str, Tensor], names: Sequence[str], data: Sequences
) -> Figure:
    """The longest sequence with its states; moves and stays; residuals of the first sequences.

    Arguments:
        model: the model.
        draws: site -> draws (S, ...), states numbered alike.
        names: names of the D columns.
        data: the sequences.
    """
    from latentlab.report.sequences import plot_chain

    b = int(data.lengths.argmax())
    n = int(data.lengths[b])
    one = Sequences(data.x[b : b + 1, :n], data.lengths[b : b + 1])
    mean = {site: value.double().mean(0, keepdim=True) for site, value in draws.items()}
    emission = model.chain(mean, one).emission
    try:
        means = emission.mean.reshape(-1, model.num_states, model.num_features)[0]
    except NotImplementedError:  # an emission of your own
        means = one.x.new_full((model.num_states, model.num_features), torch.nan)
    many = int((data.lengths.cumsum(0) < _STEPS).sum()) + 1
    some = Sequences(data.x[:many, :_STEPS], data.lengths[:many].clamp_max(_STEPS))
    try:
        residuals = model.residuals(some, draws)[some.inside].numpy(force=True)
    except ValueError:  # a column without a distribution function
        residuals = None
    transitions = model.chain(draws, one).transitions
    return plot_chain(
        one.x[0].numpy(force=True),
        model.smooth(one, draws)[0].numpy(force=True),
        means.numpy(force=True),
        names,
        transitions.reshape(-1, model.num_states, model.num_states).numpy(force=True),
        residuals,
    )
