r"""Starting values of a hidden Markov model by expectation-maximisation (Baum and Welch).

.. math::
    \gamma_{tk} = p(z_t = k \mid x), \quad
    \xi_{ij} = \textstyle\sum_t p(z_t = i, z_{t+1} = j \mid x), \\
    A_{ij} \propto \xi_{ij}, \quad
    \theta_k = \arg\max_\theta \textstyle\sum_t \gamma_{tk} \log p(x_t \mid \theta)

Letters: J starts, B sequences, T steps, D features, K states, N rows.

References:
    | A maximization technique in the statistical analysis of probabilistic functions of Markov
      chains (Baum et al., 1970)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from latentlab.distributions.emissions import Emission, EstimatesStates
from latentlab.distributions.hmm_counts import expected_counts
from latentlab.distributions.markov import log_likelihoods
from latentlab.models.hmm_chain import Chain
from latentlab.supports import bijection

__all__ = ["find_start"]

_SEEDS, _SEED_STEPS = 16, 500_000  # seeds, fewer where they have many steps times states
_BRIEF, _STEPS = 40, 60  # steps of all seeds, and of the best one
_FEW_SEEDS, _FEW_STEPS = 4, 10  # of a start that is to compete with others
_LOOKED_AT = 20_000  # steps of sequences
_GAIN = 1e-5  # nats a step below which more steps are in vain
_LEAST = 1e-4  # probability that a start gives to a move that may be made
_CLIMB = 60  # steps of an emission that does not know its best values


@dataclass(frozen=True)
class _Start:
    """Places to start from, J of them.

    Arguments:
        initial: shape (J, K).
        transitions: shape (J, K, K).
        values: of the emission, site -> (J, K, ...).
        log_prob: log-likelihood of the data, shape (J,), in nats.
    """

    initial: Tensor
    transitions: Tensor
    values: Mapping[str, Tensor]
    log_prob: Tensor

    def best(self) -> _Start:
        """The likeliest of them, J = 1."""
        j = int(self.log_prob.nan_to_num(nan=-torch.inf).argmax())
        part = slice(j, j + 1)
        values = {site: value[part] for site, value in self.values.items()}
        return _Start(self.initial[part], self.transitions[part], values, self.log_prob[part])


@dataclass(frozen=True)
class _Data:
    """What is fitted, and by what.

    Arguments:
        emission: what states emit.
        chain: which chains there may be.
        x: sequences, shape (B, T, D).
        lengths: shape (B,).
        inside: which steps exist, shape (B, T).
    """

    emission: Emission
    chain: Chain
    x: Tensor
    lengths: Tensor
    inside: Tensor


@torch.no_grad()
def find_start(
    emission: Emission,
    chain: Chain,
    x: Tensor,
    lengths: Tensor,
    generator: Generator,
    *,
    is_quick: bool = False,
) -> dict[str, Tensor]:
    """The best of several runs of expectation-maximisation, as values of the sites.

    Arguments:
        emission: what states emit, its units measured.
        chain: which chains there may be.
        x: sequences, shape (B, T, D), NaN where a cell is missing or padding; about 20,000 steps
            of them are looked at.
        lengths: shape (B,).
        generator: of the seeds.
        is_quick: whether a few steps will do, as for a start that competes with others.
    """
    K = chain.num_states
    order = torch.randperm(len(x), generator=generator, device=x.device)
    some = int((lengths[order].cumsum(0) < _LOOKED_AT).sum()) + 1
    x, lengths = x[order[:some], :_LOOKED_AT], lengths[order[:some]].clamp_max(_LOOKED_AT)
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    data = _Data(emission, chain, x, lengths, inside)
    many = min(max(_SEED_STEPS // (x[..., 0].numel() * K), 4), _SEEDS) if K > 1 else 1
    many = min(many, _FEW_SEEDS) if is_quick else many
    spread = torch.stack([_seed(data, number, generator) for number in range(many)])
    allowed = chain.allowed(x.device)
    move = allowed.to(x) * (0.2 / K + 0.8 * torch.eye(K, dtype=x.dtype, device=x.device))
    move = (move / move.sum(-1, keepdim=True)).expand(many, K, K)
    law = chain.first(spread[:, :, 0].mean(1), move)
    worst = x.new_full((many,), -torch.inf)
    start = _Start(law, move, _estimate(data, spread, None), worst)
    start = _improve(data, start, _FEW_STEPS if is_quick else _BRIEF).best()
    start = start if is_quick else _improve(data, start, _STEPS)
    move = torch.where(allowed, start.transitions[0].clamp_min(_LEAST), 0.0)
    law = start.initial[0].clamp_min(_LEAST)
    values = {site: value[0] for site, value in start.values.items()}
    return values | chain.free(law / law.sum(), move / move.sum(-1, keepdim=True))


def _improve(data: _Data, start: _Start, num_steps: int) -> _Start:
    """Steps of expectation-maximisation until the likelihood gains nothing more."""
    least = _GAIN * float(data.lengths.sum())
    for _ in range(num_steps):
        values = {site: value[:, None, None] for site, value in start.values.items()}
        seen = log_likelihoods(data.emission.distribution(**values), data.x)
        chain = (start.initial[:, None], start.transitions[:, None], seen, data.lengths)
        counts = expected_counts(*chain)
        log_prob = counts.log_prob.sum(-1)
        gains = (log_prob > start.log_prob + least).any()
        start = replace(start, log_prob=log_prob)
        if not gains:
            break
        moves = counts.moves[:, 0]  # (J, K, K)
        total = moves.sum(-1, keepdim=True)
        moves = torch.where(total > 0, moves / total.clamp_min(1e-300), start.transitions)
        law = data.chain.first(counts.starts[:, 0] / len(data.x), moves)
        values = _estimate(data, counts.states, start.values)
        start = _Start(law, moves, values, log_prob)
    return start


def _seed(data: _Data, number: int, generator: Generator) -> Tensor:
    """Probabilities of states (B, T, K): by time, by rank, by distant rows, or at random."""
    (B, T), K, device = data.inside.shape, data.chain.num_states, data.x.device
    if data.chain.left_right:
        place = torch.arange(T, device=device) / data.lengths[:, None] * K
        shift = torch.rand(1, generator=generator, device=device) - 0.5 if number else 0.0
        label = (place + shift).long().clamp(0, K - 1)
    elif number < 2:
        rows = data.x[data.inside]
        y = (rows - rows.nanmean(0)).nan_to_num(0.0)
        unit = y.square().mean(0).sqrt()
        y = y / torch.where(unit > 0, unit, 1.0)
        if number:
            of_row = torch.cdist(y, _distant(y, K, generator)).argmin(1)
        else:  # along the main axis, states of equal shares
            axis = torch.linalg.eigh(y.mT @ y)[1][:, -1]
            of_row = (y @ axis).argsort(stable=True).argsort() * K // len(y)
        label = torch.zeros(B, T, dtype=torch.long, device=device)
        label[data.inside] = of_row
    else:
        weights = data.x.new_empty(B, T, K).exponential_(generator=generator).square()
        return weights / weights.sum(-1, keepdim=True)
    return 0.1 / K + 0.9 * torch.nn.functional.one_hot(label, K).to(data.x)


def _distant(y: Tensor, num_states: int, generator: Generator) -> Tensor:
    """Rows (K, D) that lie apart: k-means++."""
    index = torch.randint(len(y), (1,), generator=generator, device=y.device)
    chosen = y[index]
    for _ in range(num_states - 1):
        away = torch.cdist(y, chosen).square().amin(1) + 1e-12
        index = torch.multinomial(away, 1, generator=generator)
        chosen = torch.cat([chosen, y[index]])
    return chosen


def _estimate(
    data: _Data, states: Tensor, current: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The values (J, K, ...) that fit best rows that belong to states (J, B, T, K) in part."""
    J, K = len(states), data.chain.num_states
    # The states of all starts side by side are states like any others.
    rows, weights = data.x[data.inside], states[:, data.inside].movedim(0, 1).flatten(1)
    found: dict[str, Tensor] = {}
    if isinstance(data.emission, EstimatesStates):
        found = data.emission.estimate(rows, weights)
    if any(site not in found for site in data.emission.sites()):
        flat = None if current is None else {k: v.flatten(0, 1) for k, v in current.items()}
        found = found | _climb(data.emission, rows, weights, found, flat)
    return {site: value.unflatten(0, (J, K)) for site, value in found.items()}


def _climb(
    emission: Emission,
    rows: Tensor,
    weights: Tensor,
    known: Mapping[str, Tensor],
    current: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """By gradient, from the current values or the median of the prior, for any emission."""
    K = weights.shape[1]
    maps, free = {}, {}
    for site, prior in emission.sites().items():
        if site in known:
            continue
        maps[site] = bijection(prior.support)
        value = prior.sample((201,)).median(0).values.expand(K, *prior.event_shape)
        value = value if current is None else current[site]
        free[site] = maps[site].inv(value).detach().clone().requires_grad_()
    with torch.enable_grad():
        climber = torch.optim.LBFGS(
            [*free.values()], max_iter=_CLIMB, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            climber.zero_grad()
            values = {site: maps[site](u) for site, u in free.items()}
            seen = log_likelihoods(emission.distribution(**known, **values), rows)
            prior = sum(
                (p.log_prob(values[s]).sum() for s, p in emission.sites().items() if s in values),
                torch.zeros(()),
            )
            value = -(weights * seen).sum() - prior
            value.backward()
            return value

        climber.step(loss)
    return {site: maps[site](u.detach()) for site, u in free.items()}
