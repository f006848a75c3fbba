"""What decides where networks climb: averages of their weights, and scores of these.

Letters: M rows that are scored, P particles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.inference import held_out as held_rows
from latentlab.inference import objectives
from latentlab.inference.batches import chosen, follows_rows, num_rows, take
from latentlab.inference.bounds import draws_for, values_of
from latentlab.inference.evaluation import evaluate
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.rows import fewer, on_rows, row_terms
from latentlab.inference.stages import State
from latentlab.protocols import Anneals, owner_of

__all__ = ["Judge", "Mean"]

_SCORED_ROWS, _SCORED_DRAWS = 2048, 4
_LATER = 3  # power by which later steps count more in an average


@dataclass
class Mean:
    """The average of the weights at one rate, the later ones the more."""

    weights: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, weights: list[Tensor]) -> None:
        """One more: of n it counts as (1 + _LATER) / (n + _LATER)."""
        self.count += 1
        if not self.weights:
            self.weights = [w.clone() for w in weights]
            return
        torch._foreach_lerp_(self.weights, weights, (1 + _LATER) / (self.count + _LATER))

    def state(self, named: Mapping[str, Tensor]) -> State:
        """A copy of it, by the names of the weights."""
        return {name: w.clone() for name, w in zip(named, self.weights, strict=True)}


@dataclass(frozen=True)
class Judge:
    """Scores a pair, always with the same rows."""

    pair: Pair
    held: Arguments | None
    by_row: bool
    total: int

    @classmethod
    def of(cls, pair: Pair, held: Arguments | None, seed: int) -> Judge:
        """The judge of a pair: at rows kept aside, else at some of those that are fitted."""
        total = num_rows(pair.data) or 1
        by_row = follows_rows(pair)
        if held is not None:
            some = chosen(4 * _SCORED_ROWS, num_rows(held) or 1, seed)
            held = take(held, some)
        if by_row:
            pair = fewer(pair, _SCORED_ROWS, seed) if held is None else on_rows(pair, held)
        return cls(pair, held, by_row, total)

    def __call__(self, step: int) -> tuple[Tensor, Estimate]:
        """The score per datum, (P, M) or (M,), and the ELBO per data set."""
        with torch.no_grad():
            if self.by_row:
                return self._by_row(step)
            if self.held is not None:
                score = held_rows.log_density_of_rows(self.pair, self.held)
                draws = objectives.draw(self.pair, 1 if self.pair.is_point() else 16)
                return score, evaluate(self.pair, draws)
            bound = self.pair.bound
            num_draws = draws_for(bound, 64, groups=2)
            draws = objectives.draw(self.pair, 1 if self.pair.is_point() else num_draws)
            weights = objectives.log_joint(self.pair, draws) - draws.log_q
            se = Estimate.from_draws(weights) if len(weights) > 1 else None
            score = weights
            if bound is not None:
                score = values_of(weights.unsqueeze(-1), bound.objective).squeeze(-1)
            return score / self.total, se or Estimate(float(weights[0]), 0.0)

    def _by_row(self, step: int) -> tuple[Tensor, Estimate]:
        bound = self.pair.bound
        num_draws = draws_for(bound, _SCORED_DRAWS)
        terms = row_terms(self.pair, num_draws if self.pair.latents else 1)
        elbo = Estimate.from_draws((terms.log_lik - terms.kl).mean(0).double())
        elbo = Estimate(self.total * elbo.value, self.total * elbo.se)
        owner, kl = owner_of(self.pair.model), terms.kl
        if isinstance(owner, Anneals):
            free = float(owner.free_bits) * sum(
                math.prod(z.event_shape) for z in self.pair.latents
            )
            # What is free is so on the mean over draws, not for each of them.
            kl = kl.mean(0).clamp_min(free).expand_as(kl) if free else kl
            kl = owner.kl_weight(step) * kl
        score = terms.log_lik - kl
        if bound is not None and bound.plate is not None:
            score = values_of(score, bound.objective)
        return (score.mean(0) if self.held is not None else score), elbo
