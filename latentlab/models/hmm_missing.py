r"""Missing cells of sequences, given all that was observed.

.. math::
    \mathbb{E}[x_{tm} \mid x_{1:T}] = \mathbb{E}_q \sum_k p(z_t = k \mid x_{1:T}, \theta) \,
        \mathbb{E}[x_{tm} \mid z_t = k, x_{to}, \theta]

The last factor is the emission's, see :class:`latentlab.distributions.cells.FillsRows`.

Letters: B sequences, T steps, D features, K states, S draws, n steps that miss cells, M of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from latentlab.data import Sequences
from latentlab.distributions import hmm
from latentlab.distributions.cells import fill_of
from latentlab.distributions.completion import Completed
from latentlab.distributions.markov import HiddenMarkov

__all__ = ["completed"]

_CHUNK = 2**22  # numbers of (S, n, K, D) held at a time


def completed(chains: Iterable[HiddenMarkov], data: Sequences) -> Completed:
    """Sequences with their missing cells as expected from all that are there.

    Arguments:
        chains: the distributions of the sequences, batch shape (S, B), so many draws at a time;
            all draws count alike.
        data: the sequences, NaN where a cell is missing.

    Returns:
        Mean and standard deviation, shape (B, T, D) each; padding is NaN in both.

    Raises:
        ValueError: for columns without a mean, such as codes of categories, and for steps that
            miss some cells where the emission does not say what they are given the others.
    """
    missing = data.x.isnan() & data.inside.unsqueeze(-1)
    at_gaps = missing.any(-1)
    rows = data.x[at_gaps]  # (n, D)
    middle = data.x.nanmean((0, 1)).nan_to_num(0.0)
    unit = (data.x - middle).abs().nan_to_num(0.0).amax((0, 1))
    unit = torch.where(unit > 0, unit, 1.0)
    first, second, count = torch.zeros_like(rows), torch.zeros_like(rows), 0
    with torch.no_grad():
        for chain in chains:
            seen = chain.emitted(data.x)
            odds = hmm.smooth(chain.initial, chain.transitions, seen, data.lengths)[:, at_gaps]
            for part, gap in _parts(missing[at_gaps], len(odds) * odds.shape[2]):
                mean, sd = fill_of(chain.emission, rows[part], gap)  # (S, 1, n, K, M)
                _expect_means(mean, [data.names[j] for j in gap.tolist()])
                away, spread = (mean - middle[gap]) / unit[gap], sd / unit[gap]
                share, place = odds[:, part].unsqueeze(1).unsqueeze(-1), (part[:, None], gap)
                first[place] += (share * away).sum((0, 1, 3))
                second[place] += (share * (spread.square() + away.square())).sum((0, 1, 3))
            count += len(odds)
    first, second = first / max(count, 1), second / max(count, 1)
    mean, sd = data.x.clone(), torch.where(data.inside.unsqueeze(-1), 0.0, data.x)
    mean[missing] = (middle + unit * first)[missing[at_gaps]]
    sd[missing] = (unit * (second - first.square()).clamp_min(0.0).sqrt())[missing[at_gaps]]
    return Completed(mean, sd)


def _parts(missing: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (n,) that miss the same cells (M,), so many at a time as memory holds."""
    patterns, places = torch.unique(missing, dim=0, return_inverse=True)
    step = max(1, _CHUNK // (width * missing.shape[-1]))
    for m, pattern in enumerate(patterns):
        for part in (places == m).nonzero()[:, 0].split(step):
            yield part, pattern.nonzero()[:, 0]


def _expect_means(mean: Tensor, names: list[str]) -> None:
    bad = mean.isnan().flatten(0, -2).any(0).tolist()
    if any(bad):
        name = names[bad.index(True)]
        raise ValueError(
            f"x: column {name!r} misses cells, and has no mean to fill them with, like codes of "
            "categories; predict the states of these steps instead"
        )
