r"""How to climb where the pair has networks.

The weights of a network have directions that change nothing, and drift along them for ever: that
they come to rest, which decides elsewhere, cannot be asked of them. Here the objective decides.
Stages run Adam at a constant rate, and average the weights over all steps at this rate, the later
ones the more: step t counts as :math:`t (t + 1) (t + 2)`. The longer a rate lasts, the less noise
of its steps is left in the average, while what the weights still have to go is soon forgotten.
After each stage the average is scored, with the same rows and the same noise, so that a gain has a
small error:

.. math:: g = \frac{1}{M} \sum_m (\ell_m^\text{new} - \ell_m^\text{best}), \qquad
          \ell_m = \mathbb{E}_q \log p(x_m \mid z_m) - \beta \, \mathrm{KL}_m .

The rows that are scored are some of those that are fitted: their choice adds to the error of the
gain the less, the more of all rows they are; where they are all, only the noise of the draws does.

Where a few stages gain nothing (less than two standard errors, or than tol squared for each
latent of a row) the climb returns to the best average, and the rate falls; when it has fallen
twice in vain, it has converged. Which rate comes first is tried out where none is asked for: from
the same weights, a stage at each of three; the best average goes on, and so does its rate, which
then has to fall as far as a smaller one would have. With rows kept aside these are scored: the
climb then ends where they get no better, at the average that was best for them.

Letters: M rows that are scored, P particles.

References:
    | Stochastic gradient descent for non-smooth optimization: convergence results and optimal
      averaging schemes (Shamir & Zhang, 2013)
    | Averaging weights leads to wider optima (Izmailov et al., 2018)
    | Early stopping, but when? (Prechelt, 1998)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from latentlab.diagnostics import Estimate
from latentlab.guides import Draws, Guide
from latentlab.inference.batches import Batches, follows_rows, num_rows
from latentlab.inference.evaluation import first_bad_site
from latentlab.inference.journal import Part
from latentlab.inference.judge import Judge, Mean
from latentlab.inference.modes import TrainingMode, standing
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.replay import done, go_to
from latentlab.inference.rows import looks_by_row, over_rows
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.stages import FitDivergedError, State
from latentlab.inference.steps import Engine, Stepper, carry_on
from latentlab.inference.training import kl_weight

__all__ = ["NETWORK_RATE", "NetworkClimb", "has_networks", "is_judged_by_row"]

NETWORK_RATE = 2e-3
_MANY = 5_000  # parameters of a user's pair above which they are taken for weights
_STAGE = (200, 500)  # a stage is an epoch, but at least and at most so many steps
_PATIENCE = 3  # stages without a gain, before the rate falls
_FALLS = 2  # times that it falls
_FALL = 4.0
_RATES = 3  # first rates that are tried, each the fourfold of the one before
_TRIED = 0.1  # share of the steps that trying them may take
_NUMBER = ("one", "two", "three", "four", "five")
_FAILURES = 3
_AVERAGE_EVERY = 5  # steps


def has_networks(pair: Pair) -> bool:
    """Whether the pair learns the weights of networks, besides what its guide is made of.

    These are matrices of a module that is registered with ``pyro.module``, or else more numbers
    than anyone reads one by one.

    Arguments:
        pair: the pair, looked at.
    """
    own = pair.store["params"]
    weights = any("$$$" in name and p.dim() > 1 and p.requires_grad for name, p in own.items())
    written = not isinstance(pair.guide, Guide) and not _is_auto(pair)
    return weights or written and sum(p.numel() for p in own.values()) > _MANY


def is_judged_by_row(pair: Pair) -> bool:
    """Whether each row is judged on its own: many rows, or rows that a network encodes.

    Arguments:
        pair: the pair.
    """
    return looks_by_row(pair) or (has_networks(pair) and follows_rows(pair))


def _is_auto(pair: Pair) -> bool:
    from pyro.infer.autoguide import AutoGuide

    return isinstance(pair.guide, AutoGuide)


@dataclass
class NetworkClimb:
    """A climb from one start, for a pair with networks; as ``Climb``, but the objective decides.

    Arguments:
        pair: the pair, entered.
        seed: all noise comes from (seed, step).
        num_particles: draws per step P.
        lr: rate of the first stage, in units of the parameters.
        tol: a gain below its square, for each latent of a row, is none.
        max_steps: steps in all.
        batch: the data of each step.
        tick: called after every step, for a progress bar.
        engine: what takes the steps.
        held: rows kept aside, to be scored in the place of rows that are fitted.
        batch_size: rows per step; ``None`` for all.
        finds_rate: whether larger rates than ``lr`` are tried first, and the best one is taken.
    """

    pair: Pair
    seed: int
    num_particles: int
    lr: float
    tol: float
    max_steps: int
    batch: Batches
    tick: Callable[[int, float], None]
    engine: Engine
    held: Arguments | None = None
    batch_size: int | None = None
    finds_rate: bool = False
    losses: list[float] = field(default_factory=list)
    stage_starts: list[int] = field(default_factory=list)
    stage_elbos: list[Estimate] = field(default_factory=list)
    stop_reason: str = ""
    converged: bool = False
    method: ClassVar[str] = "stages"
    _judge: Judge | None = None
    _falls: int = _FALLS
    _warm: State | None = None  # average of the stage that the climb goes on from

    def __post_init__(self) -> None:
        self._mode = TrainingMode(self.pair)

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return len(self.losses)

    def warm_up(self, num_steps: int, rate: float) -> tuple[Draws, Estimate]:
        """A first stage, or one at each rate; no draws are returned: weights have no place.

        Arguments:
            num_steps: its length.
            rate: its rate, the smallest where several are tried.
        """
        steps = max(1, min(num_steps, self._length(), self.max_steps - self.num_steps))
        origin, best = self.state(), -math.inf
        num_rates = _RATES if self._can_try(steps) else 1
        for k in range(num_rates):
            self.restore(origin)
            try:
                average = self._stage(self._at(rate * _FALL**k), steps)
            except FitDivergedError:
                if k == 0:
                    raise
                self.stage_starts.pop()
                break
            score = float(self._score_at(average).mean())
            if k == 0 or score > best:
                best, state, elbo, winner = score, self.state(), self.stage_elbos[-1], k
                self._warm = average
        self.restore(state)
        self.lr, self._falls = self.lr * _FALL**winner, _FALLS + winner
        return Draws({}, torch.zeros(0)), elbo

    def _can_try(self, steps: int) -> bool:
        """Whether rates are tried: there is time, and the objective stays the same."""
        few = _RATES * steps <= _TRIED * self.max_steps
        return self.finds_rate and few and not self._annealing()

    def until_converged(self) -> None:
        """Stages until the objective gains nothing at several rates, or the steps run out."""
        self._climb()
        if not self.engine.still_holds(self.batch, self._mode, max(self.num_steps - 1, 0)):
            self._climb()  # on, as the pair is

    def _climb(self) -> None:
        rate, idle, falls, top = self.lr, 0, 0, 0.0
        run = self._at(rate)
        best_state = self.state()
        best = self._score_at(best_state, recorded=bool(self.stage_elbos))
        if self._warm is not None:
            score = self._score_at(self._warm, recorded=True)
            if score.mean() > best.mean():
                best, best_state = score, self._warm
        while True:
            if self.num_steps >= self.max_steps:
                self.restore(best_state)
                gained = "still rising" if not idle else f"{idle} stages without a gain"
                if self._annealing():
                    weight = kl_weight(self.pair, self.num_steps)
                    gained = (
                        f"the KL still counted {weight:.2g} and rising: take more steps, or a "
                        "shorter warm_up"
                    )
                self.stop_reason = f"max_steps: {self.num_steps} steps, {gained}"
                return
            steps = min(self._length(), self.max_steps - self.num_steps)
            average = self._stage(run, steps)
            score = self._score_at(average)
            gain = self._gain(score, best)
            if self._annealing() or self.pair.ranks.same(self._is_gain(gain)):
                best, best_state, top, idle = score, average, 0.0, 0
                continue
            if gain.value > top:  # too little to go on for, but better all the same
                best_state, top = average, gain.value
            idle += 1
            if idle < _PATIENCE:
                continue
            self.restore(best_state)
            if falls == self._falls:
                self.converged = True
                self.stop_reason = self._why(gain, rate)
                return
            falls, idle, rate = falls + 1, 0, rate / _FALL
            run = self._at(rate)

    def state(self) -> State:
        """A copy of everything that moves; a frame does so from start to start."""
        return {name: value.clone() for name, value in standing(self.pair, self._mode).items()}

    def restore(self, state: State) -> None:
        """Go back to a state, in place; an average says nothing of what steps do not move."""
        now = standing(self.pair, self._mode)
        for name, value in state.items():
            now[name].copy_(value)

    def moving(self) -> State:
        """What moves itself."""
        return self._mode.moving()

    def _stage(self, run: _Run, num_steps: int) -> State:
        """Steps at one rate, and the average of all that were taken at it."""
        self.stage_starts.append(self.num_steps)
        first, journal, before = self.num_steps, self.pair.journal, run.name
        where = (first, num_steps, run.rate, self.engine.used, self.engine.num_particles)
        # What the moments and the average are is said by the name of the stage before.
        stands = before or standing(self.pair, self._mode)
        run.name = journal.name("stage", self.seed, *where, stands)
        part = journal.find(run.name)
        if part is not None:
            self._redo(run, part)
            return part.under("average")
        if run.is_thin:
            raise RuntimeError(f"checkpoint: {journal.folder} is not of this fit; choose another")
        # Where the weights are at its end is asked for by the next stage at this rate alone,
        # unless it is the first one, which may be gone back to.
        prefix = "passing." if run.mean.count else ""
        average = self._walk(run, num_steps)
        kept = ({"after": before}, {"average": average}, prefix)
        journal.keep(run.name, lambda: self._part(run, first, *kept))
        return average

    def _walk(self, run: _Run, num_steps: int) -> State:
        """The steps of a stage, from where its last point is, if there is one."""
        journal, first = self.pair.journal, self.num_steps
        good, failures = self.state(), 0
        point = journal.point(run.name)
        if point is not None:
            self._redo(run, point)
            good, failures = point.under("good"), point.facts["failures"]
        k = self.num_steps - first
        while k < num_steps:
            left = num_steps - k
            size = min(run.stepper.size, left % _AVERAGE_EVERY or left)
            rates = [run.rate / 2**failures] * size
            try:
                elbos, path = run.stepper.take(self.num_steps, rates, failures)
            except (MemoryError, RuntimeError) as error:
                self.engine.take_fewer(error)
                run.stepper = carry_on(run.stepper, self._at(run.rate).stepper)
                continue
            taken = self._note(elbos)
            k += taken
            if taken < size:
                failures += 1
                if failures > _FAILURES:
                    raise FitDivergedError(self.num_steps, *self._first_bad_site())
                self.restore(good)
                run.stepper = self._at(run.rate).stepper
            elif len(path):
                for point in path:
                    run.mean.add(self._parts(point))
            elif (num_steps - k) % _AVERAGE_EVERY == 0:
                run.mean.add([*self.moving().values()])
            if (num_steps - k) % _AVERAGE_EVERY == 0:
                journal.mark(run.name, partial(self._point, run, first, good, failures))
        average = run.mean.state(self.moving())
        for state in (self.moving(), average):
            self.pair.ranks.align(state)
        return average

    def _part(
        self, run: _Run, first: int, facts: dict, groups: dict[str, State], prefix: str = ""
    ) -> Part:
        """What a stage did, or a part of it, since its first step."""
        facts = facts | {"count": run.mean.count, "engine": self.engine.facts(self.seed)}
        groups = groups | {"passing.moments": run.stepper.memory()}
        return done(self.pair, self.losses[first:], facts, groups, prefix)

    def _point(self, run: _Run, first: int, good: State, failures: int) -> Part:
        average = run.mean.state(self._mode.moving()) if run.mean.count else {}
        groups = {"good": good, "average": average}
        return self._part(run, first, {"failures": failures}, groups)

    def _redo(self, run: _Run, part: Part) -> None:
        """Do what a stage did, without its steps."""
        self._note([-loss for loss in go_to(self.pair, part)])
        if self.engine.recall(part.facts["engine"], self.seed):
            run.stepper = self._at(run.rate).stepper
        average, names = part.under("average"), self._mode.moving() if part.facts["count"] else ()
        run.mean = Mean([average[name].clone() for name in names], part.facts["count"])
        moments = part.under("passing.moments")
        run.stepper.recall(moments)
        run.is_thin = not moments

    def _at(self, rate: float) -> _Run:
        parameters = [*self.pair.parameters().values()]
        optimiser = torch.optim.Adam(parameters, lr=rate, fused=True)
        how = (self.batch, self.seed, self._mode, _AVERAGE_EVERY, self.num_steps)
        return _Run(rate, self.engine.stepper(optimiser, *how), Mean())

    def _note(self, elbos: list[float]) -> int:
        """Put steps on record, up to the first that is not finite; how many there were."""
        for count, value in enumerate(elbos):
            if not math.isfinite(value):
                return count
            self.losses.append(-value)
            self.tick(self.num_steps, -value)
        return len(elbos)

    def _parts(self, point: Tensor) -> list[Tensor]:
        """What moves, at a place, in its shapes."""
        like = [*self.moving().values()]
        parts = point.split([p.numel() for p in like])
        return [part.view_as(p) for part, p in zip(parts, like, strict=True)]

    def _first_bad_site(self) -> tuple[str, float]:
        if steep := self.engine.gauge_of(self.seed).where:
            return steep
        manual_seed(stream(self.seed, "step", self.num_steps, _FAILURES))
        with self._mode:
            return first_bad_site(self.pair, self.num_particles, self.batch(self.num_steps))

    def _length(self) -> int:
        total = num_rows(self.pair.data) or 1
        epoch = math.ceil(total / self.batch_size) if self.batch_size else 1
        length = max(_STAGE[0], min(_STAGE[1], epoch))
        return math.ceil(length / _AVERAGE_EVERY) * _AVERAGE_EVERY

    def _score_at(self, state: State, recorded: bool = False) -> Tensor:
        """The objective at a state in nats per datum: of draws and rows (P, M), or of one (M,)."""
        now = self.state()
        self.restore(state)
        # By the weight that the KL will have: scores of different weights do not compare.
        step, journal = self.num_steps + self.max_steps, self.pair.journal
        name = journal.name("score", self.seed, step, standing(self.pair, self._mode))
        part = journal.remember(name, partial(self._judged, step))
        score, elbo = part.tensors["score"], Estimate(*part.facts["elbo"])
        if not recorded:
            self.stage_elbos.append(elbo)
        self.restore(now)
        return score

    def _judged(self, step: int) -> Part:
        if self._judge is None:
            self._judge = Judge.of(self.pair, self.held, self.seed)
        manual_seed(stream(self.seed, "score"))
        score, elbo = self._judge(step)
        return Part({"score": score}, {"elbo": [elbo.value, elbo.se]})

    def _gain(self, score: Tensor, best: Tensor) -> Estimate:
        """How much a score is above the best, in nats per datum."""
        more = (score - best).double()
        if more.numel() == 1:  # a point is drawn without noise
            return Estimate(float(more), 0.0)
        if more.dim() == 1:
            return Estimate.from_draws(more)
        # Where all rows that are fitted are scored, only the draws of the latents are a sample.
        total = num_rows(self.pair.data) or 1
        sum_of_rows = over_rows(more, total)
        return Estimate(sum_of_rows.value / total, sum_of_rows.se / total)

    def _is_gain(self, gain: Estimate) -> bool:
        if not math.isfinite(gain.value):
            return False
        total = num_rows(self.pair.data) or 1
        num_latents = sum(math.prod(z.shape) for z in self.pair.latents)
        least = self.tol**2 * max(1.0, num_latents / total)
        return gain.value > max(2 * gain.se, least)

    def _annealing(self) -> bool:
        """Whether the weight of the KL still moves."""
        now, later = self.num_steps, self.num_steps + self.max_steps
        return kl_weight(self.pair, now) != kl_weight(self.pair, later)

    def _why(self, gain: Estimate, rate: float) -> str:
        what = "rows kept aside" if self.held is not None else "the objective"
        return (
            f"{what} gained nothing more at {_NUMBER[self._falls]} rates: {gain} nats per datum "
            f"in the last {_PATIENCE} stages (rate {rate:.2g})"
        )


@dataclass
class _Run:
    """Steps at one rate: what takes them, and the average of where they led."""

    rate: float
    stepper: Stepper
    mean: Mean
    name: str = ""  # of the last stage, in the journal
    is_thin: bool = False  # whether that was read, with what is needed to go on left out
